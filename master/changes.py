"""Operations that change names and attributes. Every method is one synchronous step (see
`loading`): checks, one transaction, commit, events. Rules follow Linux; who may do what is in
`permissions`, how the tree changes in `tree`.
"""

from __future__ import annotations

import errno
import stat

from alluxiofuse.errors import FsError
from alluxiofuse.ids import MAX_SYMLINK_BYTES, ROOT_INO
from alluxiofuse.master import permissions
from alluxiofuse.master.events import Events
from alluxiofuse.master.namespace import Namespace, check_name
from alluxiofuse.master.permissions import EXECUTE, WRITE, require
from alluxiofuse.master.persist_log import PersistLog
from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.store import Transaction
from alluxiofuse.units import clamp_ns
from alluxiofuse.wire.master_ops import (
    RENAME_NOREPLACE,
    Link,
    Mkdir,
    Mknod,
    Rename,
    Renamed,
    Rmdir,
    SetAttr,
    Symlink,
    Unlink,
    Unlinked,
)
from alluxiofuse.wire.messages import NOTHING, Nothing
from alluxiofuse.wire.types import EVENT_ATTR, EVENT_ENTRY, Attr, Caller, Event

NO_ID = 0xFFFF_FFFF
"""(uid_t) -1, which chown(2) takes as "leave it": nobody's id."""
_NODE_TYPES = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)


class Changes:
    def __init__(self, namespace: Namespace, persist_log: PersistLog, events: Events) -> None:
        self._namespace = namespace
        self._store = namespace.store
        self._tree = namespace.tree
        self._gate = namespace.gate
        self._now_ns = namespace.clock.now_ns
        self._persist_log = persist_log
        self._events = events

    # --- shared -----------------------------------------------------------------------------------

    def new_record(self, who: Caller, parent_record: InodeRecord, mode: int) -> InodeRecord:
        """Of an inode that `who` creates in that directory; it has no name yet."""
        mode, uid, gid = permissions.creation_owner(who, parent_record, mode)
        now = self._now_ns()
        nlink = 2 if stat.S_ISDIR(mode) else 1
        record = InodeRecord(mode, nlink, uid, gid, 0, 0, now, now, now, now, 0, b"", 0)
        record.is_loaded = stat.S_ISDIR(mode)
        record.checked_at_ns = now
        if record.is_loaded:
            record.listed_at_ns = now
        return record

    def free_place(self, tx: Transaction, who: Caller, parent: int, name: bytes) -> InodeRecord:
        """The parent's record, when `who` may create the name there and nothing has it. EEXIST wins
        over permissions, as in Linux."""
        check_name(name)
        parent_record = self._tree.directory(tx, parent)
        require(who, parent_record, EXECUTE)
        child = tx.child(parent, name)
        self._gate.child(parent, parent_record, name, child)
        if child is not None:
            raise FsError(errno.EEXIST)
        self._namespace.require_writable(parent_record)
        require(who, parent_record, WRITE | EXECUTE)
        return parent_record

    def insert(
        self,
        tx: Transaction,
        session_id: int,
        parent: int,
        parent_record: InodeRecord,
        name: bytes,
        record: InodeRecord,
    ) -> Attr:
        """Name a new inode, commit, tell."""
        ino = self._tree.insert(tx, parent, parent_record, name, record)
        attr = self._namespace.attr(ino, record)
        self.finish_insert(tx, session_id, parent, name, attr)
        return attr

    def finish_insert(
        self, tx: Transaction, session_id: int, parent: int, name: bytes, answer: object
    ) -> None:
        """Commit, tell."""
        tx.commit(answer)
        self._persist_log.wake()
        self._events.publish(session_id, Event(EVENT_ENTRY, parent, name))

    def _place(
        self, tx: Transaction, who: Caller, parent: int, parent_record: InodeRecord, name: bytes
    ) -> tuple[int, InodeRecord]:
        """(inode, its record) of an existing name. ENOENT."""
        check_name(name)
        require(who, parent_record, EXECUTE)
        child = tx.child(parent, name)
        self._gate.child(parent, parent_record, name, child)
        if child is None:
            raise FsError(errno.ENOENT)
        return child, self._tree.record(tx, child)

    def _require_unmounted(self, parent_record: InodeRecord, record: InodeRecord) -> None:
        """EBUSY for a mount point: its mount is not that of its parent."""
        if record.mount_id != parent_record.mount_id:
            raise FsError(errno.EBUSY)

    def _require_empty(self, tx: Transaction, ino: int, record: InodeRecord) -> None:
        self._gate.children(ino, record)
        if not tx.is_empty("edge", ino.to_bytes(8, "big")):
            raise FsError(errno.ENOTEMPTY)

    # --- creating ---------------------------------------------------------------------------------

    def mkdir(self, req: Mkdir) -> Attr:
        tx = self._store.transaction()
        parent_record = self.free_place(tx, req.who, req.parent, req.name)
        record = self.new_record(req.who, parent_record, stat.S_IFDIR | req.mode & 0o1777)
        return self.insert(tx, req.session_id, req.parent, parent_record, req.name, record)

    def mknod(self, req: Mknod) -> Attr:
        kind = stat.S_IFMT(req.mode) or stat.S_IFREG
        if kind not in _NODE_TYPES:
            raise FsError(errno.EPERM if kind == stat.S_IFDIR else errno.EINVAL)
        is_device = kind in (stat.S_IFCHR, stat.S_IFBLK)
        if is_device and permissions.is_checked(req.who) and req.who.uid != 0:
            raise FsError(errno.EPERM)
        tx = self._store.transaction()
        parent_record = self.free_place(tx, req.who, req.parent, req.name)
        record = self.new_record(req.who, parent_record, kind | req.mode & 0o7777)
        record.rdev = req.rdev if is_device else 0
        return self.insert(tx, req.session_id, req.parent, parent_record, req.name, record)

    def symlink(self, req: Symlink) -> Attr:
        if b"\0" in req.target:
            raise FsError(errno.EINVAL)
        if len(req.target) > MAX_SYMLINK_BYTES:
            raise FsError(errno.ENAMETOOLONG)
        tx = self._store.transaction()
        parent_record = self.free_place(tx, req.who, req.parent, req.name)
        record = self.new_record(req.who, parent_record, stat.S_IFLNK | 0o777)
        record.target, record.size = req.target, len(req.target)
        return self.insert(tx, req.session_id, req.parent, parent_record, req.name, record)

    def link(self, req: Link) -> Attr:
        tx = self._store.transaction()
        record = self._tree.record(tx, req.ino)
        parent_record = self.free_place(tx, req.who, req.parent, req.name)
        if stat.S_ISDIR(record.mode):
            raise FsError(errno.EPERM)
        if record.nlink == 0:
            raise FsError(errno.ENOENT)
        if record.mount_id != parent_record.mount_id:
            raise FsError(errno.EXDEV)
        self._tree.link(tx, req.parent, parent_record, req.name, req.ino, record)
        attr = self._namespace.attr(req.ino, record)
        tx.commit(attr)
        self._events.publish(
            req.session_id, Event(EVENT_ENTRY, req.parent, req.name), Event(EVENT_ATTR, req.ino)
        )
        return attr

    # --- removing ---------------------------------------------------------------------------------

    def unlink(self, req: Unlink) -> Unlinked:
        tx = self._store.transaction()
        parent_record = self._tree.directory(tx, req.parent)
        ino, record = self._place(tx, req.who, req.parent, parent_record, req.name)
        permissions.require_removable(req.who, parent_record, record)
        if stat.S_ISDIR(record.mode):
            raise FsError(errno.EISDIR)
        self._namespace.require_writable(parent_record)
        return self._detach(tx, req, ino, record, parent_record)

    def rmdir(self, req: Rmdir) -> Nothing:
        tx = self._store.transaction()
        parent_record = self._tree.directory(tx, req.parent)
        ino, record = self._place(tx, req.who, req.parent, parent_record, req.name)
        permissions.require_removable(req.who, parent_record, record)
        if not stat.S_ISDIR(record.mode):
            raise FsError(errno.ENOTDIR)
        self._namespace.require_writable(parent_record)
        self._require_unmounted(parent_record, record)
        self._require_empty(tx, ino, record)
        self._detach(tx, req, ino, record, parent_record)
        return NOTHING

    def _detach(
        self,
        tx: Transaction,
        req: Unlink | Rmdir,
        ino: int,
        record: InodeRecord,
        parent_record: InodeRecord,
    ) -> Unlinked:
        unlinked = self._tree.detach(tx, req.parent, req.name, ino, record, parent_record)
        tx.commit(unlinked if isinstance(req, Unlink) else NOTHING)
        self._persist_log.wake()
        told = [Event(EVENT_ENTRY, req.parent, req.name)]
        if unlinked.nlink or ino in self._tree.orphans:
            told.append(Event(EVENT_ATTR, ino))
        self._events.publish(req.session_id, *told)
        return unlinked

    # --- renaming ---------------------------------------------------------------------------------

    def rename(self, req: Rename) -> Renamed:
        if req.flags & ~RENAME_NOREPLACE:
            raise FsError(errno.EINVAL)
        tx = self._store.transaction()
        is_same_parent = req.parent == req.new_parent
        # Both directories come first, in Linux as here: their errors win.
        new_parent_record = self._tree.directory(tx, req.new_parent)
        require(req.who, new_parent_record, EXECUTE)
        check_name(req.new_name)
        parent_record = new_parent_record if is_same_parent else self._tree.directory(tx, req.parent)
        ino, record = self._place(tx, req.who, req.parent, parent_record, req.name)
        target = tx.child(req.new_parent, req.new_name)
        self._gate.child(req.new_parent, new_parent_record, req.new_name, target)
        target_record = None if target is None else self._tree.record(tx, target)
        if target is not None and req.flags & RENAME_NOREPLACE:
            raise FsError(errno.EEXIST)
        self._check_loop(tx, req, ino, record, target)
        if target == ino:
            return Renamed(ino, None)
        permissions.require_removable(req.who, parent_record, record)
        replaced = None
        if target is None or target_record is None:
            require(req.who, new_parent_record, WRITE | EXECUTE)
        else:
            permissions.require_removable(req.who, new_parent_record, target_record)
            _require_same_kind(record, target_record)
            replaced = (target, target_record)
        if stat.S_ISDIR(record.mode) and not is_same_parent:
            require(req.who, record, WRITE)  # its ".." changes
        self._check_mounts(parent_record, record, new_parent_record, target_record)
        if replaced is not None and stat.S_ISDIR(record.mode):
            self._require_empty(tx, *replaced)
        gone = self._tree.rename(
            tx,
            (req.parent, parent_record, req.name),
            (req.new_parent, new_parent_record, req.new_name),
            (ino, record),
            replaced,
        )
        renamed = Renamed(ino, gone)
        tx.commit(renamed)
        self._persist_log.wake()
        self._tell_renamed(req, ino, gone)
        return renamed

    def _check_loop(
        self, tx: Transaction, req: Rename, ino: int, record: InodeRecord, target: int | None
    ) -> None:
        """EINVAL for a directory into itself, ENOTEMPTY onto one of its own ancestors."""
        if req.parent == req.new_parent:
            return
        if stat.S_ISDIR(record.mode) and self._tree.is_below(tx, req.new_parent, ino):
            raise FsError(errno.EINVAL)
        if target is not None and self._tree.is_below(tx, req.parent, target):
            raise FsError(errno.ENOTEMPTY)

    def _check_mounts(
        self,
        parent_record: InodeRecord,
        record: InodeRecord,
        new_parent_record: InodeRecord,
        target_record: InodeRecord | None,
    ) -> None:
        """EXDEV, EBUSY, EROFS."""
        if parent_record.mount_id != new_parent_record.mount_id:
            raise FsError(errno.EXDEV)
        self._require_unmounted(parent_record, record)
        if target_record is not None:
            self._require_unmounted(new_parent_record, target_record)
        self._namespace.require_writable(parent_record)

    def _tell_renamed(self, req: Rename, ino: int, gone: Unlinked | None) -> None:
        told = [
            Event(EVENT_ENTRY, req.parent, req.name),
            Event(EVENT_ENTRY, req.new_parent, req.new_name),
            Event(EVENT_ATTR, ino),
        ]
        if gone is not None and (gone.nlink or gone.ino in self._tree.orphans):
            told.append(Event(EVENT_ATTR, gone.ino))
        self._events.publish(req.session_id, *told)

    # --- attributes -------------------------------------------------------------------------------

    def setattr(self, req: SetAttr) -> Attr:
        tx = self._store.transaction()
        record = self._tree.record(tx, req.ino)
        self._namespace.require_writable(record)
        now = self._now_ns()
        if req.mode is not None:
            record.mode = permissions.changed_mode(req.who, record, req.mode)
        if req.uid is not None or req.gid is not None:
            self._chown(req, record)
        if req.atime_now or req.mtime_now or req.atime_ns is not None or req.mtime_ns is not None:
            self._utimens(req, record, now)
        record.ctime_ns = now
        if record.nlink and req.ino != ROOT_INO:
            self._persist_log.attrs_changed(tx, req.ino, record)
        tx.put_inode(req.ino, record)
        attr = self._namespace.attr(req.ino, record)
        tx.commit(attr)
        self._persist_log.wake()
        self._events.publish(req.session_id, Event(EVENT_ATTR, req.ino))
        return attr

    def _chown(self, req: SetAttr, record: InodeRecord) -> None:
        if NO_ID in (req.uid, req.gid):
            raise FsError(errno.EINVAL)
        permissions.require_chown(req.who, record, req.uid, req.gid)
        if req.mode is None:  # else the caller's kernel has taken the bits into account
            record.mode = permissions.mode_after_chown(record.mode)
        record.uid = record.uid if req.uid is None else req.uid
        record.gid = record.gid if req.gid is None else req.gid

    def _utimens(self, req: SetAttr, record: InodeRecord, now: int) -> None:
        only_now = req.atime_ns is None and req.mtime_ns is None
        permissions.require_utimens(req.who, record, only_now)
        if req.atime_now or req.atime_ns is not None:
            record.atime_ns = now if req.atime_ns is None else clamp_ns(req.atime_ns)
        if req.mtime_now or req.mtime_ns is not None:
            record.mtime_ns = now if req.mtime_ns is None else clamp_ns(req.mtime_ns)
            if record.home:
                record.mtime_set_at_ns = max(record.mtime_set_at_ns, req.written_ns)


def _require_same_kind(record: InodeRecord, target_record: InodeRecord) -> None:
    """A directory replaces only a directory, anything else only what is none."""
    if stat.S_ISDIR(record.mode) and not stat.S_ISDIR(target_record.mode):
        raise FsError(errno.ENOTDIR)
    if not stat.S_ISDIR(record.mode) and stat.S_ISDIR(target_record.mode):
        raise FsError(errno.EISDIR)
