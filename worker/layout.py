"""What a worker keeps on disk, where, and how it sees that a directory is its own.

    <state_dir>/index/                      RocksDB, see `index`
    <tier directory>/alluxiofuse.json       marker: format, worker uuid, directory id
    <tier directory>/slabs/<2 hex>/<16 hex> one sparse file per container, named by its id, below the
                                            two last digits of it; bytes at their natural offsets
    <tier directory>/slabs/<2 hex>/<16 hex>.part   a slab being moved here; removed at start

The marker is locked (flock) while a worker runs. A directory id is given once and never reused, so
that an index record of a directory that was emptied (a MEM tier after a reboot) can't be mistaken
for one of its successor.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alluxiofuse.errors import StateError, UserError
from alluxiofuse.units import format_size

FORMAT = 1
MARKER = "alluxiofuse.json"
PART_SUFFIX = ".part"
_PROBES = 16
_SLAB_NAME = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Marker:
    worker_uuid: str
    directory_id: int


def slab_path(root: str, container: int) -> str:
    """Where the slab of `container` lies below the tier directory `root`."""
    return f"{root}/slabs/{container & 0xFF:02x}/{container:016x}"


def tells_each_write(root: Path) -> bool:
    """Each write changes a file's ctime, also one that follows another at once, if the file was looked at in
    between (multigrain timestamps: ext4, xfs, btrfs and tmpfs since Linux 6.13). Before, what happened within
    a tick of the kernel's clock, some milliseconds, had one time."""
    try:
        fd = os.open(root, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        seen = set()
        for _ in range(_PROBES):
            os.pwrite(fd, b"x", 0)
            seen.add(os.fstat(fd).st_ctime_ns)
        return len(seen) == _PROBES
    except OSError:
        return False
    finally:
        os.close(fd)


def read_marker(root: Path) -> Marker | None:
    """The marker of a tier directory; None when it has none and holds no slabs. Changes nothing.
    UserError when it is no directory, or holds what is not ours."""
    try:
        raw = (root / MARKER).read_bytes()
    except FileNotFoundError:
        if (root / "slabs").exists():
            raise UserError(f"{root} holds a folder `slabs` that is not of a worker: name another") from None
        return None
    except OSError as exc:
        raise UserError(f"tier directory {root} can't be used: {exc.strerror}") from None
    if not raw and not (root / "slabs").exists():
        return None  # A start that ended right there.
    try:
        found = json.loads(raw)
        marker = Marker(str(found["worker_uuid"]), int(found["directory_id"]))
        version = int(found["format"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{root / MARKER} is not readable: empty the directory or name another") from None
    if version > FORMAT:
        raise UserError(f"{root} was written by a newer version of this program")
    return marker


def check_quota(root: Path, quota_bytes: int) -> None:
    """UserError when the filesystem that holds (or would hold) `root` is smaller than the quota."""
    there = root
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        stat = os.statvfs(there)
    except OSError as exc:
        raise UserError(f"tier directory {root} can't be used: {exc.strerror}") from None
    total = stat.f_blocks * stat.f_frsize
    if quota_bytes > total:
        raise UserError(
            f"the quota of {root}, {format_size(quota_bytes)}, is larger than its filesystem,"
            f" {format_size(total)}: lower it"
        )
    if quota_bytes <= 0:
        raise UserError(f"the quota of {root} must be more than 0")


def claim(root: Path, marker: Marker) -> int:
    """Make the directory with its 256 folders, write the marker where there is none, and lock it;
    the descriptor that holds the lock. UserError when another process has it."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(root / MARKER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise UserError(f"tier directory {root} can't be used: {exc.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise UserError(
            f"{root} is in use by another worker: stop it or name another tier directory"
        ) from None
    try:
        is_new = os.fstat(fd).st_size == 0
        if is_new:
            write_marker(fd, marker)
        (root / "slabs").mkdir(mode=0o700, exist_ok=True)
        for number in range(256):
            (root / "slabs" / f"{number:02x}").mkdir(mode=0o700, exist_ok=True)
        if is_new:
            for made in (root / "slabs", root, root.parent):
                sync_names(made)
    except OSError as exc:
        os.close(fd)
        raise UserError(f"tier directory {root} can't be used: {exc.strerror}") from None
    return fd


def sync_names(directory: str | Path) -> None:
    """What was made, renamed and removed in a directory lasts. Blocks. OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_marker(fd: int, marker: Marker) -> None:
    """Into an open, writable file; durable when this returns."""
    text = {"format": FORMAT, "worker_uuid": marker.worker_uuid, "directory_id": marker.directory_id}
    raw = json.dumps(text).encode()
    os.ftruncate(fd, len(raw))
    os.pwrite(fd, raw, 0)
    os.fsync(fd)


class Claims:
    """The tier directories of a worker, and the locks on them. Guarded by the caller: at the start, then
    by `upkeep`."""

    def __init__(self) -> None:
        self.markers: dict[str, Marker] = {}
        self._fds: dict[str, int] = {}

    def add(self, root: Path, marker: Marker) -> None:
        """See `claim`."""
        self._fds[str(root)] = claim(root, marker)
        self.markers[str(root)] = marker

    def release(self, root: str) -> None:
        """Let go of a directory, for now: nothing of it is open here. Idempotent."""
        fd = self._fds.pop(root, -1)
        if fd >= 0:
            os.close(fd)

    def renew(self, root: str) -> None:
        """After `release`, of a directory whose marker was read again. UserError."""
        if root not in self._fds:
            self._fds[root] = claim(Path(root), self.markers[root])

    def close(self) -> None:
        """Idempotent."""
        for root in list(self._fds):
            self.release(root)


def stored_slabs(root: Path, *, is_removing: bool = True) -> Iterator[int]:
    """Container ids of all slabs in a tier directory. Half moved ones are removed on the way, unless not
    `is_removing`; what has another name is not ours and left alone."""
    for number in range(256):
        folder = root / "slabs" / f"{number:02x}"
        try:
            names = os.listdir(folder)
        except OSError as exc:
            raise StateError(f"{folder} can't be read: {exc.strerror}") from None
        ending = f"{number:02x}"
        for name in names:
            if name.endswith(ending) and _SLAB_NAME.fullmatch(name):
                yield int(name, 16)
            elif is_removing and _is_part(name) and stat.S_ISREG(os.lstat(folder / name).st_mode):
                os.unlink(folder / name)


def _is_part(name: str) -> bool:
    return name.endswith(PART_SUFFIX) and _SLAB_NAME.fullmatch(name.removesuffix(PART_SUFFIX)) is not None


FOREIGN, SLAB, PART = 0, 1, 2


def slab_of(folder: int, entry: os.DirEntry[str]) -> tuple[int, int]:
    """What a thing in one of the 256 folders is: (SLAB or PART, container), or (FOREIGN, 0)."""
    name, is_part = entry.name.removesuffix(PART_SUFFIX), entry.name.endswith(PART_SUFFIX)
    if (
        not _SLAB_NAME.fullmatch(name)
        or int(name[14:], 16) != folder
        or not entry.is_file(follow_symlinks=False)
    ):
        return FOREIGN, 0
    return (PART if is_part else SLAB), int(name, 16)
