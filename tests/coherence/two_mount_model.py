"""Random operations on two mounts of one namespace, against the same operations on a plain directory.

One operation at a time, from either mount. After each one:

* the mount that did it has the plain directory's outcome (value or errno), and sees its own change;
* whoever opens a file anew, on either mount, gets exactly the bytes, size and times: no waiting;
* names (also those that do not exist), attributes and listings of both mounts, and what was opened
  or mapped before, agree within the time in which news travels (waited for, up to `PATIENCE_S`).
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE_S = 30.0
"""For what has to be there within a second on a machine that has time."""
FRESH_S = 1.0
MAX_HANDLES = 8
MAX_MAPS = 4
MAX_BYTES = 3 << 20
LEAVES = ("a", "b", "c")
PLACES = ("", "d", "e", "d/e")
PATHS = [f"{place}/{name}".lstrip("/") for place in PLACES for name in (*LEAVES, "d", "e")]
PATHS = sorted(set(PATHS) | {"e/a/b", "d/e/a"})
SIZES = (0, 1, 10, 100, 4095, 4096, 4096, 8192, 5000, 70_000)
LARGE_SIZES = (300_000, 1 << 20, (1 << 20) + 1)
CREATE = os.O_CREAT | os.O_NOFOLLOW


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


def seen(root: Path, path: str) -> tuple[object, ...] | int:
    """What lstat and readlink say, as far as it must be the plain directory's; or the errno."""
    try:
        found = os.lstat(root / path)
        target = os.readlink(root / path) if stat.S_ISLNK(found.st_mode) else ""
    except OSError as exc:
        return exc.errno or -1
    size = found.st_size if not stat.S_ISDIR(found.st_mode) else 0
    return (oct(found.st_mode), found.st_nlink, size, target)


def identity(root: Path, path: str, *, has_times: bool) -> tuple[object, ...] | int:
    """What must be the same on both mounts beyond that."""
    try:
        found = os.lstat(root / path)
    except OSError as exc:
        return exc.errno or -1
    times = (found.st_mtime_ns, found.st_ctime_ns) if has_times else ()
    return (found.st_ino, found.st_atime_ns, found.st_uid, found.st_gid, *times)


class Model:
    def __init__(self, mounts: list[Path], plain: Path, seed: int) -> None:
        self.mounts = mounts
        self.plain = plain
        self.dice = random.Random(seed)
        self.handles: list[Handle] = []
        self.maps: list[Mapping] = []
        self.count = 0
        self.trace: list[str] = []
        """The last operations, for people."""
        self.late = 0.0
        """The longest that anything took to agree."""
        self.late_count = 0
        """How often that was more than `FRESH_S`."""
        self._operations = self._weighted()

    def _weighted(self) -> list[Callable[[int], Touched | None]]:
        weights: list[tuple[int, Callable[[int], Touched | None]]] = [
            (10, self.open),
            (6, self.create),
            (16, self.write),
            (6, self.append),
            (9, self.close),
            (4, self.truncate),
            (4, self.ftruncate),
            (8, self.rename),
            (6, self.unlink),
            (3, self.link),
            (2, self.symlink),
            (4, self.mkdir),
            (3, self.rmdir),
            (3, self.fsync),
            (3, self.utimens),
            (3, self.chmod),
            (3, self.map),
            (2, self.unmap),
            (3, self.write_by_map),
            (4, self.whole_file),
            (5, self.read),
            (3, self.replace),
        ]
        return [operation for weight, operation in weights for _ in range(weight)]

    # --- running ------------------------------------------------------------------------------------

    def run(self, count: int) -> None:
        for _ in range(count):
            self.step()
        while self.handles:
            self.close_handle(self.handles[-1])
        self.unmap_all()
        self.agree(self.check_everything, "the end")

    def step(self) -> None:
        operation, mount = self.dice.choice(self._operations), self.dice.randrange(2)
        self.count += 1
        self.note(f"{self.count} mount {mount} {operation.__name__}")
        touched = operation(mount)
        if touched is None:
            return
        if touched.is_content:
            for inode in touched.inodes:
                self.check_opens(inode, mount)
        self.agree(self.check_names, "names and attributes")
        self.agree(lambda: self.check_listings(touched.paths), "listings")
        for inode in touched.inodes:
            self.agree(lambda inode=inode: self.check_open_files(inode), "what is open")  # type: ignore[misc]

    def note(self, text: str) -> None:
        self.trace.append(text)
        del self.trace[:-150]

    def more(self, text: str) -> None:
        self.trace[-1] += " " + text

    def agree(self, check: Callable[[], None], what: str) -> None:
        began = time.monotonic()
        pause_s = 0.0005
        while True:
            try:
                check()
                break
            except Difference as exc:
                if time.monotonic() - began > PATIENCE_S:
                    raise Difference(f"after {PATIENCE_S:.0f} s still: {what}: {exc}") from None
            time.sleep(pause_s)
            pause_s = min(0.05, 2 * pause_s)
        took = time.monotonic() - began
        self.late = max(self.late, took)
        self.late_count += took > FRESH_S

    # --- checks -------------------------------------------------------------------------------------

    def check_names(self) -> None:
        one, two = self.mounts
        dirty = {handle.inode for handle in self.handles if handle.is_dirty}
        for path in PATHS:
            wanted = seen(self.plain, path)
            for mount in (one, two):
                if (found := seen(mount, path)) != wanted:
                    raise Difference(f"{mount.name}/{path}: {found}, not {wanted}")
            if isinstance(wanted, int):
                continue
            # While something is written and not flushed, each mount may have its own clock's times.
            has_times = os.lstat(self.plain / path).st_ino not in dirty
            found_one, found_two = (identity(root, path, has_times=has_times) for root in (one, two))
            if found_one != found_two:
                raise Difference(f"{path}: {found_one} on the first mount, {found_two} on the second")

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
        size = min(one.length, os.fstat(one.twin).st_size)
        require_same(
            one.memory[:size], os.pread(one.twin, size, 0), f"mapping on {self.mounts[one.mount].name}"
        )

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

    # --- both sides ---------------------------------------------------------------------------------

    def both(self, mount: int, operation: Callable[[Path], object]) -> tuple[object, object] | None:
        """Do it on the mount and on the plain directory: the two values, or None when both refused."""
        outcomes: list[object] = []
        errors: list[int] = []
        for root in (self.mounts[mount], self.plain):
            try:
                outcomes.append(operation(root))
                errors.append(0)
            except OSError as exc:
                outcomes.append(None)
                errors.append(exc.errno or -1)
        if errors[0] != errors[1]:
            for outcome in outcomes:
                if isinstance(outcome, int) and outcome > 2:
                    os.close(outcome)
            names = [errno.errorcode.get(code, code) if code else "done" for code in errors]
            raise Difference(f"the mount says {names[0]}, a plain directory {names[1]}")
        if errors[0]:
            self.more(errno.errorcode.get(errors[0], "?"))
            return None
        return outcomes[0], outcomes[1]

    def path(self) -> str:
        """The directories' own names less often: most of the time there shall be some."""
        path = self.dice.choice(PATHS)
        return path if path not in PLACES or self.dice.random() < 0.2 else self.path()

    def some_file(self) -> str:
        """Mostly one that exists."""
        found = [path for path in PATHS if os.path.isfile(self.plain / path)]
        return self.dice.choice(found) if found and self.dice.random() < 0.9 else self.path()

    def some_handle(self, mount: int, *, writable: bool = False, readable: bool = False) -> Handle | None:
        found = [
            one
            for one in self.handles
            if one.mount == mount and (one.can_write or not writable) and (one.can_read or not readable)
        ]
        return self.dice.choice(found) if found else None

    def data(self) -> bytes:
        sizes = LARGE_SIZES if self.dice.random() < 0.06 else SIZES
        size = self.dice.choice(sizes)
        return bytes(size) if self.dice.random() < 0.1 else self.dice.randbytes(size)

    def offset(self, size: int) -> int:
        near = self.dice.choice([0, size, 4096, 1 << 20])
        spot = self.dice.choice(
            [self.dice.randrange(size + 1), near, near + self.dice.randrange(-9, 9), size + 5000]
        )
        return min(max(0, spot), MAX_BYTES)

    # --- operations on names ------------------------------------------------------------------------

    def create(self, mount: int) -> Touched | None:
        if len(self.handles) >= MAX_HANDLES:
            return None
        path = self.path()
        flags = self.dice.choice([os.O_RDWR, os.O_WRONLY, os.O_RDONLY]) | CREATE
        flags |= self.dice.choice([0, 0, os.O_EXCL, os.O_APPEND])
        flags |= self.dice.choice([0, os.O_TRUNC]) if flags & os.O_ACCMODE else 0
        self.more(f"{path} {flags:o}")
        return self.opened(mount, path, flags)

    def open(self, mount: int) -> Touched | None:
        if len(self.handles) >= MAX_HANDLES:
            return None
        path = self.some_file()
        flags = self.dice.choice([os.O_RDWR, os.O_RDWR, os.O_WRONLY, os.O_RDONLY, os.O_RDONLY])
        flags |= self.dice.choice([0, 0, os.O_APPEND, os.O_TRUNC]) if flags & os.O_ACCMODE else 0
        self.more(f"{path} {flags:o}")
        return self.opened(mount, path, flags)

    def opened(self, mount: int, path: str, flags: int) -> Touched | None:
        done = self.both(mount, lambda root: os.open(root / path, flags, 0o640))
        if done is None:
            return Touched([path])
        fd, twin = done
        assert isinstance(fd, int)
        assert isinstance(twin, int)
        if not stat.S_ISREG(os.fstat(twin).st_mode):
            os.close(fd)
            os.close(twin)
            return Touched([path])
        handle = Handle(mount, fd, twin, flags, is_dirty=bool(flags & os.O_TRUNC))
        self.handles.append(handle)
        self.more(f"-> {fd}")
        self.check_handle(handle)  # Just opened: exactly.
        is_new = bool(flags & (os.O_TRUNC | os.O_CREAT))
        return Touched([path], is_content=not flags & os.O_CREAT, inodes=[handle.inode] if is_new else [])

    def unlink(self, mount: int) -> Touched:
        path = self.path()
        self.more(path)
        inodes = self.inodes_at(path)
        self.both(mount, lambda root: os.unlink(root / path))
        return Touched([path], inodes=inodes)

    def inodes_at(self, *paths: str) -> list[int]:
        found = []
        for path in paths:
            try:
                found.append(os.lstat(self.plain / path).st_ino)
            except OSError:
                pass
        return found

    def rename(self, mount: int) -> Touched:
        old, new = self.path(), self.path()
        self.more(f"{old} {new}")
        inodes = self.inodes_at(old, new)
        self.both(mount, lambda root: os.rename(root / old, root / new))
        return Touched([old, new], inodes=inodes)

    def link(self, mount: int) -> Touched:
        old, new = self.some_file(), self.path()
        self.more(f"{old} {new}")
        self.both(mount, lambda root: os.link(root / old, root / new, follow_symlinks=False))
        return Touched([old, new])

    def symlink(self, mount: int) -> Touched:
        target, path = self.dice.choice([*LEAVES, "d/a", "e", "nothing"]), self.path()
        self.more(f"{target} {path}")
        self.both(mount, lambda root: os.symlink(target, root / path))
        return Touched([path])

    def mkdir(self, mount: int) -> Touched:
        path = self.dice.choice(["d", "e", "d/e", self.path()])
        self.more(path)
        self.both(mount, lambda root: os.mkdir(root / path, 0o750))
        return Touched([path])

    def rmdir(self, mount: int) -> Touched:
        path = self.path()
        self.more(path)
        self.both(mount, lambda root: os.rmdir(root / path))
        return Touched([path])

    # --- attributes ---------------------------------------------------------------------------------

    def chmod(self, mount: int) -> Touched:
        path, mode = self.some_file(), self.dice.choice([0o600, 0o644, 0o755, 0o4711])
        self.more(f"{path} {mode:o}")
        self.both(mount, lambda root: os.chmod(root / path, mode))
        return Touched([path])

    def utimens(self, mount: int) -> Touched:
        path = self.some_file()
        times = (self.dice.randrange(1 << 60), self.dice.randrange(1 << 60))
        self.more(path)
        done = self.both(mount, lambda root: os.utime(root / path, ns=times))
        if done is not None:
            found = os.stat(self.mounts[mount] / path)
            if (found.st_atime_ns, found.st_mtime_ns) != times:
                raise Difference(f"the times of {path} are not those just set")
        return Touched([path])

    def truncate(self, mount: int) -> Touched | None:
        path = self.some_file()
        try:
            before = os.stat(self.plain / path)
        except OSError:
            return None
        size = self.dice.choice([0, self.offset(before.st_size)])
        self.more(f"{path} {size}")
        self.settle_maps(before.st_ino)
        self.both(mount, lambda root: os.truncate(root / path, size))
        self.flushed(mount, before.st_ino)
        return Touched([path], is_content=True, inodes=[before.st_ino])

    # --- bytes --------------------------------------------------------------------------------------

    def flushed(self, mount: int, inode: int) -> None:
        for handle in self.handles:
            if handle.mount == mount and handle.inode == inode:
                handle.is_dirty = False

    def settle_maps(self, inode: int) -> None:
        """Before it may become shorter: touching pages behind the end would be a SIGBUS."""
        for one in [one for one in self.maps if os.fstat(one.twin).st_ino == inode]:
            self.unmap_one(one)

    def write(self, mount: int) -> Touched | None:
        handle = self.some_handle(mount, writable=True)
        if handle is None:
            return None
        data, size = self.data(), os.fstat(handle.twin).st_size
        offset = self.offset(size)
        if handle.flags & os.O_APPEND and size > MAX_BYTES:
            return None
        self.more(f"{handle.fd} {len(data)} at {offset}")
        return self.wrote(handle, lambda fd: os.pwrite(fd, data, offset), len(data))

    def wrote(self, handle: Handle, write: Callable[[int], int], length: int) -> Touched:
        for fd in (handle.fd, handle.twin):
            if (count := write(fd)) != length:
                raise Difference(f"{count} of {length} bytes were written")
        if length:
            handle.is_dirty = True
        self.check_handle(handle)  # Its own writes, at once.
        return Touched(is_content=True, inodes=[handle.inode])

    def append(self, mount: int) -> Touched | None:
        found = [
            one for one in self.handles if one.mount == mount and one.flags & os.O_APPEND and one.can_write
        ]
        if not found:
            return None
        handle = self.dice.choice(found)
        if os.fstat(handle.twin).st_size > MAX_BYTES:
            return None
        data = self.dice.randbytes(self.dice.choice([1, 100, 4096, 8192, 10_000]))
        self.more(f"{handle.fd} {len(data)}")
        return self.wrote(handle, lambda fd: os.write(fd, data), len(data))

    def ftruncate(self, mount: int) -> Touched | None:
        handle = self.some_handle(mount, writable=True)
        if handle is None:
            return None
        size = self.dice.choice([0, self.offset(os.fstat(handle.twin).st_size)])
        self.more(f"{handle.fd} to {size}")
        self.settle_maps(handle.inode)
        for fd in (handle.fd, handle.twin):
            os.ftruncate(fd, size)
        handle.is_dirty = True
        self.check_handle(handle)
        return Touched(is_content=True, inodes=[handle.inode])

    def read(self, mount: int) -> Touched | None:
        """Nothing changed since all agreed, so all still agree."""
        handle = self.some_handle(mount)
        if handle is not None and self.dice.random() < 0.5:
            self.more(f"{handle.fd}")
            self.check_handle(handle)
            return None
        path = self.some_file()
        if os.path.isfile(self.plain / path) and not os.path.islink(self.plain / path):
            self.more(path)
            self.check_open(mount, path, mount)
        return None

    def whole_file(self, mount: int) -> Touched:
        """As most programs do: open with O_TRUNC, write, close."""
        path, data = self.some_file(), self.data()
        self.more(f"{path} {len(data)}")
        inodes = self.inodes_at(path)
        for inode in inodes:
            self.settle_maps(inode)

        def put(root: Path) -> None:
            with open(os.open(root / path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW), "wb") as file:
                file.write(data)

        done = self.both(mount, put)
        if done is None:
            return Touched([path])
        for inode in inodes:
            self.flushed(mount, inode)
        return Touched([path], is_content=True, inodes=inodes)

    def replace(self, mount: int) -> Touched:
        """As careful programs do: write another file, rename it over."""
        path, data = self.some_file(), self.data()
        self.more(f"{path} {len(data)}")
        inodes = self.inodes_at(path)

        def put(root: Path) -> None:
            new = root / "new"
            new.write_bytes(data)
            try:
                os.rename(new, root / path)
            except OSError:
                os.unlink(new)
                raise

        self.both(mount, put)
        return Touched([path, "new"], inodes=inodes)

    def fsync(self, mount: int) -> Touched | None:
        handle = self.some_handle(mount)
        if handle is None:
            return None
        self.more(f"{handle.fd}")
        os.fsync(handle.fd)
        self.flushed(mount, handle.inode)
        return Touched(is_content=True, inodes=[handle.inode])

    def close(self, mount: int) -> Touched | None:
        handle = self.some_handle(mount)
        if handle is None:
            return None
        self.more(f"{handle.fd}")
        inode = handle.inode
        self.close_handle(handle)
        return Touched(is_content=True, inodes=[inode])

    def close_handle(self, handle: Handle) -> None:
        if handle.can_write:
            self.flushed(handle.mount, handle.inode)
        self.handles.remove(handle)
        os.close(handle.fd)
        os.close(handle.twin)

    # --- mappings -----------------------------------------------------------------------------------

    def map(self, mount: int) -> Touched | None:
        handle = self.some_handle(mount, readable=True)
        if handle is None or len(self.maps) >= MAX_MAPS or self.is_dirty(handle.inode):
            return None
        size = os.fstat(handle.fd).st_size
        if not size:
            return None
        memory = mmap.mmap(handle.fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        self.maps.append(Mapping(mount, memory, size, os.dup(handle.twin)))
        self.check_map(self.maps[-1])
        return None

    def unmap(self, mount: int) -> None:
        if self.maps:
            self.unmap_one(self.dice.choice(self.maps))

    def unmap_one(self, one: Mapping) -> None:
        self.maps.remove(one)
        one.memory.close()
        os.close(one.twin)

    def unmap_all(self) -> None:
        while self.maps:
            self.unmap_one(self.maps[-1])

    def write_by_map(self, mount: int) -> Touched | None:
        found = [
            one
            for one in self.handles
            # O_APPEND: pyfuse3 does not tell pages that are written back from appends (docs/fuse.md).
            if one.mount == mount and one.can_read and one.can_write and not one.flags & os.O_APPEND
        ]
        if not found:
            return None
        handle = self.dice.choice(found)
        size = os.fstat(handle.twin).st_size
        if not size:
            return None
        offset = self.dice.randrange(size)
        data = self.dice.randbytes(self.dice.choice([1, 5000, 100_000]))[: size - offset]
        self.more(f"{handle.fd} {len(data)} at {offset}")
        with mmap.mmap(handle.fd, size) as memory:
            memory[offset : offset + len(data)] = data
            memory.flush()
        os.pwrite(handle.twin, data, offset)
        handle.is_dirty = True
        self.check_handle(handle)
        return Touched(is_content=True, inodes=[handle.inode])

    # --- the end ------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """Close everything, whatever state it is in."""
        self.unmap_all()
        for handle in self.handles:
            for fd in (handle.fd, handle.twin):
                try:
                    os.close(fd)
                except OSError:
                    pass
        self.handles.clear()
