"""Page checksums and the blocking work on slab files. No state; called in threads or inline.

A page's checksum is the xxh3-64 of its bytes: PAGE_BYTES of them, fewer in the last page of a
container. A page of zeros is never allocated: it is a hole of the slab, present and costing nothing,
so that sparse files stay sparse. `ZERO_PAGE` is the checksum of a full one.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache

import xxhash

from alluxiofuse.ids import PAGE_BYTES, page_count, page_length, runs
from alluxiofuse.worker.layout import PART_SUFFIX, sync_names

ZERO_PAGE = xxhash.xxh3_64_intdigest(bytes(PAGE_BYTES))
"""Checksum of a full page of zeros."""

_WIRE_MASK = (1 << 63) - 1
_PUNCH = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, linux/falloc.h
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

Buffer = bytes | bytearray | memoryview


def checksum(data: Buffer) -> int:
    return xxhash.xxh3_64_intdigest(data)


@lru_cache(maxsize=64)
def _zero_checksum(length: int) -> int:
    return xxhash.xxh3_64_intdigest(bytes(length))


def is_zero(value: int, length: int) -> bool:
    """The checksum is that of `length` zeros (1 .. PAGE_BYTES)."""
    return value == (ZERO_PAGE if length == PAGE_BYTES else _zero_checksum(length))


def wire_checksum(data: Buffer) -> int:
    """The low 63 bits of the xxh3-64, as `worker_ops.ReadResult` carries it."""
    return xxhash.xxh3_64_intdigest(data) & _WIRE_MASK


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the blocks of [offset, offset + length) back; reads as zeros then. OSError."""
    while _libc.fallocate(fd, _PUNCH, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


_STEP_BYTES = 64


def bits(mask: int) -> Iterator[int]:
    """Numbers of the set bits of a mask that is not negative, ascending. Linear in its length."""
    raw = mask.to_bytes((mask.bit_length() + 7) // 8, "little")
    for at in range(0, len(raw), _STEP_BYTES):
        part = int.from_bytes(raw[at : at + _STEP_BYTES], "little")
        while part:
            low = part & -part
            yield at * 8 + low.bit_length() - 1
            part ^= low


def mask_of(pages: Iterable[int]) -> int:
    """The mask with these bits. Linear."""
    raw = bytearray()
    for page in pages:
        at = page >> 3
        if at >= len(raw):
            raw.extend(bytes(max(at + 1 - len(raw), len(raw))))
        raw[at] |= 1 << (page & 7)
    return int.from_bytes(raw, "little")


def mask_runs(mask: int) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of set bits, ascending."""
    if not mask:
        return
    first = (mask & -mask).bit_length() - 1
    rest = mask >> first
    if not rest & (rest + 1):
        yield first, rest.bit_length()
    else:
        yield from runs(bits(mask))


def pwrite_all(fd: int, data: Buffer, offset: int) -> None:
    """All of `data`; OSError (a short write goes on until the reason for it shows)."""
    done = os.pwrite(fd, data, offset)
    if done < len(data):
        view = memoryview(data)
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)


def append_all(fd: int, data: Buffer) -> None:
    """All of `data` to the end of the file, in one piece whoever else appends: others have the
    descriptor too, so only the kernel knows where the end is. OSError as of `pwrite_all`."""
    done = os.pwritev(fd, [data], 0, os.RWF_APPEND)
    if done < len(data):
        view = memoryview(data)
        while done < len(view):
            done += os.pwritev(fd, [view[done:]], 0, os.RWF_APPEND)


def store_pages(fd: int, first: int, data: Buffer) -> list[int]:
    """Write `data`, which starts at page `first`, to the slab, leaving out pages of zeros; the
    checksum of each page."""
    view = memoryview(data).cast("B")
    count = page_count(len(view))
    sums = [checksum(view[i * PAGE_BYTES : (i + 1) * PAGE_BYTES]) for i in range(count)]
    filled = [i for i in range(count) if not is_zero(sums[i], page_length(i, len(view)))]
    for at, number in runs(filled):
        pwrite_all(fd, view[at * PAGE_BYTES : (at + number) * PAGE_BYTES], (first + at) * PAGE_BYTES)
    return sums


def page_checksums(fd: int, pages: Iterator[int] | list[int] | range, size: int) -> dict[int, int]:
    """Checksums of pages as they are in the slab of a container of `size` bytes. A file that is too
    short gives a checksum of what is there, which then does not match."""
    buffer = bytearray(min(PAGE_BYTES, size))
    found = {}
    with memoryview(buffer) as view:
        for page in pages:
            length = page_length(page, size)
            got = os.preadv(fd, [view[:length]], page * PAGE_BYTES)
            found[page] = checksum(view[:got])
    return found


def data_pages(fd: int, size: int) -> int:
    """Mask of the pages that have any allocated data (SEEK_DATA). Moves the descriptor's offset."""
    mask = 0
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # No more data; or it was truncated in between.
                break
            raise
        if start >= size:
            break
        first, last = start // PAGE_BYTES, (end - 1) // PAGE_BYTES
        mask |= ((1 << (last - first + 1)) - 1) << first
        at = (last + 1) * PAGE_BYTES
    return mask


def sealed_checksums(fd: int, pages: int, size: int) -> tuple[dict[int, int], int, int]:
    """Of the pages of mask `pages` of a slab that was written: checksums; the mask of full pages of
    zeros (which have none in the dict), those that are holes told apart cheaply; and the mask of
    pages of zeros, the last one included, that are not holes yet. Changes nothing. Blocks for the
    reading of the data; moves the descriptor's offset."""
    full = (1 << (size // PAGE_BYTES)) - 1
    data = data_pages(fd, size)
    zeros = pages & full & ~data
    found = page_checksums(fd, bits(pages & ~zeros), size)
    zeros |= mask_of(page for page, value in found.items() if value == ZERO_PAGE)
    last = page_count(size) - 1
    filled = zeros | (1 << last if last in found and is_zero(found[last], page_length(last, size)) else 0)
    return {page: value for page, value in found.items() if value != ZERO_PAGE}, zeros, filled & data


def punch_pages(fd: int, pages: int) -> None:
    """Make pages of zeros holes; the times stay. Nobody may be writing: what is written to such a
    page meanwhile would be lost. Blocks."""
    times = os.fstat(fd)
    for first, count in mask_runs(pages):
        punch_hole(fd, first * PAGE_BYTES, count * PAGE_BYTES)
    os.utime(fd, ns=(times.st_atime_ns, times.st_mtime_ns))


def copy_pages(source: str, target: str, pages: int, size: int, sync: bool) -> None:
    """A new file `target` of `size` bytes with the given pages of `source` and holes elsewhere; with
    `sync` it is durable, its name too. It is there as a whole or not at all."""
    part = target + PART_SUFFIX
    read_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        write_fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(write_fd, size)
            for page in bits(pages):
                offset = page * PAGE_BYTES
                pwrite_all(write_fd, os.pread(read_fd, page_length(page, size), offset), offset)
            if sync:
                os.fsync(write_fd)
            os.rename(part, target)
        except BaseException:
            os.unlink(part)
            raise
        finally:
            os.close(write_fd)
    finally:
        os.close(read_fd)
    if sync:
        sync_names(os.path.dirname(target))
