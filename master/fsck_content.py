"""Which containers the master wants from workers, and how its side of the content is mended.

`wanted` is what a check of master and worker together joins with what the workers have; nothing here
knows workers' files.
"""

from __future__ import annotations

import heapq
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from alluxiofuse.findings import CantMend, Mend
from alluxiofuse.ids import DEFAULT_BLOCK_BYTES, ROOT_MOUNT_ID
from alluxiofuse.master import fsck_mend
from alluxiofuse.master.containers import give_container
from alluxiofuse.master.fsck_check import MAX_NUMBER, Check, parse
from alluxiofuse.master.persist_plan import is_clean
from alluxiofuse.master.records import SYNC_CONTENT, InodeRecord, SyncEntry
from alluxiofuse.master.store import Transaction, u64
from alluxiofuse.master.tree import OPEN


@dataclass(slots=True)
class Wanted:
    """A container that the master knows of."""

    container: int
    ino: int
    """0: the index has it, and its inode is gone without a trace of its names."""
    size: int = 0
    worker_id: int = 0
    """The worker that surely has it, or where it is open for writing; 0: none, or unknown."""
    is_dirty: bool = False
    """Nothing but a worker has these bytes."""
    is_open: bool = False
    """Open for writing."""
    is_base: bool = False
    """What a file that is open for writing was made from."""
    base: int = 0
    """Of one that is open: the container that counts if nothing was written, and is only at a worker;
    0: none is needed."""
    names: list[tuple[int, bytes]] = field(default_factory=list)
    """Of a file whose record is missing: its names. It is made again."""
    is_orphan: bool = False
    """Removed while it was open: nobody misses it."""


def wanted(check: Check) -> Iterator[Wanted]:
    """Every container of the index, and those that are missing in it; ascending."""
    missing = ((container, ino) for container, ino in sorted(check.unindexed.items()))
    for container, ino in heapq.merge(_indexed(check), missing):
        yield _wanted(check, container, ino)


def _indexed(check: Check) -> Iterator[tuple[int, int]]:
    for key, raw in check.store.scan("meta", b"c"):
        if len(key) == 8 and len(raw) == 8:
            container, ino = int.from_bytes(key, "big"), int.from_bytes(raw, "big")
            if container not in check.unindexed:
                yield container, ino if ino < MAX_NUMBER else 0


def _wanted(check: Check, container: int, ino: int) -> Wanted:
    record = check.inode(ino)
    if record is None:
        return Wanted(container, ino, is_dirty=True, names=check.wanted_names.get(ino, []))
    if record.container == container:
        found = Wanted(container, ino, record.size, record.home or record.held_by)
        found.is_orphan = record.nlink == 0
        found.is_open = record.home != 0
        found.is_dirty = stat.S_ISREG(record.mode) and not is_clean(record)
        if found.is_open and record.base_container and record.base_size:
            is_in_ufs = record.is_in_ufs and record.ufs_container == record.base_container
            found.base = 0 if is_in_ufs else record.base_container
        return found
    if record.home and record.base_container == container:
        return Wanted(container, ino, record.base_size, record.held_by, is_base=True)
    return Wanted(container, 0)


def workers(check: Check) -> dict[str, int]:
    """uuid -> id, of all workers that ever registered."""
    found = {}
    for key, raw in check.store.scan("meta", b"worker"):
        worker_id = int.from_bytes(raw, "big")
        if len(raw) == 8 and key.isascii() and 0 < worker_id < MAX_NUMBER:
            found[key.decode()] = worker_id
    return found


def next_container(check: Check) -> int:
    """Containers from here on were never given to anything."""
    raw = check.store.get("meta", b"next_container")
    return int.from_bytes(raw, "big") if raw is not None and len(raw) == 8 else 0


# --- mending --------------------------------------------------------------------------------------------


def name_worker(check: Check, uuid: str) -> Mend:
    """An id for a worker that the master does not know."""

    def change(tx: Transaction) -> None:
        tx.put("meta", b"worker" + uuid.encode(), u64(check.store.take_number(b"next_worker")))

    return check.mend(change)


def set_size(check: Check, ino: int, size: int) -> Mend:
    """The file ends where its bytes end."""

    def change(tx: Transaction) -> None:
        record = tx.inode(ino)
        if record is not None:
            record.size = size
            tx.put_inode(ino, record)

    return check.mend(change)


def set_holder(check: Check, ino: int, worker_id: int) -> Mend:
    """This worker has it."""

    def change(tx: Transaction) -> None:
        record = tx.inode(ino)
        if record is not None:
            if record.home:
                record.home = worker_id
            else:
                record.held_by = worker_id
            tx.put_inode(ino, record)

    return check.mend(change)


def make_again(check: Check, want: Wanted, size: int, mtime_ns: int, worker_id: int, is_open: bool) -> Mend:
    """A file whose record is missing, of its names and the bytes that a worker has."""

    def change(tx: Transaction) -> None:
        record = fsck_mend.file_again(check, tx, want.ino, want.names)
        _fill(check, tx, want.ino, record, want.container, size, mtime_ns, worker_id, is_open)

    return check.mend(change)


def salvage(
    check: Check, container: int, ino: int, size: int, mtime_ns: int, worker_id: int, is_open: bool
) -> Mend:
    """Bytes that no file wants become one in lost+found. `ino`: the number that it had; 0: unknown."""

    def change(tx: Transaction) -> None:
        if not worker_id:
            raise CantMend("the master does not know the worker that has it")
        name = b"container-%d" % container
        number, record = fsck_mend.new_file(check, tx, ROOT_MOUNT_ID, name, ino)
        _fill(check, tx, number, record, container, size, mtime_ns, worker_id, is_open)

    return check.mend(change)


def _fill(
    check: Check,
    tx: Transaction,
    ino: int,
    record: InodeRecord,
    container: int,
    size: int,
    mtime_ns: int,
    worker_id: int,
    is_open: bool,
) -> None:
    record.container, record.size = container, size
    record.mtime_ns = mtime_ns or record.mtime_ns  # 0: open for writing, and nothing was written
    record.block_bytes = DEFAULT_BLOCK_BYTES
    if is_open:
        record.home = worker_id
        tx.put("meta", OPEN + u64(ino), b"")
    else:
        record.held_by = worker_id
    give_container(tx, container, ino)
    raw = tx.get("persist", b"s" + u64(ino))
    if raw is None or isinstance(parse(raw, SyncEntry), SyncEntry):
        check.log.add(tx, ino, SYNC_CONTENT)
    tx.put_inode(ino, record)


def drop_names(check: Check, want: Wanted) -> Mend:
    """Of a file whose record is missing, and whose bytes are nowhere."""

    def change(tx: Transaction) -> None:
        for parent, name in want.names:
            fsck_mend.drop_name(check, tx, parent, name, want.ino)

    return check.mend(change)


def names_of(check: Check, want: Wanted) -> str:
    """For people."""
    if want.names:
        return check.place(*want.names[0])
    return check.path(want.ino)


def older_version(check: Check, want: Wanted) -> str:
    """What the under storage has of it, for people; "" when nothing."""
    record = check.inode(want.ino)
    if record is None or not record.is_in_ufs:
        return ""
    mount = check.mounts.record(record.mount_id)
    return "" if mount is None else f"an older version is in {mount.uri}"
