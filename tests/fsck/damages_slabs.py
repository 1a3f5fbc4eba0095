"""Damage to slabs and their index, and to what the master knows of them. See `damages`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from daemons import LocalDaemon
from damage import change, change_index, container_of, damage, set_record, set_slab
from fsck_tree import DIRTY_FILES, MIB
from fsck_world import find, index_of, slab_of

from alluxiofuse.master.store import Store, Transaction, u64
from alluxiofuse.wire.types import StateMark
from alluxiofuse.worker.checksums import checksum
from alluxiofuse.worker.index import Batch, SlabRecord
from alluxiofuse.worker.slab import CLEAN, WRITING


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
    change_index(site, lambda batch: batch.delete(container, 4))


@damage("record-damaged", "slab-unindexed", named="/dir/dirty")
def record_of_a_dirty_slab_damaged(site: LocalDaemon) -> None:
    container = container_of(site, "dir/dirty")
    change_index(site, lambda batch: batch.raw.put(b"c" + u64(container), b"\x93garbage"))


def damage_page_table(site: LocalDaemon, name: str) -> None:
    container = container_of(site, name)
    change_index(site, lambda batch: batch.raw.put(b"p" + u64(container) + u64(0), b"?"))


@damage("pages-damaged", named="/dirty.bin")
def page_table_of_a_dirty_slab_damaged(site: LocalDaemon) -> None:
    damage_page_table(site, "dirty.bin")


@damage("slab-damaged")
def page_table_of_a_clean_slab_damaged(site: LocalDaemon) -> None:
    damage_page_table(site, "clean.bin")


@damage("pages-stale")
def page_table_of_nobody(site: LocalDaemon) -> None:
    container = container_of(site, "dirty.bin")

    def spoil(batch: Batch) -> None:
        batch.raw.put(b"p" + u64(container) + u64(9), b"12345678")
        batch.raw.put(b"p" + u64(4711) + u64(0), b"12345678")

    change_index(site, spoil)


@damage("slab-not-dirty", named="/dirty.bin")
def dirty_slab_that_counts_as_clean(site: LocalDaemon) -> None:
    set_slab(site, "dirty.bin", state=CLEAN)


@damage("slab-damaged", named="/clean.bin")
def clean_slab_that_counts_as_open(site: LocalDaemon) -> None:
    """Its seal was lost with the power, and perhaps bytes; the under storage has them all."""
    set_slab(site, "clean.bin", state=WRITING)


@damage("slab-elsewhere", named="not where the index says")
def slab_in_another_directory(site: LocalDaemon) -> None:
    place = site.base / "other"
    (place / "slabs").mkdir(parents=True)
    with index_of(site) as index:
        other, uuid = index.new_directory(str(place)), index.worker_uuid
    set_slab(site, "dirty.bin", directory=other)
    text = {"format": 1, "worker_uuid": uuid, "directory_id": other}
    (place / "alluxiofuse.json").write_text(json.dumps(text))


@damage("marker-damaged")
def marker_damaged(site: LocalDaemon) -> None:
    (site.base / "ssd" / "alluxiofuse.json").write_text("garbage")


@damage("marker-damaged")
def marker_missing(site: LocalDaemon) -> None:
    (site.base / "ssd" / "alluxiofuse.json").unlink()


@damage("uuid-missing")
def worker_without_a_name(site: LocalDaemon) -> None:
    change_index(site, lambda batch: batch.raw.delete(b"muuid"))


@damage("worker-damaged", "worker-unknown", "holder-wrong")
def number_of_the_worker_damaged(site: LocalDaemon) -> None:
    def spoil(store: Store, tx: Transaction) -> None:
        for key, _ in store.scan("meta", b"worker"):
            tx.put("meta", b"worker" + key, b"\xff" * 8)

    change(site, spoil)


@damage("mark-damaged")
def mark_damaged(site: LocalDaemon) -> None:
    change_index(site, lambda batch: batch.raw.put(b"mstate", b"?"))


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
    set_record(site, "dirty.bin", held_by=77)


@damage("size-differs", named="/dirty.bin")
def wrong_size(site: LocalDaemon) -> None:
    set_record(site, "dirty.bin", size=10)


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
        record = SlabRecord(33, directory, 1, 0, True, checksum(slab.read_bytes()))
        index.put(999_999_999, record)
