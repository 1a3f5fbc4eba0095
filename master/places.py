"""Where an inode belongs in its under storage, and where the under storage has it.

Plain functions on a transaction (or the store, for reading). All paths are relative to the mount.
The root of a mount is the root inode, or a directory whose parent belongs to another mount.
"""

from __future__ import annotations

from collections.abc import Iterator

from alluxiofuse.ids import ROOT_INO
from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.store import Store, Transaction, u64

Reader = Store | Transaction


def join(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name


def is_below(path: bytes, directory: bytes) -> bool:
    """Strictly below."""
    return path != directory and (not directory or path.startswith(directory + b"/"))


def is_mount_root(tx: Reader, ino: int, record: InodeRecord) -> bool:
    if ino == ROOT_INO:
        return True
    parent = tx.inode(record.parent)
    return parent is not None and parent.mount_id != record.mount_id


def desired_path(tx: Reader, ino: int, record: InodeRecord) -> bytes | None:
    """Where the inode belongs below its mount, by its primary name; None for an orphan."""
    return _path_up(tx, ino, record, until_location=False)


def location_path(tx: Reader, ino: int, record: InodeRecord) -> bytes | None:
    """Where the under storage has it (if it does: `is_in_ufs`), below its mount. None for an orphan
    of which the under storage has nothing."""
    return _path_up(tx, ino, record, until_location=True)


def _path_up(tx: Reader, ino: int, record: InodeRecord, *, until_location: bool) -> bytes | None:
    """Names up to the mount's directory, or to a location on the way."""
    names: list[bytes] = []
    while ino != ROOT_INO:
        if until_location and record.location is not None:
            names.append(record.location)
            break
        parent = tx.inode(record.parent) if record.parent else None
        if parent is None:
            return None
        if parent.mount_id != record.mount_id:
            break
        names.append(record.name)
        ino, record = record.parent, parent
    return b"/".join(reversed(names))


def place_below(tx: Reader, parent: int, name: bytes) -> bytes | None:
    """Where a child of `parent` without a location of its own is: below the parent's location."""
    record = tx.inode(parent)
    directory = None if record is None else location_path(tx, parent, record)
    return None if directory is None else join(directory, name)


def moving_ancestor(tx: Reader, record: InodeRecord) -> int:
    """The topmost directory above that still has to be moved in the under storage; 0: none."""
    found = 0
    ino = record.parent
    while ino:
        parent = tx.inode(ino)
        if parent is None or parent.mount_id != record.mount_id:
            break
        if parent.location is not None:
            found = ino
        if ino == ROOT_INO:
            break
        ino = parent.parent
    return found


def namespace_path(tx: Reader, ino: int, record: InodeRecord) -> bytes:
    """Absolute path by the primary names, for people and messages; b"(removed)" for an orphan."""
    names: list[bytes] = []
    while ino != ROOT_INO:
        parent = tx.inode(record.parent) if record.parent else None
        if parent is None:
            return b"(removed)"
        names.append(record.name)
        ino, record = record.parent, parent
    return b"/" + b"/".join(reversed(names))


def resolve(tx: Reader, root: int, path: bytes) -> tuple[int, InodeRecord] | None:
    """The inode at `path` below the mount whose root directory is `root`, by the namespace; None
    when there is no such name, or another mount is in the way. Hard links' further names count."""
    ino, record = root, tx.inode(root)
    if record is None:
        return None
    mount_id = record.mount_id
    for name in path.split(b"/") if path else ():
        child = tx.child(ino, name)
        found = None if child is None else tx.inode(child)
        if child is None or found is None or found.mount_id != mount_id:
            return None
        ino, record = child, found
    return ino, record


# --- overrides of the location, and their index -----------------------------------------------------


def set_location(tx: Transaction, ino: int, record: InodeRecord, path: bytes | None) -> None:
    """Change `record.location` and its index entry; the caller puts the record."""
    if record.location is not None:
        key = b"l" + u64(record.mount_id) + record.location
        if tx.get("persist", key) == u64(ino):
            tx.delete("persist", key)
    record.location = path
    if path is not None:
        tx.put("persist", b"l" + u64(record.mount_id) + path, u64(ino))


def located_at(tx: Reader, mount_id: int, path: bytes) -> int | None:
    """The inode with a location of its own that is exactly `path`."""
    value = tx.get("persist", b"l" + u64(mount_id) + path)
    return None if value is None else int.from_bytes(value, "big")


def prefixes(path: bytes) -> Iterator[bytes]:
    """The directories above a path, topmost first, without the mount itself."""
    at = path.find(b"/")
    while at >= 0:
        yield path[:at]
        at = path.find(b"/", at + 1)


def located_above(tx: Reader, mount_id: int, path: bytes) -> int | None:
    """The directory (topmost) with a location of its own that is above `path`."""
    for prefix in prefixes(path):
        ino = located_at(tx, mount_id, prefix)
        if ino is not None:
            return ino
    return None


def located_below(tx: Reader, mount_id: int, directory: bytes) -> Iterator[tuple[bytes, int]]:
    """(location, ino) of the inodes whose own location is strictly below `directory`."""
    below = directory + b"/" if directory else b""
    for rest, value in tx.scan("persist", b"l" + u64(mount_id) + below):
        yield below + rest, int.from_bytes(value, "big")
