"""What a run of `two_mount_model` compares: names, attributes, bytes; both mounts with a plain directory."""

from __future__ import annotations

import mmap
import os
import random
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PLACES = ("", "d", "e", "d/e")
LEAVES = ("a", "b", "c")
PATHS = [f"{place}/{name}".lstrip("/") for place in PLACES for name in (*LEAVES, "d", "e")]
PATHS = sorted(set(PATHS) | {"e/a/b", "d/e/a"})


@dataclass(eq=False)
class Handle:
    """One open file: on a mount, and its twin of the plain directory."""

    mount: int
    fd: int
    twin: int
    flags: int
    is_dirty: bool = False
    """Written through since the last flush or fsync of its mount."""

    @property
    def inode(self) -> int:
        """Of the twin: those of one file have the same."""
        return os.fstat(self.twin).st_ino

    @property
    def can_read(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_WRONLY

    @property
    def can_write(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


@dataclass(eq=False)
class Mapping:
    mount: int
    memory: mmap.mmap
    length: int
    twin: int
    """A descriptor of its own."""
    where: str
    """The file, as /proc/self/maps names it: it may have no name and no descriptor any more."""


@dataclass
class Touched:
    """What an operation may have changed."""

    paths: list[str] = field(default_factory=list)
    is_content: bool = False
    inodes: list[int] = field(default_factory=list)
    """Twins' inodes whose bytes changed."""


class Difference(AssertionError):
    pass


def read_all(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    parts, at = [], 0
    while chunk := os.pread(fd, max(1, size + 1 - at), at):
        parts.append(chunk)
        at += len(chunk)
    return b"".join(parts)


def place_of(fd: int) -> str:
    found = os.fstat(fd)
    return f" {os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x} {found.st_ino} "


def mapped_size(where: str) -> int:
    """Of the file of a mapping of this process, as its mount has it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if where in line:
            return os.stat(f"/proc/self/map_files/{line.split()[0]}").st_size
    raise Difference(f"{where} is not mapped")


def require_same(found: bytes, wanted: bytes, what: str) -> None:
    if found == wanted:
        return
    at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), None)
    where = (
        "no byte differs"
        if at is None
        else f"first at {at}: {found[at : at + 8]!r}, not {wanted[at : at + 8]!r}"
    )
    raise Difference(f"{what}: {len(found)} bytes instead of {len(wanted)}, {where}")


class Seen(NamedTuple):
    """What lstat and readlink say."""

    shown: tuple[object, ...] | int
    """As far as it must be the plain directory's; or the errno."""
    own: tuple[object, ...] = ()
    """What must be the same on both mounts beyond that."""
    times: tuple[int, int] = (0, 0)
    """Likewise, mtime and ctime."""
    inode: int = 0


def seen(root: str, path: str) -> Seen:
    try:
        found = os.lstat(f"{root}/{path}")
        target = os.readlink(f"{root}/{path}") if stat.S_ISLNK(found.st_mode) else ""
    except OSError as exc:
        return Seen(exc.errno or -1)
    size = found.st_size if not stat.S_ISDIR(found.st_mode) else 0
    return Seen(
        (found.st_mode, found.st_nlink, size, target),
        (found.st_ino, found.st_atime_ns, found.st_uid, found.st_gid),
        (found.st_mtime_ns, found.st_ctime_ns),
        found.st_ino,
    )


class Checks:
    """State of a run, and the comparisons. Each raises Difference."""

    def __init__(self, mounts: list[Path], plain: Path, seed: int) -> None:
        self.mounts = mounts
        self.plain = plain
        self.dice = random.Random(seed)
        self.handles: list[Handle] = []
        self.maps: list[Mapping] = []
        self.count = 0
        self.trace: list[str] = []
        """The last operations, for people."""

    def note(self, text: str) -> None:
        self.trace.append(text)
        del self.trace[:-150]

    def more(self, text: str) -> None:
        self.trace[-1] += " " + text

    def check_names(self) -> None:
        dirty = {handle.inode for handle in self.handles if handle.is_dirty}
        roots = [str(mount) for mount in self.mounts]
        for path in PATHS:
            wanted = seen(str(self.plain), path)
            found = [seen(root, path) for root in roots]
            for root, one in zip(roots, found, strict=True):
                if one.shown != wanted.shown:
                    raise Difference(f"{root}/{path}: {one.shown}, not {wanted.shown}")
            if found[0].own != found[1].own:
                raise Difference(f"{path}: {found[0].own} on the first mount, {found[1].own} on the second")
            # While something is written and not flushed, each mount may have its own clock's times.
            if found[0].times != found[1].times and wanted.inode not in dirty:
                raise Difference(
                    f"{path}: {found[0].times} on the first mount, {found[1].times} on the second"
                )

    def check_listings(self, paths: list[str]) -> None:
        for place in {os.path.dirname(path) for path in paths}:
            try:
                wanted = sorted(os.listdir(self.plain / place))
            except OSError:
                continue
            for mount in self.mounts:
                try:
                    found = sorted(os.listdir(mount / place))
                except OSError as exc:
                    raise Difference(f"listing {mount.name}/{place}: {exc}") from None
                if found != wanted:
                    raise Difference(f"listing {mount.name}/{place}: {found}, not {wanted}")

    def paths_of(self, inode: int) -> list[str]:
        found = []
        for path in PATHS:
            try:
                place = os.lstat(self.plain / path)
            except OSError:
                continue
            if place.st_ino == inode and stat.S_ISREG(place.st_mode):
                found.append(path)
        return found

    def check_opens(self, inode: int, author: int) -> None:
        """Close-to-open: exactly, at once, on the other mount first."""
        for path in self.paths_of(inode)[:2]:
            for mount in (1 - author, author):
                self.check_open(mount, path, author)

    def check_open(self, mount: int, path: str, author: int) -> None:
        what = f"{self.mounts[mount].name}/{path} opened anew"
        with open(self.plain / path, "rb") as twin:
            wanted = read_all(twin.fileno())
            inode = os.fstat(twin.fileno()).st_ino
        fd = os.open(self.mounts[mount] / path, os.O_RDONLY)
        try:
            found = os.fstat(fd)
            if found.st_size != len(wanted):
                raise Difference(f"{what}: its size is {found.st_size}, not {len(wanted)}")
            require_same(read_all(fd), wanted, what)
            if not self.is_dirty(inode):
                own = os.lstat(self.mounts[author] / path)
                if (found.st_mtime_ns, found.st_ctime_ns) != (own.st_mtime_ns, own.st_ctime_ns):
                    raise Difference(
                        f"{what}: mtime {found.st_mtime_ns} ctime {found.st_ctime_ns}, who changed it says "
                        f"{own.st_mtime_ns} {own.st_ctime_ns}"
                    )
        finally:
            os.close(fd)

    def is_dirty(self, inode: int) -> bool:
        return any(handle.is_dirty and handle.inode == inode for handle in self.handles)

    def check_open_files(self, inode: int) -> None:
        for handle in self.handles:
            if handle.inode == inode:
                self.check_handle(handle)
        if not self.is_dirty(inode):
            for one in self.maps:
                if os.fstat(one.twin).st_ino == inode:
                    self.check_map(one)

    def check_handle(self, handle: Handle) -> None:
        what = f"open file {handle.fd} of {self.mounts[handle.mount].name}"
        size = os.fstat(handle.twin).st_size
        if (found := os.fstat(handle.fd).st_size) != size:
            raise Difference(f"{what}: its size is {found}, not {size}")
        if handle.can_read:
            require_same(read_all(handle.fd), read_all(handle.twin), what)

    def check_map(self, one: Mapping) -> None:
        what = f"mapping on {self.mounts[one.mount].name}"
        size = min(one.length, os.fstat(one.twin).st_size)
        # Behind the end that its mount knows there is SIGBUS, and the news of another travels.
        if (found := mapped_size(one.where)) < size:
            raise Difference(f"{what}: its file has {found} bytes, not {size}")
        require_same(one.memory[:size], os.pread(one.twin, size, 0), what)

    def check_everything(self) -> None:
        self.check_names()
        self.check_listings(list(PATHS))
        for path in PATHS:
            if stat.S_ISREG(
                (os.lstat(self.plain / path).st_mode) if os.path.lexists(self.plain / path) else 0
            ):
                for mount in (0, 1):
                    self.check_open(mount, path, mount)
        for handle in self.handles:
            self.check_handle(handle)
