"""Checks the invariants of the whole store: for tests, and for a person who doubts it.

Reads everything, so it is slow on a large store; memory is proportional to the number of inodes.
"""

from __future__ import annotations

import stat
from collections import defaultdict
from collections.abc import Iterator

from alluxiofuse.ids import ROOT_INO
from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.store import Store, u64
from alluxiofuse.master.tree import LINK, OPEN, ORPHAN
from alluxiofuse.wire.codec import decode

_Name = tuple[int, bytes]


def problems(store: Store) -> list[str]:
    """One sentence for each broken invariant; [] when all is well."""
    inodes = {int.from_bytes(key, "big"): decode(raw, InodeRecord) for key, raw in store.scan("inode", b"")}
    names: dict[int, list[_Name]] = defaultdict(list)
    for key, raw in store.scan("edge", b""):
        names[int.from_bytes(raw, "big")].append((int.from_bytes(key[:8], "big"), key[8:]))
    return [
        *_names(inodes, names),
        *_links(store, inodes, names),
        *_directories(inodes, names),
        *_indexes(store, inodes),
        *_containers(store, inodes),
        *_persist(store, inodes),
    ]


def _names(inodes: dict[int, InodeRecord], names: dict[int, list[_Name]]) -> Iterator[str]:
    for ino, places in names.items():
        if ino not in inodes:
            yield f"{places} lead to inode {ino}, which does not exist"
        for parent, name in places:
            if parent not in inodes or not stat.S_ISDIR(inodes[parent].mode):
                yield f"the name {name!r} is in inode {parent}, which is no directory"
    for ino, record in inodes.items():
        if ino == ROOT_INO:
            continue
        is_named = (record.parent, record.name) in names.get(ino, [])
        if record.nlink and not is_named:
            yield f"inode {ino} has no name {record.name!r} in {record.parent}, its primary one"
        if not record.nlink and (record.parent or names.get(ino)):
            yield f"the orphan {ino} has a name"


def _links(store: Store, inodes: dict[int, InodeRecord], names: dict[int, list[_Name]]) -> Iterator[str]:
    indexed: dict[int, set[_Name]] = defaultdict(set)
    for key, _ in store.scan("meta", LINK):
        indexed[int.from_bytes(key[:8], "big")].add((int.from_bytes(key[8:16], "big"), key[16:]))
    for ino in indexed.keys() | inodes.keys():
        record = inodes.get(ino)
        primary = (record.parent, record.name) if record else None
        further = {place for place in names.get(ino, []) if place != primary}
        if indexed.get(ino, set()) != further:
            yield f"inode {ino}: further names {further}, indexed {indexed.get(ino)}"


def _directories(inodes: dict[int, InodeRecord], names: dict[int, list[_Name]]) -> Iterator[str]:
    subdirectories: dict[int, int] = defaultdict(int)
    for ino, record in inodes.items():
        if stat.S_ISDIR(record.mode) and ino != ROOT_INO and record.nlink:
            subdirectories[record.parent] += 1
            if len(names.get(ino, [])) != 1:
                yield f"directory {ino} has {len(names.get(ino, []))} names"
    for ino, record in inodes.items():
        is_dir = stat.S_ISDIR(record.mode)
        wanted = 2 + subdirectories[ino] if is_dir else len(names.get(ino, []))
        if record.nlink != wanted and not (is_dir and record.nlink == 0):
            yield f"inode {ino} has nlink {record.nlink} instead of {wanted}"


def _indexes(store: Store, inodes: dict[int, InodeRecord]) -> Iterator[str]:
    for prefix, members in (
        (ORPHAN, {ino for ino, r in inodes.items() if r.nlink == 0}),
        (OPEN, {ino for ino, r in inodes.items() if r.home}),
    ):
        indexed = {int.from_bytes(key, "big") for key, _ in store.scan("meta", prefix)}
        if indexed != members:
            yield f"index {prefix.decode()}: {indexed}, it should be {members}"
    for key, _ in store.scan("xattr", b""):
        if int.from_bytes(key[:8], "big") not in inodes:
            yield f"inode {int.from_bytes(key[:8], 'big')} is gone and has an extended attribute"


def _containers(store: Store, inodes: dict[int, InodeRecord]) -> Iterator[str]:
    indexed = {
        int.from_bytes(key, "big"): int.from_bytes(ino, "big")
        for key, ino in store.scan("meta", b"c")
        if len(key) == 8
    }
    wanted: dict[int, int] = {}
    for ino, record in inodes.items():
        for container in {record.container, record.base_container if record.home else 0} - {0}:
            if container in wanted:
                yield f"container {container} is of inodes {wanted[container]} and {ino}"
            wanted[container] = ino
    for container in indexed.keys() | wanted.keys():
        if indexed.get(container) != wanted.get(container):
            yield f"container {container}: index {indexed.get(container)}, inode {wanted.get(container)}"


def _persist(store: Store, inodes: dict[int, InodeRecord]) -> Iterator[str]:
    for key, _ in store.scan("persist", b"s"):
        ino = int.from_bytes(key, "big")
        if ino not in inodes or not inodes[ino].nlink:
            yield f"inode {ino} has no name and an entry in the persist log"
    located = {key + raw for key, raw in store.scan("persist", b"l")}
    wanted = {
        u64(r.mount_id) + r.location + u64(ino)
        for ino, r in inodes.items()
        if r.location is not None and r.nlink
    }
    if located != wanted:
        yield f"index of locations: {located}, it should be {wanted}"
