"""The worker's index: RocksDB, what of each slab may be trusted after a restart.

Keys (integers 8 bytes big-endian):

b"c" + container           -> SlabRecord
b"p" + container + chunk   -> checksums of the pages chunk * 64 .. chunk * 64 + 63 of a container of
                              more than one page: present bitmap (8 bytes, little-endian), then
                              64 checksums of 8 bytes; the bitmap alone when all present pages are
                              pages of zeros. A container of one page has its checksum in the record.
b"m" + name                -> b"format", b"uuid", b"next_directory", b"state" (wire.types.StateMark)
b"d" + directory id        -> path of the tier directory when it was claimed

A batch of fetched pages is written after their bytes are in the slab; when it is lost, the pages
are fetched again. Records of states DIRTY and WRITING are written before the answer to the client:
in the write-ahead log of the operating system, which survives a kill of this process.
"""

from __future__ import annotations

import gc
import logging
import os
import struct
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rocksdict import AccessType, Options, Rdict, WriteBatch

from alluxiofuse import descriptors
from alluxiofuse.errors import BadRequestError, StateError
from alluxiofuse.state_disk import StateDb
from alluxiofuse.wire.codec import decode, decoder, encode
from alluxiofuse.wire.types import StateMark
from alluxiofuse.worker.checksums import ZERO_PAGE, bits
from alluxiofuse.worker.layout import sync_names

log = logging.getLogger(__name__)

FORMAT = 1
T = TypeVar("T")
CHUNK_PAGES = 64
_CHUNK = struct.Struct("<Q64Q")
_ZEROS_BYTES = 8
_FULL = (1 << CHUNK_PAGES) - 1


class SlabRecord(msgspec.Struct, array_like=True, gc=False):
    """What survives of a slab."""

    size: int
    """Of the content; while WRITING the file itself is the truth."""
    directory: int
    """Directory id."""
    state: int
    """slabs.CLEAN, DIRTY or WRITING."""
    accessed_s: int
    """Wall clock of the last index write, for the order of eviction after a restart."""
    is_present: bool = False
    """Of the only page of a container of at most one page."""
    checksum: int = 0
    """Of that page."""
    was: int = 0
    """Container id under which the slab's file may still be named: a crash between this record and
    the renaming of the file. 0: none."""
    passes: bool = False
    """While WRITING: kernels may be writing to it by themselves."""
    is_emptied: bool = False
    """While WRITING: what is in the file is of a container that is gone, and to be cut off first."""


_record_decoder = decoder(SlabRecord)


def u64(value: int) -> bytes:
    return value.to_bytes(8, "big")


def _options() -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(8 << 20)
    options.set_max_write_buffer_number(2)
    options.set_max_open_files(descriptors.share(0.1, least=20, most=1000))
    options.set_keep_log_file_num(2)
    options.set_max_total_wal_size(32 << 20)
    return options


class Batch:
    """Changes that happen together. Made by `Index.batch`, applied by `Index.commit`."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self.raw = WriteBatch(raw_mode=True)

    def put(self, container: int, record: SlabRecord) -> None:
        self.raw.put(b"c" + u64(container), encode(record))

    def delete(self, container: int, page_count: int) -> None:
        self.raw.delete(b"c" + u64(container))
        self.delete_chunks(container, 0, page_count)

    def delete_chunks(self, container: int, first_page: int, page_count: int) -> None:
        """Chunks that start at or beyond `first_page`, of a container that had `page_count` pages."""
        if page_count <= 1:
            return
        start = -(-first_page // CHUNK_PAGES)
        for chunk in range(start, -(-page_count // CHUNK_PAGES)):
            self.raw.delete(b"p" + u64(container) + u64(chunk))

    def put_pages(self, container: int, sums: dict[int, int], zeros: int = 0) -> None:
        """Pages became present (or changed), at most once per page and batch: those with a checksum,
        and those of the mask `zeros`, full pages of zeros."""
        grouped = dict(_by_chunk(sums))
        raw = zeros.to_bytes((zeros.bit_length() + 7) // 8, "little")
        empty = bytes(8)
        touched = [at // 8 for at in range(0, len(raw), 8) if raw[at : at + 8] != empty[: len(raw) - at]]
        for chunk in grouped.keys() | set(touched):
            present, values = self._index.chunk(container, chunk)
            word = int.from_bytes(raw[chunk * 8 : chunk * 8 + 8], "little")
            present |= word
            for page in bits(word):
                values[page] = ZERO_PAGE
            for page in grouped.get(chunk, ()):
                present |= 1 << (page % CHUNK_PAGES)
                values[page % CHUNK_PAGES] = sums[page]
            self.put_chunk(container, chunk, present, values)

    def remove_pages(self, container: int, mask: int) -> None:
        """Pages are no longer present."""
        for chunk, pages in _by_chunk(dict.fromkeys(bits(mask), 0)):
            present, values = self._index.chunk(container, chunk)
            for page in pages:
                present &= ~(1 << (page % CHUNK_PAGES))
            self.put_chunk(container, chunk, present, values)

    def put_chunk(self, container: int, chunk: int, present: int, values: list[int]) -> None:
        key = b"p" + u64(container) + u64(chunk)
        if not present:
            self.raw.delete(key)
        elif all(values[i] == ZERO_PAGE for i in bits(present)):
            self.raw.put(key, present.to_bytes(_ZEROS_BYTES, "little"))
        else:
            self.raw.put(key, _CHUNK.pack(present, *values))

    def move_chunks(self, old: int, new: int, page_count: int) -> None:
        if page_count > 1:
            for chunk in range(-(-page_count // CHUNK_PAGES)):
                value = self._index.get(b"p" + u64(old) + u64(chunk))
                if value is not None:
                    self.raw.put(b"p" + u64(new) + u64(chunk), value)
        self.delete(old, page_count)


class Index(StateDb):
    """An open index. Calls are quick enough to be made inline, except `sync`."""

    def __init__(self, directory: Path, *, is_readonly: bool = False) -> None:
        """Opens or creates it. UserError when another process has it, StateError when it is not one.
        `is_readonly`: changes nothing on disk, and nothing can be written."""
        super().__init__(directory)
        self._owed: list[WriteBatch] = []
        self._write_count = 0
        self.synced_count = -1
        """How many of the writes are on the disk; -1: it is not known."""
        if is_readonly and not (directory / "CURRENT").exists():
            raise StateError(f"{directory} holds no index of a worker")
        try:
            directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
            for made in (directory.parent, directory.parent.parent):
                sync_names(made)
            names = os.listdir(directory)
        except OSError as exc:
            raise StateError(f"{directory} can't be used for state: {exc.strerror}") from None
        if names and "CURRENT" not in names:
            raise StateError(f"{directory} holds other files and no index: name an empty state directory")
        try:
            access = AccessType.read_only() if is_readonly else AccessType.read_write()
            self._db = Rdict(str(directory), options=_options(), access_type=access)
        except Exception as exc:  # rocksdict raises bare Exception
            raise self._not_opened(exc, "a worker's index") from None
        found = self.get(b"mformat")
        if found is not None and int.from_bytes(found, "big") > FORMAT:
            self.close()
            raise StateError(f"{directory} was written by a newer version of this program")

    # --- identity ---------------------------------------------------------------------------------

    @property
    def worker_uuid(self) -> str:
        """Made at first use, then always the same."""
        found = self.get(b"muuid")
        if found is None:
            found = uuid.uuid4().hex.encode()
            batch = WriteBatch(raw_mode=True)
            batch.put(b"muuid", found)
            batch.put(b"mformat", u64(FORMAT))
            self._write(batch)
        if not found.isascii():
            raise self._damaged("the worker's name")
        return found.decode()

    @property
    def seen_state(self) -> StateMark:
        """Of the master: which state it had when this worker was last with it."""
        found = self.get(b"mstate")
        return StateMark() if found is None else self._decode(found, StateMark)

    def see_state(self, mark: StateMark) -> None:
        batch = WriteBatch(raw_mode=True)
        batch.put(b"mstate", encode(mark))
        try:
            self._write(batch)
        except StateError:
            pass  # It is told again and again.

    def directories(self) -> dict[int, str]:
        """Directory id -> path, of all that were ever claimed and not forgotten."""
        return {
            int.from_bytes(key, "big"): value.decode("utf-8", "surrogateescape")
            for key, value in self._scan(b"d")
        }

    def new_directory(self, path: str) -> int:
        """A directory id never used before, remembered with its path."""
        number = int.from_bytes(self.get(b"mnext_directory") or b"\1", "big")
        batch = WriteBatch(raw_mode=True)
        batch.put(b"mnext_directory", u64(number + 1))
        batch.put(b"d" + u64(number), path.encode("utf-8", "surrogateescape"))
        self._write(batch)
        return number

    def forget_directory(self, directory_id: int) -> None:
        batch = WriteBatch(raw_mode=True)
        batch.delete(b"d" + u64(directory_id))
        self._write(batch)

    # --- slabs ------------------------------------------------------------------------------------

    def get(self, key: bytes) -> bytes | None:
        """StateError, here and in all that reads: the disk gives nothing, or not what was written."""
        try:
            value: bytes | None = self._db.get(key)
        except Exception as exc:  # rocksdict raises bare Exception
            raise self._unreadable(exc) from None
        return value

    def _unreadable(self, exc: Exception) -> StateError:
        return StateError(f"the worker's index {self.directory} can't be read: {exc}")

    def record(self, container: int) -> SlabRecord | None:
        value = self.get(b"c" + u64(container))
        return None if value is None else self._decode(value, SlabRecord)

    def _decode(self, raw: bytes, type_: type[T]) -> T:
        try:
            return decode(raw, type_)
        except BadRequestError:
            raise self._damaged("a record") from None

    def _damaged(self, what: str) -> StateError:
        return StateError(f"{what} in {self.directory} is damaged: stop, and run `alluxiofuse fsck`")

    def records(self) -> Iterator[tuple[int, SlabRecord]]:
        decode_record = _record_decoder.decode
        for key, value in self._scan(b"c"):
            try:
                yield int.from_bytes(key, "big"), decode_record(value)
            except (msgspec.MsgspecError, ValueError):
                raise self._damaged("a record") from None

    def chunk(self, container: int, chunk: int) -> tuple[int, list[int]]:
        """(present bitmap, 64 checksums) of a chunk; a new list."""
        value = self.get(b"p" + u64(container) + u64(chunk))
        if value is None:
            return 0, [0] * CHUNK_PAGES
        if not is_chunk(value):
            raise self._damaged("a page table")
        if len(value) == _ZEROS_BYTES:
            return int.from_bytes(value, "little"), [ZERO_PAGE] * CHUNK_PAGES
        present, *values = _CHUNK.unpack(value)
        return present, values

    def presence(self, container: int) -> tuple[int, int]:
        """Masks of a container of several pages: (present, those of zeros)."""
        present, zeros = bytearray(), bytearray()
        for key, _ in self._scan(b"p" + u64(container)):
            at = int.from_bytes(key, "big") * 8
            present.extend(bytes(at - len(present)))
            zeros.extend(bytes(at - len(zeros)))
            found, values = self.chunk(container, at // 8)
            present += found.to_bytes(8, "little")
            if ZERO_PAGE in values:
                mask = sum(1 << page for page in bits(found) if values[page] == ZERO_PAGE)
                zeros += mask.to_bytes(8, "little")
        return int.from_bytes(present, "little"), int.from_bytes(zeros, "little")

    def checksums(self, container: int, pages: Iterable[int]) -> dict[int, int]:
        """Of the pages of a container of several pages that are present in the index."""
        found = {}
        for chunk, numbers in _by_chunk(dict.fromkeys(pages, 0)):
            present, values = self.chunk(container, chunk)
            for page in numbers:
                if present >> (page % CHUNK_PAGES) & 1:
                    found[page] = values[page % CHUNK_PAGES]
        return found

    # --- writing ----------------------------------------------------------------------------------

    def batch(self) -> Batch:
        return Batch(self)

    def put(self, container: int, record: SlabRecord) -> None:
        """A batch of one."""
        if self._trouble is not None:
            raise self._copy_of(self._trouble)
        try:
            self._db.put(b"c" + u64(container), encode(record))
        except Exception as exc:  # rocksdict raises bare Exception
            raise self._failed(exc) from None
        self._write_count += 1

    def commit(self, batch: Batch) -> None:
        """StateError (ENOSPC, EROFS, EIO): it has not happened, and nothing can be written until
        `heal` succeeds."""
        self._write(batch.raw)

    def owe(self, batch: Batch) -> None:
        """Like `commit`; where that fails it is done when writing works again. For what memory goes ahead
        with and a restart finds out by itself: content that is clean now, or is not here any more."""
        try:
            self.commit(batch)
        except StateError:
            self._owed.append(batch.raw)

    def _write(self, raw: WriteBatch) -> None:
        if self._trouble is not None:
            raise self._copy_of(self._trouble)
        try:
            self._db.write(raw)
        except Exception as exc:  # rocksdict raises bare Exception
            raise self._failed(exc) from None
        self._write_count += 1

    def sync(self) -> None:
        """fsync of the write-ahead log, unless another one has done it since the last write; blocks.
        Thread-safe. StateError: it may not survive the machine."""
        wanted = self._write_count
        with self._sync_lock:
            if self._trouble is not None:
                raise self._copy_of(self._trouble)
            if self.synced_count >= wanted:
                return
            count = self._write_count
            try:
                self._db.flush_wal(True)
                self.synced_count = count
            except Exception as exc:  # rocksdict raises bare Exception
                raise self._failed(exc) from None

    # --- while it can't be written -----------------------------------------------------------------

    def _reopen(self) -> None:
        """No scan is under way. What is owed is written too."""
        self.close()
        gc.collect()  # RocksDB's lock goes with the last reference
        self._db = Rdict(str(self.directory), options=_options())
        self.synced_count = -1
        while self._owed:
            self._db.write(self._owed[0])
            del self._owed[0]

    def close(self) -> None:
        try:
            self._db.close()
        except Exception as exc:  # what it still wanted to write is in the write-ahead log
            log.debug("closing %s: %s", self.directory, exc)

    def items(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """(key without the prefix, value) in key order, as of the first item."""
        return self._scan(prefix)

    def estimate(self) -> int:
        """About how many keys it holds."""
        return int(self._db.property_int_value("rocksdb.estimate-num-keys") or 0)

    def _scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        last: Any = prefix
        for last, value in self._db.items(from_key=prefix):
            if not last.startswith(prefix):
                return
            yield last[len(prefix) :], value
        try:
            iterator = self._db.iter()
            iterator.seek(bytes(last) + b"\x00")
            iterator.status()  # never a scan that just ends early
        except Exception as exc:  # rocksdict raises bare Exception
            raise self._unreadable(exc) from None


def is_chunk(raw: bytes) -> bool:
    """It can be the value of a key b"p"."""
    return len(raw) in (_ZEROS_BYTES, _CHUNK.size)


def _by_chunk(pages: dict[int, int]) -> Iterator[tuple[int, list[int]]]:
    grouped: dict[int, list[int]] = {}
    for page in pages:
        grouped.setdefault(page // CHUNK_PAGES, []).append(page)
    yield from grouped.items()
