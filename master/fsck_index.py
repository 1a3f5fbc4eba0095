"""The check of what stands beside the tree: format, counters, mount table, the lists and indexes in
`meta`, extended attributes. What each key means: `records`."""

from __future__ import annotations

import stat
import time
import uuid
from collections.abc import Iterator

from alluxiofuse.ids import ROOT_INO, ROOT_MOUNT_ID
from alluxiofuse.master.format import new_root
from alluxiofuse.master.fsck_check import MAX_KEPT, MAX_NUMBER, Check, StoredMounts, parse, shown
from alluxiofuse.master.records import FORMAT, IntentRecord, RemoveEntry, SyncEntry
from alluxiofuse.master.replies import REPLY
from alluxiofuse.master.store import Transaction, u64
from alluxiofuse.master.tree import OPEN, ORPHAN

_SPARE = 1 << 20
"""How far a counter is set beyond what was seen: what is gone may have had higher numbers."""


def check_meta(check: Check) -> None:
    """Before the tree: what everything else needs."""
    _format(check)
    _root(check)
    _mounts(check)
    _workers(check)
    _counters(check)


def _format(check: Check) -> None:
    raw = check.store.get("meta", b"format")
    if raw is None or len(raw) != 8:
        check.findings.problem(
            "format-missing",
            "the number of the store's format is missing or damaged",
            check.mend(lambda tx: tx.put("meta", b"format", u64(FORMAT))),
        )
    found = check.store.get("meta", b"cluster_id")
    if found is not None and found.isascii() and 0 < len(found) <= 64:
        check.cluster_id = found.decode()
        return
    is_known, check.cluster_id = bool(check.cluster_id), check.cluster_id or str(uuid.uuid4())
    check.findings.problem(
        "cluster-id-missing",
        "the id of the cluster is missing or damaged"
        + (": its worker knows it" if is_known else ": a new one is made"),
        check.mend(lambda tx: tx.put("meta", b"cluster_id", check.cluster_id.encode())),
        "" if is_known else "its workers will be refused: check them together",
    )


def _root(check: Check) -> None:
    if check.inode(ROOT_INO) is not None:
        return
    check.is_damaged = True

    root = new_root(time.time_ns())
    root.nlink = 2 + sum(_is_directory(check, raw) for _, raw in check.store.scan("edge", u64(ROOT_INO)))

    def change(tx: Transaction) -> None:
        tx.put_inode(ROOT_INO, root)

    check.findings.problem(
        "root-missing", "the root directory has no record: it is made again", check.mend(change)
    )
    check.root = root


def _is_directory(check: Check, raw: bytes) -> bool:
    return len(raw) == 8 and check.directory(int.from_bytes(raw, "big")) is not None


def _mounts(check: Check) -> None:
    mounts = check.mounts
    if not isinstance(mounts, StoredMounts):
        return
    for key, raw in mounts.damaged:
        check.findings.problem(
            "mount-damaged",
            f"the entry of mount {int.from_bytes(key[:8], 'big')} in the mount table can't be read",
            check.put_away("mount", key, raw),
            "start with --ufs URI, of the root" if key == u64(ROOT_MOUNT_ID) else "restore it from a backup",
        )
    if ROOT_MOUNT_ID not in mounts.records:
        check.findings.problem(
            "root-mount-missing",
            "the mount table has no under storage for the root",
            None,
            "start the daemon with --ufs URI, as at its first start",
        )
    for mount_id, record in mounts.records.items():
        inode = check.inode(record.ino)
        if inode is not None and stat.S_ISDIR(inode.mode) and inode.mount_id == mount_id:
            continue
        if inode is None and record.ino == ROOT_INO:
            continue  # made again
        check.findings.problem(
            "mount-point-missing",
            f"{record.uri} is mounted at inode {record.ino}, which is not a directory of that mount",
            None,
            "restore the state directory from a backup; the under storage itself is not touched",
        )


def _workers(check: Check) -> None:
    seen: set[int] = set()
    for key, raw in check.store.scan("meta", b"worker"):
        worker_id = int.from_bytes(raw, "big")
        if len(raw) == 8 and 0 < worker_id < MAX_NUMBER and worker_id not in seen and key.isascii():
            seen.add(worker_id)
            continue
        check.findings.problem(
            "worker-damaged",
            f"the number of the worker {shown(key)} is damaged: it gets a new one",
            check.put_away("meta", b"worker" + key, raw),
            "check the master together with that worker",
        )


def _counters(check: Check) -> None:
    store = check.store
    highest: dict[bytes, int] = {
        b"next_ino": _last(check, "inode", b"", MAX_NUMBER),
        b"next_container": _last(check, "meta", b"c", 0x60 << 56),
        b"next_mount": _last(check, "mount", b"", MAX_NUMBER),
    }
    if highest[b"next_mount"] == ROOT_MOUNT_ID:
        highest[b"next_mount"] = 0  # the root's is not taken from the counter
    workers = [int.from_bytes(raw, "big") for _, raw in store.scan("meta", b"worker") if len(raw) == 8]
    highest[b"next_worker"] = max((number for number in workers if number < MAX_NUMBER), default=0)
    highest[b"next_id"] = _highest_id(check)
    highest[b"next_session"] = _last(check, "meta", REPLY, MAX_NUMBER)
    for counter, used in highest.items():
        require_counter(check, counter, used)


def require_counter(check: Check, counter: bytes, used: int) -> None:
    """The counter has never given `used` yet, or will give it again: damage."""
    raw = check.store.get("meta", counter)
    value = int.from_bytes(raw, "big") if raw is not None and len(raw) == 8 else 0
    is_damaged = raw is not None and (len(raw) != 8 or value >= MAX_NUMBER)
    if value > used and not is_damaged:
        return
    if not used and not is_damaged:
        return
    check.findings.problem(
        "counter",
        f"the counter {counter.decode()} is {value or 'missing'}, though {used} is in use",
        check.mend(lambda tx: tx.put("meta", counter, u64(used + _SPARE))),
    )


def _last(check: Check, family: str, prefix: bytes, limit: int) -> int:
    """The highest number that follows `prefix` in a key of 8 bytes more, below `limit`."""
    key = check.store.last_key(family, prefix + limit.to_bytes(8, "big"))
    if key is None or not key.startswith(prefix) or len(key) < len(prefix) + 8:
        return 0
    return int.from_bytes(key[len(prefix) : len(prefix) + 8], "big")


def _highest_id(check: Check) -> int:
    """Generations and task ids of the persist log."""
    found = 0
    kinds: tuple[tuple[bytes, type[SyncEntry | RemoveEntry | IntentRecord]], ...] = (
        (b"s", SyncEntry),
        (b"r", RemoveEntry),
        (b"i", IntentRecord),
    )
    for prefix, type_ in kinds:
        for _, raw in check.store.scan("persist", prefix):
            entry = parse(raw, type_)
            number = 0
            if isinstance(entry, SyncEntry | RemoveEntry):
                number = entry.generation
            elif isinstance(entry, IntentRecord):
                number = entry.task_id
            found = max(found, number if 0 < number < MAX_NUMBER else 0)
    return found


# --- the index of containers ----------------------------------------------------------------------------


def check_containers(check: Check) -> Iterator[None]:
    """Entries that no inode confirms. Those of inodes without a record are kept in mind: their bytes
    may be at a worker."""
    for key, raw in check.store.scan("meta", b"c"):
        if len(key) != 8:
            continue  # b"cluster_id"
        yield None
        container = int.from_bytes(key, "big")
        ino = int.from_bytes(raw, "big") if len(raw) == 8 else 0
        record = check.inode(ino)
        if record is not None and container in (
            record.container,
            record.base_container if record.home else 0,
        ):
            continue
        if record is None and 0 < ino < MAX_NUMBER:
            check.is_damaged = True
            if len(check.lost_containers) < MAX_KEPT:
                check.lost_containers[ino] = max(container, check.lost_containers.get(ino, 0))
            continue
        check.is_damaged = True
        check.findings.problem(
            "container-stale",
            f"the index says that container {container} is of inode {ino}, which does not have it",
            check.delete("meta", b"c" + key),
        )


# --- lists of inodes ------------------------------------------------------------------------------------


def check_lists(check: Check) -> None:
    """`OPEN` and `ORPHAN` have no inode too many. (That they have none too few the tree sees to.)"""
    for prefix, what in ((OPEN, "open for writing"), (ORPHAN, "removed")):
        for key, _ in check.store.scan("meta", prefix):
            ino = int.from_bytes(key[:8], "big")
            record = check.inode(ino) if len(key) == 8 else None
            is_member = record is not None and (bool(record.home) if prefix == OPEN else record.nlink == 0)
            if not is_member:
                check.findings.problem(
                    "list-stale",
                    f"inode {ino} is in the list of those {what}, and is not",
                    check.delete("meta", prefix + key),
                )


def check_replies(check: Check) -> None:
    """Answers that were kept can be found again."""
    for key, raw in check.store.scan("meta", REPLY):
        if len(key) != 10 or len(raw) < 8:
            check.findings.problem(
                "reply-damaged", "an answer that was kept can't be read", check.delete("meta", REPLY + key)
            )


def check_xattrs(check: Check) -> None:
    """Attributes of inodes that are gone, and of those that have no name."""
    known, is_there = 0, False
    for key, raw in check.store.scan("xattr", b""):
        ino = int.from_bytes(key[:8], "big")
        if ino != known:
            known, is_there = ino, check.inode(ino) is not None
        if len(key) <= 8 or not (is_there or ino in check.wanted_names or ino in check.handled):
            check.findings.problem(
                "xattr-stale",
                f"inode {ino} is gone and has an extended attribute",
                check.put_away("xattr", key, raw),
            )
