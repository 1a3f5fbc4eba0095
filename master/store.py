"""The metadata store: RocksDB, transactions, and the one `commit`.

All of the master's durable state is here and changes only through `Transaction.commit`. A
transaction must not contain an `await` between its first read and its commit: everything runs in
one thread, so this makes it serialised. Records that a transaction returns may be changed in place
and put back; they are not shared with other transactions.

Durability: a commit is in the write-ahead log of the operating system when it returns (survives a
kill of the process); `sync` (and a background call at most every 100 ms, by the master) makes it
survive the machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from rocksdict import Options, Rdict, WriteBatch

from alluxiofuse.errors import StateError, UserError
from alluxiofuse.master.records import (
    COLUMN_FAMILIES,
    FORMAT,
    InodeRecord,
    IntentRecord,
    MountRecord,
    RemoveEntry,
    SyncEntry,
)
from alluxiofuse.wire.codec import decoder, encode

_inode_decoder = decoder(InodeRecord)
_RESERVE = 1024
"""Counters are taken from the disk in steps of this many numbers."""


def u64(value: int) -> bytes:
    return value.to_bytes(8, "big")


class Store:
    """An open metadata store. Owned by one process (RocksDB's lock file)."""

    def __init__(self, directory: Path) -> None:
        """Opens, and creates when the directory is empty or missing. UserError when another process
        has it open, StateError when it is not a store of ours or a newer format."""
        self.directory = directory
        self._reserved: dict[bytes, tuple[int, int]] = {}
        self.commit_count = 0
        self.on_commit: list[Callable[[], None]] = []
        """Called after every commit, while it is in the log of the operating system only."""
        _prepare(directory)
        options = _options()
        try:
            self._db = Rdict(
                str(directory), options=options, column_families={n: _options() for n in COLUMN_FAMILIES}
            )
        except Exception as exc:  # rocksdict raises bare Exception
            if "lock" in str(exc).lower():
                raise UserError(
                    f"{directory} is in use by another process: stop it or name another state directory"
                ) from None
            raise StateError(f"{directory} can't be opened as a metadata store: {exc}") from None
        self._cf = {name: self._db.get_column_family(name) for name in COLUMN_FAMILIES}
        self._handle = {name: self._db.get_column_family_handle(name) for name in COLUMN_FAMILIES}
        self._check_format()

    def _check_format(self) -> None:
        found = self.get("meta", b"format")
        if found is None:
            transaction = Transaction(self)
            transaction.put("meta", b"format", u64(FORMAT))
            transaction.commit()
        elif int.from_bytes(found, "big") > FORMAT:
            self.close()
            raise StateError(f"{self.directory} was written by a newer version of this program")

    # --- reading ----------------------------------------------------------------------------------

    def get(self, family: str, key: bytes) -> bytes | None:
        value: bytes | None = self._cf[family].get(key)
        return value

    def inode(self, ino: int) -> InodeRecord | None:
        value = self._cf["inode"].get(u64(ino))
        return None if value is None else _inode_decoder.decode(value)

    def child(self, parent: int, name: bytes) -> int | None:
        value = self._cf["edge"].get(u64(parent) + name)
        return None if value is None else int.from_bytes(value, "big")

    def scan(self, family: str, prefix: bytes, after: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """(key without the prefix, value) in key order; `after`: strictly beyond prefix + after. A
        snapshot as of the first item: changes made meanwhile are not seen."""
        iterator = self._cf[family].iter()
        iterator.seek(prefix if after is None else prefix + after + b"\x00")
        cut = len(prefix)
        while iterator.valid():
            key = iterator.key()
            if not key.startswith(prefix):
                return
            yield key[cut:], iterator.value()
            iterator.next()

    def estimate(self, family: str) -> int:
        """About how many keys a family holds."""
        return int(self._cf[family].property_int_value("rocksdb.estimate-num-keys") or 0)

    # --- writing ----------------------------------------------------------------------------------

    def transaction(self) -> Transaction:
        return Transaction(self)

    def take_number(self, counter: bytes) -> int:
        """The next number (from 1) of a durable counter: never given twice, gaps after a crash."""
        at, end = self._reserved.get(counter, (0, 0))
        if at == end:
            raw = self.get("meta", counter)
            at = 1 if raw is None else int.from_bytes(raw, "big")
            end = at + _RESERVE
            batch = WriteBatch(raw_mode=True)
            batch.put(counter, u64(end), self._handle["meta"])
            self.commit(batch)
        self._reserved[counter] = (at + 1, end)
        return at

    def commit(self, batch: WriteBatch) -> None:
        """Every change of the master's state passes here, atomically."""
        self._db.write(batch)
        self.commit_count += 1
        for callback in self.on_commit:
            callback()

    def sync(self) -> None:
        """fsync of the write-ahead log; blocks for a disk write: call it in a thread. Thread-safe."""
        self._db.flush_wal(True)

    def close(self) -> None:
        """Releases RocksDB's lock. Idempotent."""
        for family in self._cf.values():
            family.close()
        self._cf.clear()
        self._handle.clear()
        self._db.close()


class Transaction:
    """Reads through its own writes; `commit` makes all of them happen, or none."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._writes: dict[tuple[str, bytes], bytes | None] = {}
        self._after: list[Callable[[], None]] = []

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Call `callback` (plain, quick, must not raise) once the changes are durable against a kill:
        events, commands to workers. Never called when the transaction is dropped."""
        self._after.append(callback)

    def get(self, family: str, key: bytes) -> bytes | None:
        if (family, key) in self._writes:
            return self._writes[family, key]
        return self.store.get(family, key)

    def put(self, family: str, key: bytes, value: bytes) -> None:
        self._writes[family, key] = value

    def delete(self, family: str, key: bytes) -> None:
        self._writes[family, key] = None

    def scan(self, family: str, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Like Store.scan with this transaction's writes laid over it; in key order."""
        merged = {prefix + k: v for k, v in self.store.scan(family, prefix)}
        for (fam, key), value in self._writes.items():
            if fam == family and key.startswith(prefix):
                if value is None:
                    merged.pop(key, None)
                else:
                    merged[key] = value
        for key in sorted(merged):
            yield key[len(prefix) :], merged[key]

    def is_empty(self, family: str, prefix: bytes) -> bool:
        """No key with this prefix, without reading more than needed."""
        gone = {k for (f, k), v in self._writes.items() if f == family and v is None}
        if any(f == family and v is not None and k.startswith(prefix) for (f, k), v in self._writes.items()):
            return False
        return all(prefix + key in gone for key, _ in self.store.scan(family, prefix))

    # --- typed ------------------------------------------------------------------------------------

    def inode(self, ino: int) -> InodeRecord | None:
        value = self.get("inode", u64(ino))
        return None if value is None else _inode_decoder.decode(value)

    def put_inode(self, ino: int, record: InodeRecord) -> None:
        self.put("inode", u64(ino), encode(record))

    def delete_inode(self, ino: int) -> None:
        self.delete("inode", u64(ino))

    def child(self, parent: int, name: bytes) -> int | None:
        value = self.get("edge", u64(parent) + name)
        return None if value is None else int.from_bytes(value, "big")

    def put_edge(self, parent: int, name: bytes, ino: int) -> None:
        self.put("edge", u64(parent) + name, u64(ino))

    def delete_edge(self, parent: int, name: bytes) -> None:
        self.delete("edge", u64(parent) + name)

    def mount(self, mount_id: int) -> MountRecord | None:
        value = self.get("mount", u64(mount_id))
        return None if value is None else decoder(MountRecord).decode(value)

    def put_mount(self, record: MountRecord) -> None:
        self.put("mount", u64(record.mount_id), encode(record))

    def sync_entry(self, ino: int) -> SyncEntry | None:
        value = self.get("persist", b"s" + u64(ino))
        return None if value is None else decoder(SyncEntry).decode(value)

    def put_sync_entry(self, ino: int, entry: SyncEntry) -> None:
        self.put("persist", b"s" + u64(ino), encode(entry))

    def delete_sync_entry(self, ino: int) -> None:
        self.delete("persist", b"s" + u64(ino))

    def remove_entry(self, mount_id: int, path: bytes) -> RemoveEntry | None:
        value = self.get("persist", b"r" + u64(mount_id) + path)
        return None if value is None else decoder(RemoveEntry).decode(value)

    def put_remove_entry(self, mount_id: int, path: bytes, entry: RemoveEntry) -> None:
        self.put("persist", b"r" + u64(mount_id) + path, encode(entry))

    def delete_remove_entry(self, mount_id: int, path: bytes) -> None:
        self.delete("persist", b"r" + u64(mount_id) + path)

    def intent(self, mount_id: int, path: bytes) -> IntentRecord | None:
        value = self.get("persist", b"i" + u64(mount_id) + path)
        return None if value is None else decoder(IntentRecord).decode(value)

    def put_intent(self, mount_id: int, path: bytes, intent: IntentRecord) -> None:
        self.put("persist", b"i" + u64(mount_id) + path, encode(intent))

    def delete_intent(self, mount_id: int, path: bytes) -> None:
        self.delete("persist", b"i" + u64(mount_id) + path)

    def commit(self) -> None:
        """Apply; the transaction is empty and usable again afterwards."""
        if self._writes:
            batch = WriteBatch(raw_mode=True)
            handle = self.store._handle
            for (family, key), value in self._writes.items():
                if value is None:
                    batch.delete(key, handle[family])
                else:
                    batch.put(key, value, handle[family])
            self._writes.clear()
            self.store.commit(batch)
        callbacks, self._after = self._after, []
        for callback in callbacks:
            callback()


def _options() -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.create_missing_column_families(True)
    options.set_write_buffer_size(16 << 20)
    options.set_max_write_buffer_number(2)
    options.set_keep_log_file_num(4)
    options.set_max_total_wal_size(64 << 20)
    return options


def _prepare(directory: Path) -> None:
    """Create the directory, or see that what is there may be ours."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = os.listdir(directory)
    except NotADirectoryError:
        raise StateError(f"{directory} is not a directory") from None
    except FileExistsError:
        raise StateError(f"{directory} is not a directory") from None
    except OSError as exc:
        raise StateError(f"{directory} can't be used for state: {exc.strerror}") from None
    if names and "CURRENT" not in names:
        raise StateError(f"{directory} holds other files and no metadata store: name an empty directory")


__all__ = ["Store", "Transaction", "u64"]
