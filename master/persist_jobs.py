"""Carrying out one job of the persist log: intent, I/O in a thread, commit of what was learned.

Between the I/O and the commit the namespace may have changed in any way: every commit reads the
records anew and enters what is now where. The persister holds the job's path locks meanwhile.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from alluxiofuse.errors import UfsError, UfsNotFoundError, UfsUnavailableError
from alluxiofuse.master import persist_aside, places
from alluxiofuse.master.mounts import MountTable
from alluxiofuse.master.persist_log import PersistLog
from alluxiofuse.master.persist_plan import Job, Kind, is_clean
from alluxiofuse.master.records import (
    INTENT_MAKE,
    INTENT_RENAME,
    LISTED,
    SYNC_ATTRS,
    SYNC_CONTENT,
    SYNC_NAME,
    SYNC_TOUCHED,
    InodeRecord,
    IntentRecord,
    SyncEntry,
)
from alluxiofuse.master.store import Store, Transaction, u64
from alluxiofuse.ufs.base import UfsAttrs, UfsEntry, UnderStorage

T = TypeVar("T")
log = logging.getLogger(__name__)
_CHILDREN_PER_COMMIT = 1000
GATHER_S = 0.005
"""Jobs that are begun within this time share an fsync of the log."""


class Loading(Protocol):
    """What is needed of `ufs_loader.UfsLoader`."""

    async def load_children(self, ino: int) -> None: ...

    def vanished(self, ino: int) -> None: ...


def attrs_of(record: InodeRecord) -> UfsAttrs:
    return UfsAttrs(stat.S_IMODE(record.mode), record.uid, record.gid, record.mtime_ns)


class JobRunner:
    """`at(point)` is called at named points (tests make it fail there)."""

    def __init__(
        self,
        store: Store,
        mounts: MountTable,
        persist_log: PersistLog,
        loader: Loading,
        wall_ns: Callable[[], int],
        at: Callable[[str], None],
    ) -> None:
        self._store = store
        self._mounts = mounts
        self._log = persist_log
        self._loader = loader
        self._wall_ns = wall_ns
        self._at = at

    async def run(self, job: Job) -> None:
        """UfsError when the under storage fails: the entry (and an intent) stays. If cancelled, the
        same: what was begun is found again by its intent."""
        match job.kind:
            case Kind.SETTLE:
                self._settle(job)
            case Kind.EMPTY | Kind.MKDIR | Kind.SYMLINK:
                await self._make(job)
            case Kind.ATTRS:
                await self._set_attrs(job)
            case Kind.MOVE | Kind.MOVE_TREE:
                await self._move(job)
            case Kind.RESOLVE_RENAME:
                await self._resolve_rename(job)
            case Kind.RESOLVE_PUT:
                await self._resolve_put(job)
            case Kind.PUSH_DOWN:
                await self._push_down(job)
            case Kind.SET_ASIDE:
                await self._set_aside(job)
            case _:
                raise AssertionError(job.kind)

    # --- intents ----------------------------------------------------------------------------------

    def begin(self, job: Job, intent: IntentRecord) -> bool:
        """Commit that something is about to be put at `job.target`. False: the entry is gone."""
        tx = self._store.transaction()
        entry, record = tx.sync_entry(job.ino), tx.inode(job.ino)
        if entry is None or record is None:
            return False
        entry.intent = job.target
        tx.put_sync_entry(job.ino, entry)
        tx.put_intent(job.mount_id, job.target, intent)
        self._mark_directories(tx, job.ino, record, job.target)
        tx.commit()
        self._at("intent committed")
        return True

    def _mark_directories(self, tx: Transaction, ino: int, record: InodeRecord, path: bytes) -> None:
        """The directories above are made with what is put below them: from now on they may be there."""
        while b"/" in path:
            path = path.rpartition(b"/")[0]
            parent = record.parent
            found = tx.inode(parent)
            if found is None or found.mount_id != record.mount_id:
                return
            record = found
            if not record.is_in_ufs:
                record.is_in_ufs = True
                tx.put_inode(parent, record)
            if tx.remove_entry(record.mount_id, path) is not None:
                tx.delete_remove_entry(record.mount_id, path)

    def _end_intent(self, tx: Transaction, ino: int, mount_id: int, path: bytes) -> None:
        intent = tx.intent(mount_id, path)
        if intent is not None and intent.ino == ino:
            tx.delete_intent(mount_id, path)
        entry = tx.sync_entry(ino)
        if entry is not None and entry.intent == path:
            entry.intent = None
            tx.put_sync_entry(ino, entry)

    def abandon(self, ino: int, mount_id: int, path: bytes) -> None:
        """It is known that nothing was put at `path`."""
        tx = self._store.transaction()
        self._end_intent(tx, ino, mount_id, path)
        entry = tx.sync_entry(ino)
        if entry is not None:
            self._log.keep(tx, ino, entry, entry.what)
        tx.commit()

    async def _resolve_put(self, job: Job) -> None:
        """An upload or copy that ended nobody knows how, at a path that is not wanted any more."""
        await self._thread(job.mount_id, lambda storage: storage.tidy(job.target))
        tx = self._store.transaction()
        ino = job.intent.ino if job.intent is not None else job.ino
        record = tx.inode(ino)
        if job.intent is not None:
            is_own = record is not None and record.is_in_ufs and record.parent != 0
            at = places.location_path(tx, ino, record) if record is not None and is_own else None
            if at != job.target and tx.remove_entry(job.mount_id, job.target) is None:
                is_dir = record is not None and stat.S_ISDIR(record.mode)
                self._log.remove(tx, job.mount_id, job.target, is_dir)
        self._end_intent(tx, ino, job.mount_id, job.target)
        entry = tx.sync_entry(ino)
        if entry is not None:
            entry.intent = None
            self._log.keep(tx, ino, entry, entry.what)
        tx.commit()

    # --- commits ----------------------------------------------------------------------------------

    def arrived(
        self, ino: int, mount_id: int, path: bytes, generation: int, container: int, found: UfsEntry
    ) -> None:
        """Content (or a directory, a symlink) of `ino` is at `path` now, as of `generation`."""
        tx = self._store.transaction()
        self._end_intent(tx, ino, mount_id, path)
        self._log.recent.note(mount_id, path)
        record, entry = tx.inode(ino), tx.sync_entry(ino)
        if record is None or not record.parent:
            if tx.remove_entry(mount_id, path) is None:
                self._log.remove(tx, mount_id, path, stat.S_ISDIR(found.mode))
            tx.commit()
            return
        self._log.arrived(tx, ino, record, path)
        if stat.S_ISREG(record.mode):
            record.ufs_container, record.ufs_size = container, found.size
            record.fingerprint = found.fingerprint
        record.checked_at_ns = self._wall_ns()
        self._finish(tx, ino, record, entry, generation, SYNC_CONTENT | SYNC_ATTRS)
        tx.commit()

    def _finish(
        self,
        tx: Transaction,
        ino: int,
        record: InodeRecord,
        entry: SyncEntry | None,
        generation: int,
        did: int,
    ) -> None:
        """Drop what was done from the entry, keep what is (again) to be done; puts the record."""
        tx.put_inode(ino, record)
        what = 0 if entry is None else entry.what
        if did & SYNC_CONTENT and is_clean(record):
            what &= ~SYNC_CONTENT
        if did & SYNC_ATTRS and entry is not None and entry.generation == generation:
            what &= ~SYNC_ATTRS
        if did & SYNC_ATTRS:
            what &= ~SYNC_TOUCHED
        what = what | SYNC_NAME if record.location is not None else what & ~SYNC_NAME
        if entry is None and what:
            self._log.add(tx, ino, what)
        elif entry is not None:
            self._log.keep(tx, ino, entry, what)

    def _settle(self, job: Job) -> None:
        tx = self._store.transaction()
        record, entry = tx.inode(job.ino), tx.sync_entry(job.ino)
        if record is None or not record.parent or record.is_local_only:
            tx.delete_sync_entry(job.ino)
        elif entry is not None:
            if record.location is not None and record.location == job.target:
                places.set_location(tx, job.ino, record, None)
            self._finish(tx, job.ino, record, entry, entry.generation, SYNC_CONTENT | SYNC_ATTRS)
            if stat.S_ISDIR(record.mode):
                entry.what &= ~SYNC_CONTENT
                self._log.keep(tx, job.ino, entry, entry.what)
        tx.commit()

    # --- making and changing ----------------------------------------------------------------------

    async def _make(self, job: Job) -> None:
        record = self._store.inode(job.ino)
        has_bytes = record is not None and bool(record.container and record.size)
        if record is not None and stat.S_ISREG(record.mode) and (record.home or has_bytes):
            return  # Written to since it was planned: its seal plans it anew.
        if record is None or not self.begin(job, IntentRecord(job.ino, INTENT_MAKE, record.container)):
            return
        attrs, kind, path = attrs_of(record), job.kind, job.target
        target, size = record.target, record.size

        def make(storage: UnderStorage) -> UfsEntry:
            if kind is Kind.MKDIR:
                made = storage.mkdir(path, attrs)  # one that a put below made keeps its attributes
                return storage.set_attrs(path, attrs) if storage.capabilities.has_posix_attrs else made
            if kind is Kind.SYMLINK:
                return storage.symlink(path, target, attrs)
            with tempfile.TemporaryFile() as file:
                os.ftruncate(file.fileno(), size)
                return storage.put(path, file.fileno(), size, attrs)

        found = await self._thread(job.mount_id, make)
        self.arrived(job.ino, job.mount_id, path, job.generation, record.container, found)

    async def _set_attrs(self, job: Job) -> None:
        begun = self._store.transaction()
        record, entry = begun.inode(job.ino), begun.sync_entry(job.ino)
        if record is None or entry is None:
            return
        attrs, path = attrs_of(record), job.target
        is_repeated = bool(entry.what & SYNC_TOUCHED)
        if stat.S_ISREG(record.mode) and not is_repeated:
            entry.what |= SYNC_TOUCHED
            begun.put_sync_entry(job.ino, entry)
            begun.commit()
            self._at("intent committed")

        def change(storage: UnderStorage) -> tuple[bytes, UfsEntry]:
            return storage.stat(path).fingerprint, storage.set_attrs(path, attrs)

        try:
            before, found = await self._thread(job.mount_id, change)
        except UfsNotFoundError:
            self._vanished(job)
            return
        tx = self._store.transaction()
        self._log.recent.note(job.mount_id, path)
        now, entry = tx.inode(job.ino), tx.sync_entry(job.ino)
        if now is not None and now.parent and entry is not None:
            storage = self._mounts.storage(job.mount_id)
            is_ours = is_repeated and storage.is_touched(now.fingerprint, before, attrs.mtime_ns)
            if stat.S_ISREG(now.mode) and (is_ours or now.fingerprint == before):
                now.fingerprint = found.fingerprint
            self._finish(tx, job.ino, now, entry, job.generation, SYNC_ATTRS)
        tx.commit()

    def _vanished(self, job: Job) -> None:
        """Somebody removed it from the under storage."""
        record = self._store.inode(job.ino)
        if record is None or not record.parent:
            return
        if stat.S_ISDIR(record.mode) or not is_clean(record):
            tx = self._store.transaction()
            places.set_location(tx, job.ino, record, None)
            record.is_in_ufs = False
            self._log.add(tx, job.ino, SYNC_CONTENT)
            tx.put_inode(job.ino, record)
            tx.commit()
        else:
            self._loader.vanished(job.ino)

    # --- moving -----------------------------------------------------------------------------------

    async def _move(self, job: Job) -> None:
        is_atomic = self._mounts.capabilities(job.mount_id).has_atomic_rename
        kind = INTENT_RENAME if is_atomic else INTENT_MAKE
        record = self._store.inode(job.ino)
        if record is None or not self.begin(job, IntentRecord(job.ino, kind, record.container)):
            return
        source, target, notes = job.source, job.target, self._mounts.notes(job.mount_id)

        def move(storage: UnderStorage) -> tuple[bytes, UfsEntry]:
            return _relocate(storage, source, target, is_atomic, notes)

        try:
            before, found = await self._thread(job.mount_id, move)
        except UfsNotFoundError:
            if is_atomic:
                await self._resolve_rename(job)
            else:
                self.abandon(job.ino, job.mount_id, target)
                self._vanished(job)
            return
        self._moved(job, before, found, is_atomic)

    async def _resolve_rename(self, job: Job) -> None:
        """Was it done? The source is gone and the target is there, or the source is still there."""
        source, target = job.source, job.target

        def look(storage: UnderStorage) -> tuple[bool, UfsEntry | None]:
            if _stat(storage, source) is not None:
                return False, None
            return True, _stat(storage, target)

        is_gone, found = await self._thread(job.mount_id, look)
        if not is_gone:
            self.abandon(job.ino, job.mount_id, target)
        elif found is None:
            self.abandon(job.ino, job.mount_id, target)
            self._vanished(job)
        else:
            record = self._store.inode(job.ino)
            self._moved(job, b"" if record is None else record.fingerprint, found, is_atomic=True)

    def _moved(self, job: Job, before: bytes, found: UfsEntry, is_atomic: bool) -> None:
        tx = self._store.transaction()
        ino, mount_id, source, target = job.ino, job.mount_id, job.source, job.target
        self._end_intent(tx, ino, mount_id, target)
        self._left(tx, mount_id, source, job.is_dir)
        self._log.recent.note(mount_id, target, job.is_dir)
        record, entry = tx.inode(ino), tx.sync_entry(ino)
        if job.is_dir:
            self._rewrite_below(tx, mount_id, source, target)
        if record is None or not record.parent:
            if is_atomic and persist_aside.follow(tx, ino, source, target, before, found.fingerprint):
                tx.delete_remove_entry(mount_id, source)
                self._log.remove(tx, mount_id, target, job.is_dir, ino)
            elif tx.remove_entry(mount_id, target) is None:
                self._log.remove(tx, mount_id, target, job.is_dir)
            tx.commit()
            return
        self._log.arrived(tx, ino, record, target, is_moved=is_atomic)
        if stat.S_ISREG(record.mode) and record.fingerprint == before:
            record.fingerprint = found.fingerprint
        self._finish(tx, ino, record, entry, job.generation, 0)
        tx.commit()

    def _rewrite_below(self, tx: Transaction, mount_id: int, source: bytes, target: bytes) -> None:
        """A tree was moved at once: so was what is to be removed, and what is to be moved, below."""
        for rest, _ in list(tx.scan("persist", b"r" + u64(mount_id) + source + b"/")):
            old = source + b"/" + rest
            entry = tx.remove_entry(mount_id, old)
            tx.delete_remove_entry(mount_id, old)
            if entry is not None:
                self._log.remove(tx, mount_id, target + b"/" + rest, entry.is_dir, entry.holder)
                persist_aside.follow(tx, entry.holder, old, target + b"/" + rest)
        for at, ino in list(places.located_below(tx, mount_id, source)):
            record = tx.inode(ino)
            if record is not None:
                places.set_location(tx, ino, record, target + at[len(source) :])
                tx.put_inode(ino, record)

    async def _set_aside(self, job: Job) -> None:
        """Bring what somebody still has open to its temporary name. It is copied where something is to
        take its place, which others that look into the store then never miss."""
        mount_id, source, target = job.mount_id, job.source, job.target
        mount, notes = self._mounts.record(mount_id), self._mounts.notes(mount_id)
        is_wanted = mount is not None and places.resolve(self._store, mount.ino, source) is not None
        is_moved = self._mounts.capabilities(mount_id).has_atomic_rename and not is_wanted
        tx = self._store.transaction()
        persist_aside.begin(tx, self._log, mount_id, job.ino)
        tx.commit()
        self._at("intent committed")

        def move(storage: UnderStorage) -> tuple[bytes, UfsEntry]:
            there = _stat(storage, target)
            if there is not None:  # by an attempt that was not committed
                return b"" if orphan is None else orphan.fingerprint, there
            return _relocate(storage, source, target, is_moved, notes)

        orphan = self._store.inode(job.ino)
        found: tuple[bytes, UfsEntry] | None = None
        try:
            found = await self._thread(mount_id, move)
        except UfsNotFoundError:
            log.info("what was removed here while it was open was removed outside too")
        except UfsError as exc:
            if isinstance(exc, UfsUnavailableError) or exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            log.warning("a removed file that is still open can't be kept for its readers: %s", exc.message)
        tx = self._store.transaction()
        persist_aside.end(
            tx, self._log, mount_id, (source, job.generation), job.ino, found, is_moved=is_moved
        )
        if found is not None and is_moved:
            self._left(tx, mount_id, source, is_tree=False)
        tx.commit()

    async def _push_down(self, job: Job) -> None:
        """A directory of a store that can't move trees: give its override to everything in it; then
        each moves by itself."""
        await self._loader.load_children(job.ino)
        after: bytes | None = None
        while after is None or after:
            after = self._push_chunk(job.ino, after)
            await trio.lowlevel.checkpoint()
        tx = self._store.transaction()
        record, entry = tx.inode(job.ino), tx.sync_entry(job.ino)
        if record is None or not record.parent or record.location is None or entry is None:
            return
        old = record.location
        places.set_location(tx, job.ino, record, None)
        has_directories = self._mounts.capabilities(job.mount_id).has_directories
        if has_directories or record.fingerprint == LISTED:
            self._log.remove(tx, job.mount_id, old, is_dir=True)
            record.fingerprint = b""
        if has_directories:
            record.is_in_ufs = False
            entry.what |= SYNC_CONTENT
        self._finish(tx, job.ino, record, entry, job.generation, 0)
        tx.commit()

    def _push_chunk(self, ino: int, after: bytes | None) -> bytes:
        """The last name done, b"" when there are no more."""
        tx = self._store.transaction()
        record = tx.inode(ino)
        if record is None or record.location is None:
            return b""
        base, name, count = record.location, b"", 0
        for name, value in self._store.scan("edge", u64(ino), after):
            count += 1
            self._push_child(tx, int.from_bytes(value, "big"), ino, name, places.join(base, name))
            if count >= _CHILDREN_PER_COMMIT:
                break
        tx.commit()
        return name if count >= _CHILDREN_PER_COMMIT else b""

    def _push_child(self, tx: Transaction, child: int, parent: int, name: bytes, path: bytes) -> None:
        record = tx.inode(child)
        if record is None or (record.parent, record.name) != (parent, name) or record.is_local_only:
            return
        above = tx.inode(parent)
        if above is None or above.mount_id != record.mount_id:
            return
        if record.is_in_ufs and record.location is None:
            places.set_location(tx, child, record, path)
            tx.put_inode(child, record)
            self._log.add(tx, child, SYNC_NAME)

    # --- removing ---------------------------------------------------------------------------------

    async def remove(self, mount_id: int, jobs: list[Job]) -> None:
        """Delete what is at these paths (all files, or all directories)."""
        kept: set[bytes] = set()

        def delete(storage: UnderStorage) -> None:
            if not jobs[0].is_dir:
                storage.delete_many([job.target for job in jobs])
                return
            for job in jobs:
                try:
                    storage.delete(job.target)
                except UfsError as exc:
                    if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
                    kept.add(job.target)

        await self._thread(mount_id, delete)
        tx = self._store.transaction()
        for job in jobs:
            if job.target in kept:
                log.info("a directory removed here holds files made outside: it is left there")
            self._left(tx, mount_id, job.target, job.is_dir)
            entry = tx.remove_entry(mount_id, job.target)
            if entry is not None and entry.generation == job.generation:
                tx.delete_remove_entry(mount_id, job.target)
                tx.delete_intent(mount_id, job.target)
        tx.commit()

    def _left(self, tx: Transaction, mount_id: int, path: bytes, is_tree: bool) -> None:
        """Nothing of ours is at `path` any more. In a store without directories those above may have
        vanished with it, which does not make them vanish here."""
        self._log.recent.note(mount_id, path, is_tree)
        mount = self._mounts.record(mount_id)
        if mount is None or self._mounts.capabilities(mount_id).has_directories:
            return
        for prefix in places.prefixes(path):
            self._log.recent.note(mount_id, prefix)
            found = places.resolve(tx, mount.ino, prefix)
            if found is not None and found[1].fingerprint == LISTED:
                found[1].fingerprint = b""
                tx.put_inode(*found)

    # --- within -----------------------------------------------------------------------------------

    async def _thread(self, mount_id: int, work: Callable[[UnderStorage], T]) -> T:
        """`work` in a thread; finished before this returns, also when cancelled. What it changes can't
        be taken back, so the commits that want it are durable first."""
        storage = self._mounts.storage(mount_id)
        await self._store.durability.wait(GATHER_S)
        self._at("before I/O")
        result = await trio.to_thread.run_sync(work, storage, limiter=self._mounts.limiter(mount_id))
        self._at("after I/O")
        return result


def _relocate(
    storage: UnderStorage, source: bytes, target: bytes, is_moved: bool, notes: Path | None
) -> tuple[bytes, UfsEntry]:
    """Rename or copy. The fingerprint before, and what is at `target` now."""
    before = storage.stat(source).fingerprint
    if is_moved:
        return before, storage.rename(source, target)
    if notes is not None:
        storage.resume(notes)  # a large copy goes in parts
    return before, storage.copy(source, target)


def _stat(storage: UnderStorage, path: bytes) -> UfsEntry | None:
    try:
        return storage.stat(path)
    except UfsNotFoundError:
        return None
