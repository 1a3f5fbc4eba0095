"""How damage of the tree is undone. Each function tells one finding, with the change that mends it.

Rules: an inode that may be the only trace of something is never deleted; it gets its name back, or one
in the directory `lost+found` of its mount. What the under storage has is read from there again. No
RemoveEntry is ever made: nothing is deleted in an under storage.
"""

from __future__ import annotations

import stat
import time

from alluxiofuse.findings import CantMend, Mend
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.master import places
from alluxiofuse.master.containers import forget_container
from alluxiofuse.master.fsck_check import MAX_KEPT, Check, shown
from alluxiofuse.master.persist_plan import is_clean
from alluxiofuse.master.records import SYNC_CONTENT, SYNC_NAME, InodeRecord
from alluxiofuse.master.store import Transaction, u64
from alluxiofuse.master.tree import LINK, OPEN, ORPHAN

LOST_AND_FOUND = b"lost+found"


# --- names that lead nowhere ----------------------------------------------------------------------------


def name_leads_nowhere(check: Check, parent: int, name: bytes, ino: int) -> None:
    """The inode has no record, or one that can't be read."""
    check.is_damaged = True
    check.handle(ino)
    what = f"{check.place(parent, name)}: its record (inode {ino}) is missing"
    entry = check.store.get("persist", b"s" + u64(ino))
    container = check.lost_containers.get(ino)
    if check.has_children(ino):
        check.findings.problem(
            "inode-missing",
            what + "; it was a directory, and is made again with mode 755",
            check.mend(lambda tx: _make_directory(check, tx, ino, parent, name)),
        )
    elif entry is not None and container is not None:
        if len(check.wanted_names) < MAX_KEPT:  # its bytes are at a worker: see `fsck_content`
            check.wanted_names.setdefault(ino, []).append((parent, name))
    elif entry is not None:
        check.findings.lost(
            "inode-lost",
            what + "; it was not in the under storage yet",
            check.mend(lambda tx: drop_name(check, tx, parent, name, ino)),
            "the name is removed; an empty file, a link or a directory was lost",
        )
    else:
        check.findings.problem(
            "inode-missing",
            what + "; it is read again from the under storage, without what only we knew of it",
            check.mend(lambda tx: drop_name(check, tx, parent, name, ino)),
        )


def drop_name(check: Check, tx: Transaction, parent: int, name: bytes, ino: int) -> None:
    """The name goes, with all that is known of an inode that has no record; the directory is listed
    anew at its next use."""
    tx.delete_edge(parent, name)
    tx.delete("meta", LINK + u64(ino) + u64(parent) + name)
    forget_traces(check, tx, ino)
    record = check.directory(parent)
    if record is not None:
        record.is_loaded, record.listing_fingerprint = False, b""
        tx.put_inode(parent, record)


def forget_traces(check: Check, tx: Transaction, ino: int) -> None:
    tx.delete_sync_entry(ino)
    for prefix in (OPEN, ORPHAN):
        tx.delete("meta", prefix + u64(ino))
    for key, _ in check.store.scan("xattr", u64(ino)):
        tx.delete("xattr", u64(ino) + key)
    container = check.lost_containers.get(ino)
    if container is not None:
        forget_container(tx, container)


def directory_is_missing(check: Check, ino: int, child: int) -> None:
    """Names are in it, none leads to it."""
    check.handle(ino)
    record = check.inode(child)
    mount_id = record.mount_id if record is not None else 1

    def change(tx: Transaction) -> None:
        parent = lost_and_found(check, tx, mount_id)
        _make_directory(check, tx, ino, parent, _free_name(tx, parent, b"#%d" % ino), False)

    check.findings.problem(
        "directory-missing",
        f"inode {ino}, a directory with names in it, is missing: it is made again in lost+found",
        check.mend(change),
    )


def _make_directory(
    check: Check, tx: Transaction, ino: int, parent: int, name: bytes, is_place_known: bool = True
) -> None:
    """The record of a directory of which only the names in it are known (and its own, or not). Counts
    are set by a later run."""
    above = tx.inode(parent)
    if above is None:
        raise CantMend(f"inode {parent}, the directory above, is damaged")
    if tx.inode(ino) is not None:
        return
    record = _new(above, stat.S_IFDIR | 0o755)
    record.parent, record.name = parent, name
    tx.put_edge(parent, name, ino)
    if is_place_known and tx.sync_entry(ino) is None:
        # The under storage has it; what it shows there joins what is known.
        record.is_in_ufs, record.is_loaded = True, False
    else:
        check.log.created(tx, ino, record)
    tx.put_inode(ino, record)
    above.nlink += 1
    tx.put_inode(parent, above)


def _new(above: InodeRecord, mode: int) -> InodeRecord:
    now = time.time_ns()
    nlink = 2 if stat.S_ISDIR(mode) else 1
    return InodeRecord(
        mode, nlink, above.uid, above.gid, 0, 0, now, now, now, now, 0, b"", above.mount_id
    )  # fmt: skip


# --- inodes without a name ------------------------------------------------------------------------------


def inode_has_no_name(check: Check, ino: int) -> None:
    """Its primary name does not lead to it, or its directory can't be reached."""
    record = check.inode(ino)
    if record is None:
        return
    check.is_damaged = True
    said = check.place(record.parent, record.name)
    further = next(iter(check.store.scan("meta", LINK + u64(ino))), None)
    is_place_free = (
        check.directory(record.parent) is not None
        and _is_free(check, record.parent, record.name)
        and bool(record.name)
        and (not stat.S_ISDIR(record.mode) or check.is_rooted(record.parent))
    )
    if is_place_free:
        check.findings.problem(
            "name-missing",
            f"{said} (inode {ino}) is not in its directory: the name is put back",
            check.mend(lambda tx: tx.put_edge(record.parent, record.name, ino)),
        )
    elif further is not None and not stat.S_ISDIR(record.mode):
        parent, name = int.from_bytes(further[0][:8], "big"), further[0][8:]

        def take_further(tx: Transaction) -> None:
            tx.delete("meta", LINK + u64(ino) + u64(parent) + name)
            _settle(check, tx, ino, record, parent, name)

        check.findings.problem(
            "name-missing",
            f"{said} is not a name of inode {ino} any more; {check.place(parent, name)} is",
            check.mend(take_further),
        )
    elif _is_in_ufs_only(check, record):
        check.findings.problem(
            "inode-unreachable",
            f"{said} (inode {ino}) can't be reached; its bytes are in the under storage, from where it is "
            "read again",
            check.mend(lambda tx: _forget(check, tx, ino, record)),
        )
    else:
        check.findings.problem(
            "inode-unreachable",
            f"{said} (inode {ino}) can't be reached: it is put into lost+found",
            check.mend(lambda tx: attach(check, tx, ino)),
        )


def _is_free(check: Check, parent: int, name: bytes) -> bool:
    raw = check.store.get("edge", u64(parent) + name)
    return raw is None or len(raw) != 8


def _is_in_ufs_only(check: Check, record: InodeRecord) -> bool:
    """A file of which nothing is lost when the inode goes: the under storage has it, at a place that
    we can't tell any more."""
    is_lost_place = record.location is None and check.directory(record.parent) is None
    return stat.S_ISREG(record.mode) and is_clean(record) and not record.home and is_lost_place


def _forget(check: Check, tx: Transaction, ino: int, record: InodeRecord) -> None:
    forget_traces(check, tx, ino)
    places.set_location(tx, ino, record, None)
    forget_container(tx, record.container)
    tx.delete_inode(ino)


def attach(check: Check, tx: Transaction, ino: int) -> None:
    """A name in lost+found for an inode that can't be reached."""
    record = tx.inode(ino)
    if record is None:
        raise CantMend(f"inode {ino} is damaged")
    parent = lost_and_found(check, tx, record.mount_id)
    if tx.child(record.parent, record.name) == ino:
        tx.delete_edge(record.parent, record.name)
    _settle(check, tx, ino, record, parent, _free_name(tx, parent, b"#%d" % ino))
    if stat.S_ISDIR(record.mode):
        above = tx.inode(parent)
        assert above is not None
        above.nlink += 1
        tx.put_inode(parent, above)


def _settle(check: Check, tx: Transaction, ino: int, record: InodeRecord, parent: int, name: bytes) -> None:
    """The inode's primary name is this one from now on; the persist log is told. Where the under
    storage has it is kept when that can be told."""
    location = None
    if record.is_in_ufs and not record.is_local_only:
        if record.location is not None:
            location = record.location
        elif check.is_rooted(record.parent):
            location = places.place_below(check.store, record.parent, record.name)
    if location is not None:
        places.set_location(tx, ino, record, location)
        check.log.add(tx, ino, SYNC_NAME)
    else:
        places.set_location(tx, ino, record, None)
        if not record.is_local_only:
            if stat.S_ISREG(record.mode):
                record.is_in_ufs, record.fingerprint = False, b""
            check.log.add(tx, ino, SYNC_CONTENT)
    record.parent, record.name, record.nlink = parent, name, max(1, record.nlink)
    tx.put_edge(parent, name, ino)
    tx.put_inode(ino, record)


def lost_and_found(check: Check, tx: Transaction, mount_id: int) -> int:
    """The directory of that name at the top of a mount; made when there is none."""
    mount = check.mounts.record(mount_id)
    top = ROOT_INO if mount is None else mount.ino
    above = tx.inode(top)
    if above is None or above.mount_id != mount_id or not stat.S_ISDIR(above.mode):
        raise CantMend(f"there is no place for it: mount {mount_id} is gone or damaged")
    for number in range(1000):
        name = LOST_AND_FOUND + (b"-%d" % number if number else b"")
        ino = tx.child(top, name)
        record = None if ino is None else tx.inode(ino)
        if ino is not None and record is not None and stat.S_ISDIR(record.mode):
            return ino
        if ino is None:
            break
    record = _new(above, stat.S_IFDIR | 0o700)
    ino = check.store.take_number(b"next_ino")
    record.parent, record.name = top, name
    tx.put_edge(top, name, ino)
    check.log.created(tx, ino, record)
    tx.put_inode(ino, record)
    above.nlink += 1
    tx.put_inode(top, above)
    return ino


def _free_name(tx: Transaction, parent: int, name: bytes) -> bytes:
    for number in range(1000):
        tried = name + (b"-%d" % number if number else b"")
        if tx.child(parent, tried) is None:
            return tried
    raise CantMend(f"no name like {shown(name)} is free in lost+found")


def new_file(
    check: Check, tx: Transaction, mount_id: int, name: bytes, ino: int = 0
) -> tuple[int, InodeRecord]:
    """An empty file in lost+found: (inode, record); the caller fills in its content and puts it."""
    parent = lost_and_found(check, tx, mount_id)
    above = tx.inode(parent)
    assert above is not None
    record = _new(above, stat.S_IFREG | 0o600)
    ino = ino or check.store.take_number(b"next_ino")
    record.parent, record.name = parent, _free_name(tx, parent, name)
    tx.put_edge(parent, record.name, ino)
    return ino, record


def file_again(check: Check, tx: Transaction, ino: int, names: list[tuple[int, bytes]]) -> InodeRecord:
    """The record of a file of which the names are left; the caller fills in its content and puts it."""
    (parent, name), *further = names
    above = tx.inode(parent)
    if above is None:
        raise CantMend(f"inode {parent}, its directory, is damaged")
    record = _new(above, stat.S_IFREG | 0o644)
    record.parent, record.name, record.nlink = parent, name, len(names)
    tx.delete("meta", LINK + u64(ino) + u64(parent) + name)
    for other, its_name in further:
        tx.put("meta", LINK + u64(ino) + u64(other) + its_name, b"")
    return record


# --- small things ---------------------------------------------------------------------------------------


def orphan_has_name(check: Check, parent: int, name: bytes, ino: int) -> None:
    """A name leads to an inode that says that it has none: it gets it back."""
    check.is_damaged = True

    def change(tx: Transaction) -> None:
        record = tx.inode(ino)
        above = tx.inode(parent)
        if record is None or above is None or record.nlink:
            return
        if record.mount_id != above.mount_id:
            raise CantMend("it belongs to another mount: remove the name")
        tx.delete("meta", ORPHAN + u64(ino))
        record.is_in_ufs = False
        record.location = None
        record.parent, record.name, record.nlink = parent, name, 1
        check.log.add(tx, ino, SYNC_CONTENT)
        tx.put_inode(ino, record)

    check.findings.problem(
        "orphan-named", f"{check.place(parent, name)} leads to an inode that was removed: it is back",
        check.mend(change),
    )  # fmt: skip


def clear_place(check: Check, ino: int) -> Mend:
    def change(tx: Transaction) -> None:
        record = tx.inode(ino)
        if record is not None and not record.nlink:
            record.parent, record.name = 0, b""
            tx.put_inode(ino, record)
            for key, _ in tx.scan("meta", LINK + u64(ino)):
                tx.delete("meta", LINK + u64(ino) + key)

    return check.mend(change)


def set_link_count(check: Check, ino: int, wanted: int) -> Mend:
    def change(tx: Transaction) -> None:
        record = tx.inode(ino)
        if record is not None:
            record.nlink = wanted
            tx.put_inode(ino, record)

    return check.mend(change)


def take_mount_of_parent(check: Check, ino: int) -> Mend:
    """Of a thing that is in no under storage, at least not at a place that we can tell."""

    def change(tx: Transaction) -> None:
        record = tx.inode(ino)
        above = None if record is None else tx.inode(record.parent)
        mount = None if record is None else check.mounts.record(record.mount_id)
        if record is None or above is None or ino == ROOT_INO or (mount is not None and mount.ino == ino):
            raise CantMend("unmount and mount what belongs there")
        if stat.S_ISREG(record.mode) and is_clean(record) and record.size:
            raise CantMend("its bytes are in that mount: copy it, then remove it")
        places.set_location(tx, ino, record, None)
        record.mount_id = above.mount_id
        record.is_in_ufs = record.is_local_only = False
        check.log.created(tx, ino, record)
        tx.put_inode(ino, record)

    return check.mend(change)


def root_is_wrong(check: Check) -> None:
    check.is_damaged = True

    def change(tx: Transaction) -> None:
        record = tx.inode(ROOT_INO)
        if record is None:
            return
        record.mode = stat.S_IFDIR | (record.mode & 0o7777)
        record.parent, record.name, record.nlink = ROOT_INO, b"", max(2, record.nlink)
        tx.put_inode(ROOT_INO, record)

    check.findings.problem("root-damaged", "the record of the root directory is wrong", check.mend(change))
