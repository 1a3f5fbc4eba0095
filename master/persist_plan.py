"""What is to be done next for one entry of the persist log: decided here, synchronously, from the
store as it is now; done by `persist_jobs` and `persister`.

A plan is valid until the next `await`. Rules and their reasons: architecture.md, "The persist log".
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from enum import Enum

from alluxiofuse.master import persist_aside, places
from alluxiofuse.master.mounts import MountTable
from alluxiofuse.master.persist_log import Key, PersistLog
from alluxiofuse.master.persist_queue import Lock, PathLocks
from alluxiofuse.master.records import (
    INTENT_MAKE,
    INTENT_RENAME,
    INTENT_UPLOAD,
    SYNC_ATTRS,
    SYNC_CONTENT,
    InodeRecord,
    IntentRecord,
    RemoveEntry,
    SyncEntry,
)
from alluxiofuse.master.store import Store, decode_record, u64


class Kind(Enum):
    UPLOAD = "upload"
    EMPTY = "empty"
    MKDIR = "mkdir"
    SYMLINK = "symlink"
    ATTRS = "attrs"
    MOVE = "move"
    MOVE_TREE = "move_tree"
    PUSH_DOWN = "push_down"
    RESOLVE_RENAME = "resolve_rename"
    RESOLVE_PUT = "resolve_put"
    REMOVE = "remove"
    SET_ASIDE = "set_aside"
    """Of a removal: somebody still has open what is there, so it is moved rather than deleted."""
    SETTLE = "settle"
    """Nothing to do in the under storage: only the entry and the record are put in order."""


@dataclass(slots=True)
class Job:
    kind: Kind
    key: Key
    mount_id: int
    locks: tuple[Lock, ...] = ()
    ino: int = 0
    generation: int = 0
    source: bytes = b""
    target: bytes = b""
    intent: IntentRecord | None = None
    is_dir: bool = False


@dataclass(frozen=True, slots=True)
class Blocked:
    by: Key | None
    """None: by something that ends without notice (an open orphan): look again later."""


@dataclass(frozen=True, slots=True)
class Waits:
    """Nothing to do until the namespace changes again (open for writing)."""


Plan = Job | Blocked | Waits | None
"""None: there is no such entry (any more)."""


def is_clean(record: InodeRecord) -> bool:
    """The under storage has the present bytes (of a file), or the thing itself."""
    return record.is_in_ufs and (not stat.S_ISREG(record.mode) or record.ufs_container == record.container)


class Planner:
    def __init__(self, store: Store, mounts: MountTable, log: PersistLog, locks: PathLocks) -> None:
        self._store = store
        self._mounts = mounts
        self._log = log
        self._locks = locks

    def plan(self, key: Key) -> Plan:
        if self._locks.is_held(key):
            return Blocked(key)
        found = self._plan_inode(key) if isinstance(key, int) else self._plan_removal(*key)
        if isinstance(found, Job):
            holder = self._locks.conflict(found.locks, key)
            if holder is not None:
                return Blocked(holder)
        return found

    def cycle_breaker(self, key: Key) -> Job | None:
        """If the entries that this one waits for wait for each other in a circle: move one of them to
        a temporary name."""
        seen: list[Key] = []
        at: Key = key
        while at not in seen:
            seen.append(at)
            if len(seen) > 1000 or self._locks.is_held(at):
                return None
            found = self.plan(at)
            if not isinstance(found, Blocked) or found.by is None:
                return None
            at = found.by
        for member in seen[seen.index(at) :]:
            job = self._move_aside(member) if isinstance(member, int) else self._remove_now(*member)
            if job is not None:
                return job
        return None

    def _remove_now(self, mount_id: int, path: bytes) -> Job | None:
        """A removal that only waited for its heir, which would have overwritten what is there."""
        found = self._plan_removal(mount_id, path, has_heir=False)
        if isinstance(found, Job) and self._locks.conflict(found.locks, found.key) is None:
            return found
        return None

    # --- inodes -----------------------------------------------------------------------------------

    def _plan_inode(self, ino: int) -> Plan:
        tx = self._store.transaction()
        entry, record = tx.sync_entry(ino), tx.inode(ino)
        if entry is None:
            return None
        if record is None or not record.parent:
            return Job(Kind.SETTLE, ino, 0, ino=ino)
        mount_id = record.mount_id
        desired = places.desired_path(self._store, ino, record)
        if desired is None:
            return Waits()
        if entry.intent is not None:
            leftover = self._plan_leftover(ino, record, entry, entry.intent, desired)
            if leftover is not None:
                return leftover
        ancestor = places.moving_ancestor(self._store, record)
        if ancestor:
            return Blocked(ancestor)
        job = self._wanted(ino, record, entry, desired)
        if job is None:
            return Waits()
        if job.kind in (Kind.SETTLE, Kind.PUSH_DOWN):
            return job
        uncertain = self._uncertain_above(mount_id, job.source) if job.source else 0
        if uncertain:
            return Blocked(uncertain)
        if desired.startswith(job.source + b"/") and job.source and self._has_directories(mount_id):
            # Into what has to be made at its own place: out of the way first.
            return self._move_aside(ino) or Blocked(None)
        if not job.source and self._is_own_way_barred(record, desired) and not self._give_up(ino, desired):
            return Blocked(None)
        if job.kind is not Kind.ATTRS:
            blocked = self._target_blocked(ino, mount_id, desired, job)
            if blocked is not None:
                return blocked
        return job

    def _plan_leftover(
        self, ino: int, record: InodeRecord, entry: SyncEntry, path: bytes, desired: bytes
    ) -> Plan:
        """What an earlier attempt may have left. None: go on, doing it again covers it."""
        mount_id = record.mount_id
        intent = self._store.transaction().intent(mount_id, path)
        lock = (Lock(mount_id, path, False),)
        if intent is None or intent.ino != ino:
            return Job(Kind.RESOLVE_PUT, ino, mount_id, lock, ino, target=path)
        if intent.kind == INTENT_RENAME:
            source = places.location_path(self._store, ino, record) or b""
            is_dir = stat.S_ISDIR(record.mode)
            uncertain = self._uncertain_above(mount_id, source)
            if uncertain:
                return Blocked(uncertain)
            both = (Lock(mount_id, source, is_dir), Lock(mount_id, path, is_dir))
            return Job(Kind.RESOLVE_RENAME, ino, mount_id, both, ino, 0, source, path, intent, is_dir)
        is_same = intent.kind == INTENT_MAKE or intent.container == record.container
        if path == desired and is_same and entry.what & SYNC_CONTENT and not is_clean(record):
            return None
        if path == desired and intent.kind == INTENT_MAKE and record.location is not None:
            return None  # a copy on its way
        return Job(Kind.RESOLVE_PUT, ino, mount_id, lock, ino, target=path, intent=intent)

    def _wanted(self, ino: int, record: InodeRecord, entry: SyncEntry, desired: bytes) -> Job | None:
        mount_id, capabilities = record.mount_id, self._mounts.capabilities(record.mount_id)
        at_target = Lock(mount_id, desired, False)

        def job(kind: Kind, *locks: Lock, source: bytes = b"", is_dir: bool = False) -> Job:
            return Job(kind, ino, mount_id, locks, ino, entry.generation, source, desired, is_dir=is_dir)

        wants_content = bool(entry.what & SYNC_CONTENT) and not record.is_local_only
        if record.is_local_only or (record.location is not None and record.location == desired):
            return job(Kind.SETTLE)
        if stat.S_ISDIR(record.mode):
            if record.location is not None:
                if not capabilities.has_atomic_rename:
                    return job(Kind.PUSH_DOWN, Lock(mount_id, record.location, True))
                locks = (Lock(mount_id, record.location, True), Lock(mount_id, desired, True))
                return job(Kind.MOVE_TREE, *locks, source=record.location, is_dir=True)
            if wants_content and capabilities.has_directories and desired:
                return job(Kind.MKDIR, at_target, is_dir=True)
        elif wants_content and not is_clean(record) and not record.home:
            if stat.S_ISLNK(record.mode):
                return job(Kind.SYMLINK, at_target)
            return job(Kind.UPLOAD if record.container and record.size else Kind.EMPTY, at_target)
        elif record.location is not None:
            return job(Kind.MOVE, Lock(mount_id, record.location, False), at_target, source=record.location)
        elif wants_content and not is_clean(record):
            return None
        if entry.what & SYNC_ATTRS and capabilities.has_posix_attrs and record.is_in_ufs and desired:
            return job(Kind.ATTRS, at_target, is_dir=stat.S_ISDIR(record.mode))
        return job(Kind.SETTLE)

    def _is_own_way_barred(self, record: InodeRecord, desired: bytes) -> bool:
        """Its old bytes lie where a directory above its place has to be, and newer ones are to be put."""
        location = record.location
        if location is None or is_clean(record) or not self._has_directories(record.mount_id):
            return False
        return places.is_below(desired, location)

    def _has_directories(self, mount_id: int) -> bool:
        return self._mounts.capabilities(mount_id).has_directories

    def _target_blocked(self, ino: int, mount_id: int, path: bytes, job: Job) -> Blocked | None:
        """What has to leave `path` before something may be put there."""
        occupant = places.located_at(self._store, mount_id, path)
        if occupant is not None and occupant != ino and not self._give_up(occupant):
            return Blocked(occupant)
        above = places.located_above(self._store, mount_id, path)
        if above is not None and above != ino:
            return Blocked(above)
        tx = self._store.transaction()
        intent = tx.intent(mount_id, path)
        if intent is not None and intent.ino != ino:
            return Blocked(self._who_resolves(mount_id, path, intent))
        removal = tx.remove_entry(mount_id, path)
        if removal is not None and (removal.is_dir != job.is_dir or job.kind is Kind.MOVE_TREE):
            return Blocked((mount_id, path))
        if removal is not None and intent is None and persist_aside.is_needed(tx, path, removal):
            return Blocked((mount_id, path))
        for prefix in places.prefixes(path):
            above_removal = tx.remove_entry(mount_id, prefix)
            above_intent = tx.intent(mount_id, prefix)
            if above_removal is not None and (not above_removal.is_dir or above_intent is not None):
                return Blocked((mount_id, prefix))
            if above_intent is not None and self._is_anothers(mount_id, prefix, above_intent):
                return Blocked(self._who_resolves(mount_id, prefix, above_intent))
        if job.kind is Kind.MOVE_TREE:
            return self._tree_blocked(ino, mount_id, path) or self._intents_below(mount_id, job.source)
        return None

    def _is_anothers(self, mount_id: int, path: bytes, intent: IntentRecord) -> bool:
        """What may have been put at `path` is not the directory that belongs there. (Where the store has
        none a file there is in nobody's way.)"""
        mount = self._mounts.record(mount_id)
        if mount is None or not self._has_directories(mount_id):
            return False
        found = places.resolve(self._store, mount.ino, path)
        return found is None or found[0] != intent.ino

    def _tree_blocked(self, ino: int, mount_id: int, path: bytes) -> Blocked | None:
        for _, below in places.located_below(self._store, mount_id, path):
            if below != ino:
                return Blocked(below)
        for rest, _ in self._store.scan("persist", b"r" + u64(mount_id) + path + b"/"):
            return Blocked((mount_id, path + b"/" + rest))
        return self._intents_below(mount_id, path)

    def _intents_below(self, mount_id: int, path: bytes) -> Blocked | None:
        for rest, value in self._store.scan("persist", b"i" + u64(mount_id) + path + b"/"):
            below = path + b"/" + rest
            return Blocked(
                self._who_resolves(
                    mount_id, below, decode_record(value, IntentRecord, "an entry of the persist log")
                )
            )
        return None

    def _who_resolves(self, mount_id: int, path: bytes, intent: IntentRecord) -> Key:
        """The entry whose execution ends an intent: the inode's, or the removal when it is gone."""
        entry = self._store.transaction().sync_entry(intent.ino)
        return intent.ino if entry is not None and entry.intent == path else (mount_id, path)

    def _give_up(self, ino: int, desired: bytes | None = None) -> bool:
        """The under storage's bytes of this inode are worth nothing (a newer, sealed version waits to
        be uploaded), so they may be overwritten where they are. True: given up, committed. `desired`: an
        earlier attempt to put the newer version there does not matter."""
        tx = self._store.transaction()
        record, entry = tx.inode(ino), tx.sync_entry(ino)
        if record is None or entry is None or not stat.S_ISREG(record.mode):
            return False
        if record.home or is_clean(record) or self._locks.is_held(ino) or record.location is None:
            return False
        if entry.intent is not None and entry.intent != desired:
            return False
        self._log.remove(tx, record.mount_id, record.location, is_dir=False)
        places.set_location(tx, ino, record, None)
        record.is_in_ufs = False
        self._log.add(tx, ino, SYNC_CONTENT)
        tx.put_inode(ino, record)
        tx.commit()
        return True

    def _move_aside(self, key: int) -> Job | None:
        """A job that takes the inode's bytes to a temporary name."""
        record = self._store.inode(key)
        entry = self._store.transaction().sync_entry(key)
        if record is None or entry is None or record.location is None or entry.intent is not None:
            return None
        is_dir, mount_id = stat.S_ISDIR(record.mode), record.mount_id
        target = persist_aside.temporary_path(key)
        if record.location == target or (
            is_dir and not self._mounts.capabilities(mount_id).has_atomic_rename
        ):
            return None
        if is_dir and self._intents_below(mount_id, record.location):
            return None
        if self._uncertain_above(mount_id, record.location):
            return None
        kind = Kind.MOVE_TREE if is_dir else Kind.MOVE
        locks = (Lock(mount_id, record.location, is_dir), Lock(mount_id, target, is_dir))
        if self._locks.conflict(locks, key) is not None:
            return None
        return Job(kind, key, mount_id, locks, key, entry.generation, record.location, target, is_dir=is_dir)

    def _uncertain_above(self, mount_id: int, path: bytes) -> int:
        """A directory of which it is not known whether it, with `path` below, has been moved; 0: none."""
        tx = self._store.transaction()
        for prefix in places.prefixes(path):
            above = places.located_at(self._store, mount_id, prefix)
            entry = None if above is None else tx.sync_entry(above)
            if above is not None and entry is not None and entry.intent is not None:
                return above
        return 0

    # --- removals ---------------------------------------------------------------------------------

    def _plan_removal(self, mount_id: int, path: bytes, has_heir: bool = True) -> Plan:
        tx = self._store.transaction()
        entry = tx.remove_entry(mount_id, path)
        if entry is None:
            return None
        lock = (Lock(mount_id, path, entry.is_dir),)
        intent = tx.intent(mount_id, path)
        if intent is not None:
            who = self._who_resolves(mount_id, path, intent)
            if who != (mount_id, path):
                return Blocked(who)
            if intent.kind == INTENT_RENAME and persist_aside.is_held(tx, path, entry):
                return self._resolve_orphan(mount_id, path, entry.holder, intent)
            kind = Kind.RESOLVE_PUT if intent.kind == INTENT_UPLOAD else Kind.REMOVE
            if kind is Kind.RESOLVE_PUT:
                return Job(kind, (mount_id, path), mount_id, lock, 0, target=path, intent=intent)
        uncertain = self._uncertain_above(mount_id, path)
        if uncertain:
            return Blocked(uncertain)
        if persist_aside.is_held(tx, path, entry):
            return self._plan_held(mount_id, path, entry)
        heir = self._heir(mount_id, path, entry) if has_heir else 0
        if heir:
            return Blocked(heir)
        if entry.is_dir:
            blocked = self._tree_blocked(0, mount_id, path)
            if blocked is not None:
                return blocked
        return Job(
            Kind.REMOVE,
            (mount_id, path),
            mount_id,
            lock,
            0,
            entry.generation,
            target=path,
            is_dir=entry.is_dir,
        )

    def _plan_held(self, mount_id: int, path: bytes, entry: RemoveEntry) -> Plan:
        """What an orphan's bytes are stays, or goes where nobody minds it."""
        mount = self._mounts.record(mount_id)
        if mount is None or not persist_aside.is_needed(self._store, path, entry):
            return Blocked(None)
        has_directories = self._has_directories(mount_id)
        if not persist_aside.is_in_the_way(self._store, mount_id, mount.ino, path, has_directories):
            return Blocked(None)
        uncertain = persist_aside.uncertain_at(self._store, mount_id, entry.holder)
        if uncertain is not None:
            return Blocked((mount_id, uncertain))
        target = persist_aside.temporary_path(entry.holder)
        older = self._store.transaction().remove_entry(mount_id, target)
        if older is not None and older.holder != entry.holder:
            return Blocked((mount_id, target))
        return Job(
            Kind.SET_ASIDE,
            (mount_id, path),
            mount_id,
            (Lock(mount_id, path, False), Lock(mount_id, target, False)),
            entry.holder,
            entry.generation,
            path,
            target,
        )

    def _resolve_orphan(self, mount_id: int, path: bytes, ino: int, intent: IntentRecord) -> Plan:
        """It was removed when it was not known whether it had been renamed to `path`."""
        record = self._store.inode(ino)
        if record is None or record.location is None:
            return Blocked(None)
        source = record.location
        uncertain = self._uncertain_above(mount_id, source) or self._uncertain_above(mount_id, path)
        if uncertain:
            return Blocked(uncertain)
        both = (Lock(mount_id, source, False), Lock(mount_id, path, False))
        return Job(Kind.RESOLVE_RENAME, (mount_id, path), mount_id, both, ino, 0, source, path, intent, False)

    def _heir(self, mount_id: int, path: bytes, entry: RemoveEntry) -> int:
        """The inode that is about to overwrite (or, a directory, to take over) what is there."""
        mount = self._mounts.record(mount_id)
        found = None if mount is None else places.resolve(self._store, mount.ino, path)
        if found is None:
            return 0
        ino, record = found
        sync = self._store.transaction().sync_entry(ino)
        if sync is None or stat.S_ISDIR(record.mode) != entry.is_dir:
            return 0
        if places.desired_path(self._store, ino, record) != path:
            return 0
        if places.moving_ancestor(self._store, record):
            return 0  # it can't come before that has moved, which may wait for this removal
        if entry.is_dir:
            return ino if not record.is_in_ufs and sync.what & SYNC_CONTENT else 0
        return ino if not is_clean(record) or record.location is not None else 0
