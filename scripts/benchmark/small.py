"""Many small files: made, read, looked at, renamed, removed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from benchmark.place import SMALL_BYTES, Place, Workload, WrongBytesError, drop_caches, per_second, timed

_FOLDERS = 32


def _files(place: Place) -> list[Path]:
    return [
        place.small / f"{number % _FOLDERS:02d}" / f"file-{number:06d}" for number in range(place.file_count)
    ]


def create_all(place: Place) -> float:
    """Seconds for all of them; earlier ones are removed first."""
    shutil.rmtree(place.small, ignore_errors=True)
    data = os.urandom(SMALL_BYTES)
    for number in range(_FOLDERS):
        (place.small / f"{number:02d}").mkdir(parents=True)
    paths = _files(place)

    def create() -> None:
        for path in paths:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            os.write(fd, data)
            os.close(fd)

    return timed(create)


def create(place: Place) -> float:
    return place.file_count / create_all(place)


def create_synced(place: Place) -> float:
    """Each file, and then its name, made to survive a loss of power before the next is begun."""
    data = os.urandom(SMALL_BYTES)
    directory = place.root / "synced"
    directory.mkdir()
    at = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    numbers = iter(range(1 << 60))

    def create_one() -> None:
        fd = os.open(str(next(numbers)), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=at)
        os.write(fd, data)
        os.fsync(fd)
        os.close(fd)
        os.fsync(at)

    try:
        return per_second(create_one, place.seconds)
    finally:
        os.close(at)
        shutil.rmtree(directory)


def _ensure(place: Place) -> list[Path]:
    if not place.small.exists():
        create_all(place)
    return _files(place)


def _read_all(paths: list[Path]) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        length = len(os.read(fd, SMALL_BYTES * 2))
        os.close(fd)
        if length != SMALL_BYTES:
            raise WrongBytesError(f"{path.name} has {length} of {SMALL_BYTES} bytes")


def _stat_all(paths: list[Path]) -> None:
    for path in paths:
        os.stat(path)


def read(place: Place, is_cold: bool) -> float:
    paths = _ensure(place)
    if is_cold:
        drop_caches(paths)
    else:
        _read_all(paths)
    return place.file_count / timed(lambda: _read_all(paths))


def stat(place: Place, is_cold: bool) -> float:
    paths = _ensure(place)
    if is_cold:
        drop_caches([])
    else:
        _stat_all(paths)
    return place.file_count / timed(lambda: _stat_all(paths))


def _list_all(place: Place) -> None:
    """What `ls -lR` does: every directory, every entry's attributes."""
    for folder in sorted(os.listdir(place.small)):
        with os.scandir(place.small / folder) as entries:
            for entry in entries:
                entry.stat(follow_symlinks=False)


def listing(place: Place, is_cold: bool) -> float:
    _ensure(place)
    if is_cold:
        drop_caches([])
    else:
        _list_all(place)
    return place.file_count / timed(lambda: _list_all(place))


def rename(place: Place) -> float:
    names = [(path, path.with_name(path.name + ".renamed")) for path in _ensure(place)]

    def rename_all() -> None:
        for source, target in names:
            os.rename(source, target)

    seconds = timed(rename_all)
    for source, target in names:
        os.rename(target, source)
    return place.file_count / seconds


def delete(place: Place) -> float:
    paths = _ensure(place)

    def delete_all() -> None:
        for path in paths:
            os.unlink(path)

    seconds = timed(delete_all)
    shutil.rmtree(place.small)
    return place.file_count / seconds


WORKLOADS = {
    "create": Workload("small files (4 KiB) created", "files/s", create),
    "create-fsync": Workload(
        "small files created, fsync of each and of its directory", "files/s", create_synced
    ),
    "small-cold": Workload("small files read, cold", "files/s", lambda place: read(place, is_cold=True)),
    "small-warm": Workload("small files read, warm", "files/s", lambda place: read(place, is_cold=False)),
    "stat-cold": Workload("stat, cold", "ops/s", lambda place: stat(place, is_cold=True)),
    "stat-warm": Workload("stat, warm", "ops/s", lambda place: stat(place, is_cold=False)),
    "list-cold": Workload(
        "listing with attributes, cold", "entries/s", lambda place: listing(place, is_cold=True)
    ),
    "list-warm": Workload(
        "listing with attributes, warm", "entries/s", lambda place: listing(place, is_cold=False)
    ),
    "rename": Workload("rename", "ops/s", rename),
    "delete": Workload("unlink", "ops/s", delete),
}
