"""The metadata store: RocksDB, transactions, and the one `commit`.

All of the master's durable state is here and changes only through `Transaction.commit`. A
transaction must not contain an `await` between its first read and its commit: everything runs in
one thread, so this makes it serialised. Records that a transaction returns may be changed in place
and put back; they are not shared with other transactions.

Durability: a commit is in the write-ahead log of the operating system when it returns (survives a
kill of the process); `sync` (and a background call at most every 100 ms, by the master) makes it
survive the machine.

When the disk is full or fails, the commit at hand raises StateError and has not happened. RocksDB then
writes no more until it is opened again, which `heal` does as soon as there is room; reading goes on.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rocksdict import AccessType, Options, Rdict, ReadOptions, WriteBatch

from alluxiofuse import descriptors, state_disk
from alluxiofuse.errors import StateError
from alluxiofuse.master.durability import Durability
from alluxiofuse.master.records import (
    COLUMN_FAMILIES,
    FORMAT,
    InodeRecord,
    IntentRecord,
    MountRecord,
    RemoveEntry,
    SyncEntry,
)
from alluxiofuse.state_disk import StateDb
from alluxiofuse.wire.codec import decoder, encode

T = TypeVar("T")
_inode_decoder = decoder(InodeRecord)
_RESERVE = 1024
"""Counters are taken from the disk in steps of this many numbers."""

log = logging.getLogger(__name__)


def u64(value: int) -> bytes:
    return value.to_bytes(8, "big")


def decode_inode(ino: int, raw: bytes) -> InodeRecord:
    """StateError: it is damaged."""
    try:
        return _inode_decoder.decode(raw)
    except (msgspec.MsgspecError, ValueError):
        raise StateError(f"the record of inode {ino} is damaged: stop, and run `alluxiofuse fsck`") from None


def decode_record(raw: bytes, type_: type[T], what: str) -> T:
    """StateError: it is damaged. `what`: what it is, for people."""
    try:
        return decoder(type_).decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise StateError(f"{what} is damaged: stop, and run `alluxiofuse fsck`") from None


def _up_to(prefix: bytes) -> ReadOptions:
    """Of an iterator that ends behind the keys with `prefix`. Without that bound it walks on over all keys
    that were deleted lately, to the next one that is there, only for us to see that it is another's: then a
    scan of nothing costs a millisecond after the removal of 10,000 files."""
    options = ReadOptions()
    stem = prefix.rstrip(b"\xff")
    if stem:
        options.set_iterate_upper_bound(stem[:-1] + bytes([stem[-1] + 1]))
    return options


class Store(StateDb):
    """An open metadata store. Owned by one process (RocksDB's lock file)."""

    def __init__(self, directory: Path, *, is_readonly: bool = False) -> None:
        """Opens, and creates when the directory is empty or missing. UserError when another process
        has it open, StateError when it is not a store of ours or a newer format.

        `is_readonly`: changes nothing on disk, takes no lock of RocksDB's, and nothing can be
        committed; the directory has to hold a store."""
        super().__init__(directory)
        self._is_readonly = is_readonly
        self._reserved: dict[bytes, tuple[int, int]] = {}
        self.commit_count = 0
        self.synced_count = 0
        """How many of the commits are on the disk."""
        self.needed_count = 0
        """The newest commit that is not recovered from elsewhere if it is lost with the machine."""
        self.durability = Durability(self)
        self.on_commit: list[Callable[[], None]] = []
        """Called after every commit, while it is in the log of the operating system only."""
        self._scan_count = 0
        """Iterators in use: while there is one, RocksDB can't be closed."""
        self.reply: tuple[bytes, int] | None = None
        """While a change with a request id runs: under which key, and with which number, the commit that
        makes it keeps its answer; that commit sets it to None (`replies`)."""
        self.synced_sequence = 0
        """Of the newest commit that is known to be on the disk."""
        if not is_readonly:
            _prepare(directory)
        elif not (directory / "CURRENT").exists():
            raise StateError(f"{directory} holds no metadata store")
        try:
            self._open()
        except Exception as exc:  # rocksdict raises bare Exception
            raise self._not_opened(exc, "a metadata store") from None
        self._check_format()

    def _open(self) -> None:
        families = {name: _options() for name in COLUMN_FAMILIES}
        access = AccessType.read_only() if self._is_readonly else AccessType.read_write()
        self._db: Any = Rdict(
            str(self.directory), options=_options(), column_families=families, access_type=access
        )
        self._cf = _Families(self)
        self._cf.update({name: self._db.get_column_family(name) for name in COLUMN_FAMILIES})
        self._handle = _Families(self)
        self._handle.update({name: self._db.get_column_family_handle(name) for name in COLUMN_FAMILIES})

    def _check_format(self) -> None:
        found = self.get("meta", b"format")
        if found is None and self._is_readonly:
            return
        if found is None:
            transaction = Transaction(self)
            transaction.put("meta", b"format", u64(FORMAT))
            transaction.commit()
        elif int.from_bytes(found, "big") > FORMAT:
            self.close()
            raise StateError(f"{self.directory} was written by a newer version of this program")

    # --- reading ----------------------------------------------------------------------------------

    def get(self, family: str, key: bytes) -> bytes | None:
        """StateError, here and in all that reads: the disk gives nothing, or not what was written."""
        try:
            value: bytes | None = self._cf[family].get(key)
        except Exception as exc:  # rocksdict raises bare Exception
            raise self._unreadable(exc) from None
        return value

    def inode(self, ino: int) -> InodeRecord | None:
        value = self.get("inode", u64(ino))
        return None if value is None else decode_inode(ino, value)

    def child(self, parent: int, name: bytes) -> int | None:
        value = self.get("edge", u64(parent) + name)
        return None if value is None else int.from_bytes(value, "big")

    def _unreadable(self, exc: Exception) -> Exception:
        if type(exc) is not Exception:
            return exc  # not of RocksDB
        return StateError(f"the state directory {self.directory} can't be read: {exc}")

    def scan(self, family: str, prefix: bytes, after: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """(key without the prefix, value) in key order; `after`: strictly beyond prefix + after. A
        snapshot as of the first item: changes made meanwhile are not seen. StateError where the disk
        gives nothing more: never a scan that just ends early."""
        start = last = prefix if after is None else prefix + after + b"\x00"
        cut = len(prefix)
        options = _up_to(prefix)
        self._scan_count += 1
        try:
            # `items` costs 0.15 us a key, an iterator that is moved by hand 0.4. But damage just ends it.
            for last, value in self._cf[family].items(from_key=start, read_opt=options):
                yield last[cut:], value
            self._check_end(family, last + b"\x00", options)
        finally:
            self._scan_count -= 1

    def _check_end(self, family: str, start: bytes, options: ReadOptions) -> None:
        """StateError when what follows can't be read."""
        try:
            iterator = self._cf[family].iter(options)
            iterator.seek(start)
            iterator.status()
        except Exception as exc:  # rocksdict raises bare Exception
            raise self._unreadable(exc) from None

    def last_key(self, family: str, limit: bytes) -> bytes | None:
        """The greatest key that is not above `limit`."""
        iterator = self._cf[family].iter()
        iterator.seek_for_prev(limit)
        return bytes(iterator.key()) if iterator.valid() else None

    def estimate(self, family: str) -> int:
        """About how many keys a family holds."""
        return int(self._cf[family].property_int_value("rocksdb.estimate-num-keys") or 0)

    # --- writing ----------------------------------------------------------------------------------

    def transaction(self) -> Transaction:
        return Transaction(self)

    def take_number(self, counter: bytes) -> int:
        """The next number (from 1) of a durable counter: never given twice, gaps after a crash, also
        one of the machine (others may remember what this store then does not). Blocks for an fsync
        once in many times."""
        at, end = self._reserved.get(counter, (0, 0))
        if at == end:
            raw = self.get("meta", counter)
            at = 1 if raw is None else int.from_bytes(raw, "big")
            end = at + _RESERVE
            batch = WriteBatch(raw_mode=True)
            batch.put(counter, u64(end), self._handle["meta"])
            self.commit(batch)
            self.sync()
        self._reserved[counter] = (at + 1, end)
        return at

    def commit(self, batch: WriteBatch, *, is_recoverable: bool = False) -> None:
        """Every change of the master's state passes here, atomically. StateError (ENOSPC, EIO): it has
        not happened. `is_recoverable`: should it be lost with the machine, a worker brings it again."""
        if self._trouble is not None:
            raise self._copy_of(self._trouble)
        try:
            self._db.write(batch)
        except Exception as exc:  # rocksdict raises bare Exception
            raise self._failed(exc) from None
        self.commit_count += 1
        if not is_recoverable:
            self.needed_count = self.commit_count
        for callback in self.on_commit:
            callback()

    def sync(self) -> None:
        """fsync of the write-ahead log; blocks for a disk write: call it in a thread. Thread-safe.
        StateError: what was committed may not survive the machine."""
        with self._sync_lock:
            if self._trouble is not None:
                raise self._copy_of(self._trouble)
            count = self.commit_count
            try:
                sequence = self.sequence
                self._db.flush_wal(True)
                self.synced_sequence = sequence
            except Exception as exc:  # rocksdict raises bare Exception
                raise self._failed(exc) from None
            self.synced_count = max(self.synced_count, count)

    @property
    def sequence(self) -> int:
        """Of the newest commit. Grows with each, from life to life."""
        return int(self._db.latest_sequence_number())

    # --- while it can't be written -----------------------------------------------------------------

    def _may_reopen(self) -> bool:
        return not self._scan_count and state_disk.can_be_written(self.directory)

    def _reopen(self) -> None:
        self._close()
        gc.collect()  # RocksDB's lock goes with the last reference
        self._open()

    def unreachable(self) -> StateError:
        """For reading while it is closed, after an attempt to open it again failed."""
        return self._copy_of(self._trouble or StateError(f"{self.directory} is closed"))

    def close(self) -> None:
        """Releases RocksDB's lock. Idempotent."""
        self._close()

    def _close(self) -> None:
        for part in (*self._cf.values(), self._db):
            try:
                if part is not None:
                    part.close()
            except Exception as exc:  # what it still wanted to write is in the write-ahead log
                log.debug("closing %s: %s", self.directory, exc)
        self._cf.clear()
        self._handle.clear()
        self._db = None


class _Families(dict[str, Any]):
    """Column families, or their handles, by name; StateError while the store is not open."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def __missing__(self, name: str) -> Any:
        raise self._store.unreachable()


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
        return None if value is None else decode_inode(ino, value)

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
        return None if value is None else decode_record(value, MountRecord, "the mount table")

    def put_mount(self, record: MountRecord) -> None:
        self.put("mount", u64(record.mount_id), encode(record))

    def sync_entry(self, ino: int) -> SyncEntry | None:
        value = self.get("persist", b"s" + u64(ino))
        return None if value is None else decode_record(value, SyncEntry, "an entry of the persist log")

    def put_sync_entry(self, ino: int, entry: SyncEntry) -> None:
        self.put("persist", b"s" + u64(ino), encode(entry))

    def delete_sync_entry(self, ino: int) -> None:
        self.delete("persist", b"s" + u64(ino))

    def remove_entry(self, mount_id: int, path: bytes) -> RemoveEntry | None:
        value = self.get("persist", b"r" + u64(mount_id) + path)
        return None if value is None else decode_record(value, RemoveEntry, "an entry of the persist log")

    def put_remove_entry(self, mount_id: int, path: bytes, entry: RemoveEntry) -> None:
        self.put("persist", b"r" + u64(mount_id) + path, encode(entry))

    def delete_remove_entry(self, mount_id: int, path: bytes) -> None:
        self.delete("persist", b"r" + u64(mount_id) + path)

    def intent(self, mount_id: int, path: bytes) -> IntentRecord | None:
        value = self.get("persist", b"i" + u64(mount_id) + path)
        return None if value is None else decode_record(value, IntentRecord, "an entry of the persist log")

    def put_intent(self, mount_id: int, path: bytes, intent: IntentRecord) -> None:
        self.put("persist", b"i" + u64(mount_id) + path, encode(intent))

    def delete_intent(self, mount_id: int, path: bytes) -> None:
        self.delete("persist", b"i" + u64(mount_id) + path)

    def commit(self, answer: object = None, *, is_recoverable: bool = False) -> None:
        """Apply; the transaction is empty and usable again afterwards. StateError: nothing happened.
        `answer`: what this change is answered with, kept in case the request comes again.
        `is_recoverable`: see `Store.commit`."""
        if answer is not None and (reply := self.store.reply) is not None:
            self.put("meta", reply[0], u64(reply[1]) + encode(answer))
        if self._writes:
            batch = WriteBatch(raw_mode=True)
            handle = self.store._handle
            for (family, key), value in self._writes.items():
                if value is None:
                    batch.delete(key, handle[family])
                else:
                    batch.put(key, value, handle[family])
            self._writes.clear()
            try:
                self.store.commit(batch, is_recoverable=is_recoverable)
            except StateError:
                self._after.clear()
                raise
            if answer is not None:
                self.store.reply = None
        callbacks, self._after = self._after, []
        for callback in callbacks:
            callback()


def _options() -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.create_missing_column_families(True)
    options.set_write_buffer_size(16 << 20)
    options.set_max_write_buffer_number(2)
    options.set_max_open_files(descriptors.share(0.1, least=20, most=1000))
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


__all__ = ["Store", "Transaction", "decode_inode", "decode_record", "u64"]
