#!/usr/bin/env python3
"""Measure directories side by side: `bench.py DIR [DIR...]`. Standard library only.

Every workload runs in each directory in turn (A B A B ...), so that what the machine does meanwhile
hits all alike; shown are medians and the ratio to the first directory. "cold" means that the
kernel's caches were dropped (as root; else only the page cache of the files concerned), not the
cache of the filesystem under test. Everything is made in a new directory inside each DIR and
removed at the end.
"""

from __future__ import annotations

import argparse
import io
import json
import mmap
import os
import random
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

CHUNK_BYTES = 1 << 20
PAGE_BYTES = 4096
SMALL_BYTES = 4096
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass
class Place:
    """One directory under test."""

    label: str
    root: Path
    big: Path
    small: Path
    size_bytes: int
    file_count: int
    seconds: float
    """How long a random-access workload runs."""
    notes: set[str] = field(default_factory=set)

    def small_file(self, number: int) -> Path:
        return self.small / f"{number % 32:02d}" / f"file-{number:06d}"

    def ensure_big(self) -> None:
        if not self.big.exists() or self.big.stat().st_size != self.size_bytes:
            sequential_write(self)

    def ensure_small(self) -> None:
        if not self.small.exists():
            small_create(self)


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


def aligned_buffer(length: int) -> mmap.mmap:
    """Page-aligned memory, as O_DIRECT wants it."""
    return mmap.mmap(-1, length)


# --- large files ------------------------------------------------------------------------------------


def sequential_write(place: Place) -> float:
    chunk = random.Random(1).randbytes(CHUNK_BYTES)

    def write() -> None:
        fd = os.open(place.big, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            for _ in range(place.size_bytes // CHUNK_BYTES):
                os.write(fd, chunk)
            os.fsync(fd)
        finally:
            os.close(fd)

    return place.size_bytes / timed(write) / 1e6


def read_all(path: Path) -> None:
    buffer = bytearray(CHUNK_BYTES)
    fd = os.open(path, os.O_RDONLY)
    try:
        while os.readv(fd, [buffer]):
            pass
    finally:
        os.close(fd)


def read_cold(place: Place) -> float:
    place.ensure_big()
    drop_caches([place.big])
    return place.size_bytes / timed(lambda: read_all(place.big)) / 1e6


def read_warm(place: Place) -> float:
    place.ensure_big()
    read_all(place.big)
    return place.size_bytes / timed(lambda: read_all(place.big)) / 1e6


def mmap_read(place: Place) -> float:
    place.ensure_big()
    drop_caches([place.big])

    def touch() -> None:
        with open(place.big, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            view = memoryview(mapped)
            try:
                for offset in range(0, len(view), CHUNK_BYTES):
                    bytes(view[offset : offset + CHUNK_BYTES])
            finally:
                view.release()

    return place.size_bytes / timed(touch) / 1e6


def open_direct(place: Place, flags: int) -> int:
    try:
        return os.open(place.big, flags | os.O_DIRECT)
    except OSError:
        place.notes.add("no O_DIRECT: random reads go through the page cache")
        return os.open(place.big, flags)


def random_read(place: Place) -> float:
    place.ensure_big()
    drop_caches([place.big])
    buffer = aligned_buffer(PAGE_BYTES)
    pages = place.size_bytes // PAGE_BYTES
    pick = random.Random(2)
    fd = open_direct(place, os.O_RDONLY)
    try:
        return per_second(lambda: os.preadv(fd, [buffer], pick.randrange(pages) * PAGE_BYTES), place.seconds)
    finally:
        os.close(fd)


def random_write(place: Place) -> float:
    place.ensure_big()
    data = os.urandom(PAGE_BYTES)
    pages = place.size_bytes // PAGE_BYTES
    pick = random.Random(3)
    fd = os.open(place.big, os.O_RDWR)
    try:
        start = time.perf_counter()
        rate = per_second(lambda: os.pwrite(fd, data, pick.randrange(pages) * PAGE_BYTES), place.seconds)
        done = rate * (time.perf_counter() - start)
        os.fsync(fd)
        return done / (time.perf_counter() - start)
    finally:
        os.close(fd)


def per_second(action: Callable[[], object], seconds: float) -> float:
    count = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(16):
            action()
        count += 16
    return count / elapsed


# --- small files --------------------------------------------------------------------------------------


def small_create(place: Place) -> float:
    shutil.rmtree(place.small, ignore_errors=True)
    data = os.urandom(SMALL_BYTES)
    for number in range(32):
        (place.small / f"{number:02d}").mkdir(parents=True)

    def create() -> None:
        for number in range(place.file_count):
            fd = os.open(place.small_file(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            os.write(fd, data)
            os.close(fd)

    return place.file_count / timed(create)


def small_create_synced(place: Place) -> float:
    """Each file, and then its name, made to survive a loss of power before the next is begun."""
    data = os.urandom(SMALL_BYTES)
    directory = place.root / "synced"
    directory.mkdir()
    at = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    numbers = iter(range(1 << 60))

    def create() -> None:
        fd = os.open(str(next(numbers)), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=at)
        os.write(fd, data)
        os.fsync(fd)
        os.close(fd)
        os.fsync(at)

    try:
        return per_second(create, place.seconds)
    finally:
        os.close(at)
        shutil.rmtree(directory)


def rewrite(place: Place, is_synced: bool) -> float:
    """4 KiB at random places of one file that stays open."""
    place.ensure_big()
    data = os.urandom(PAGE_BYTES)
    pages = place.size_bytes // PAGE_BYTES
    pick = random.Random(5)
    fd = os.open(place.big, os.O_RDWR)

    def write() -> None:
        os.pwrite(fd, data, pick.randrange(pages) * PAGE_BYTES)
        if is_synced:
            os.fsync(fd)

    try:
        return per_second(write, place.seconds)
    finally:
        os.close(fd)


def read_small(place: Place) -> None:
    for number in range(place.file_count):
        fd = os.open(place.small_file(number), os.O_RDONLY)
        os.read(fd, SMALL_BYTES * 2)
        os.close(fd)


def small_files(place: Place) -> list[Path]:
    return [place.small_file(number) for number in range(place.file_count)]


def small_read_cold(place: Place) -> float:
    place.ensure_small()
    drop_caches(small_files(place))
    return place.file_count / timed(lambda: read_small(place))


def small_read_warm(place: Place) -> float:
    place.ensure_small()
    read_small(place)
    return place.file_count / timed(lambda: read_small(place))


def stat_all(place: Place) -> None:
    for path in small_files(place):
        os.stat(path)


def small_stat_cold(place: Place) -> float:
    place.ensure_small()
    drop_caches([])
    return place.file_count / timed(lambda: stat_all(place))


def small_stat_warm(place: Place) -> float:
    place.ensure_small()
    stat_all(place)
    return place.file_count / timed(lambda: stat_all(place))


def list_all(place: Place) -> None:
    """What `ls -lR` does: every directory, every entry's attributes."""
    for directory, _, _ in os.walk(place.small):
        with os.scandir(directory) as entries:
            for entry in entries:
                entry.stat(follow_symlinks=False)


def list_cold(place: Place) -> float:
    place.ensure_small()
    drop_caches([])
    return place.file_count / timed(lambda: list_all(place))


def list_warm(place: Place) -> float:
    place.ensure_small()
    list_all(place)
    return place.file_count / timed(lambda: list_all(place))


def small_rename(place: Place) -> float:
    place.ensure_small()
    names = [(path, path.with_name(path.name + ".renamed")) for path in small_files(place)]

    def rename() -> None:
        for source, target in names:
            os.rename(source, target)

    seconds = timed(rename)
    for source, target in names:
        os.rename(target, source)
    return place.file_count / seconds


def small_delete(place: Place) -> float:
    place.ensure_small()
    paths = small_files(place)

    def delete() -> None:
        for path in paths:
            os.unlink(path)

    seconds = timed(delete)
    shutil.rmtree(place.small)
    return place.file_count / seconds


def untar(place: Place) -> float:
    """A source tree: directories five deep, files of 0 to 32 KiB, modes and times set."""
    count = max(1, place.file_count // 2)
    archive = make_archive(count)
    target = place.root / "tree"
    target.mkdir()
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            # Our own archive; Debian 12's Python 3.11.2 has no filters, newer ones warn without.
            if hasattr(tarfile, "tar_filter"):
                tar.extraction_filter = staticmethod(tarfile.tar_filter)
            seconds = timed(lambda: tar.extractall(target))  # noqa: S202
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return count / seconds


def make_archive(count: int) -> bytes:
    pick = random.Random(4)
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as tar:
        for number in range(count):
            parts = [f"d{pick.randrange(4)}" for _ in range(pick.randrange(1, 6))]
            info = tarfile.TarInfo("/".join([*parts, f"f{number}"]))
            info.size = pick.choice((0, 100, 1000, 4000, 8000, 32000))
            info.mtime = 1_700_000_000 + number
            tar.addfile(info, io.BytesIO(pick.randbytes(info.size)))
    return memory.getvalue()


WORKLOADS: dict[str, tuple[str, str, Callable[[Place], float]]] = {
    "write": ("sequential write, fsync", "MB/s", sequential_write),
    "read-cold": ("sequential read, cold", "MB/s", read_cold),
    "read-warm": ("sequential read, warm", "MB/s", read_warm),
    "mmap": ("mmap read, cold", "MB/s", mmap_read),
    "random-read": ("random 4 KiB read, 1 thread", "IOPS", random_read),
    "random-write": ("random 4 KiB write, fsync at the end", "IOPS", random_write),
    "create": ("small files (4 KiB) created", "files/s", small_create),
    "create-fsync": (
        "small files created, fsync of each and of its directory",
        "files/s",
        small_create_synced,
    ),
    "rewrite": ("4 KiB written, no fsync", "writes/s", lambda place: rewrite(place, is_synced=False)),
    "rewrite-fsync": (
        "4 KiB written, fsync after each",
        "writes/s",
        lambda place: rewrite(place, is_synced=True),
    ),
    "small-cold": ("small files read, cold", "files/s", small_read_cold),
    "small-warm": ("small files read, warm", "files/s", small_read_warm),
    "stat-cold": ("stat, cold", "ops/s", small_stat_cold),
    "stat-warm": ("stat, warm", "ops/s", small_stat_warm),
    "list-cold": ("listing with attributes, cold", "entries/s", list_cold),
    "list-warm": ("listing with attributes, warm", "entries/s", list_warm),
    "rename": ("rename", "ops/s", small_rename),
    "delete": ("delete", "ops/s", small_delete),
    "untar": ("untar a source tree", "files/s", untar),
}


def progress(text: str) -> None:
    """One line that is overwritten, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r{text}", end="\033[K", file=sys.stderr, flush=True)


def measure(places: list[Place], names: list[str], rounds: int) -> dict[str, list[list[float]]]:
    """name -> for each place its results, one per round."""
    results: dict[str, list[list[float]]] = {name: [[] for _ in places] for name in names}
    for number in range(rounds):
        for name in names:
            for index, place in enumerate(places):
                progress(f"round {number + 1}/{rounds}: {name} in {place.label}")
                os.sync()  # earlier dirty pages go to disk before the next measurement
                results[name][index].append(WORKLOADS[name][2](place))
    progress("")
    return results


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def table(places: list[Place], results: dict[str, list[list[float]]]) -> str:
    rows = [["", "unit", *[place.label for place in places]]]
    for name, per_place in results.items():
        title, unit, _ = WORKLOADS[name]
        medians = [statistics.median(one) for one in per_place]
        cells = [shown(medians[0])]
        cells += [f"{shown(value)} ({value / medians[0]:.2f}x)" for value in medians[1:]]
        rows.append([title, unit, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def parse_size(text: str) -> int:
    number, unit = text[:-1], text[-1:].upper()
    powers = {"K": 10, "M": 20, "G": 30}
    size = int(text) if unit.isdigit() else int(number) << powers[unit]
    return max(CHUNK_BYTES, size - size % CHUNK_BYTES)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="+", metavar="DIR", type=Path)
    parser.add_argument("--size", default="256M", type=parse_size, help="of the large file (default 256M)")
    parser.add_argument("--files", default=1000, type=int, help="how many small files (default 1000)")
    parser.add_argument("--rounds", default=3, type=int, help="default 3; medians are shown")
    parser.add_argument(
        "--seconds", default=2.0, type=float, help="of each random-access workload (default 2)"
    )
    parser.add_argument("--only", default="", help=f"comma-separated, of: {', '.join(WORKLOADS)}")
    parser.add_argument("--json", action="store_true", help="all results of all rounds, for scripts")
    arguments = parser.parse_args(argv)
    arguments.names = [name for name in arguments.only.split(",") if name] or list(WORKLOADS)
    unknown = [name for name in arguments.names if name not in WORKLOADS]
    if unknown:
        parser.error(f"--only: no such workload: {', '.join(unknown)}")
    for directory in arguments.directories:
        if not directory.is_dir():
            parser.error(f"{directory} is not a directory")
    if arguments.files < 1 or arguments.rounds < 1:
        parser.error("--files and --rounds are at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    places: list[Place] = []
    try:
        for directory in arguments.directories:
            root = Path(tempfile.mkdtemp(prefix="bench-", dir=directory))
            places.append(
                Place(
                    str(directory),
                    root,
                    root / "big",
                    root / "small",
                    arguments.size,
                    arguments.files,
                    arguments.seconds,
                )
            )
        results = measure(places, arguments.names, arguments.rounds)
        if arguments.json:
            print(json.dumps(as_json(places, results), indent=1))
        else:
            print(table(places, results))
            for place in places:
                for note in sorted(place.notes):
                    print(f"{place.label}: {note}")
            if not os.access(DROP_CACHES, os.W_OK):
                print("not root: only page caches were dropped for the cold rows")
    except KeyboardInterrupt:
        return 130
    finally:
        for place in places:
            shutil.rmtree(place.root, ignore_errors=True)
    return 0


def as_json(places: list[Place], results: dict[str, list[list[float]]]) -> dict[str, object]:
    return {
        name: {
            "title": WORKLOADS[name][0],
            "unit": WORKLOADS[name][1],
            "directories": {
                place.label: {"median": statistics.median(rounds), "rounds": rounds}
                for place, rounds in zip(places, per_place, strict=True)
            },
        }
        for name, per_place in results.items()
    }


if __name__ == "__main__":
    sys.exit(main())
