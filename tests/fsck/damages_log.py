"""Damage to counters, lists and the persist log. See `damages`."""

from __future__ import annotations

from daemons import LocalDaemon
from damage import change, container_of, damage, set_record
from fsck_world import find, record_of

from alluxiofuse.master import places
from alluxiofuse.master.records import IntentRecord, RemoveEntry
from alluxiofuse.master.store import Store, Transaction, u64


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
    set_record(site, "dir/dirty", container=container_of(site, "dir/sub/dirty"), size=1200)


# --- the persist log ----------------------------------------------------------------------------------


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
