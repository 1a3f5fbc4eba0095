"""Damage to names, inodes and what belongs to them. See `damages`."""

from __future__ import annotations

from daemons import LocalDaemon
from damage import change, damage, set_record
from fsck_tree import content
from fsck_world import find

from alluxiofuse.master.store import Store, Transaction, u64


@damage("inode-missing", named="/dirty.bin")
def record_of_a_dirty_file_missing(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.delete_inode(find(store, "dirty.bin")))


@damage("inode-damaged", "inode-missing", named="/hard1")
def record_of_a_linked_dirty_file_damaged(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.put("inode", u64(find(store, "hard1")), b"\x93\x01garbage"))


@damage("inode-damaged", "inode-missing", changes={"clean.bin": None}, named="/clean.bin")
def record_of_a_clean_file_implausible(site: LocalDaemon) -> None:
    set_record(site, "clean.bin", mode=0o123456701)


@damage("inode-missing", changes={"dir/small": None}, named="/dir/small")
def record_of_a_clean_file_missing(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.delete_inode(find(store, "dir/small")))


@damage("inode-missing", named="/dir")
def record_of_a_directory_missing(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.delete_inode(find(store, "dir")))


@damage("inode-missing", named="/new")
def record_of_a_dirty_directory_missing(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.delete_inode(find(store, "new")))


@damage("inode-lost", changes={"link": None}, named="/link")
def record_of_a_link_missing(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.delete_inode(find(store, "link")))


@damage(
    "directory-missing",
    changes={
        "new": None,
        "new/inner": None,
        "lost+found": "dir",
        "lost+found/#NEW": "dir",
        "lost+found/#NEW/inner": "dir",
    },
)
def directory_and_its_name_missing(site: LocalDaemon) -> None:
    def spoil(store: Store, tx: Transaction) -> None:
        tx.delete_inode(find(store, "new"))
        tx.delete_edge(1, b"new")

    change(site, spoil)


@damage("name-missing", named="/dir/dirty")
def name_missing(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.delete_edge(find(store, "dir"), b"dirty"))


@damage("name-missing", named="/dir")
def name_of_a_directory_missing(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.delete_edge(1, b"dir"))


@damage("name-damaged", "name-missing", named="/dir/dirty")
def name_damaged(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.put("edge", u64(find(store, "dir")) + b"dirty", b"12"))


@damage("name-damaged")
def names_that_cannot_be(site: LocalDaemon) -> None:
    def spoil(store: Store, tx: Transaction) -> None:
        tx.put("edge", u64(1) + b"a/b", u64(find(store, "dir")))
        tx.put("edge", u64(1), u64(find(store, "dir")))
        tx.put("edge", b"abc", u64(7))
        tx.put("edge", b"\xff" * 8 + b"x", u64(7))

    change(site, spoil)


@damage("inode-missing")
def name_of_nothing(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.put_edge(find(store, "dir"), b"nothing", 12345))


@damage("name-in-file")
def name_in_a_file(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.put_edge(find(store, "dirty.bin"), b"x", find(store, "hard1")))


@damage("link-count", named="/dir/sub")
def link_count_of_a_directory(site: LocalDaemon) -> None:
    set_record(site, "dir/sub", nlink=9)


@damage("link-count", named="/dirty.bin")
def link_count_of_a_file(site: LocalDaemon) -> None:
    set_record(site, "dirty.bin", nlink=3)


@damage("orphan-unindexed", "orphan-named", named="/dirty.bin")
def link_count_zero_with_a_name(site: LocalDaemon) -> None:
    set_record(site, "dirty.bin", nlink=0)


@damage("link-unindexed", "link-count", named="/hard2")
def list_of_names_lacks_one(site: LocalDaemon) -> None:
    def spoil(store: Store, tx: Transaction) -> None:
        for key, _ in store.scan("meta", b"link"):
            tx.delete("meta", b"link" + key)

    change(site, spoil)


@damage("link-stale")
def list_of_names_has_one_too_many(site: LocalDaemon) -> None:
    def spoil(store: Store, tx: Transaction) -> None:
        tx.put("meta", b"link" + u64(find(store, "dirty.bin")) + u64(1) + b"nothing", b"")
        tx.put("meta", b"link" + u64(4711) + u64(1) + b"nothing", b"")

    change(site, spoil)


@damage("directory-named-twice")
def directory_with_two_names(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.put_edge(1, b"twice", find(store, "dir")))


@damage(
    "inode-unreachable",
    changes={
        "new": None,
        "new/inner": None,
        "lost+found": "dir",
        "lost+found/#NEW": "dir",
        "lost+found/#NEW/inner": "dir",
    },
)
def directories_in_a_circle(site: LocalDaemon) -> None:
    def spoil(store: Store, tx: Transaction) -> None:
        outer, inner = find(store, "new"), find(store, "new/inner")
        record = tx.inode(outer)
        assert record is not None
        record.parent, record.name = inner, b"new"
        tx.put_inode(outer, record)
        tx.delete_edge(1, b"new")
        tx.put_edge(inner, b"new", outer)

    change(site, spoil)


@damage(
    "inode-unreachable",
    "link-unindexed",
    changes={
        "dir/dirty": content("hard", 900),
        "lost+found": "dir",
        "lost+found/#DIRTY": content("dirty", 6000),
    },
)
def name_taken_by_another(site: LocalDaemon) -> None:
    """The name of a dirty file leads to a hard link of another one."""

    def spoil(store: Store, tx: Transaction) -> None:
        parent = find(store, "dir")
        tx.put_edge(parent, b"dirty", find(store, "hard1"))

    change(site, spoil)


@damage("root-missing", named="root")
def root_missing(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.delete_inode(1))


@damage("xattr-stale")
def attribute_of_nobody(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.put("xattr", u64(4711) + b"user.x", b"value"))
