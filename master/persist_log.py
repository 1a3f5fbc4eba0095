"""The persist log: what namespace changes leave to be done in under storages (architecture.md).

Plain functions on a transaction, called by whoever changes the namespace, in the same transaction.
They decide what the mount's store can hold. They may change fields of `record` in place; the caller
puts it afterwards. The persister is woken when the transaction commits.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from alluxiofuse.errors import StateError
from alluxiofuse.master import places
from alluxiofuse.master.recent_paths import RecentPaths
from alluxiofuse.master.records import (
    INTENT_RENAME,
    LISTED,
    SYNC_ATTRS,
    SYNC_CONTENT,
    SYNC_NAME,
    InodeRecord,
    IntentRecord,
    RemoveEntry,
    SyncEntry,
)
from alluxiofuse.master.store import Store, Transaction, u64
from alluxiofuse.ufs.base import Capabilities

MAX_TOUCHED = 100_000
"""Changes remembered for the persister; beyond, it scans the store instead."""

Key = int | tuple[int, bytes]
"""An entry of the log: an inode number (SyncEntry), or (mount id, path) (RemoveEntry)."""


class MountFacts(Protocol):
    """What the log must know of mounts, without waiting for anything."""

    def capabilities(self, mount_id: int) -> Capabilities: ...
    def is_readonly(self, mount_id: int) -> bool: ...


class PersistLog:
    """Owned by the master's one thread. Holds no durable state of its own: the `persist` family is it."""

    def __init__(
        self, store: Store, mounts: MountFacts, *, wall_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self.store = store
        self._mounts = mounts
        self._wall_ns = wall_ns
        self._touched: dict[Key, None] = {}
        self.is_overflowed = True
        """More changes than were remembered: the store has to be scanned. True at the start."""
        self.recent = RecentPaths()
        """Written by the persister, read by the loader."""
        self._on_wake: list[Callable[[], None]] = []

    # --- changes of the namespace -----------------------------------------------------------------

    def created(self, tx: Transaction, ino: int, record: InodeRecord) -> None:
        """A new inode has its edge, parent, name and mount_id. Directories become `is_loaded`."""
        if stat.S_ISDIR(record.mode):
            record.is_loaded = True
        if not self._can_hold(record):
            record.is_local_only = True
            return
        if stat.S_ISDIR(record.mode) and not self._mounts.capabilities(record.mount_id).has_directories:
            record.is_in_ufs = True  # as much as it ever can be; what comes below will lie there
            return
        self.add(tx, ino, SYNC_CONTENT)

    def content_committed(self, tx: Transaction, ino: int, record: InodeRecord) -> None:
        """`record.container`, `size` and `held_by` are those of sealed content."""
        if not record.parent or record.is_local_only:
            return
        entry = tx.sync_entry(ino)
        if entry is not None and entry.what & SYNC_CONTENT and entry.intent is None:
            # A new file: it says so already. Whether content is up to date does not depend on generations.
            tx.after_commit(partial(self.touch, ino))
            return
        self.add(tx, ino, SYNC_CONTENT)

    def attrs_changed(self, tx: Transaction, ino: int, record: InodeRecord) -> None:
        """Mode, owner or mtime."""
        if not record.parent or record.is_local_only:
            return
        if not self._mounts.capabilities(record.mount_id).has_posix_attrs or not self._can_hold(record):
            return
        if not places.is_mount_root(tx, ino, record):
            self.add(tx, ino, SYNC_ATTRS)

    def last_name_removed(self, tx: Transaction, ino: int, record: InodeRecord) -> None:
        """Before parent and name are cleared and the edge is deleted. The caller may keep the inode as
        an orphan: then `location_path` still tells where its clean bytes are."""
        entry = tx.sync_entry(ino)
        if entry is not None:
            tx.delete_sync_entry(ino)
            tx.after_commit(partial(self.touch, ino))
        if record.is_local_only:
            return
        is_dir = stat.S_ISDIR(record.mode)
        location = places.location_path(tx, ino, record) if record.is_in_ufs else None
        places.set_location(tx, ino, record, None)
        if location is not None and self._leaves_something(record):
            holder = ino if stat.S_ISREG(record.mode) else 0
            self.remove(tx, record.mount_id, location, is_dir, holder)
        if entry is not None and entry.intent is not None and entry.intent != location:
            intent = tx.intent(record.mount_id, entry.intent)
            may_have_moved = intent is not None and intent.kind == INTENT_RENAME and not is_dir
            self.remove(tx, record.mount_id, entry.intent, is_dir, ino if may_have_moved else 0)
            if is_dir and location is not None:
                self._mirror_below(tx, record.mount_id, location, entry.intent)
        if stat.S_ISREG(record.mode):
            record.location = location

    def renaming(
        self,
        tx: Transaction,
        ino: int,
        record: InodeRecord,
        new_parent: int,
        new_name: bytes,
        replaced: tuple[int, InodeRecord] | None,
    ) -> None:
        """Before record.parent and name change. `replaced`: the inode whose *last* name this was (one
        with further names is renamed to one of those first, by a call of its own)."""
        if replaced is not None:
            self.last_name_removed(tx, *replaced)
        if record.is_local_only:
            return
        entry = tx.sync_entry(ino)
        if not record.is_in_ufs:
            # What is not there can't be moved: it is made at its new place. An upload that is under
            # way ends at the intent's path and becomes the location then.
            self.add(tx, ino, SYNC_CONTENT if entry is None else entry.what)
            return
        location = places.location_path(tx, ino, record)
        is_back = entry is not None and places.place_below(tx, new_parent, new_name) == location
        if is_back and entry is not None and entry.intent is None:
            places.set_location(tx, ino, record, None)
            self.keep(tx, ino, entry, entry.what & ~SYNC_NAME)
            return
        places.set_location(tx, ino, record, location)
        self.add(tx, ino, SYNC_NAME)

    def orphan_freed(self, ino: int, record: InodeRecord) -> None:
        """After the commit that deleted an orphan: its bytes may be deleted now."""
        if record.location is not None:
            self.touch((record.mount_id, record.location))

    def wake(self) -> None:
        """There may be work. Follows every commit that entered something, by itself."""
        for callback in self._on_wake:
            callback()

    # --- for the persister and the loader ---------------------------------------------------------

    def on_wake(self, callback: Callable[[], None]) -> None:
        self._on_wake.append(callback)

    def may_have(self, key: Key) -> bool:
        """There is such an entry, or it can't be known now."""
        raw = b"s" + u64(key) if isinstance(key, int) else b"r" + u64(key[0]) + key[1]
        try:
            return self.store.get("persist", raw) is not None
        except StateError:
            return True

    def take_touched(self) -> list[Key]:
        """Entries added or changed since the last call (also some that are gone again)."""
        touched, self._touched = list(self._touched), {}
        return touched

    def touch(self, key: Key) -> None:
        """Have the persister look at this entry."""
        if len(self._touched) >= MAX_TOUCHED:
            self.is_overflowed = True
        else:
            self._touched[key] = None
        self.wake()

    def add(self, tx: Transaction, ino: int, what: int) -> None:
        """Put `what` into the inode's entry, with a new generation."""
        entry = tx.sync_entry(ino) or SyncEntry(0, 0, 0)
        entry.what |= what
        entry.generation = self.store.take_number(b"next_id")
        entry.queued_at_ns = self._wall_ns()
        tx.put_sync_entry(ino, entry)
        tx.after_commit(partial(self.touch, ino))

    def remove(self, tx: Transaction, mount_id: int, path: bytes, is_dir: bool, holder: int = 0) -> None:
        """What is at `path` is nobody's any more."""
        generation = self.store.take_number(b"next_id")
        tx.put_remove_entry(mount_id, path, RemoveEntry(generation, is_dir, self._wall_ns(), holder))
        tx.after_commit(partial(self.touch, (mount_id, path)))

    def arrived(
        self, tx: Transaction, ino: int, record: InodeRecord, path: bytes, is_moved: bool = False
    ) -> None:
        """The inode's bytes are at `path` now: what lay there is gone, and what it left elsewhere is to
        be removed (nothing, when it was moved by an atomic rename). The caller puts the record."""
        if record.is_in_ufs and not is_moved:
            before = places.location_path(tx, ino, record)
            if before is not None and before != path and self._leaves_something(record):
                self.remove(tx, record.mount_id, before, stat.S_ISDIR(record.mode))
        record.is_in_ufs = True
        tx.delete_remove_entry(record.mount_id, path)
        at_place = places.place_below(tx, record.parent, record.name) == path
        places.set_location(tx, ino, record, None if at_place else path)

    # --- within -----------------------------------------------------------------------------------

    def _can_hold(self, record: InodeRecord) -> bool:
        if self._mounts.is_readonly(record.mount_id):
            return False
        if stat.S_ISLNK(record.mode):
            return self._mounts.capabilities(record.mount_id).has_symlinks
        return stat.S_ISREG(record.mode) or stat.S_ISDIR(record.mode)

    def _leaves_something(self, record: InodeRecord) -> bool:
        """Directories of a store that has none leave nothing behind, but for a marker perhaps."""
        if record.fingerprint == LISTED:
            return True
        return not stat.S_ISDIR(record.mode) or self._mounts.capabilities(record.mount_id).has_directories

    def keep(self, tx: Transaction, ino: int, entry: SyncEntry, what: int) -> None:
        """Put the entry with just these bits; without any, and no intent, it goes."""
        entry.what = what
        if what or entry.intent is not None:
            tx.put_sync_entry(ino, entry)
        else:
            tx.delete_sync_entry(ino)

    def _mirror_below(self, tx: Transaction, mount_id: int, source: bytes, target: bytes) -> None:
        """A directory goes whose atomic rename may or may not have happened: what is to be removed
        below its old place may be below the new one, and so may what others have there."""
        intent = tx.intent(mount_id, target)
        if intent is None or intent.kind != INTENT_RENAME:
            return
        for rest, _ in list(tx.scan("persist", b"r" + u64(mount_id) + source + b"/")):
            entry = tx.remove_entry(mount_id, source + b"/" + rest)
            if entry is not None:
                self.remove(tx, mount_id, target + b"/" + rest, entry.is_dir, entry.holder)
                if entry.holder:  # Who has it open reads it here or there.
                    tx.put_intent(mount_id, target + b"/" + rest, IntentRecord(entry.holder, INTENT_RENAME))
        for at, ino in list(places.located_below(tx, mount_id, source)):
            record, sync = tx.inode(ino), tx.sync_entry(ino)
            path = target + at[len(source) :]
            if record is None or sync is None:
                continue
            if sync.intent is not None:  # being made anew elsewhere: the old bytes are worth nothing
                self.remove(tx, mount_id, path, stat.S_ISDIR(record.mode))
                continue
            sync.intent = path
            tx.put_sync_entry(ino, sync)
            tx.put_intent(mount_id, path, IntentRecord(ino, INTENT_RENAME))
