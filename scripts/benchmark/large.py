"""One large file: in sequence, mapped, and at random."""

from __future__ import annotations

import mmap
import os
import random
import signal
import time

from benchmark.place import (
    CHUNK_BYTES,
    PAGE_BYTES,
    Place,
    Workload,
    WrongBytesError,
    aligned_buffer,
    drop_caches,
    expected,
    per_second,
    timed,
)

_BATCH = 16
_ANSWER_BYTES = 256
"""What a reader says, filled up with blanks; a pipe takes it in one piece."""


def sequential_write(place: Place, is_synced: bool) -> float:
    def write() -> None:
        fd = os.open(place.big, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            for offset in range(0, place.size_bytes, CHUNK_BYTES):
                if os.write(fd, expected(offset, CHUNK_BYTES)) != CHUNK_BYTES:
                    raise WrongBytesError("a write was cut short")
            if is_synced:
                os.fsync(fd)
        finally:
            os.close(fd)

    return place.size_bytes / timed(write) / 1e6


def _ensure_big(place: Place) -> None:
    if not place.big.exists() or place.big.stat().st_size != place.size_bytes:
        sequential_write(place, is_synced=True)


def _read_all(place: Place, is_checked: bool) -> None:
    buffer = bytearray(CHUNK_BYTES)
    offset = 0
    fd = os.open(place.big, os.O_RDONLY)
    try:
        while length := os.readv(fd, [buffer]):
            if is_checked and buffer[:length] != expected(offset, length):
                raise WrongBytesError(f"wrong bytes in the MiB at {offset}")
            offset += length
    finally:
        os.close(fd)
    if offset != place.size_bytes:
        raise WrongBytesError(f"{offset} of {place.size_bytes} bytes could be read")


def _map_all(place: Place, is_checked: bool) -> None:
    buffer = bytearray(CHUNK_BYTES)
    with open(place.big, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        if len(mapped) != place.size_bytes:
            raise WrongBytesError(f"{len(mapped)} of {place.size_bytes} bytes could be mapped")
        with memoryview(mapped) as view:
            for offset in range(0, len(view), CHUNK_BYTES):
                buffer[:] = view[offset : offset + CHUNK_BYTES]
                if is_checked and buffer != expected(offset, CHUNK_BYTES):
                    raise WrongBytesError(f"wrong bytes in the MiB at {offset} of the mapping")


def read_cold(place: Place) -> float:
    _ensure_big(place)
    drop_caches([place.big])
    seconds = timed(lambda: _read_all(place, is_checked=False))
    _read_all(place, is_checked=True)  # the very pages that the first one brought into the cache
    return place.size_bytes / seconds / 1e6


def read_warm(place: Place) -> float:
    _ensure_big(place)
    _read_all(place, is_checked=True)
    return place.size_bytes / timed(lambda: _read_all(place, is_checked=False)) / 1e6


def mmap_read(place: Place) -> float:
    _ensure_big(place)
    drop_caches([place.big])
    seconds = timed(lambda: _map_all(place, is_checked=False))
    _map_all(place, is_checked=True)
    return place.size_bytes / seconds / 1e6


def _open_direct(place: Place, flags: int) -> int:
    try:
        return os.open(place.big, flags | os.O_DIRECT)
    except OSError:
        place.notes.add("takes no O_DIRECT: random access goes through the page cache")
        return os.open(place.big, flags)


def _read_pages(place: Place, seed: int) -> float:
    """4 KiB at random, one after the other; one of each batch is compared."""
    buffer = aligned_buffer(PAGE_BYTES)
    pages = place.size_bytes // PAGE_BYTES
    pick = random.Random(seed)
    fd = _open_direct(place, os.O_RDONLY)

    def read_batch() -> None:
        for _ in range(_BATCH):
            offset = pick.randrange(pages) * PAGE_BYTES
            os.preadv(fd, [buffer], offset)
        if bytearray(buffer[:]) != expected(offset, PAGE_BYTES):
            raise WrongBytesError(f"wrong bytes in the 4 KiB at {offset}")

    try:
        return per_second(read_batch, place.seconds) * _BATCH
    finally:
        os.close(fd)


def random_read(place: Place) -> float:
    _ensure_big(place)
    drop_caches([place.big])
    return _read_pages(place, seed=2)


def random_read_at_once(place: Place, readers: int) -> float:
    """Each reader is a process: threads of one would wait for the interpreter's lock instead."""
    _ensure_big(place)
    os.close(_open_direct(place, os.O_RDONLY))  # for the note, which a child can't leave here
    drop_caches([place.big])
    results, told = os.pipe()
    children: list[int] = []
    try:
        for number in range(readers):
            child = os.fork()
            if child == 0:
                _be_reader(place, number, told)
            children.append(child)
        os.close(told)
        told = -1
        return sum(_rate(os.read(results, _ANSWER_BYTES).decode()) for _ in children)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(results)
        if told >= 0:
            os.close(told)


def _rate(answer: str) -> float:
    try:
        return float(answer)
    except ValueError:
        raise WrongBytesError(answer.strip() or "a reader ended without a result") from None


def _be_reader(place: Place, number: int, told: int) -> None:
    """The child's whole life: its rate, or what went wrong, into the pipe. Never returns."""
    try:
        answer = str(_read_pages(place, seed=10 + number))
    except BaseException as error:
        answer = f"a reader failed: {error}"
    os.write(told, answer.encode()[: _ANSWER_BYTES - 1].ljust(_ANSWER_BYTES))
    os._exit(0)


def random_write(place: Place, is_direct: bool) -> float:
    """The bytes that are there already, so that the file can still be checked by whoever reads it."""
    _ensure_big(place)
    pages = place.size_bytes // PAGE_BYTES
    pick = random.Random(3)
    buffer = aligned_buffer(PAGE_BYTES)
    fd = _open_direct(place, os.O_RDWR) if is_direct else os.open(place.big, os.O_RDWR)

    def write() -> None:
        offset = pick.randrange(pages) * PAGE_BYTES
        buffer[:] = expected(offset, PAGE_BYTES)
        os.pwrite(fd, buffer, offset)

    try:
        start = time.perf_counter()
        rate = per_second(write, place.seconds, batch=_BATCH)
        count = rate * (time.perf_counter() - start)
        os.fdatasync(fd)
        return count / (time.perf_counter() - start)
    finally:
        os.close(fd)


def rewrite(place: Place, is_synced: bool) -> float:
    """4 KiB at random places of one file that stays open."""
    _ensure_big(place)
    pages = place.size_bytes // PAGE_BYTES
    pick = random.Random(5)
    fd = os.open(place.big, os.O_RDWR)

    def write() -> None:
        offset = pick.randrange(pages) * PAGE_BYTES
        os.pwrite(fd, expected(offset, PAGE_BYTES), offset)
        if is_synced:
            os.fsync(fd)

    try:
        return per_second(write, place.seconds)
    finally:
        os.close(fd)


WORKLOADS = {
    "write-fsync": Workload(
        "sequential write, fsync", "MB/s", lambda place: sequential_write(place, is_synced=True)
    ),
    "write": Workload("sequential write", "MB/s", lambda place: sequential_write(place, is_synced=False)),
    "read-cold": Workload("sequential read, cold", "MB/s", read_cold),
    "read-warm": Workload("sequential read, warm", "MB/s", read_warm),
    "mmap": Workload("mmap read, cold", "MB/s", mmap_read),
    "random-read": Workload("random 4 KiB read, O_DIRECT", "IOPS", random_read),
    "random-read-8": Workload(
        "the same, 8 readers at once", "IOPS", lambda place: random_read_at_once(place, 8)
    ),
    "random-write": Workload(
        "random 4 KiB write, fdatasync at the end", "IOPS", lambda place: random_write(place, is_direct=False)
    ),
    "random-write-direct": Workload(
        "random 4 KiB write, O_DIRECT", "IOPS", lambda place: random_write(place, is_direct=True)
    ),
    "rewrite": Workload("4 KiB written, no fsync", "writes/s", lambda place: rewrite(place, is_synced=False)),
    "rewrite-fsync": Workload(
        "4 KiB written, fsync after each", "writes/s", lambda place: rewrite(place, is_synced=True)
    ),
}
