"""The invariants of the persist log, checked over a whole store: for tests and doubtful people.

Memory is proportional to the number of inodes.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator

from alluxiofuse.master import places
from alluxiofuse.master.persist_plan import is_clean
from alluxiofuse.master.records import (
    SYNC_CONTENT,
    SYNC_NAME,
    InodeRecord,
    IntentRecord,
    RemoveEntry,
    SyncEntry,
)
from alluxiofuse.master.store import Store
from alluxiofuse.wire.codec import decode


def persist_problems(store: Store, is_virtual_dir: Callable[[InodeRecord], bool]) -> list[str]:
    """One sentence for each broken invariant; [] when all is well. `is_virtual_dir`: a directory of a
    store that has none."""
    inodes = {int.from_bytes(key, "big"): decode(raw, InodeRecord) for key, raw in store.scan("inode", b"")}
    entries = {int.from_bytes(key, "big"): decode(raw, SyncEntry) for key, raw in store.scan("persist", b"s")}
    return [
        *_index(store, inodes),
        *_entries(inodes, entries),
        *_intents(store, entries),
        *_removals(store, inodes, is_virtual_dir),
    ]


def _index(store: Store, inodes: dict[int, InodeRecord]) -> Iterator[str]:
    indexed = {}
    for key, raw in store.scan("persist", b"l"):
        indexed[int.from_bytes(raw, "big")] = (int.from_bytes(key[:8], "big"), key[8:])
    for ino, at in indexed.items():
        record = inodes.get(ino)
        if record is None or (record.mount_id, record.location) != at:
            yield f"the index says that inode {ino} is at {at}, its record does not"
    for ino, record in inodes.items():
        if record.location is not None and record.parent and ino not in indexed:
            yield f"inode {ino} has a location that is not in the index"


def _entries(inodes: dict[int, InodeRecord], entries: dict[int, SyncEntry]) -> Iterator[str]:
    for ino, record in inodes.items():
        what = entries[ino].what if ino in entries else 0
        if not record.parent or record.is_local_only:
            continue
        if record.location is not None and not what & SYNC_NAME:
            yield f"inode {ino} is not where it belongs, and no entry says so"
        if record.location is not None and not record.is_in_ufs:
            yield f"inode {ino} has a location, but is not in the under storage"
        if stat.S_ISREG(record.mode) and not is_clean(record) and not record.home and not what & SYNC_CONTENT:
            yield f"inode {ino} is dirty, and no entry says so"
    for ino in entries:
        if ino not in inodes or not inodes[ino].parent:
            yield f"there is an entry for inode {ino}, which is gone"


def _intents(store: Store, entries: dict[int, SyncEntry]) -> Iterator[str]:
    found = {}
    for key, raw in store.scan("persist", b"i"):
        intent = decode(raw, IntentRecord)
        mount_id, path = int.from_bytes(key[:8], "big"), key[8:]
        found[intent.ino, path] = intent
        entry = entries.get(intent.ino)
        is_removed = store.transaction().remove_entry(mount_id, path) is not None
        if (entry is None or entry.intent != path) and not is_removed:
            yield f"nobody will find the intent of inode {intent.ino} at {path!r}"
    for ino, entry in entries.items():
        if entry.intent is not None and (ino, entry.intent) not in found:
            yield f"inode {ino} has an intent at {entry.intent!r} that is not recorded"


def _removals(
    store: Store, inodes: dict[int, InodeRecord], is_virtual_dir: Callable[[InodeRecord], bool]
) -> Iterator[str]:
    removals = {
        (int.from_bytes(key[:8], "big"), key[8:]): decode(raw, RemoveEntry)
        for key, raw in store.scan("persist", b"r")
    }
    taken: dict[tuple[int, bytes], int] = {}
    for ino, record in inodes.items():
        if not record.is_in_ufs or not record.parent or is_virtual_dir(record):
            continue
        location = places.location_path(store, ino, record)
        if location is None or places.is_mount_root(store, ino, record):
            continue
        at = (record.mount_id, location)
        if at in removals:
            yield f"inode {ino} has its bytes at {location!r}, which is to be removed"
        if at in taken:
            yield f"inodes {ino} and {taken[at]} both have their bytes at {location!r}"
        taken[at] = ino
