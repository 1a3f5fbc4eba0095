"""Copies of files and trees: in, out and within the namespace."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, NamedTuple

import trio

from alluxiofuse.client.parallel import for_each
from alluxiofuse.errors import FsError
from alluxiofuse.rpc.base import Buffer

if TYPE_CHECKING:
    from alluxiofuse.client.filesystem import OpenFile
    from alluxiofuse.client.paths import Paths, Progress

CHUNK_BYTES = 4 << 20
PARALLEL = 8
_WRITE_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
_thread = trio.to_thread.run_sync


class _Item(NamedTuple):
    """Something to copy: its place in the source, the same below the target, its mode with type."""

    source: bytes
    target: bytes
    mode: int
    ino: int = 0


async def copy_in(
    paths: Paths, local: bytes, target: bytes, recursive: bool, progress: Progress | None
) -> int:
    """See `Paths.copy_in`."""
    copied = 0

    async def copy_file(item: _Item) -> None:
        nonlocal copied
        fd = await _thread(os.open, item.source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            mode = stat.S_IMODE(item.mode) & 0o777
            file = await paths.open(item.target, _WRITE_NEW, mode)

            async def read(offset: int) -> Buffer:
                return await _thread(os.pread, fd, CHUNK_BYTES, offset)

            count = await _pump(read, file, progress)
            copied += count  # Not in one line: others add while this one waits.
        finally:
            os.close(fd)

    async def copy_link(item: _Item) -> None:
        await _symlink(paths, await _thread(os.readlink, item.source), item.target)

    async def copy_one(item: _Item) -> None:
        if stat.S_ISREG(item.mode):
            await copy_file(item)
        elif stat.S_ISLNK(item.mode):
            await copy_link(item)

    info = await _thread(os.stat, local)
    if not stat.S_ISDIR(info.st_mode):
        await copy_file(_Item(local, target, info.st_mode))
        return copied
    _require(recursive, local)
    await for_each(_local_tree(paths, local, target), copy_one, PARALLEL)
    return copied


async def _local_tree(paths: Paths, local: bytes, target: bytes) -> AsyncIterator[_Item]:
    """Everything below a local directory that is not one; directories are made on the way."""
    pending = [(local, target)]
    while pending:
        source, place = pending.pop()
        mode = (await _thread(os.stat, source)).st_mode
        await _make_directory(paths, place, mode)
        for name, entry_mode in await _thread(_scan, source):
            below = os.path.join(source, name), os.path.join(place, name)
            if stat.S_ISDIR(entry_mode):
                pending.append(below)
            else:
                yield _Item(*below, entry_mode)


def _scan(directory: bytes) -> list[tuple[bytes, int]]:
    with os.scandir(directory) as entries:
        return sorted((entry.name, entry.stat(follow_symlinks=False).st_mode) for entry in entries)


async def copy_out(
    paths: Paths, source: bytes, local: bytes, recursive: bool, progress: Progress | None
) -> int:
    """See `Paths.copy_out`."""
    copied = 0

    async def copy_file(item: _Item) -> None:
        nonlocal copied
        flags = _WRITE_NEW | os.O_CLOEXEC
        fd = await _thread(os.open, item.target, flags, stat.S_IMODE(item.mode) & 0o777)
        try:
            file = await paths.fs.open(paths.who, item.ino)
            try:
                count = await _pull(file, fd, progress)
                copied += count
            finally:
                await file.release()
        finally:
            await _thread(os.close, fd)

    async def copy_one(item: _Item) -> None:
        if stat.S_ISREG(item.mode):
            await copy_file(item)
        elif stat.S_ISLNK(item.mode):
            target = await paths.fs.readlink(item.ino)
            await _thread(_replace_link, target, item.target)

    attr = await paths.stat(source)
    if not stat.S_ISDIR(attr.mode):
        await copy_file(_Item(source, local, attr.mode, attr.ino))
        return copied
    _require(recursive, source)
    await for_each(_remote_tree(paths, source, local, _make_local), copy_one, PARALLEL)
    return copied


async def copy_within(
    paths: Paths, source: bytes, target: bytes, recursive: bool, progress: Progress | None
) -> int:
    """See `Paths.copy`."""
    copied = 0

    async def copy_file(item: _Item) -> None:
        nonlocal copied
        origin = await paths.fs.open(paths.who, item.ino)
        try:
            file = await paths.open(item.target, _WRITE_NEW, stat.S_IMODE(item.mode) & 0o777)
            if file.ino == item.ino:
                await file.release()
                raise FsError(errno.EINVAL, "source and target are the same file")

            async def read(offset: int) -> Buffer:
                return await origin.read(offset, CHUNK_BYTES)

            count = await _pump(read, file, progress)
            copied += count  # Not in one line: others add while this one waits.
        finally:
            await origin.release()

    async def copy_one(item: _Item) -> None:
        if stat.S_ISREG(item.mode):
            await copy_file(item)
        elif stat.S_ISLNK(item.mode):
            await _symlink(paths, await paths.fs.readlink(item.ino), item.target)

    async def make(place: bytes, mode: int) -> None:
        await _make_directory(paths, place, mode)

    attr = await paths.stat(source)
    if not stat.S_ISDIR(attr.mode):
        await _refuse_same(paths, attr.ino, target)
        await copy_file(_Item(source, target, attr.mode, attr.ino))
        return copied
    _require(recursive, source)
    if (target + b"/").startswith(source.rstrip(b"/") + b"/"):
        raise FsError(errno.EINVAL, "a directory cannot be copied into itself")
    await for_each(_remote_tree(paths, source, target, make), copy_one, PARALLEL)
    return copied


async def _refuse_same(paths: Paths, ino: int, target: bytes) -> None:
    if await paths.exists(target) and (await paths.stat(target)).ino == ino:
        raise FsError(errno.EINVAL, "source and target are the same file")


async def _remote_tree(
    paths: Paths, source: bytes, target: bytes, make: Callable[[bytes, int], Awaitable[None]]
) -> AsyncIterator[_Item]:
    """Everything below a directory that is not one; `make` makes the directories on the way."""
    async for place, attr in paths.walk(source):
        below = target + place[len(source.rstrip(b"/")) :]
        if stat.S_ISDIR(attr.mode):
            await make(below, attr.mode)
        else:
            yield _Item(place, below, attr.mode, attr.ino)


async def _pump(read: Callable[[int], Awaitable[Buffer]], file: OpenFile, progress: Progress | None) -> int:
    """All of a source into a new file, which is flushed and released."""
    from alluxiofuse.client.paths import write_all

    offset = 0
    try:
        while data := await read(offset):
            await write_all(file, offset, data)
            offset += len(data)
            if progress is not None:
                progress(len(data))
        await file.flush()
        return offset
    finally:
        await file.release()


async def _pull(file: OpenFile, fd: int, progress: Progress | None) -> int:
    offset = 0
    while data := await file.read(offset, CHUNK_BYTES):
        await _thread(_pwrite_all, fd, data, offset)
        offset += len(data)
        if progress is not None:
            progress(len(data))
    return offset


def _pwrite_all(fd: int, data: Buffer, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        offset += count
        view = view[count:]


async def _symlink(paths: Paths, target: bytes, place: bytes) -> None:
    parent = (await paths.stat(os.path.dirname(place))).ino
    try:
        await paths.fs.symlink(paths.who, parent, os.path.basename(place), target)
    except FsError as exc:
        if exc.errno != errno.EEXIST:
            raise
        await paths.fs.unlink(paths.who, parent, os.path.basename(place))
        await paths.fs.symlink(paths.who, parent, os.path.basename(place), target)


def _replace_link(target: bytes, place: bytes) -> None:
    try:
        os.symlink(target, place)
    except FileExistsError:
        os.unlink(place)
        os.symlink(target, place)


async def _make_directory(paths: Paths, place: bytes, mode: int) -> None:
    """Also when it is there; always one that we can fill."""
    try:
        await paths.mkdir(place, stat.S_IMODE(mode) & 0o777 | 0o700)
    except FsError as exc:
        if exc.errno != errno.EEXIST or not stat.S_ISDIR((await paths.stat(place)).mode):
            raise


async def _make_local(place: bytes, mode: int) -> None:
    def make() -> None:
        try:
            os.mkdir(place, stat.S_IMODE(mode) & 0o777 | 0o700)
        except FileExistsError:
            if not os.path.isdir(place):
                raise

    await _thread(make)


def _require(recursive: bool, path: bytes) -> None:
    if not recursive:
        raise FsError(errno.EISDIR, f"{os.fsdecode(path)} is a directory: copy it recursively")
