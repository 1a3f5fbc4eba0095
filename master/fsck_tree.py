"""The check of the tree: inodes, names, link counts, directories that can be reached.

One pass over three families in step, all sorted by inode: the inodes, the names below each (`edge`),
and the further names of each (`link`). Invariants: `tree`'s docstring. How each kind of damage is
undone is in `fsck_mend`.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator

from alluxiofuse.ids import MAX_NAME_BYTES, ROOT_INO, ROOT_MOUNT_ID
from alluxiofuse.master import fsck_mend as mends
from alluxiofuse.master.fsck_check import MAX_KEPT, MAX_NUMBER, Check, parse_inode, shown
from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.store import u64
from alluxiofuse.master.tree import LINK, OPEN, ORPHAN

_Item = tuple[bytes, bytes]


class _InStep:
    """A family whose keys begin with an inode number, read in step with another."""

    def __init__(self, items: Iterator[_Item]) -> None:
        self._items = items
        self._next: _Item | None = next(items, None)

    def before(self, ino: int) -> Iterator[tuple[int, _Item]]:
        """What belongs to smaller inodes."""
        while self._next is not None and _number(self._next[0]) < ino:
            item, self._next = self._next, next(self._items, None)
            yield _number(item[0]), item

    def of(self, ino: int) -> Iterator[_Item]:
        while self._next is not None and _number(self._next[0]) == ino:
            item, self._next = self._next, next(self._items, None)
            yield item


def _number(key: bytes) -> int:
    return int.from_bytes(key[:8], "big")


class TreePass:
    def __init__(self, check: Check) -> None:
        self._check = check
        self._findings = check.findings
        self._missing_dirs: dict[int, int] = {}
        """Directories without a record that have names in them -> one of those inodes."""
        self._missing_mounts: set[int] = set()
        self._nameless: list[int] = []
        """Inodes to which no way leads; looked at when all names have been."""
        self._counts: list[tuple[int, int]] = []
        """(inode, what its link count should be)."""

    def run(self) -> Iterator[None]:
        """Gives a None for each inode, for a progress bar."""
        store = self._check.store
        edges = _InStep(store.scan("edge", b""))
        links = _InStep(store.scan("meta", LINK))
        for key, raw in store.scan("inode", b""):
            yield None
            ino = _number(key)
            record = parse_inode(ino, raw) if len(key) == 8 and 0 < ino < MAX_NUMBER else None
            if record is None:
                self._check.is_damaged = True
                self._findings.problem(
                    "inode-damaged",
                    f"the record of inode {ino} can't be read",
                    self._check.put_away("inode", key, raw),
                    "what is known of it elsewhere is used",
                )
                continue
            for parent, edge in edges.before(ino):
                self._homeless(parent, edge)
            for owner, link in links.before(ino):
                self._stray_link(owner, link)
            subdirectories = sum(self._name(ino, record, *edge) for edge in edges.of(ino))
            further = sum(self._link(ino, record, *link) for link in links.of(ino))
            self._inode(ino, record, subdirectories, further)
        for parent, edge in edges.before(MAX_NUMBER * 8):
            self._homeless(parent, edge)
        for owner, link in links.before(MAX_NUMBER * 8):
            self._stray_link(owner, link)
        self._make_missing_directories()
        self._name_the_nameless()
        for ino, wanted in self._counts:
            self._count(ino, wanted)

    # --- names ------------------------------------------------------------------------------------

    def _name(self, parent: int, directory: InodeRecord, key: bytes, value: bytes) -> bool:
        """A name in an existing inode. True: it leads to a directory that has it as its name."""
        check, name = self._check, key[8:]
        if not self._is_name(name) or len(value) != 8:
            check.is_damaged = True
            self._findings.problem(
                "name-damaged",
                f"a name in {check.path(parent)} can't be: {shown(name)!r}",
                check.put_away("edge", key, value),
            )
            return False
        if not stat.S_ISDIR(directory.mode):
            check.is_damaged = True
            self._findings.problem(
                "name-in-file",
                f"{check.path(parent)} is no directory and has a name in it: {shown(name)}",
                check.delete("edge", key),
            )
            return False
        ino = int.from_bytes(value, "big")
        record = check.inode(ino)
        if record is None:
            mends.name_leads_nowhere(check, parent, name, ino)
            return False
        is_dir = stat.S_ISDIR(record.mode)
        if (record.parent, record.name) == (parent, name) and record.nlink:
            return is_dir
        if ino == ROOT_INO or (is_dir and record.nlink):
            self._findings.problem(
                "directory-named-twice",
                f"{check.place(parent, name)} is a second name of the directory {check.path(ino)}",
                check.delete("edge", key),
            )
        elif not record.nlink:
            mends.orphan_has_name(check, parent, name, ino)
        elif check.store.get("meta", LINK + u64(ino) + key) is None:
            self._findings.problem(
                "link-unindexed",
                f"{check.place(parent, name)} is a name of inode {ino} that is not in its list of names",
                check.mend(lambda tx: tx.put("meta", LINK + u64(ino) + key, b"")),
            )
        return False

    @staticmethod
    def _is_name(name: bytes) -> bool:
        if not name or len(name) > MAX_NAME_BYTES or name in (b".", b".."):
            return False
        return b"/" not in name and b"\0" not in name

    def _homeless(self, parent: int, edge: _Item) -> None:
        """A name in a directory that does not exist."""
        key, value = edge
        check = self._check
        root = check.inode(ROOT_INO)
        if parent == ROOT_INO and root is not None:
            self._name(parent, root, key, value)
            return
        check.is_damaged = True
        if not 0 < parent < MAX_NUMBER or not self._is_name(key[8:]) or len(value) != 8:
            self._findings.problem(
                "name-damaged", f"a name in inode {parent} can't be", check.put_away("edge", key, value)
            )
            return
        if len(self._missing_dirs) < MAX_KEPT:
            self._missing_dirs.setdefault(parent, int.from_bytes(value, "big"))

    def _make_missing_directories(self) -> None:
        """Those for which no name was found on the way get one in lost+found."""
        for ino, child in self._missing_dirs.items():
            if self._check.inode(ino) is None and ino not in self._check.handled:
                mends.directory_is_missing(self._check, ino, child)

    # --- further names ----------------------------------------------------------------------------

    def _link(self, ino: int, record: InodeRecord, key: bytes, _: bytes) -> bool:
        """An entry of the list of further names. True: it is one."""
        parent, name = _number(key[8:]), key[16:]
        is_primary = (parent, name) == (record.parent, record.name)
        if not stat.S_ISDIR(record.mode) and not is_primary and self._check.child(parent, name) == ino:
            return True
        self._findings.problem(
            "link-stale",
            f"inode {ino}: its list of names has one that it does not have: {shown(name)}",
            self._check.delete("meta", LINK + key),
        )
        return False

    def _stray_link(self, ino: int, link: _Item) -> None:
        if self._check.inode(ino) is None and ino not in self._check.handled:
            self._findings.problem(
                "link-stale",
                f"inode {ino} is gone and has a list of names",
                self._check.delete("meta", LINK + link[0]),
            )

    # --- inodes -----------------------------------------------------------------------------------

    def _inode(self, ino: int, record: InodeRecord, subdirectories: int, further: int) -> None:
        check = self._check
        if ino == ROOT_INO:
            if not stat.S_ISDIR(record.mode) or record.parent != ROOT_INO or record.name:
                mends.root_is_wrong(check)
                return
        elif not check.mounts.is_known(record.mount_id):
            if check.mounts.is_dying(record.mount_id):
                self._findings.note(
                    "unmounted",
                    f"metadata of what was unmounted is deleted at the next start ({record.mount_id})",
                )
                return  # it goes piece by piece: counts need not be right
            self._mount_is_missing(ino, record.mount_id)
        self._indexes(ino, record)
        if not record.nlink:
            self._orphan(ino, record, further)
            return
        if ino != ROOT_INO and not self._has_place(ino, record):
            check.is_damaged = True
            if len(self._nameless) < MAX_KEPT:
                self._nameless.append(ino)
            return
        is_dir = stat.S_ISDIR(record.mode)
        wanted = 2 + subdirectories if is_dir else 1 + further
        if record.nlink != wanted and len(self._counts) < MAX_KEPT:
            self._counts.append((ino, wanted))
        self._mount(ino, record)

    def _name_the_nameless(self) -> None:
        """Unless a directory that is made again has them back."""
        for ino in self._nameless:
            record = self._check.inode(ino)
            if record is None or record.parent in self._check.handled or self._has_place(ino, record):
                continue
            mends.inode_has_no_name(self._check, ino)

    def _count(self, ino: int, wanted: int) -> None:
        record = self._check.inode(ino)
        if record is None or record.nlink in (0, wanted):
            return
        is_sure = not self._nameless and not self._check.handled
        if not is_sure and self._findings.run_mended:
            return  # what was mended changes the counts: the next run sees
        self._findings.problem(
            "link-count",
            f"{self._check.path(ino)} has the link count {record.nlink} instead of {wanted}",
            mends.set_link_count(self._check, ino, wanted),
            "" if is_sure else "perhaps only because of what was found before",
        )

    def _mount_is_missing(self, ino: int, mount_id: int) -> None:
        if mount_id == ROOT_MOUNT_ID:
            return  # told by the check of the mount table
        if mount_id not in self._missing_mounts and len(self._missing_mounts) < MAX_KEPT:
            self._missing_mounts.add(mount_id)
            self._check.is_damaged = True
            self._findings.problem(
                "mount-missing",
                f"mount {mount_id} is not in the mount table: {self._check.path(ino)}, and whatever else is "
                "of it, can't be reached",
                None,
                "its data is kept; restore the state directory from a backup to get at it",
            )

    def _has_place(self, ino: int, record: InodeRecord) -> bool:
        """Its primary name leads to it, and its directory can be reached from the root."""
        check = self._check
        if check.child(record.parent, record.name) != ino:
            return False
        if not stat.S_ISDIR(record.mode):  # the directory above is checked by itself
            return check.directory(record.parent) is not None
        return check.is_rooted(ino) or not self._is_first_of_circle(ino, record)

    def _is_first_of_circle(self, ino: int, record: InodeRecord) -> bool:
        """It is the smallest of directories that lie in each other, or its directory is none. (What
        lies below either is reached again when that is.)"""
        smallest, at, seen = ino, record.parent, {ino}
        while at not in seen:
            above = self._check.directory(at)
            if above is None:
                return at == record.parent
            if self._check.child(above.parent, above.name) != at or at == ROOT_INO:
                return False
            seen.add(at)
            smallest, at = min(smallest, at), above.parent
        return at == ino and smallest == ino

    def _orphan(self, ino: int, record: InodeRecord, further: int) -> None:
        check = self._check
        if record.parent or further:
            self._findings.problem(
                "orphan-named",
                f"inode {ino} was removed and still says where it was",
                mends.clear_place(check, ino),
            )
        if check.store.get("meta", ORPHAN + u64(ino)) is None:
            self._findings.problem(
                "orphan-unindexed",
                f"inode {ino} was removed, and nothing would ever free it",
                check.mend(lambda tx: tx.put("meta", ORPHAN + u64(ino), b"")),
            )
        else:
            self._findings.note(
                "orphan", f"inode {ino} was removed while it was open: it is freed at the next start"
            )

    def _indexes(self, ino: int, record: InodeRecord) -> None:
        """`OPEN`, and the index of containers."""
        check = self._check
        if record.home and check.store.get("meta", OPEN + u64(ino)) is None:
            self._findings.problem(
                "open-unindexed",
                f"{check.path(ino)} is open for writing and not in the list of such files",
                check.mend(lambda tx: tx.put("meta", OPEN + u64(ino), b"")),
            )
        for container in {record.container, record.base_container if record.home else 0} - {0}:
            raw = check.store.get("meta", b"c" + u64(container))
            owner = None if raw is None or len(raw) != 8 else int.from_bytes(raw, "big")
            if owner == ino:
                continue
            check.is_damaged = True
            rival = None if owner is None else check.inode(owner)
            if rival is not None and container in (
                rival.container,
                rival.base_container if rival.home else 0,
            ):
                self._findings.problem(
                    "container-shared",
                    f"{check.path(ino)} and {check.path(owner or 0)} claim the same content, container "
                    f"{container}",
                    None,
                    "look at both, and remove or overwrite the one that is wrong",
                )
                continue
            if len(check.unindexed) < MAX_KEPT:
                check.unindexed[container] = ino
            self._findings.problem(
                "container-unindexed",
                f"the content of {check.path(ino)}, container {container}, is not in the index",
                check.mend(lambda tx, c=container: tx.put("meta", b"c" + u64(c), u64(ino))),  # type: ignore[misc]
            )

    def _mount(self, ino: int, record: InodeRecord) -> None:
        """Whose mount it is in: its directory's, but for mount points."""
        check = self._check
        mount = check.mounts.record(record.mount_id)
        if mount is None:
            return
        above = record if ino == ROOT_INO else check.inode(record.parent)
        if above is None or (mount.ino == ino) == (ino == ROOT_INO or above.mount_id != record.mount_id):
            return
        self._findings.problem(
            "mount-wrong",
            f"{check.path(ino)} is in mount {record.mount_id}, its directory in {above.mount_id}",
            mends.take_mount_of_parent(check, ino),
        )
