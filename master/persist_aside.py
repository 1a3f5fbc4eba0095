"""Bytes of files that were removed or replaced while a session has them open (orphans).

They stay in the under storage until the last session lets go: the RemoveEntry at their place names the
inode as its holder. When that place is wanted, by an inode that belongs there or by a directory that
is to go, they are set aside first, to the temporary name that a circle of renames uses too. Before the
first byte goes there a RemoveEntry with the same holder says so: whatever a crash leaves at the
temporary name is found again, by whoever goes on, and removed with the orphan.

Plain functions on a transaction (or the store, for reading).
"""

from __future__ import annotations

from alluxiofuse.master import places
from alluxiofuse.master.persist_log import PersistLog
from alluxiofuse.master.records import INTENT_RENAME, InodeRecord, IntentRecord, RemoveEntry
from alluxiofuse.master.store import Transaction, decode_record, u64
from alluxiofuse.ufs.base import UfsEntry

MOVING_PREFIX = b".alluxiofuse-moving-"
"""At the top of a mount: what has to be out of the way. Listings hide it."""


def temporary_path(ino: int) -> bytes:
    """Numbers are never reused, so nothing but bytes of this inode is ever there."""
    return MOVING_PREFIX + b"%d" % ino


def is_held(tx: places.Reader, path: bytes, entry: RemoveEntry) -> bool:
    """What is at `path` is an orphan's, and not to be deleted yet."""
    record = _holder(tx, entry)
    return record is not None and (record.location != path or _has_bytes(record))


def is_needed(tx: places.Reader, path: bytes, entry: RemoveEntry) -> bool:
    """Who has the orphan open may have to read it from `path`. What workers have cached of it does not
    count: they may evict it."""
    record = _holder(tx, entry)
    return record is not None and record.location == path and _has_bytes(record)


def _holder(tx: places.Reader, entry: RemoveEntry) -> InodeRecord | None:
    if not entry.holder or tx.get("meta", b"orphan" + u64(entry.holder)) is None:
        return None
    return tx.inode(entry.holder)


def _has_bytes(record: InodeRecord) -> bool:
    """The under storage has content that is still somebody's, not an older one."""
    if not record.is_in_ufs or not record.ufs_size:
        return False
    return record.ufs_container in (record.container, record.base_container)


def uncertain_at(tx: places.Reader, mount_id: int, ino: int) -> bytes | None:
    """The path to which an atomic rename of the inode has or has not been done; nobody has looked yet."""
    for path, raw in tx.scan("persist", b"i" + u64(mount_id)):
        intent = decode_record(raw, IntentRecord, "an entry of the persist log")
        if intent.ino == ino and intent.kind == INTENT_RENAME:
            return path
    return None


def is_in_the_way(tx: places.Reader, mount_id: int, root: int, path: bytes, has_directories: bool) -> bool:
    """The namespace below `root`, the mount's directory, has something at `path`, or a directory above
    it is to be removed."""
    if places.resolve(tx, root, path) is not None:
        return True
    if not has_directories:
        return False
    key = b"r" + u64(mount_id)
    return any(tx.get("persist", key + prefix) is not None for prefix in places.prefixes(path))


def begin(tx: Transaction, log: PersistLog, mount_id: int, ino: int) -> None:
    """Bytes of the orphan may be at its temporary path from now on."""
    entry = tx.remove_entry(mount_id, temporary_path(ino))
    if entry is None or entry.holder != ino:
        log.remove(tx, mount_id, temporary_path(ino), False, ino)


def follow(
    tx: Transaction, ino: int, old: bytes, new: bytes, before: bytes = b"", after: bytes = b""
) -> bool:
    """The bytes of an orphan, which were at `old`, are at `new`, and their fingerprint `before` is `after`
    now. False: it is no orphan (any more), or its bytes were not there."""
    record = tx.inode(ino)
    if record is None or not is_orphan_at(record, old):
        return False
    record.location = new
    if record.fingerprint == before:
        record.fingerprint = after
    tx.put_inode(ino, record)
    return True


def is_orphan_at(record: InodeRecord, path: bytes) -> bool:
    return not record.parent and record.is_in_ufs and record.location == path


def end(
    tx: Transaction,
    log: PersistLog,
    mount_id: int,
    removal: tuple[bytes, int],
    ino: int,
    found: tuple[bytes, UfsEntry] | None,
    is_moved: bool,
) -> None:
    """The orphan `ino` has its bytes at its temporary path: `found`, and the fingerprint that they had
    before. None: they are nowhere, or the store does not let them go there, and readers have to do
    without. `removal`: path and generation of the entry that they made wait. `is_moved`: nothing is
    left there."""
    path, generation = removal
    if found is not None:
        follow(tx, ino, path, temporary_path(ino), found[0], found[1].fingerprint)
    entry = tx.remove_entry(mount_id, path)
    if entry is None or entry.generation != generation:
        return
    if found is not None and is_moved:
        tx.delete_remove_entry(mount_id, path)
    else:
        log.remove(tx, mount_id, path, False)
