"""The inode tree on a transaction: names, link counts, hard links, orphans. No permissions, no
loading, no requests: `namespace` decides whether something may be done, this module does it whole.

Invariants (`validate.py` checks them):

* every name (edge) leads to an inode; an inode that is no directory has `nlink` names, one of them
  primary (`record.parent`, `record.name`), the others in the index b"link";
* a directory has exactly one name and `nlink` = 2 + its subdirectories;
* `nlink` 0 means orphan: without a name, in the index b"orphan", open in some session.

All methods that take a transaction change records in place and put them; callers that go on using
a record of a directory pass the same object, so that no change is lost. None awaits.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from functools import partial
from typing import Protocol

from alluxiofuse.errors import FsError, StaleError, StateError
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.master.clock import Clock
from alluxiofuse.master.containers import forget_container, give_container
from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.store import Store, Transaction, u64
from alluxiofuse.wire.master_ops import Unlinked

LINK = b"link"
ORPHAN = b"orphan"
OPEN = b"open"


class PersistHooks(Protocol):
    """What the tree tells the persist log (`persist_log.PersistLog`), in its own transaction."""

    def created(self, tx: Transaction, ino: int, record: InodeRecord) -> None: ...

    def last_name_removed(self, tx: Transaction, ino: int, record: InodeRecord) -> None: ...

    def renaming(
        self,
        tx: Transaction,
        ino: int,
        record: InodeRecord,
        new_parent: int,
        new_name: bytes,
        replaced: tuple[int, InodeRecord] | None,
    ) -> None: ...

    def orphan_freed(self, ino: int, record: InodeRecord) -> None: ...


def link_key(ino: int, parent: int, name: bytes) -> bytes:
    return LINK + u64(ino) + u64(parent) + name


class Tree:
    def __init__(
        self,
        store: Store,
        persist_log: PersistHooks,
        is_open: Callable[[int], bool],
        drop_container: Callable[[int, int], None],
        clock: Clock,
    ) -> None:
        """`is_open(ino)`: some session has it open. `drop_container(container, also_worker)`: tell
        workers that nobody wants it; called after the commit."""
        self.store = store
        self._persist_log = persist_log
        self._is_open = is_open
        self._drop_container = drop_container
        self._clock = clock
        self.orphans = {int.from_bytes(key, "big") for key, _ in store.scan("meta", ORPHAN)}
        """All orphans; each is open somewhere, so there are few."""

    # --- reading ----------------------------------------------------------------------------------

    def record(self, tx: Transaction, ino: int) -> InodeRecord:
        """StaleError when there is none."""
        record = tx.inode(ino)
        if record is None:
            raise StaleError(f"inode {ino} is gone")
        return record

    def directory(self, tx: Transaction, ino: int) -> InodeRecord:
        """StaleError, ENOTDIR; ENOENT for one that was removed while open."""
        record = self.record(tx, ino)
        if not stat.S_ISDIR(record.mode):
            raise FsError(errno.ENOTDIR)
        if record.nlink == 0:
            raise FsError(errno.ENOENT)
        return record

    def is_below(self, tx: Transaction, ino: int, ancestor: int) -> bool:
        """`ino` is `ancestor` or somewhere below it."""
        while ino != ancestor:
            if ino == ROOT_INO or ino == 0:
                return False
            ino = self.record(tx, ino).parent
        return True

    # --- changes ----------------------------------------------------------------------------------

    def insert(
        self, tx: Transaction, parent: int, parent_record: InodeRecord, name: bytes, record: InodeRecord
    ) -> int:
        """Give a new inode its first name, which must be free, and tell the persist log; its number.
        Sets parent, name and mount of `record`, and puts everything."""
        ino = self.store.take_number(b"next_ino")
        record.parent, record.name, record.mount_id = parent, name, parent_record.mount_id
        tx.put_edge(parent, name, ino)
        if stat.S_ISDIR(record.mode):
            parent_record.nlink += 1
        self._touch(tx, parent, parent_record)
        give_container(tx, record.container, ino)
        self._persist_log.created(tx, ino, record)
        tx.put_inode(ino, record)
        return ino

    def link(
        self,
        tx: Transaction,
        parent: int,
        parent_record: InodeRecord,
        name: bytes,
        ino: int,
        record: InodeRecord,
    ) -> None:
        """One more name, which must be free, for an inode that is no directory and no orphan."""
        tx.put_edge(parent, name, ino)
        tx.put("meta", link_key(ino, parent, name), b"")
        record.nlink += 1
        record.ctime_ns = self._clock.now_ns()
        tx.put_inode(ino, record)
        self._touch(tx, parent, parent_record)

    def detach(
        self,
        tx: Transaction,
        parent: int,
        name: bytes,
        ino: int,
        record: InodeRecord,
        parent_record: InodeRecord | None = None,
    ) -> Unlinked:
        """Take one name away. With the last one the inode goes, at once or, when it is open, as an
        orphan with its last release. A directory must be empty. The parent's record is read when not
        given, and put in any case."""
        if parent_record is None:
            parent_record = self.record(tx, parent)
        tx.delete_edge(parent, name)
        if stat.S_ISDIR(record.mode):
            parent_record.nlink -= 1
        self._touch(tx, parent, parent_record)
        self._drop_name(tx, parent, name, ino, record, is_absorbed=False)
        return Unlinked(ino, record.nlink, record.container)

    def _drop_name(
        self, tx: Transaction, parent: int, name: bytes, ino: int, record: InodeRecord, is_absorbed: bool
    ) -> None:
        """The inode's side of losing a name. `is_absorbed`: what the under storage has of it is
        taken over by the inode that moves in, so the persist log is not told."""
        record.ctime_ns = self._clock.now_ns()
        if not stat.S_ISDIR(record.mode) and record.nlink > 1:
            self._drop_one_of_many(tx, parent, name, ino, record)
            return
        if not is_absorbed:
            self._persist_log.last_name_removed(tx, ino, record)
        record.nlink, record.parent, record.name = 0, 0, b""
        if self._is_open(ino):
            tx.put("meta", ORPHAN + u64(ino), b"")
            tx.put_inode(ino, record)
            tx.after_commit(partial(self.orphans.add, ino))
        else:
            self._discard(tx, ino, record)

    def _drop_one_of_many(
        self, tx: Transaction, parent: int, name: bytes, ino: int, record: InodeRecord
    ) -> None:
        if (parent, name) == (record.parent, record.name):
            key, _ = next(iter(tx.scan("meta", LINK + u64(ino))))
            heir_parent, heir_name = int.from_bytes(key[:8], "big"), key[8:]
            tx.delete("meta", LINK + u64(ino) + key)
            self._persist_log.renaming(tx, ino, record, heir_parent, heir_name, None)
            record.parent, record.name = heir_parent, heir_name
        else:
            tx.delete("meta", link_key(ino, parent, name))
        record.nlink -= 1
        tx.put_inode(ino, record)

    def rename(
        self,
        tx: Transaction,
        source: tuple[int, InodeRecord, bytes],
        target: tuple[int, InodeRecord, bytes],
        moved: tuple[int, InodeRecord],
        replaced: tuple[int, InodeRecord] | None,
    ) -> Unlinked | None:
        """Move one name. `source` and `target` are (parent, its record, name); both records are the
        same object when the parents are the same. The caller has checked everything; `replaced` is
        another inode than `moved`, an empty directory when it is one."""
        (parent, parent_record, name), (new_parent, new_parent_record, new_name) = source, target
        ino, record = moved
        is_primary = (parent, name) == (record.parent, record.name)
        gone = None
        if replaced is None:
            if is_primary:
                self._persist_log.renaming(tx, ino, record, new_parent, new_name, None)
        else:
            gone = self._replace(tx, moved, target, replaced, is_primary)
        tx.delete_edge(parent, name)
        tx.put_edge(new_parent, new_name, ino)
        if is_primary:
            record.parent, record.name = new_parent, new_name
        else:
            tx.delete("meta", link_key(ino, parent, name))
            tx.put("meta", link_key(ino, new_parent, new_name), b"")
        if stat.S_ISDIR(record.mode):
            parent_record.nlink -= 1
            new_parent_record.nlink += 1
        record.ctime_ns = self._clock.now_ns()
        tx.put_inode(ino, record)
        self._touch(tx, parent, parent_record)
        if new_parent_record is not parent_record:
            self._touch(tx, new_parent, new_parent_record)
        return gone

    def _replace(
        self,
        tx: Transaction,
        moved: tuple[int, InodeRecord],
        target: tuple[int, InodeRecord, bytes],
        replaced: tuple[int, InodeRecord],
        is_primary: bool,
    ) -> Unlinked:
        """The inode at the target loses its name; the persist log hears of both. `is_primary`: it
        is the primary name of the moved inode that moves, so the under storage is to follow."""
        new_parent, new_parent_record, new_name = target
        ino, record = moved
        gone_ino, gone = replaced
        is_last = stat.S_ISDIR(gone.mode) or gone.nlink == 1
        is_absorbed = is_primary and is_last
        if is_absorbed:
            self._persist_log.renaming(tx, ino, record, new_parent, new_name, replaced)
        self._drop_name(tx, new_parent, new_name, gone_ino, gone, is_absorbed)
        if is_primary and not is_absorbed:
            self._persist_log.renaming(tx, ino, record, new_parent, new_name, None)
        if stat.S_ISDIR(gone.mode):
            new_parent_record.nlink -= 1
        return Unlinked(gone_ino, gone.nlink, gone.container)

    # --- ends -------------------------------------------------------------------------------------

    def released(self, ino: int) -> None:
        """Nobody has the inode open any more: an orphan goes now, in a transaction of its own. While
        nothing can be written it stays, for whoever asks next (`Content.sweep`)."""
        if ino not in self.orphans or self.store.is_failed:
            return
        tx = self.store.transaction()
        record = tx.inode(ino)
        tx.delete("meta", ORPHAN + u64(ino))
        if record is not None and record.nlink == 0:
            self._discard(tx, ino, record)
            tx.after_commit(partial(self._persist_log.orphan_freed, ino, record))
        try:
            tx.commit()
        except StateError:
            return
        self.orphans.discard(ino)

    def _discard(self, tx: Transaction, ino: int, record: InodeRecord) -> None:
        tx.delete_inode(ino)
        for key, _ in tx.scan("xattr", u64(ino)):
            tx.delete("xattr", u64(ino) + key)
        if record.home:
            tx.delete("meta", OPEN + u64(ino))
        for container, worker in (
            (record.container, record.home or record.held_by),
            (record.base_container, record.held_by or record.home),
        ):
            if container:
                forget_container(tx, container)
                tx.after_commit(partial(self._drop_container, container, worker))

    def _touch(self, tx: Transaction, ino: int, record: InodeRecord) -> None:
        record.mtime_ns = record.ctime_ns = self._clock.now_ns()
        tx.put_inode(ino, record)
