"""Path-based helpers on top of a FileSystem, for the CLI and Python users. All are async.

A path is absolute in the namespace, bytes or str (str is encoded as os.fsencode does).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from alluxiofuse.client.filesystem import FileSystem, OpenFile
from alluxiofuse.client.parallel import for_each
from alluxiofuse.errors import FsError
from alluxiofuse.rpc.base import Buffer
from alluxiofuse.wire.types import Attr, Caller, DirEntry

AnyPath = bytes | str
Progress = Callable[[int], None]
"""Called with the number of bytes that were done since the last call."""

CHUNK_BYTES = 4 << 20
PARALLEL = 8
_Entries = list[DirEntry]


class Usage(NamedTuple):
    size_bytes: int
    file_count: int
    directory_count: int


class Paths:
    """One user's view of a FileSystem by path."""

    def __init__(self, fs: FileSystem, who: Caller | None = None) -> None:
        """`who` None: the user of this process, with its groups."""
        self.fs = fs
        self.who = who or Caller(os.geteuid(), os.getegid(), os.getgroups())

    # --- looking ------------------------------------------------------------------------------------

    async def stat(self, path: AnyPath, *, follow: bool = True) -> Attr:
        return (await self.fs.resolve(self.who, absolute(path), follow))[-1]

    async def exists(self, path: AnyPath) -> bool:
        """Follows symlinks; False also when a directory on the way does not exist."""
        try:
            await self.stat(path)
        except FsError as exc:
            if exc.errno in (errno.ENOENT, errno.ENOTDIR):
                return False
            raise
        return True

    async def walk(self, path: AnyPath) -> AsyncIterator[tuple[bytes, Attr]]:
        """(absolute path, attributes) of `path` and everything below it, parents first; symlinks
        are not followed. What vanishes meanwhile is left out."""
        top = absolute(path)
        pending = [(top, await self.stat(top, follow=False))]
        while pending:
            place, attr = pending.pop()
            yield place, attr
            if stat.S_ISDIR(attr.mode):
                below: list[tuple[bytes, Attr]] = []
                try:
                    async for page in self.fs.readdir(self.who, attr.ino):
                        below += [(join(place, entry.name), entry.attr) for entry in page]
                except FsError as exc:
                    if exc.errno != errno.ENOENT:
                        raise
                pending += reversed(below)

    async def du(self, path: AnyPath) -> Usage:
        size = files = directories = 0
        seen: set[int] = set()
        async for _, attr in self.walk(path):
            if stat.S_ISDIR(attr.mode):
                directories += 1
            elif attr.nlink < 2 or attr.ino not in seen:
                files += 1
                size += attr.size
                if attr.nlink > 1:
                    seen.add(attr.ino)
        return Usage(size, files, directories)

    # --- files --------------------------------------------------------------------------------------

    async def open(self, path: AnyPath, flags: int = 0, mode: int = 0o644) -> OpenFile:
        """os.open(): with os.O_CREAT it creates, with `mode` as it is (no umask)."""
        path = absolute(path)
        if not flags & os.O_CREAT:
            attr = await self.stat(path, follow=not flags & os.O_NOFOLLOW)
            _refuse_directory(attr, path, flags)
            return await self.fs.open(self.who, attr.ino, flags)
        if not flags & os.O_EXCL:
            # A symlink is followed to what is there, or to what it says shall be there.
            path = await self._target(path)
        parent, name = await self._parent(path)
        attr, file = await self.fs.create(self.who, parent, name, mode, flags)
        if stat.S_ISDIR(attr.mode):
            await file.release()
            raise FsError(errno.EISDIR, f"{_shown(path)} is a directory")
        return file

    async def _target(self, path: bytes) -> bytes:
        for _ in range(40):
            try:
                attr = await self.stat(path, follow=False)
            except FsError as exc:
                if exc.errno == errno.ENOENT:
                    return path
                raise
            if not stat.S_ISLNK(attr.mode):
                return path
            target = await self.fs.readlink(attr.ino)
            path = absolute(os.path.join(os.path.dirname(path), target))
        raise FsError(errno.ELOOP, _shown(path))

    async def read_bytes(self, path: AnyPath) -> bytes:
        file = await self.open(path)
        try:
            parts = []
            offset = 0
            while data := await file.read(offset, CHUNK_BYTES):
                parts.append(data)
                offset += len(data)
            return b"".join(parts)
        finally:
            await file.release()

    async def write_bytes(self, path: AnyPath, data: Buffer, mode: int = 0o644) -> None:
        """Create or replace."""
        file = await self.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        try:
            view = memoryview(data)
            for offset in range(0, len(view), CHUNK_BYTES):
                await write_all(file, offset, view[offset : offset + CHUNK_BYTES])
            await file.flush()
        finally:
            await file.release()

    # --- names --------------------------------------------------------------------------------------

    async def _parent(self, path: bytes) -> tuple[int, bytes]:
        """(inode of the directory, name) of a path whose last part need not exist."""
        directory, name = os.path.split(path)
        if not name:
            raise FsError(errno.EISDIR, "/ is a directory")
        return (await self.stat(directory)).ino, name

    async def mkdir(self, path: AnyPath, mode: int = 0o755, *, parents: bool = False) -> None:
        """`parents`: mkdir -p."""
        path = absolute(path)
        if parents:
            await self._mkdir_parents(path, mode)
            return
        if path == b"/":
            raise FsError(errno.EEXIST)
        parent, name = await self._parent(path)
        await self.fs.mkdir(self.who, parent, name, mode)

    async def _mkdir_parents(self, path: bytes, mode: int) -> None:
        missing: list[bytes] = []
        while not await self.exists(path):
            missing.append(path)
            path = os.path.dirname(path)
        if not stat.S_ISDIR((await self.stat(path)).mode):
            raise FsError(errno.ENOTDIR, f"{_shown(path)} is no directory")
        for one in reversed(missing):
            parent, name = await self._parent(one)
            try:
                await self.fs.mkdir(self.who, parent, name, mode)
            except FsError as exc:
                if exc.errno != errno.EEXIST:
                    raise

    async def remove(self, path: AnyPath, *, recursive: bool = False) -> int:
        """A file, symlink or (empty, unless recursive) directory; how many inodes were removed."""
        path = absolute(path)
        parent, name = await self._parent(path)
        attr = await self.fs.lookup(self.who, parent, name)
        if not stat.S_ISDIR(attr.mode):
            await self.fs.unlink(self.who, parent, name)
            return 1
        count = await self._clear(attr.ino) if recursive else 0
        await self.fs.rmdir(self.who, parent, name)
        return count + 1

    async def _clear(self, ino: int) -> int:
        """Remove everything below a directory, depth first."""
        count = 0
        stack: list[tuple[int, bytes, int, bool]] = [(0, b"", ino, False)]
        while stack:
            parent, name, current, is_cleared = stack.pop()
            if is_cleared:
                await self.fs.rmdir(self.who, parent, name)
                count += 1
                continue
            entries = await self.fs.list_dir(self.who, current)
            files = [entry.name for entry in entries if not stat.S_ISDIR(entry.attr.mode)]
            await self._unlink_all(current, files)
            count += len(files)
            if parent:
                stack.append((parent, name, current, True))
            stack += [
                (current, entry.name, entry.attr.ino, False)
                for entry in entries
                if stat.S_ISDIR(entry.attr.mode)
            ]
        return count

    async def _unlink_all(self, parent: int, names: list[bytes]) -> None:
        async def unlink(name: bytes) -> None:
            try:
                await self.fs.unlink(self.who, parent, name)
            except FsError as exc:
                if exc.errno != errno.ENOENT:
                    raise

        await for_each(_each(names), unlink, PARALLEL)

    async def rename(self, source: AnyPath, target: AnyPath, flags: int = 0) -> None:
        """rename(2): `target` is the new name itself, never "into a directory"."""
        old = await self._parent(absolute(source))
        new = await self._parent(absolute(target))
        await self.fs.rename(self.who, *old, *new, flags)

    # --- copies -------------------------------------------------------------------------------------

    async def copy_in(
        self, local: str, target: AnyPath, *, recursive: bool = False, progress: Progress | None = None
    ) -> int:
        """From the local filesystem to `target` (the new name itself); bytes copied. Trees keep
        their modes and symlinks; directories that are there are filled up. OSError: of `local`."""
        from alluxiofuse.client.copying import copy_in

        return await copy_in(self, os.fsencode(local), absolute(target), recursive, progress)

    async def copy_out(
        self, source: AnyPath, local: str, *, recursive: bool = False, progress: Progress | None = None
    ) -> int:
        """To the local filesystem, to the name `local` itself; bytes copied. OSError: of `local`."""
        from alluxiofuse.client.copying import copy_out

        return await copy_out(self, absolute(source), os.fsencode(local), recursive, progress)

    async def copy(
        self, source: AnyPath, target: AnyPath, *, recursive: bool = False, progress: Progress | None = None
    ) -> int:
        """Within the namespace; EINVAL into itself."""
        from alluxiofuse.client.copying import copy_within

        return await copy_within(self, absolute(source), absolute(target), recursive, progress)

    async def load(
        self, path: AnyPath, *, parallel: int = PARALLEL, progress: Progress | None = None
    ) -> Usage:
        """Bring everything below `path` into the cache. NoSpaceError when it does not fit."""
        size = files = directories = 0

        async def load(attr: Attr) -> None:
            file = await self.fs.open(self.who, attr.ino, os.O_RDONLY)
            try:
                await file.load(progress)
            finally:
                await file.release()

        async def regular() -> AsyncIterator[Attr]:
            nonlocal size, files, directories
            async for _, attr in self.walk(path):
                directories += stat.S_ISDIR(attr.mode)
                if stat.S_ISREG(attr.mode):
                    files += 1
                    size += attr.size
                    yield attr

        await for_each(regular(), load, parallel)
        return Usage(size, files, directories)

    async def list(self, path: AnyPath) -> _Entries:
        """Entries of a directory; ENOTDIR for anything else."""
        attr = await self.stat(path)
        if not stat.S_ISDIR(attr.mode):
            raise FsError(errno.ENOTDIR, f"{_shown(absolute(path))} is no directory")
        return await self.fs.list_dir(self.who, attr.ino)


def absolute(path: AnyPath) -> bytes:
    """With one leading slash, without trailing or double ones. EINVAL for a relative path. `..` is
    left to the namespace, where symlinks give it its meaning."""
    path = os.fsencode(path)
    if not path.startswith(b"/"):
        raise FsError(errno.EINVAL, f"{_shown(path)} is no absolute path")
    return b"/" + b"/".join(part for part in path.split(b"/") if part not in (b"", b"."))


def join(directory: bytes, name: bytes) -> bytes:
    return directory.rstrip(b"/") + b"/" + name


async def write_all(file: OpenFile, offset: int, data: Buffer) -> None:
    """Every byte, or NoSpaceError."""
    view = memoryview(data)
    while view:
        count = await file.write(offset, view)
        offset += count
        view = view[count:]


async def _each(names: list[bytes]) -> AsyncIterator[bytes]:
    for name in names:
        yield name


def _refuse_directory(attr: Attr, path: bytes, flags: int) -> None:
    if stat.S_ISDIR(attr.mode):
        raise FsError(errno.EISDIR, f"{_shown(path)} is a directory")


def _shown(path: bytes) -> str:
    return os.fsdecode(path).encode("utf-8", "backslashreplace").decode()
