"""Mounting and unmounting in the namespace: what becomes of directories and of their metadata."""

from __future__ import annotations

import errno
import stat

import trio

from alluxiofuse.errors import FsError
from alluxiofuse.master import places
from alluxiofuse.master.containers import forget_container
from alluxiofuse.master.events import Events
from alluxiofuse.master.mounts import MountTable, identified
from alluxiofuse.master.namespace import Namespace, check_name
from alluxiofuse.master.records import InodeRecord, MountRecord
from alluxiofuse.master.store import Transaction, u64
from alluxiofuse.master.workers import WorkerRegistry
from alluxiofuse.ufs.base import UnderStorage
from alluxiofuse.wire.master_ops import MountUfs
from alluxiofuse.wire.types import EVENT_ATTR, EVENT_ENTRY, Event, MountInfo

UNMOUNTED = b"unmounted"
"""meta: + ino of a directory whose metadata, with all below, is to be deleted."""
MAX_INTERVAL_S = 1e9
_INODES_PER_COMMIT = 500


class MountTree:
    def __init__(
        self, namespace: Namespace, mounts: MountTable, events: Events, workers: WorkerRegistry
    ) -> None:
        self._namespace = namespace
        self._store = namespace.store
        self._tree = namespace.tree
        self._mounts = mounts
        self._events = events
        self._workers = workers

    # --- mounting ---------------------------------------------------------------------------------

    async def mount(self, req: MountUfs, parent: int, name: bytes, child: int | None) -> MountInfo:
        """`child`: what is at `name` now. The store is probed first; nothing changes on an error."""
        check_name(name)
        interval_s = req.sync_interval_s
        if interval_s is not None and interval_s != -1 and not 0 <= interval_s <= MAX_INTERVAL_S:
            raise FsError(errno.EINVAL, "the sync interval is no number of seconds, 0 (always) or -1 (never)")
        self._check_free(parent, child)
        known = self._mounts.overlapping(req.uri, req.options, req.is_readonly)
        if known is not None:
            raise FsError(errno.EBUSY, f"{req.uri} overlaps with {known.uri}, which is mounted already")
        storage, options = await trio.to_thread.run_sync(self._probe, req.uri, dict(req.options))
        try:
            mount_id = self._enter(req, storage, options, parent, name)
        except BaseException:
            storage.close()
            raise
        return self._mounts.info(mount_id, with_secrets=False)

    def _probe(self, uri: str, options: dict[str, str]) -> tuple[UnderStorage, dict[str, str]]:
        """The connector, and the options to keep. Blocks."""
        storage = self._mounts.open(uri, options)
        try:
            storage.check()
            return storage, identified(options, storage)
        except BaseException:
            storage.close()
            raise

    def _check_free(self, parent: int, child: int | None) -> None:
        self._namespace.directory(parent)
        if child is None:
            return
        record = self._namespace.existing(child)
        if not stat.S_ISDIR(record.mode):
            raise FsError(errno.ENOTDIR)
        if places.is_mount_root(self._store, child, record):
            raise FsError(errno.EBUSY, "something is mounted there already")
        if any(True for _ in self._store.scan("edge", u64(child))) or not record.is_loaded:
            raise FsError(errno.ENOTEMPTY, "the mount point has to be empty (list it first)")

    def _enter(
        self, req: MountUfs, storage: UnderStorage, options: dict[str, str], parent: int, name: bytes
    ) -> int:
        """Await-free. Everything is looked at again: the probe took its time."""
        child = self._store.child(parent, name)
        self._check_free(parent, child)
        tx = self._store.transaction()
        mount_id = self._mounts.new_id()
        if child is None:
            child = self._new_directory(tx, parent, name)
        record = tx.inode(child)
        assert record is not None
        tx.delete_sync_entry(child)
        places.set_location(tx, child, record, None)
        record.mount_id, record.is_in_ufs, record.is_local_only = mount_id, True, False
        record.is_loaded, record.listed_at_ns, record.listing_fingerprint = False, 0, b""
        tx.put_inode(child, record)
        interval_s = req.sync_interval_s
        if interval_s is None:
            interval_s = storage.capabilities.default_sync_interval_s
        entry = MountRecord(mount_id, child, req.uri, req.is_readonly, interval_s, options)
        self._mounts.add(tx, entry, storage)
        tx.commit()
        self._events.publish(0, Event(EVENT_ENTRY, parent, name), Event(EVENT_ATTR, child))
        return mount_id

    def _new_directory(self, tx: Transaction, parent: int, name: bytes) -> int:
        above = self._namespace.directory(parent)
        now = self._namespace.clock.now_ns()
        record = InodeRecord(
            stat.S_IFDIR | 0o755, 2, above.uid, above.gid, 0, 0, now, now, now, now, 0, b"", 0
        )
        return self._tree.insert(tx, parent, above, name, record)

    # --- unmounting -------------------------------------------------------------------------------

    async def unmount(self, mount_id: int, ino: int) -> None:
        """EBUSY while something of it is not persisted, or open for writing. Afterwards an empty
        directory of the mount above is there; the metadata below goes in pieces."""
        self._check_idle(mount_id)
        record = self._namespace.existing(ino)
        tx = self._store.transaction()
        parent, name = record.parent, record.name
        above = self._namespace.directory(parent)
        tx.delete_edge(parent, name)
        above.nlink -= 1
        tx.put_inode(parent, above)
        now = self._namespace.clock.now_ns()
        plain = InodeRecord(record.mode, 2, record.uid, record.gid, 0, 0, now, now, now, now, 0, b"", 0)
        self._tree.insert(tx, parent, above, name, plain)
        tx.put("meta", UNMOUNTED + u64(ino), b"")
        self._mounts.remove(tx, mount_id)
        tx.commit()
        self._events.publish(0, Event(EVENT_ENTRY, parent, name))
        await self._delete_below(ino)

    def _check_idle(self, mount_id: int) -> None:
        for kind in (b"r", b"i", b"l"):
            if any(True for _ in self._store.scan("persist", kind + u64(mount_id))):
                raise FsError(errno.EBUSY, "something is not persisted yet: wait, or persist it")
        for prefix, family in ((b"s", "persist"), (b"open", "meta")):
            for key, _ in self._store.scan(family, prefix):
                record = self._store.inode(int.from_bytes(key[:8], "big"))
                if record is not None and record.mount_id == mount_id:
                    raise FsError(errno.EBUSY, "something is not persisted yet, or open for writing")
        if any(self._is_within(other, mount_id) for other in self._mounts.ids() if other != mount_id):
            raise FsError(errno.EBUSY, "another under storage is mounted below")

    def _is_within(self, other: int, mount_id: int) -> bool:
        """The mount `other` is mounted in `mount_id`."""
        mount = self._mounts.record(other)
        record = None if mount is None else self._store.inode(mount.ino)
        above = None if record is None or not record.name else self._store.inode(record.parent)
        return above is not None and above.mount_id == mount_id

    async def resume(self) -> None:
        for key, _ in self._store.scan("meta", UNMOUNTED):
            await self._delete_below(int.from_bytes(key, "big"))

    async def _delete_below(self, top: int) -> None:
        """Delete the metadata of a tree that has no name, deepest first, so that it can be resumed."""
        while self._store.inode(top) is not None:
            batch: list[int] = []
            self._collect(top, batch)
            tx = self._store.transaction()
            for ino in batch:
                self._delete(tx, ino)
            tx.commit()
            await trio.lowlevel.checkpoint()
        tx = self._store.transaction()
        tx.delete("meta", UNMOUNTED + u64(top))
        tx.commit()

    def _collect(self, top: int, batch: list[int]) -> None:
        """Up to `_INODES_PER_COMMIT` inodes below, children before their parents; the top last."""
        way = [top]
        while way and len(batch) < _INODES_PER_COMMIT:
            known = set(batch)
            children = (int.from_bytes(raw, "big") for _, raw in self._store.scan("edge", u64(way[-1])))
            below = next((child for child in children if child not in known), None)
            if below is None:
                batch.append(way.pop())
            elif self._is_leaf(below):
                batch.append(below)
            else:
                way.append(below)

    def _is_leaf(self, ino: int) -> bool:
        return not any(True for _ in self._store.scan("edge", u64(ino)))

    def _delete(self, tx: Transaction, ino: int) -> None:
        record = tx.inode(ino)
        if record is None:
            return
        if record.parent and tx.child(record.parent, record.name) == ino:
            tx.delete_edge(record.parent, record.name)
        for key, _ in self._store.scan("meta", b"link" + u64(ino)):
            tx.delete_edge(int.from_bytes(key[:8], "big"), key[8:])
            tx.delete("meta", b"link" + u64(ino) + key)
        for key, _ in self._store.scan("xattr", u64(ino)):
            tx.delete("xattr", u64(ino) + key)
        tx.delete("meta", b"orphan" + u64(ino))
        tx.delete_inode(ino)
        if record.container:
            forget_container(tx, record.container)
            container = record.container
            tx.after_commit(lambda: self._workers.drop_container(container))
