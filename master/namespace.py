"""Operations on names and inodes that change nothing, and what both kinds of operations share.

Every method is one synchronous step (see `loading`): it may raise `NeedsLoad` to the gate that runs
it. Errors are those of the system call of that name; an inode that is gone is StaleError.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable

from alluxiofuse.errors import FsError, StaleError
from alluxiofuse.ids import MAX_NAME_BYTES, ROOT_INO
from alluxiofuse.master.clock import Clock
from alluxiofuse.master.loading import Gate
from alluxiofuse.master.permissions import EXECUTE, READ, require
from alluxiofuse.master.persist_plan import is_clean
from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.store import Store, Transaction, u64
from alluxiofuse.master.tree import Tree
from alluxiofuse.wire.master_ops import DirPage, Unlinked
from alluxiofuse.wire.messages import NOTHING, Nothing
from alluxiofuse.wire.types import LOST, NOT_PERSISTED, PERSISTED, TO_BE_PERSISTED, Attr, Caller, DirEntry

MAX_SYMLINKS = 40
"""Followed in one path, as in Linux (path_resolution(7))."""


def check_name(name: bytes) -> None:
    """EINVAL, ENAMETOOLONG."""
    if len(name) > MAX_NAME_BYTES:
        raise FsError(errno.ENAMETOOLONG)
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise FsError(errno.EINVAL)


IsAway = Callable[[int, int], bool]
"""(worker id, container): the worker is lost, or came back without what it had."""


def persistence(record: InodeRecord, is_away: IsAway) -> int:
    holder = record.home or record.held_by
    if holder and record.size and not is_clean(record) and is_away(holder, record.container):
        return LOST
    if record.is_local_only:
        return NOT_PERSISTED
    return PERSISTED if is_clean(record) and record.location is None else TO_BE_PERSISTED


class Namespace:
    def __init__(
        self,
        store: Store,
        tree: Tree,
        gate: Gate,
        clock: Clock,
        is_readonly: Callable[[int], bool],
        is_away: IsAway,
    ) -> None:
        """`is_readonly(mount_id)`."""
        self._is_away = is_away
        self.store = store
        self.tree = tree
        self.gate = gate
        self.clock = clock
        self._is_readonly = is_readonly
        self._cache_s = gate.loader.cache_s

    # --- shared -----------------------------------------------------------------------------------

    def attr(self, ino: int, r: InodeRecord) -> Attr:
        return self._attr(ino, r, self._cache_s(r))

    def _attr(self, ino: int, r: InodeRecord, cache_s: float) -> Attr:
        return Attr(
            ino,
            r.mode,
            r.nlink,
            r.uid,
            r.gid,
            r.rdev,
            r.size,
            r.atime_ns,
            r.mtime_ns,
            r.ctime_ns,
            r.btime_ns,
            r.container,
            r.home,
            persistence(r, self._is_away),
            r.mount_id,
            cache_s,
            r.mtime_set_at_ns,
        )

    def detach(self, tx: Transaction, parent: int, name: bytes, ino: int, record: InodeRecord) -> Unlinked:
        """Take one name away (see `Tree.detach`). No checks, no events: the caller's."""
        return self.tree.detach(tx, parent, name, ino, record)

    def require_writable(self, record: InodeRecord) -> None:
        """EROFS in a read-only mount."""
        if self._is_readonly(record.mount_id):
            raise FsError(errno.EROFS)

    def existing(self, ino: int) -> InodeRecord:
        """StaleError when it is gone."""
        record = self.store.inode(ino)
        if record is None:
            raise StaleError(f"inode {ino} is gone")
        return record

    def directory(self, ino: int) -> InodeRecord:
        """StaleError, ENOTDIR."""
        record = self.existing(ino)
        if not stat.S_ISDIR(record.mode):
            raise FsError(errno.ENOTDIR)
        return record

    def child(self, parent: int, parent_record: InodeRecord, name: bytes) -> int | None:
        """Inode of a name that has been loaded if need be; None when there is none."""
        child = self.store.child(parent, name)
        self.gate.child(parent, parent_record, name, child)
        return child

    # --- operations -------------------------------------------------------------------------------

    def lookup(self, who: Caller, parent: int, name: bytes) -> Attr:
        parent_record = self.directory(parent)
        require(who, parent_record, EXECUTE)
        return self.attr(*self._named(parent, parent_record, name))

    def getattr(self, ino: int) -> Attr:
        record = self.existing(ino)
        self.gate.fresh(ino, record)
        return self.attr(ino, record)

    def readdir(self, who: Caller, ino: int, after: bytes, limit: int) -> DirPage:
        record = self.directory(ino)
        require(who, record, READ)
        if not after or not record.is_loaded:
            # Compared once for each listing: a large directory takes longer than its sync interval, and
            # each of its pages would have all of it compared again.
            self.gate.children(ino, record)
        entries: list[DirEntry] = []
        inode, attr = self.store.inode, self._attr
        cache_s = self.gate.loader.listed_cache_s(ino, record)
        for name, value in self.store.scan("edge", u64(ino), after or None):
            if len(entries) == limit:
                return DirPage(entries, False)
            child = int.from_bytes(value, "big")
            child_record = inode(child)
            if child_record is not None:
                entries.append(DirEntry(name, attr(child, child_record, cache_s(child_record))))
        return DirPage(entries, True)

    def access(self, who: Caller, ino: int, mask: int) -> Nothing:
        record = self.existing(ino)
        require(who, record, mask)
        if mask & 2 and not stat.S_ISCHR(record.mode) and not stat.S_ISBLK(record.mode):
            self.require_writable(record)
        return NOTHING

    def readlink(self, ino: int) -> bytes:
        record = self.existing(ino)
        if not stat.S_ISLNK(record.mode):
            raise FsError(errno.EINVAL)
        self.gate.fresh(ino, record)
        return record.target

    def resolve(self, who: Caller, path: bytes, follow: bool) -> list[Attr]:
        """Attributes of the root, of every directory on the (physical) way, and of what the path
        leads to. Symlinks on the way are always followed, the last one when `follow`; absolute ones
        start at the root of the namespace."""
        way: list[tuple[int, InodeRecord]] = [(ROOT_INO, self.existing(ROOT_INO))]
        todo = _parts(path)
        must_be_directory = path.endswith((b"/", b"/."))
        followed = 0
        while todo:
            part = todo.pop()
            ino, record = way[-1]
            if not stat.S_ISDIR(record.mode):
                raise FsError(errno.ENOTDIR)
            require(who, record, EXECUTE)
            if part in (b".", b".."):
                if part == b".." and len(way) > 1:
                    way.pop()
                continue
            child, child_record = self._named(ino, record, part)
            if not stat.S_ISLNK(child_record.mode) or not (todo or follow or must_be_directory):
                way.append((child, child_record))
                continue
            followed += 1
            if followed > MAX_SYMLINKS:
                raise FsError(errno.ELOOP)
            if child_record.target.startswith(b"/"):
                del way[1:]
            todo += _parts(child_record.target)
        if must_be_directory and not stat.S_ISDIR(way[-1][1].mode):
            raise FsError(errno.ENOTDIR)
        return [self.attr(ino, record) for ino, record in way]

    def _named(self, parent: int, parent_record: InodeRecord, name: bytes) -> tuple[int, InodeRecord]:
        """ENOENT."""
        check_name(name)
        child = self.child(parent, parent_record, name)
        if child is None:
            raise FsError(errno.ENOENT)
        return child, self.existing(child)


def _parts(path: bytes) -> list[bytes]:
    """Components, the first one last."""
    return [part for part in reversed(path.split(b"/")) if part]
