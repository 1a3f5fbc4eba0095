"""The random operations of `two_mount_model`: each is done on a mount and on the plain directory."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path

from two_mount_checks import LEAVES, PATHS, PLACES, Checks, Difference, Handle, Mapping, Touched, place_of

MAX_HANDLES = 8
MAX_MAPS = 4
MAX_BYTES = 3 << 20
SIZES = (0, 1, 10, 100, 4095, 4096, 4096, 8192, 5000, 70_000)
LARGE_SIZES = (300_000, 1 << 20, (1 << 20) + 1)
CREATE = os.O_CREAT | os.O_NOFOLLOW


class Operations(Checks):
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
        self.maps.append(Mapping(mount, memory, size, os.dup(handle.twin), place_of(handle.fd)))
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
