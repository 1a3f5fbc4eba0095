"""Kinds of damage, one function each: done to a state on disk, with what a check has to say of it.

The state is that of `template`: see `BUILD` for its files.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from daemons import LocalDaemon
from fsck_world import find, index_of, record_of, slab_of, store_of

from alluxiofuse.master import places
from alluxiofuse.master.records import InodeRecord, IntentRecord, RemoveEntry
from alluxiofuse.master.store import Store, Transaction, u64
from alluxiofuse.wire.types import StateMark
from alluxiofuse.worker.index import SlabRecord
from alluxiofuse.worker.slab import CLEAN, WRITING

MIB = 1 << 20


def content(name: str, size: int) -> bytes:
    """Bytes that are nowhere else, and differ from page to page."""
    seed = name.encode() + b"."
    return (seed * (size // len(seed) + 1))[: size - 8] + b"the end." if size > 8 else b"x" * size


CLEAN_FILES = {
    "clean.bin": content("clean.bin", 3 * MIB + 17),
    "dir/small": content("small", 5000),
    "dir/sub/deep": content("deep", 100),
    "moved-before": content("moved", 4000),
    "removed-before": content("removed", 3000),
}
DIRTY_FILES = {
    "dirty.bin": content("dirty.bin", 3 * MIB + 5),
    "dir/dirty": content("dirty", 6000),
    "dir/sub/dirty": content("subdirty", 1200),
    "hard1": content("hard", 900),
    "again": content("again", MIB),
}


def build(site: LocalDaemon) -> None:
    """Fills a mount, some of it persisted and cached, the rest dirty, and leaves it to be killed.
    Nothing is persisted by itself (`persist_delay` of an hour)."""
    top = site.mount
    (top / "dir" / "sub").mkdir(parents=True)
    for name, data in CLEAN_FILES.items():
        (top / name).write_bytes(data)
    (top / "again").write_bytes(b"an older version")
    site.wait_persisted()
    os.rename(top / "moved-before", top / "moved")
    os.unlink(top / "removed-before")
    (top / "new" / "inner").mkdir(parents=True)
    for name, data in DIRTY_FILES.items():
        (top / name).write_bytes(data)
    os.link(top / "hard1", top / "hard2")
    os.symlink("clean.bin", top / "link")
    os.setxattr(top / "dirty.bin", b"user.color", b"blue")


def expected() -> dict[str, bytes | str]:
    """Path -> bytes of a file, target of a symlink, or "dir"."""
    files: dict[str, bytes | str] = {**CLEAN_FILES, **DIRTY_FILES}
    files["moved"] = files.pop("moved-before")
    files.pop("removed-before")
    files["hard2"] = files["hard1"]
    for name in ("dir", "dir/sub", "new", "new/inner"):
        files[name] = "dir"
    files["link"] = "-> clean.bin"
    return files


def tree_of(site: LocalDaemon) -> dict[str, bytes | str]:
    """The same, as it is in the metadata, the slabs and the under storage."""
    found: dict[str, bytes | str] = {}
    with store_of(site) as store:
        _walk(site, store, 1, "", found)
    return found


def _walk(site: LocalDaemon, store: Store, parent: int, above: str, found: dict[str, bytes | str]) -> None:
    for name, raw in list(store.scan("edge", u64(parent))):
        ino = int.from_bytes(raw, "big")
        path = above + name.decode()
        record = store.inode(ino)
        assert record is not None, path
        if stat.S_ISDIR(record.mode):
            found[path] = "dir"
            _walk(site, store, ino, f"{path}/", found)
        elif stat.S_ISLNK(record.mode):
            found[path] = f"-> {record.target.decode()}"
        elif record.is_in_ufs and record.ufs_container == record.container:
            location = places.location_path(store, ino, record)
            assert location is not None
            found[path] = (site.ufs_dir / location.decode()).read_bytes()
        else:
            slab = slab_of(site, record.container)
            found[path] = slab.read_bytes()[: record.size] if slab.exists() else "no bytes"


# --- the table -------------------------------------------------------------------------------------------


@dataclass
class Damage:
    name: str
    do: Callable[[LocalDaemon], None]
    codes: set[str]
    """Kinds of findings that tell of it."""
    changes: dict[str, bytes | str | None] = field(default_factory=dict)
    """What is not as before after the repair; None: not there, and read again from the under storage."""
    left: set[str] = field(default_factory=set)
    """Kinds that no repair can undo."""
    arguments: tuple[str, ...] = ()
    named: str = ""
    """Text that a finding has to have."""


DAMAGES: list[Damage] = []


def damage(
    *codes: str,
    changes: dict[str, bytes | str | None] | None = None,
    left: tuple[str, ...] = (),
    arguments: tuple[str, ...] = (),
    named: str = "",
) -> Callable[[Callable[[LocalDaemon], None]], Callable[[LocalDaemon], None]]:
    def enter(do: Callable[[LocalDaemon], None]) -> Callable[[LocalDaemon], None]:
        DAMAGES.append(Damage(do.__name__, do, set(codes), changes or {}, set(left), arguments, named))
        return do

    return enter


def change(site: LocalDaemon, do: Callable[[Store, Transaction], None]) -> None:
    with store_of(site) as store:
        tx = store.transaction()
        do(store, tx)
        tx.commit()


def change_record(site: LocalDaemon, path: str, do: Callable[[InodeRecord], None]) -> None:
    def edit(store: Store, tx: Transaction) -> None:
        ino = find(store, path)
        record = tx.inode(ino)
        assert record is not None
        do(record)
        tx.put_inode(ino, record)

    change(site, edit)


def container_of(site: LocalDaemon, path: str) -> int:
    with store_of(site) as store:
        return record_of(store, path).container


# --- the tree --------------------------------------------------------------------------------------------


@damage("inode-missing", named="/dirty.bin")
def record_of_a_dirty_file_missing(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.delete_inode(find(store, "dirty.bin")))


@damage("inode-damaged", "inode-missing", named="/hard1")
def record_of_a_linked_dirty_file_damaged(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.put("inode", u64(find(store, "hard1")), b"\x93\x01garbage"))


@damage("inode-damaged", "inode-missing", changes={"clean.bin": None}, named="/clean.bin")
def record_of_a_clean_file_implausible(site: LocalDaemon) -> None:
    def spoil(record: InodeRecord) -> None:
        record.mode = 0o123456701

    change_record(site, "clean.bin", spoil)


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
    def spoil(record: InodeRecord) -> None:
        record.nlink = 9

    change_record(site, "dir/sub", spoil)


@damage("link-count", named="/dirty.bin")
def link_count_of_a_file(site: LocalDaemon) -> None:
    def spoil(record: InodeRecord) -> None:
        record.nlink = 3

    change_record(site, "dirty.bin", spoil)


@damage("orphan-unindexed", "orphan-named", named="/dirty.bin")
def link_count_zero_with_a_name(site: LocalDaemon) -> None:
    def spoil(record: InodeRecord) -> None:
        record.nlink = 0

    change_record(site, "dirty.bin", spoil)


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


# --- beside the tree -------------------------------------------------------------------------------------


@damage("counter")
def counters_too_small(site: LocalDaemon) -> None:
    def spoil(store: Store, tx: Transaction) -> None:
        tx.put("meta", b"next_ino", u64(3))
        tx.put("meta", b"next_container", b"\xff" * 9)
        tx.delete("meta", b"next_id")
        tx.put("meta", b"next_worker", u64(0))

    change(site, spoil)


@damage("format-missing", "cluster-id-missing")
def format_and_cluster_missing(site: LocalDaemon) -> None:
    def spoil(store: Store, tx: Transaction) -> None:
        tx.delete("meta", b"format")
        tx.delete("meta", b"cluster_id")

    change(site, spoil)


@damage("reply-damaged")
def answer_damaged(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.put("meta", b"reply" + u64(1) + b"\0\1", b"?"))


@damage("mount-damaged", "root-mount-missing", left=("root-mount-missing",))
def mount_table_damaged(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.put("mount", u64(1), b"\x93garbage"))


@damage("list-stale")
def lists_with_strangers(site: LocalDaemon) -> None:
    def spoil(store: Store, tx: Transaction) -> None:
        tx.put("meta", b"open" + u64(find(store, "dirty.bin")), b"")
        tx.put("meta", b"orphan" + u64(find(store, "dirty.bin")), b"")

    change(site, spoil)


@damage("container-unindexed", named="/dirty.bin")
def container_not_indexed(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.delete("meta", b"c" + u64(record_of(store, "dirty.bin").container)))


@damage("container-stale")
def container_of_nobody(site: LocalDaemon) -> None:
    def spoil(store: Store, tx: Transaction) -> None:
        tx.put("meta", b"c" + u64(777), u64(find(store, "dirty.bin")))
        tx.put("meta", b"c" + u64(778), u64(4711))
        tx.put("meta", b"c" + u64(779), b"?")

    change(site, spoil)


@damage(
    "container-shared", "container-stale", "unwanted-dirty", left=("container-shared",), named="/dir/dirty"
)
def container_of_two(site: LocalDaemon) -> None:
    with store_of(site) as store:
        container = record_of(store, "dir/sub/dirty").container

    def spoil(record: InodeRecord) -> None:
        record.container, record.size = container, 1200

    change_record(site, "dir/dirty", spoil)


# --- the persist log -------------------------------------------------------------------------------------


@damage("entry-missing", named="/dirty.bin")
def entry_missing(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.delete_sync_entry(find(store, "dirty.bin")))


@damage("entry-damaged", "entry-missing", named="/dirty.bin")
def entry_damaged(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.put("persist", b"s" + u64(find(store, "dirty.bin")), b"??"))


@damage("entry-missing", named="/moved")
def entry_of_a_renamed_file_missing(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.delete_sync_entry(find(store, "moved")))


@damage("entry-stale")
def entry_of_nobody(site: LocalDaemon) -> None:
    def spoil(store: Store, tx: Transaction) -> None:
        entry = tx.sync_entry(find(store, "dirty.bin"))
        assert entry is not None
        tx.put_sync_entry(4711, entry)

    change(site, spoil)


@damage("removal-of-live", named="/clean.bin")
def removal_of_a_file_that_is_there(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.put_remove_entry(1, b"clean.bin", RemoveEntry(1, False, 0)))


@damage("removal-of-live", named="/moved")
def removal_of_a_renamed_file(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.put_remove_entry(1, b"moved-before", RemoveEntry(1, False, 0)))


@damage("removal-damaged", "removal-stale")
def removals_damaged(site: LocalDaemon) -> None:
    def spoil(store: Store, tx: Transaction) -> None:
        tx.put("persist", b"r" + u64(1) + b"some/path", b"?")
        tx.put_remove_entry(99, b"path", RemoveEntry(1, False, 0))

    change(site, spoil)


@damage("location-unindexed", named="/moved")
def location_not_indexed(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.delete("persist", b"l" + u64(1) + b"moved-before"))


@damage("location-stale")
def location_of_nobody(site: LocalDaemon) -> None:
    change(site, lambda store, tx: tx.put("persist", b"l" + u64(1) + b"a/place", u64(find(store, "dir"))))


@damage("location-void", "entry-missing", named="/dir/dirty")
def location_of_what_is_not_there(site: LocalDaemon) -> None:
    def spoil(store: Store, tx: Transaction) -> None:
        ino = find(store, "dir/dirty")
        record = tx.inode(ino)
        assert record is not None
        places.set_location(tx, ino, record, b"nowhere")
        tx.put_inode(ino, record)
        tx.delete_sync_entry(ino)

    change(site, spoil)


@damage("intent-stale", "intent-missing", "intent-damaged")
def intents(site: LocalDaemon) -> None:
    def spoil(store: Store, tx: Transaction) -> None:
        tx.put_intent(1, b"somewhere", IntentRecord(find(store, "dir/small"), 0))
        tx.put("persist", b"i" + u64(1) + b"elsewhere", b"?")
        ino = find(store, "dirty.bin")
        entry = tx.sync_entry(ino)
        assert entry is not None
        entry.intent = b"a/path"
        tx.put_sync_entry(ino, entry)

    change(site, spoil)


# --- slabs -----------------------------------------------------------------------------------------------


@damage("slab-damaged")
def clean_slab_truncated(site: LocalDaemon) -> None:
    os.truncate(slab_of(site, container_of(site, "clean.bin")), 2 * MIB + 100)


@damage("slab-missing")
def clean_slab_missing(site: LocalDaemon) -> None:
    os.unlink(slab_of(site, container_of(site, "dir/small")))


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)


@damage("slab-damaged", arguments=("--verify-data",))
def clean_slab_with_a_wrong_bit(site: LocalDaemon) -> None:
    flip(slab_of(site, container_of(site, "clean.bin")), MIB + 5)


@damage(
    "bytes-lost",
    left=("bytes-lost",),
    arguments=("--verify-data",),
    named="/dirty.bin: bytes 1048576 to 2097152",
    changes={"dirty.bin": "other"},
)
def dirty_slab_with_a_wrong_bit(site: LocalDaemon) -> None:
    flip(slab_of(site, container_of(site, "dirty.bin")), MIB + 5)


@damage("file-lost", left=("file-lost",), named="/dirty.bin: 3145733 bytes", changes={"dirty.bin": "other"})
def dirty_slab_missing(site: LocalDaemon) -> None:
    os.unlink(slab_of(site, container_of(site, "dirty.bin")))


@damage("file-lost", left=("file-lost",), named="an older version is in", changes={"again": "other"})
def dirty_slab_of_a_file_with_an_older_version_missing(site: LocalDaemon) -> None:
    os.unlink(slab_of(site, container_of(site, "again")))


@damage(
    "bytes-lost",
    left=("bytes-lost",),
    named="/dirty.bin: bytes 2097152 to 3145733",
    changes={"dirty.bin": "other"},
)
def dirty_slab_truncated(site: LocalDaemon) -> None:
    os.truncate(slab_of(site, container_of(site, "dirty.bin")), 2 * MIB + 100)


@damage("slab-unindexed", named="/dirty.bin")
def record_of_a_dirty_slab_missing(site: LocalDaemon) -> None:
    container = container_of(site, "dirty.bin")
    with index_of(site) as index:
        batch = index.batch()
        batch.delete(container, 4)
        index.commit(batch)


@damage("record-damaged", "slab-unindexed", named="/dir/dirty")
def record_of_a_dirty_slab_damaged(site: LocalDaemon) -> None:
    container = container_of(site, "dir/dirty")
    with index_of(site) as index:
        batch = index.batch()
        batch.raw.put(b"c" + u64(container), b"\x93garbage")
        index.commit(batch)


@damage("pages-damaged", named="/dirty.bin")
def page_table_of_a_dirty_slab_damaged(site: LocalDaemon) -> None:
    container = container_of(site, "dirty.bin")
    with index_of(site) as index:
        batch = index.batch()
        batch.raw.put(b"p" + u64(container) + u64(0), b"?")
        index.commit(batch)


@damage("slab-damaged")
def page_table_of_a_clean_slab_damaged(site: LocalDaemon) -> None:
    container = container_of(site, "clean.bin")
    with index_of(site) as index:
        batch = index.batch()
        batch.raw.put(b"p" + u64(container) + u64(0), b"?")
        index.commit(batch)


@damage("pages-stale")
def page_table_of_nobody(site: LocalDaemon) -> None:
    container = container_of(site, "dirty.bin")
    with index_of(site) as index:
        batch = index.batch()
        batch.raw.put(b"p" + u64(container) + u64(9), b"12345678")
        batch.raw.put(b"p" + u64(4711) + u64(0), b"12345678")
        index.commit(batch)


@damage("slab-not-dirty", named="/dirty.bin")
def dirty_slab_that_counts_as_clean(site: LocalDaemon) -> None:
    container = container_of(site, "dirty.bin")
    with index_of(site) as index:
        record = index.record(container)
        assert record is not None
        record.state = CLEAN
        index.put(container, record)


@damage("slab-damaged", named="/clean.bin")
def clean_slab_that_counts_as_open(site: LocalDaemon) -> None:
    """Its seal was lost with the power, and perhaps bytes; the under storage has them all."""
    container = container_of(site, "clean.bin")
    with index_of(site) as index:
        record = index.record(container)
        assert record is not None
        record.state = WRITING
        index.put(container, record)


@damage("slab-elsewhere", named="not where the index says")
def slab_in_another_directory(site: LocalDaemon) -> None:
    container = container_of(site, "dirty.bin")
    with index_of(site) as index:
        record = index.record(container)
        assert record is not None
        other = index.new_directory(str(site.base / "other"))
        record.directory = other
        index.put(container, record)
        place = site.base / "other"
        (place / "slabs").mkdir(parents=True)
        text = {"format": 1, "worker_uuid": index.worker_uuid, "directory_id": other}
        (place / "alluxiofuse.json").write_text(json.dumps(text))


@damage("marker-damaged")
def marker_damaged(site: LocalDaemon) -> None:
    (site.base / "ssd" / "alluxiofuse.json").write_text("garbage")


@damage("marker-damaged")
def marker_missing(site: LocalDaemon) -> None:
    (site.base / "ssd" / "alluxiofuse.json").unlink()


@damage("uuid-missing")
def worker_without_a_name(site: LocalDaemon) -> None:
    with index_of(site) as index:
        batch = index.batch()
        batch.raw.delete(b"muuid")
        index.commit(batch)


@damage("worker-damaged", "worker-unknown", "holder-wrong")
def number_of_the_worker_damaged(site: LocalDaemon) -> None:
    def spoil(store: Store, tx: Transaction) -> None:
        for key, _ in store.scan("meta", b"worker"):
            tx.put("meta", b"worker" + key, b"\xff" * 8)

    change(site, spoil)


@damage("mark-damaged")
def mark_damaged(site: LocalDaemon) -> None:
    with index_of(site) as index:
        batch = index.batch()
        batch.raw.put(b"mstate", b"?")
        index.commit(batch)


@damage("state-older")
def older_state(site: LocalDaemon) -> None:
    with index_of(site) as index:
        seen = index.seen_state
        index.see_state(StateMark(seen.cluster_id, 1 << 40))


@damage("worker-unknown", "holder-wrong")
def worker_unknown_to_the_master(site: LocalDaemon) -> None:
    def spoil(store: Store, tx: Transaction) -> None:
        for key, _ in store.scan("meta", b"worker"):
            tx.delete("meta", b"worker" + key)

    change(site, spoil)


@damage("holder-wrong", named="/dirty.bin")
def wrong_holder(site: LocalDaemon) -> None:
    def spoil(record: InodeRecord) -> None:
        record.held_by = 77

    change_record(site, "dirty.bin", spoil)


@damage("size-differs", named="/dirty.bin")
def wrong_size(site: LocalDaemon) -> None:
    def spoil(record: InodeRecord) -> None:
        record.size = 10

    change_record(site, "dirty.bin", spoil)


@damage(
    "unwanted-dirty",
    changes={
        "dirty.bin": None,
        "lost+found": "dir",
        "lost+found/container-BINARY": DIRTY_FILES["dirty.bin"],
    },
)
def dirty_slab_of_nobody(site: LocalDaemon) -> None:
    """Everything is gone but the index of containers and the slab."""

    def spoil(store: Store, tx: Transaction) -> None:
        ino = find(store, "dirty.bin")
        tx.delete_inode(ino)
        tx.delete_edge(1, b"dirty.bin")
        tx.delete_sync_entry(ino)
        tx.delete("xattr", u64(ino) + b"user.color")

    change(site, spoil)


@damage(
    "unwanted-dirty",
    changes={"lost+found": "dir", "lost+found/container-999999999": b"bytes of a life that is forgotten"},
)
def dirty_slab_that_was_never_given(site: LocalDaemon) -> None:
    """The master has a number of containers that is smaller: it was restored from an older backup."""
    slab = slab_of(site, 999_999_999)
    slab.write_bytes(b"bytes of a life that is forgotten")
    with index_of(site) as index:
        directory = next(iter(index.directories()))
        from alluxiofuse.worker.checksums import checksum

        record = SlabRecord(33, directory, 1, 0, True, checksum(slab.read_bytes()))
        index.put(999_999_999, record)


def copy(source: Path, target: Path) -> None:
    """A directory tree in place of another, holes and times included."""
    shutil.rmtree(target, ignore_errors=True)
    os.makedirs(target.parent, exist_ok=True)
    subprocess.run(["cp", "-a", "--sparse=always", str(source), str(target)], check=True)
