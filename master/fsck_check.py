"""What all parts of the master's check share: the store, the findings, safe ways to read records.

Nothing here trusts what it reads: a record that can't be decoded, or holds numbers that can't be, is
`damaged` and counts as missing; walks up a tree are bounded. Memory is bounded too: the passes stream
over the families in key order and look the other side up, and what they remember has a limit (beyond
it, a further run finds the rest).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Protocol

import msgspec

from alluxiofuse.errors import AlluxioFuseError, StateError
from alluxiofuse.findings import CantMend, Findings, Mend
from alluxiofuse.ids import MAX_FILE_BYTES, MAX_NAME_BYTES, ROOT_INO
from alluxiofuse.master.mount_tree import UNMOUNTED
from alluxiofuse.master.persist_log import PersistLog
from alluxiofuse.master.records import InodeRecord, MountRecord
from alluxiofuse.master.store import Store, Transaction, decode_inode
from alluxiofuse.ufs.base import Capabilities
from alluxiofuse.ufs.registry import open_ufs
from alluxiofuse.wire.codec import decode, decoder

MAX_KEPT = 100_000
"""Of each kind of thing that one run remembers."""
MAX_DEPTH = 40_000
"""Directories above one another; more than MAX_PATH_BYTES allows."""
MAX_NUMBER = 1 << 62
"""No inode, container or other id gets there."""
DAMAGED = b"damaged"
"""meta: + family + NUL + key -> a record that could not be read, taken out of the way by a repair."""
_KINDS = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK}
_UNKNOWN_STORE = Capabilities(True, False, False, False, False, -1.0, 1, 1 << 20)
"""Of an under storage whose connector can't be had."""


class Mounts(Protocol):
    """What is known of mounts."""

    def capabilities(self, mount_id: int) -> Capabilities: ...

    def is_readonly(self, mount_id: int) -> bool: ...

    def record(self, mount_id: int) -> MountRecord | None: ...

    def is_known(self, mount_id: int) -> bool:
        """It is in the mount table."""
        ...

    def is_dying(self, mount_id: int) -> bool:
        """It was unmounted, and its metadata is to be deleted at the next start."""
        ...


class StoredMounts:
    """The mount table as it is in the store. Connectors are asked for what they can do, no more."""

    def __init__(self, store: Store) -> None:
        self.records: dict[int, MountRecord] = {}
        self.damaged: list[tuple[bytes, bytes]] = []
        """(key, value) of those that can't be read."""
        self._capabilities: dict[int, Capabilities] = {}
        self._dying: set[int] = set()
        for key, raw in store.scan("mount", b""):
            try:
                record = decode(raw, MountRecord)
            except AlluxioFuseError:
                self.damaged.append((key, raw))
                continue
            if (
                len(key) == 8
                and int.from_bytes(key, "big") == record.mount_id
                and 0 < record.ino < MAX_NUMBER
            ):
                self.records[record.mount_id] = record
            else:
                self.damaged.append((key, raw))
        for key, _ in store.scan("meta", UNMOUNTED):
            top = read_inode(store, int.from_bytes(key[:8], "big"))
            if top is not None and top.mount_id not in self.records:
                self._dying.add(top.mount_id)

    def record(self, mount_id: int) -> MountRecord | None:
        return self.records.get(mount_id)

    def is_known(self, mount_id: int) -> bool:
        return mount_id in self.records

    def is_dying(self, mount_id: int) -> bool:
        return mount_id in self._dying

    def is_readonly(self, mount_id: int) -> bool:
        record = self.records.get(mount_id)
        return record is None or record.is_readonly

    def capabilities(self, mount_id: int) -> Capabilities:
        found = self._capabilities.get(mount_id)
        if found is None:
            record = self.records.get(mount_id)
            found = _UNKNOWN_STORE
            if record is not None:
                try:
                    storage = open_ufs(record.uri, dict(record.options))
                    found = storage.capabilities
                    storage.close()
                except AlluxioFuseError:
                    pass
            self._capabilities[mount_id] = found
        return found


class Check:
    """One check of one store."""

    def __init__(
        self, store: Store, findings: Findings, mounts: Mounts | None = None, cluster_id: str = ""
    ) -> None:
        """`mounts` None: those in the store. `cluster_id`: what others say that it is."""
        self.cluster_id = cluster_id
        """The store's own when it has one; set by the check."""
        self.store = store
        self.findings = findings
        self.mounts: Mounts = StoredMounts(store) if mounts is None else mounts
        self.log = PersistLog(store, self.mounts)
        self.is_damaged = False
        """Inodes, names or containers were not as they should be: what seems to be nobody's may be
        somebody's."""
        self.lost_containers: dict[int, int] = {}
        """Inode that has no (readable) record -> its container, by the index of containers."""
        self.unindexed: dict[int, int] = {}
        """Container -> inode, of those that are missing in the index."""
        self.wanted_names: dict[int, list[tuple[int, bytes]]] = {}
        """Of dirty files without a record: their names. They are made again when their bytes are
        found at a worker (`fsck_content`)."""
        self.handled: set[int] = set()
        """Inodes without a record of which was told what becomes of them: nothing else that misses
        them is damage of its own."""
        self.root: InodeRecord | None = None
        """What the root will be, when its record is missing."""
        self._rooted: set[int] = {ROOT_INO}

    # --- reading ----------------------------------------------------------------------------------

    def inode(self, ino: int) -> InodeRecord | None:
        """None also when it is damaged."""
        found = read_inode(self.store, ino)
        return self.root if found is None and ino == ROOT_INO else found

    def handle(self, ino: int) -> None:
        if len(self.handled) < MAX_KEPT:
            self.handled.add(ino)

    def child(self, parent: int, name: bytes) -> int | None:
        if not 0 < parent < MAX_NUMBER:
            return None
        return self.store.child(parent, name)

    def directory(self, ino: int) -> InodeRecord | None:
        """A directory that has a name."""
        record = self.inode(ino)
        return record if record is not None and stat.S_ISDIR(record.mode) and record.nlink else None

    def is_rooted(self, ino: int) -> bool:
        """The way up by primary names leads to the root, over directories that have those names."""
        way: set[int] = set()
        while ino not in self._rooted:
            record = self.directory(ino)
            if record is None or ino in way or len(way) > MAX_DEPTH:
                return False
            if self.child(record.parent, record.name) != ino:
                return False
            way.add(ino)
            ino = record.parent
        if len(self._rooted) + len(way) > MAX_KEPT:
            self._rooted = {ROOT_INO}
        if not self.findings.is_repairing:  # else what was good may be moved
            self._rooted |= way
        return True

    def path(self, ino: int) -> str:
        """For people: the absolute path, or the number where there is none."""
        names: list[bytes] = []
        at = ino
        while at != ROOT_INO:
            record = self.inode(at)
            if record is None or not record.parent or len(names) > MAX_DEPTH:
                return f"inode {ino}"
            names.append(record.name)
            at = record.parent
        return shown(b"/" + b"/".join(reversed(names)))

    def place(self, parent: int, name: bytes) -> str:
        """For people: the path of a name in a directory."""
        return f"{self.path(parent).rstrip('/')}/{shown(name)}"

    def has_children(self, ino: int) -> bool:
        return any(True for _ in self.store.scan("edge", ino.to_bytes(8, "big")))

    # --- mending ----------------------------------------------------------------------------------

    def mend(self, change: Callable[[Transaction], None]) -> Mend:
        """One transaction. `change` may raise CantMend; nothing happens then."""

        def run() -> None:
            tx = self.store.transaction()
            try:
                change(tx)
            except (StateError, msgspec.MsgspecError, OverflowError) as exc:
                # Something else that it needs is damaged too, which another run may have put right.
                raise CantMend(f"something else is damaged: {exc}") from None
            tx.commit()

        return run

    def delete(self, family: str, key: bytes) -> Mend:
        return self.mend(lambda tx: tx.delete(family, key))

    def put_away(self, family: str, key: bytes, raw: bytes) -> Mend:
        """A record that can't be read is kept where it disturbs nobody."""

        def change(tx: Transaction) -> None:
            tx.delete(family, key)
            tx.put("meta", DAMAGED + family.encode() + b"\0" + key, raw)

        return self.mend(change)


def read_inode(store: Store, ino: int) -> InodeRecord | None:
    """None when there is none, or it is damaged."""
    if not 0 < ino < MAX_NUMBER:
        return None
    raw = store.get("inode", ino.to_bytes(8, "big"))
    return None if raw is None else parse_inode(ino, raw)


def parse_inode(ino: int, raw: bytes) -> InodeRecord | None:
    """None: damaged."""
    try:
        record = decode_inode(ino, raw)
    except StateError:
        return None
    return record if _is_plausible(record) else None


def parse(raw: bytes, type_: type[msgspec.Struct]) -> object | None:
    """A record of another kind; None: damaged."""
    try:
        return decoder(type_).decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _is_plausible(record: InodeRecord) -> bool:
    ids = (
        record.parent,
        record.mount_id,
        record.container,
        record.base_container,
        record.ufs_container,
        record.home,
        record.held_by,
    )
    sizes = (record.size, record.base_size, record.ufs_size)
    return (
        stat.S_IFMT(record.mode) in _KINDS
        and 0 <= record.mode < 1 << 16
        and all(0 <= number < MAX_NUMBER for number in ids)
        and all(0 <= size <= MAX_FILE_BYTES for size in sizes)
        and 0 <= record.block_bytes < MAX_NUMBER
        and 0 <= record.nlink < 1 << 32
        and len(record.name) <= MAX_NAME_BYTES
        and (record.location is None or b"\0" not in record.location)
    )


def shown(name: bytes) -> str:
    """A name or path in a sentence: on one line, whatever it holds."""
    text = os.fsdecode(name)
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
