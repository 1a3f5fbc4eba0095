"""What all workloads share: the directory under test, its data, and how things are timed."""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

CHUNK_BYTES = 1 << 20
PAGE_BYTES = 4096
SMALL_BYTES = 4096
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_PERIOD_BYTES = CHUNK_BYTES + 7
_PERIOD = random.Random(1).randbytes(_PERIOD_BYTES)
_PATTERN = memoryview(_PERIOD + _PERIOD[:CHUNK_BYTES])


class WrongBytesError(Exception):
    """A directory gave back other bytes than were written there."""


@dataclass
class Place:
    """One directory under test. What workloads make there stays for the next ones of its kind."""

    label: str
    root: Path
    """A new directory inside it; everything is below."""
    size_bytes: int
    """Of the large file."""
    file_count: int
    """How many small files."""
    tree_count: int
    """How many files the unpacked tree has."""
    seconds: float
    """How long a workload runs that has no end of its own."""
    pid: int | None = None
    """Of the daemon that serves the directory, where it is known."""
    notes: set[str] = field(default_factory=set)
    """What the reader of the results has to know."""

    @property
    def big(self) -> Path:
        return self.root / "big"

    @property
    def small(self) -> Path:
        return self.root / "small"


@dataclass(frozen=True)
class Workload:
    title: str
    unit: str
    run: Callable[[Place], float]
    is_less_better: bool = False
    program: str = ""
    """Which it needs, if any."""
    needs_pid: bool = False


def expected(offset: int, length: int) -> memoryview:
    """The bytes that belong at `offset` of the large file, at most CHUNK_BYTES of them. They repeat
    after a length that divides nothing, so that bytes of another place are noticed."""
    start = offset % _PERIOD_BYTES
    return _PATTERN[start : start + length]


def drop_caches(paths: Iterable[Path]) -> None:
    """Forget what the kernel has cached: everything as root, else these files' pages."""
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError:
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def per_second(action: Callable[[], object], seconds: float, batch: int = 1) -> float:
    """How often `action` runs in a second; the clock is read once a batch."""
    count = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(batch):
            action()
        count += batch
    return count / elapsed


def aligned_buffer(length: int) -> mmap.mmap:
    """Page-aligned memory, as O_DIRECT wants it."""
    return mmap.mmap(-1, length)
