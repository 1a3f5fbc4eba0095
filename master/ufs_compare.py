"""Entering what an under storage showed into the namespace: synchronous, on transactions.

Two rules protect what was changed here. What the persist log is about to remove, move or put is
never taken from a listing; and a path that one of our own persists changed after the listing was
begun is left as it is (`RecentPaths`).
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from functools import partial
from typing import Protocol

from alluxiofuse.master import places
from alluxiofuse.master.clock import Clock
from alluxiofuse.master.containers import forget_container, give_container, new_container
from alluxiofuse.master.mounts import MountTable
from alluxiofuse.master.persist_aside import MOVING_PREFIX
from alluxiofuse.master.persist_log import PersistLog
from alluxiofuse.master.persist_plan import is_clean
from alluxiofuse.master.records import LISTED, SYNC_CONTENT, InodeRecord
from alluxiofuse.master.store import Store, Transaction, u64
from alluxiofuse.ufs.base import UfsEntry
from alluxiofuse.wire.master_ops import Unlinked
from alluxiofuse.wire.types import EVENT_ATTR, EVENT_DATA, EVENT_ENTRY, Event

_PERMISSIONS = {stat.S_IFDIR: 0o755, stat.S_IFREG: 0o644, stat.S_IFLNK: 0o777}


class TreeHooks(Protocol):
    """What is needed of `tree.Tree`."""

    def detach(
        self, tx: Transaction, parent: int, name: bytes, ino: int, record: InodeRecord
    ) -> Unlinked: ...


class Publisher(Protocol):
    """What is needed of `events.Events`."""

    def publish(self, origin_session: int, *events: Event) -> int: ...


class Dropper(Protocol):
    """What is needed of `workers.WorkerRegistry`."""

    def drop_container(self, container: int, also: int = 0) -> None: ...


class Comparer:
    def __init__(
        self,
        store: Store,
        mounts: MountTable,
        persist_log: PersistLog,
        tree: TreeHooks,
        events: Publisher,
        workers: Dropper,
        clock: Clock,
        block_bytes: int,
    ) -> None:
        self._store = store
        self._mounts = mounts
        self._log = persist_log
        self._tree = tree
        self._events = events
        self._workers = workers
        self._clock = clock
        self._block_bytes = block_bytes

    # --- a page of a listing ----------------------------------------------------------------------

    def apply(self, directory: int, base: bytes, entries: Iterable[UfsEntry], token: int) -> None:
        """Enter entries of `directory`, which the store has at `base`. One transaction."""
        tx = self._store.transaction()
        parent = tx.inode(directory)
        if parent is None or not parent.parent:
            return
        is_first = not parent.is_loaded
        has_pending = self._has_pending(parent.mount_id, base)
        subdirectories = added = 0
        for entry in entries:
            name = entry.path.rpartition(b"/")[2]
            child = tx.child(directory, name)
            if child is not None:
                if not self._is_same(tx, child, entry):
                    self._meet(tx, directory, name, child, entry, token)
            elif not self._is_hidden(tx, parent.mount_id, entry, token, has_pending):
                self._insert(tx, directory, parent, name, entry)
                added += 1
                subdirectories += entry.is_dir
                if not is_first:
                    self._publish(tx, Event(EVENT_ENTRY, directory, name))
        if added and (subdirectories or not is_first):
            now = tx.inode(directory) or parent
            now.nlink += subdirectories
            if not is_first:
                now.mtime_ns = now.ctime_ns = self._clock.now_ns()
            tx.put_inode(directory, now)
        tx.commit()

    def _is_same(self, tx: Transaction, ino: int, entry: UfsEntry) -> bool:
        """The record says just what the listing shows: nothing to take over, whatever is under way."""
        record = tx.inode(ino)
        if record is None or not record.is_in_ufs or entry.target != record.target:
            return False
        if entry.is_file and entry.fingerprint != record.fingerprint:
            return False
        if not self._mounts.capabilities(record.mount_id).has_posix_attrs:
            return stat.S_IFMT(entry.mode) == stat.S_IFMT(record.mode)
        is_time_same = entry.is_dir or entry.mtime_ns == record.mtime_ns
        return is_time_same and (entry.mode, entry.uid, entry.gid) == (record.mode, record.uid, record.gid)

    def meet(
        self, parent: int, name: bytes, ino: int, entry: UfsEntry, token: int, force: bool = False
    ) -> None:
        """Compare a known name with what the store has there."""
        tx = self._store.transaction()
        self._meet(tx, parent, name, ino, entry, token, force)
        tx.commit()

    def _meet(
        self,
        tx: Transaction,
        parent: int,
        name: bytes,
        ino: int,
        entry: UfsEntry,
        token: int,
        force: bool = False,
    ) -> None:
        record = tx.inode(ino)
        if record is None or not self._is_comparable(tx, parent, name, ino, record, entry.path, token, force):
            return
        if stat.S_IFMT(record.mode) != stat.S_IFMT(entry.mode):
            if self._remove(tx, parent, name, ino, record):
                above = tx.inode(parent)
                assert above is not None
                self._insert(tx, parent, above, name, entry)
                above.nlink += entry.is_dir
                tx.put_inode(parent, above)
            return
        is_changed = self._update(tx, ino, record, entry)
        if is_changed or self._mounts.sync_interval_s(record.mount_id) > 0:
            record.checked_at_ns = self._clock.now_ns()
            tx.put_inode(ino, record)

    def _is_comparable(
        self,
        tx: Transaction,
        parent: int,
        name: bytes,
        ino: int,
        record: InodeRecord,
        path: bytes,
        token: int,
        force: bool = False,
    ) -> bool:
        """Nothing of it is under way, and the store has *this* inode at `path`."""
        if record.is_local_only or not record.is_in_ufs or record.home:
            return False
        if (record.parent, record.name) != (parent, name):
            return False
        if tx.sync_entry(ino) is not None and not (force and is_clean(record)):
            return False
        if self._log.recent.is_changed(token, record.mount_id, path):
            return False
        if places.is_mount_root(tx, ino, record) or places.moving_ancestor(tx, record):
            return False
        return places.location_path(tx, ino, record) == path

    def _update(self, tx: Transaction, ino: int, record: InodeRecord, entry: UfsEntry) -> bool:
        """Take over what changed outside. True: something did."""
        is_changed = False
        if entry.is_file and entry.fingerprint != record.fingerprint:
            old, record.container = record.container, new_container(self._store)
            forget_container(tx, old)
            give_container(tx, record.container, ino)
            record.ufs_container = record.container
            record.size = record.ufs_size = entry.size
            record.fingerprint = entry.fingerprint
            record.mtime_ns, record.ctime_ns = entry.mtime_ns, self._clock.now_ns()
            tx.after_commit(partial(self._workers.drop_container, old))
            self._publish(tx, Event(EVENT_DATA, ino, b"", old))
            is_changed = True
        if entry.target != record.target:
            record.target, record.size, is_changed = entry.target, len(entry.target), True
        if self._mounts.capabilities(record.mount_id).has_posix_attrs:
            shown = (entry.mode, entry.uid, entry.gid)
            if shown != (record.mode, record.uid, record.gid):
                record.mode, record.uid, record.gid = shown
                record.ctime_ns, is_changed = self._clock.now_ns(), True
            if not entry.is_dir and entry.mtime_ns != record.mtime_ns:
                record.mtime_ns, is_changed = entry.mtime_ns, True
        if is_changed:
            self._publish(tx, Event(EVENT_ATTR, ino))
        return is_changed

    # --- new names --------------------------------------------------------------------------------

    def _has_pending(self, mount_id: int, base: bytes) -> bool:
        below = u64(mount_id) + (base + b"/" if base else b"")
        return any(True for kind in (b"r", b"l", b"i") for _ in self._store.scan("persist", kind + below))

    def _is_hidden(
        self, tx: Transaction, mount_id: int, entry: UfsEntry, token: int, has_pending: bool
    ) -> bool:
        """The store shows something at a path that is not (or no longer) a name of ours."""
        path = entry.path
        if path.startswith(MOVING_PREFIX) or self._log.recent.is_changed(token, mount_id, path):
            return True
        if not has_pending:
            return False
        if tx.remove_entry(mount_id, path) is not None or tx.intent(mount_id, path) is not None:
            return True
        if places.located_at(tx, mount_id, path) is not None:
            return True
        is_virtual = entry.is_dir and not self._mounts.capabilities(mount_id).has_directories
        return is_virtual and self._has_pending(mount_id, path)

    def _insert(
        self, tx: Transaction, parent: int, parent_record: InodeRecord, name: bytes, entry: UfsEntry
    ) -> None:
        ino = self._store.take_number(b"next_ino")
        kind = stat.S_IFMT(entry.mode)
        capabilities = self._mounts.capabilities(parent_record.mount_id)
        mode, uid, gid = entry.mode, entry.uid, entry.gid
        if not capabilities.has_posix_attrs:
            mode = kind | _PERMISSIONS.get(kind, 0o644)
            uid, gid = parent_record.uid, parent_record.gid
        mtime = entry.mtime_ns or self._clock.now_ns()
        record = InodeRecord(
            mode=mode,
            nlink=2 if entry.is_dir else 1,
            uid=uid,
            gid=gid,
            rdev=entry.rdev,
            size=len(entry.target) if stat.S_ISLNK(mode) else entry.size,
            atime_ns=mtime,
            mtime_ns=mtime,
            ctime_ns=mtime,
            btime_ns=mtime,
            parent=parent,
            name=name,
            mount_id=parent_record.mount_id,
            is_in_ufs=True,
            checked_at_ns=self._clock.now_ns(),
            target=entry.target,
        )
        if entry.is_file:
            record.block_bytes = self._block_bytes
            record.container = record.ufs_container = new_container(self._store)
            record.ufs_size, record.fingerprint = entry.size, entry.fingerprint
            give_container(tx, record.container, ino)
        elif entry.is_dir:
            record.size = 0
            if not capabilities.has_directories:
                record.fingerprint = LISTED
        tx.put_edge(parent, name, ino)
        tx.put_inode(ino, record)

    # --- vanished names ---------------------------------------------------------------------------

    def vanish_names(self, directory: int, base: bytes, names: Iterable[bytes], token: int) -> None:
        """A complete listing did not show these. One transaction."""
        tx = self._store.transaction()
        for name in names:
            ino = tx.child(directory, name)
            record = None if ino is None else tx.inode(ino)
            if ino is None or record is None:
                continue
            if self._may_vanish(tx, directory, name, ino, record, places.join(base, name), token):
                self._remove(tx, directory, name, ino, record)
        tx.commit()

    def vanish(self, ino: int, path: bytes | None = None, token: int | None = None) -> None:
        """The store does not have it (at `path`, asked with `token`) any more."""
        tx = self._store.transaction()
        record = tx.inode(ino)
        if record is None or not record.parent:
            return
        if path is not None and token is not None:
            parent, name = record.parent, record.name
            if not self._may_vanish(tx, parent, name, ino, record, path, token):
                return
        self._remove(tx, record.parent, record.name, ino, record)
        tx.commit()

    def _may_vanish(
        self,
        tx: Transaction,
        parent: int,
        name: bytes,
        ino: int,
        record: InodeRecord,
        path: bytes,
        token: int,
    ) -> bool:
        if not self._is_comparable(tx, parent, name, ino, record, path, token):
            return False
        if tx.intent(record.mount_id, path) is not None:
            return False
        is_virtual = (
            stat.S_ISDIR(record.mode) and not self._mounts.capabilities(record.mount_id).has_directories
        )
        return not is_virtual or record.fingerprint == LISTED

    def _remove(self, tx: Transaction, parent: int, name: bytes, ino: int, record: InodeRecord) -> bool:
        """Take a name that is gone outside, with all below it, out of the namespace; False: something
        below is not in the under storage yet, so it and the directories above it stay."""
        if record.home or record.mount_id != self._mount_of(tx, parent):
            return False
        if stat.S_ISDIR(record.mode) and not self._remove_below(tx, ino):
            now = tx.inode(ino)
            if now is not None and self._mounts.capabilities(now.mount_id).has_directories:
                now.is_in_ufs = False
                tx.put_inode(ino, now)
                self._log.add(tx, ino, SYNC_CONTENT)
            return False
        entry = tx.sync_entry(ino)
        if entry is not None and (not is_clean(record) or entry.intent is not None):
            return False
        gone = tx.inode(ino) or record
        gone.is_in_ufs = False
        self._publish(tx, Event(EVENT_ENTRY, parent, name))
        for other_parent, other_name in self._other_names(tx, ino):
            self._tree.detach(tx, other_parent, other_name, ino, gone)
            self._publish(tx, Event(EVENT_ENTRY, other_parent, other_name))
        self._tree.detach(tx, parent, name, ino, gone)
        return True

    def _remove_below(self, tx: Transaction, directory: int) -> bool:
        is_empty = True
        for name, value in list(tx.scan("edge", u64(directory))):
            child = int.from_bytes(value, "big")
            record = tx.inode(child)
            is_known = record is not None and record.is_in_ufs and not record.is_local_only
            if (
                record is None
                or not is_known
                or (record.parent, record.name) != (directory, name)
                or not self._remove(tx, directory, name, child, record)
            ):
                is_empty = False
        return is_empty

    def _other_names(self, tx: Transaction, ino: int) -> list[tuple[int, bytes]]:
        keys = [key for key, _ in tx.scan("meta", b"link" + u64(ino))]
        return [(int.from_bytes(key[:8], "big"), key[8:]) for key in keys]

    def _mount_of(self, tx: Transaction, ino: int) -> int:
        record = tx.inode(ino)
        return 0 if record is None else record.mount_id

    def _publish(self, tx: Transaction, event: Event) -> None:
        tx.after_commit(lambda: self._publish_now(event))

    def _publish_now(self, event: Event) -> None:
        self._events.publish(0, event)
