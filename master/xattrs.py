"""Extended attributes: xattr(7), kept in the master only. Every method is one synchronous step."""

from __future__ import annotations

import errno
import stat

from alluxiofuse.errors import FsError
from alluxiofuse.master.events import Events
from alluxiofuse.master.namespace import Namespace
from alluxiofuse.master.permissions import READ, WRITE, is_checked, owns, require
from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.store import Transaction, u64
from alluxiofuse.wire.master_ops import GetXattr, RemoveXattr, SetXattr
from alluxiofuse.wire.messages import NOTHING, Nothing
from alluxiofuse.wire.types import EVENT_ATTR, Caller, Event

XATTR_CREATE = 1
XATTR_REPLACE = 2
MAX_LIST_BYTES = 64 << 10
"""Of all names of one inode with their terminating NULs: XATTR_LIST_MAX of Linux."""


class Xattrs:
    def __init__(self, namespace: Namespace, events: Events) -> None:
        self._namespace = namespace
        self._store = namespace.store
        self._events = events

    def get(self, req: GetXattr) -> bytes:
        record = self._namespace.existing(req.ino)
        _check_namespace(req.who, record, req.name, for_write=False)
        value = self._store.get("xattr", u64(req.ino) + req.name)
        if value is None:
            raise FsError(errno.ENODATA)
        return value

    def list(self, ino: int) -> list[bytes]:
        self._namespace.existing(ino)
        return [name for name, _ in self._store.scan("xattr", u64(ino))]

    def set(self, req: SetXattr) -> Nothing:
        tx, record = self._begin(req.who, req.ino, req.name)
        key = u64(req.ino) + req.name
        is_there = tx.get("xattr", key) is not None
        if is_there and req.flags == XATTR_CREATE:
            raise FsError(errno.EEXIST)
        if not is_there and req.flags == XATTR_REPLACE:
            raise FsError(errno.ENODATA)
        if not is_there:
            used = sum(len(name) + 1 for name, _ in tx.scan("xattr", u64(req.ino)))
            if used + len(req.name) + 1 > MAX_LIST_BYTES:
                raise FsError(errno.ENOSPC)
        tx.put("xattr", key, req.value)
        return self._finish(tx, req.session_id, req.ino, record)

    def remove(self, req: RemoveXattr) -> Nothing:
        tx, record = self._begin(req.who, req.ino, req.name)
        key = u64(req.ino) + req.name
        if tx.get("xattr", key) is None:
            raise FsError(errno.ENODATA)
        tx.delete("xattr", key)
        return self._finish(tx, req.session_id, req.ino, record)

    def _begin(self, who: Caller, ino: int, name: bytes) -> tuple[Transaction, InodeRecord]:
        tx = self._store.transaction()
        record = self._namespace.tree.record(tx, ino)
        self._namespace.require_writable(record)
        _check_namespace(who, record, name, for_write=True)
        return tx, record

    def _finish(self, tx: Transaction, session_id: int, ino: int, record: InodeRecord) -> Nothing:
        record.ctime_ns = self._namespace.clock.now_ns()
        tx.put_inode(ino, record)
        tx.commit(NOTHING)
        self._events.publish(session_id, Event(EVENT_ATTR, ino))
        return NOTHING


def _check_namespace(who: Caller, record: InodeRecord, name: bytes, for_write: bool) -> None:
    """Which class of attributes `who` may use on such an inode. EOPNOTSUPP, EINVAL, EPERM, EACCES;
    ENODATA for reading what must not even be seen."""
    prefix, _, rest = name.partition(b".")
    if prefix not in (b"user", b"trusted", b"security"):
        raise FsError(errno.EOPNOTSUPP)
    if not rest or b"\0" in name:
        raise FsError(errno.EINVAL)
    is_root = who.uid == 0 or not is_checked(who)
    if prefix == b"user":
        if not stat.S_ISREG(record.mode) and not stat.S_ISDIR(record.mode):
            raise FsError(errno.EPERM if for_write else errno.ENODATA)
        is_sticky_dir = stat.S_ISDIR(record.mode) and bool(record.mode & stat.S_ISVTX)
        if for_write and is_sticky_dir and not owns(who, record):
            raise FsError(errno.EPERM)
        require(who, record, WRITE if for_write else READ)
    elif prefix == b"trusted" and not is_root:
        raise FsError(errno.EPERM if for_write else errno.ENODATA)
    elif for_write and not is_root:
        raise FsError(errno.EPERM)
