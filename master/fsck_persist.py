"""The check of the persist log, against the tree as it is (architecture.md, "The persist log").

What the persister copes with by itself is no damage: an entry of an inode that has nothing left to
do, an intent whose outcome is unknown. Mending never makes a RemoveEntry, so that nothing is deleted
in an under storage that a person did not remove.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator

from alluxiofuse.ids import ROOT_MOUNT_ID
from alluxiofuse.master import places
from alluxiofuse.master.fsck_check import MAX_NUMBER, Check, parse, shown
from alluxiofuse.master.persist_plan import is_clean
from alluxiofuse.master.records import (
    SYNC_CONTENT,
    SYNC_NAME,
    InodeRecord,
    IntentRecord,
    RemoveEntry,
    SyncEntry,
)
from alluxiofuse.master.store import Transaction, u64

_ALL_BITS = 15


def check_persist(check: Check) -> Iterator[None]:
    """Entries first, then what inodes lack. Gives a None for each inode, for a progress bar."""
    _entries(check)
    _intents(check)
    _locations(check)
    _removals(check)
    yield from _inodes(check)


# --- SyncEntry ------------------------------------------------------------------------------------------


def _entries(check: Check) -> None:
    for key, raw in check.store.scan("persist", b"s"):
        ino = int.from_bytes(key[:8], "big")
        entry = parse(raw, SyncEntry)
        if not isinstance(entry, SyncEntry) or len(key) != 8 or entry.what & ~_ALL_BITS:
            check.findings.problem(
                "entry-damaged",
                f"the entry of inode {ino} in the persist log can't be read",
                check.put_away("persist", b"s" + key, raw),
            )
            continue
        record = check.inode(ino)
        is_expected = ino in check.wanted_names or ino in check.handled
        if (record is None or not record.parent) and not is_expected:
            check.findings.problem(
                "entry-stale",
                f"inode {ino} has no name and an entry in the persist log",
                check.delete("persist", b"s" + key),
            )
        elif entry.intent is not None and record is not None:
            intent = _intent_at(check, record.mount_id, entry.intent)
            if intent is None or intent.ino != ino:
                check.findings.problem(
                    "intent-missing",
                    f"{check.path(ino)}: that it is being put at {shown(entry.intent)} is not recorded",
                    check.mend(lambda tx, ino=ino: _put_again(tx, ino)),  # type: ignore[misc]
                )


def _put_again(tx: Transaction, ino: int) -> None:
    entry = tx.sync_entry(ino)
    if entry is not None:
        entry.intent, entry.what = None, entry.what | SYNC_CONTENT
        tx.put_sync_entry(ino, entry)


# --- IntentRecord ---------------------------------------------------------------------------------------


def _intent_at(check: Check, mount_id: int, path: bytes) -> IntentRecord | None:
    raw = check.store.get("persist", b"i" + u64(mount_id) + path)
    found = None if raw is None else parse(raw, IntentRecord)
    return found if isinstance(found, IntentRecord) else None


def _intents(check: Check) -> None:
    for key, raw in check.store.scan("persist", b"i"):
        path = key[8:]
        intent = parse(raw, IntentRecord)
        if not isinstance(intent, IntentRecord) or len(key) < 8 or not 0 < intent.ino < MAX_NUMBER:
            check.findings.problem(
                "intent-damaged",
                f"what is being put at {shown(path)} can't be read",
                check.put_away("persist", b"i" + key, raw),
            )
            continue
        raw_entry = check.store.get("persist", b"s" + u64(intent.ino))
        entry = None if raw_entry is None else parse(raw_entry, SyncEntry)
        is_mine = isinstance(entry, SyncEntry) and entry.intent == path
        if not is_mine and check.store.get("persist", b"r" + key) is None:
            check.findings.problem(
                "intent-stale",
                f"nobody will ever see what became of inode {intent.ino} at {shown(path)}",
                check.delete("persist", b"i" + key),
            )


# --- the index of locations -----------------------------------------------------------------------------


def _locations(check: Check) -> None:
    for key, raw in check.store.scan("persist", b"l"):
        ino = int.from_bytes(raw, "big") if len(raw) == 8 else 0
        at = (int.from_bytes(key[:8], "big"), key[8:])
        record = check.inode(ino)
        if record is None or not record.parent or (record.mount_id, record.location) != at:
            check.findings.problem(
                "location-stale",
                f"the index says that inode {ino} is at {shown(at[1])}; its record does not",
                check.delete("persist", b"l" + key),
            )
            continue
        if is_virtual(check, record):
            continue
        for other in _holders(check, *at):
            rival = check.inode(other)
            if other != ino and rival is not None and not is_virtual(check, rival):
                _shared_place(check, ino, other, at[1])


def _shared_place(check: Check, ino: int, other: int, path: bytes) -> None:
    """Two inodes say that their bytes are at one place; one with newer bytes here can do without."""

    def change(tx: Transaction) -> None:
        record = tx.inode(ino)
        if record is not None:
            places.set_location(tx, ino, record, None)
            record.is_in_ufs = False
            check.log.add(tx, ino, SYNC_CONTENT)
            tx.put_inode(ino, record)

    record = check.inode(ino)
    is_dirty = record is not None and stat.S_ISREG(record.mode) and not is_clean(record)
    check.findings.problem(
        "place-shared",
        f"{check.path(ino)} and {check.path(other)} both have their bytes at {shown(path)} in the under "
        "storage",
        check.mend(change) if is_dirty else None,
        "compare both with what the under storage has, and write the wrong one anew",
    )


def _holders(check: Check, mount_id: int, path: bytes) -> Iterator[int]:
    """The inodes whose bytes are at `path` by their own location, or by that of a directory above (or
    the mount's), over names that have none of their own."""
    mount = check.mounts.record(mount_id)
    starts: list[tuple[int, bytes]] = []
    if mount is not None:
        starts.append((mount.ino, path))
    for prefix in (*places.prefixes(path), path):
        ino = places.located_at(check.store, mount_id, prefix)
        if ino is not None:
            starts.append((ino, path[len(prefix) + 1 :]))
    for at, rest in starts:
        found = _descend(check, at, rest, mount_id)
        if found:
            yield found


def _descend(check: Check, ino: int, rest: bytes, mount_id: int) -> int:
    """The inode below `ino` by these names, when what it and those on the way say of their location is
    nothing; 0: none, or the under storage has nothing of it."""
    record = check.inode(ino)
    for name in rest.split(b"/") if rest else ():
        child = check.child(ino, name)
        record = None if child is None else check.inode(child)
        if child is None or record is None or record.mount_id != mount_id or record.location is not None:
            return 0
        if (record.parent, record.name) != (ino, name):
            return 0
        ino = child
    return ino if record is not None and record.is_in_ufs else 0


# --- RemoveEntry ----------------------------------------------------------------------------------------


def _removals(check: Check) -> None:
    for key, raw in check.store.scan("persist", b"r"):
        mount_id, path = int.from_bytes(key[:8], "big"), key[8:]
        entry = parse(raw, RemoveEntry)
        if not isinstance(entry, RemoveEntry) or len(key) < 8:
            check.findings.problem(
                "removal-damaged",
                f"the entry for the removal of {shown(path)} can't be read",
                check.put_away("persist", b"r" + key, raw),
                "a removed file may show up again: remove it again",
            )
            continue
        if not check.mounts.is_known(mount_id):
            if mount_id != ROOT_MOUNT_ID and not check.mounts.is_dying(mount_id):
                check.findings.problem(
                    "removal-stale",
                    f"{shown(path)} is to be removed in mount {mount_id}, which is not in the mount table",
                    check.put_away("persist", b"r" + key, raw),
                )
            continue
        for ino in _holders(check, mount_id, path):
            record = check.inode(ino)
            if record is None or is_virtual(check, record):
                continue
            check.findings.problem(
                "removal-of-live",
                f"{check.path(ino)} has its bytes at {shown(path)}, which is to be removed: it is kept",
                check.delete("persist", b"r" + key),
            )
            break


def is_virtual(check: Check, record: InodeRecord) -> bool:
    """A directory of a store that has none."""
    return stat.S_ISDIR(record.mode) and not check.mounts.capabilities(record.mount_id).has_directories


# --- what inodes lack -----------------------------------------------------------------------------------


def _inodes(check: Check) -> Iterator[None]:
    for key, _ in check.store.scan("inode", b""):
        yield None
        ino = int.from_bytes(key, "big")
        record = check.inode(ino)
        if record is None or not record.parent or record.is_local_only or not record.nlink:
            continue
        if record.location is None and (not stat.S_ISREG(record.mode) or is_clean(record) or record.home):
            continue
        if not check.mounts.is_known(record.mount_id):
            continue
        raw = check.store.get("persist", b"s" + u64(ino))
        entry = None if raw is None else parse(raw, SyncEntry)
        what = entry.what if isinstance(entry, SyncEntry) else 0
        if record.location is not None:
            _location(check, ino, record, what)
        is_dirty = stat.S_ISREG(record.mode) and not is_clean(record) and not record.home
        if is_dirty and not what & SYNC_CONTENT:
            check.findings.problem(
                "entry-missing",
                f"{check.path(ino)} is not in the under storage, and would never get there",
                check.mend(lambda tx, ino=ino: check.log.add(tx, ino, SYNC_CONTENT)),  # type: ignore[misc]
            )


def _location(check: Check, ino: int, record: InodeRecord, what: int) -> None:
    location = record.location
    assert location is not None

    def forget(tx: Transaction) -> None:
        now = tx.inode(ino)
        if now is not None:
            places.set_location(tx, ino, now, None)
            check.log.add(tx, ino, SYNC_CONTENT)
            tx.put_inode(ino, now)

    if not record.is_in_ufs:
        check.findings.problem(
            "location-void",
            f"{check.path(ino)} has a place in the under storage, but is not there",
            check.mend(forget),
        )
        return
    indexed = places.located_at(check.store, record.mount_id, location)
    if indexed != ino:
        rival = None if indexed is None else check.inode(indexed)
        if rival is not None and rival.location == location and rival.mount_id == record.mount_id:
            _shared_place(check, ino, indexed or 0, location)
            return
        check.findings.problem(
            "location-unindexed",
            f"{check.path(ino)} is at {shown(location)} in the under storage, which the index does not say",
            check.mend(lambda tx: tx.put("persist", b"l" + u64(record.mount_id) + location, u64(ino))),
        )
    if not what & SYNC_NAME:
        check.findings.problem(
            "entry-missing",
            f"{check.path(ino)} is not where it belongs in the under storage, and would never get there",
            check.mend(lambda tx: check.log.add(tx, ino, SYNC_NAME)),
        )
