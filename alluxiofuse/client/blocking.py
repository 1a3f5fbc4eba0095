"""The client for programs without trio: usable from any thread.

with connect("localhost:19998") as fs:
    with fs.open("/data/a.csv", "rb") as file:
        ...
"""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

import trio

from alluxiofuse.client.bootclock import BootClock
from alluxiofuse.client.connect import open_filesystem
from alluxiofuse.client.filesystem import OpenFile
from alluxiofuse.client.paths import CHUNK_BYTES, AnyPath, Paths, Progress, Usage
from alluxiofuse.config import ClientConfig
from alluxiofuse.errors import AlluxioFuseError, FsError, UserError
from alluxiofuse.rpc.base import Buffer
from alluxiofuse.rpc.security import Security
from alluxiofuse.wire.types import Attr, Caller, DirEntry

T = TypeVar("T")

DEFAULT_BUFFER_BYTES = 1 << 20
_Entries = list[DirEntry]


def connect(
    address: str,
    *,
    security: Security | None = None,
    config: ClientConfig | None = None,
    name: str = "python",
    hostname: str = "",
    who: Caller | None = None,
) -> BlockingFileSystem:
    """Dial the master at `address`; the errors of `connect.open_filesystem`. `who` None: the user of
    this process."""
    return BlockingFileSystem(
        address, security=security, config=config, name=name, hostname=hostname, who=who
    )


class BlockingFileSystem:
    """Runs trio in a thread of its own; a context manager. Methods mirror `paths.Paths`; all may be
    called from any thread but that one. Errors are AlluxioFuseErrors; those of file objects are
    OSErrors, as Python's own."""

    def __init__(
        self,
        address: str,
        *,
        security: Security | None = None,
        config: ClientConfig | None = None,
        name: str = "python",
        hostname: str = "",
        who: Caller | None = None,
    ) -> None:
        self._ready: Future[tuple[trio.lowlevel.TrioToken, Paths]] = Future()
        self._done: trio.Event
        self._is_closed = False
        self._closing = threading.Lock()
        self._thread = threading.Thread(
            target=self._run,
            args=(address, security, config, name, hostname, who),
            name="alluxiofuse",
            daemon=True,
        )
        self._thread.start()
        self._token, self._paths = self._ready.result()

    def _run(self, *args: Any) -> None:
        try:
            trio.run(self._serve, *args, clock=BootClock())
        except BaseException as exc:
            if self._ready.done():
                raise
            self._ready.set_exception(exc)

    async def _serve(
        self,
        address: str,
        security: Security | None,
        config: ClientConfig | None,
        name: str,
        hostname: str,
        who: Caller | None,
    ) -> None:
        self._done = trio.Event()
        async with open_filesystem(
            address, security=security, config=config, name=name, hostname=hostname
        ) as filesystem:
            self._ready.set_result((trio.lowlevel.current_trio_token(), Paths(filesystem, who)))
            await self._done.wait()

    def call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run an async function in the client's thread and wait for it."""
        if self._is_closed:
            raise FsError(errno.EBADF, "the filesystem was closed")
        return trio.from_thread.run(function, *args, trio_token=self._token)

    def close(self) -> None:
        """Commit what is being written and end. Idempotent."""
        with self._closing:
            if not self._is_closed:
                self._is_closed = True
                try:
                    self._token.run_sync_soon(self._done.set)
                except trio.RunFinishedError:
                    pass
        self._thread.join()

    def __enter__(self) -> BlockingFileSystem:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # --- paths --------------------------------------------------------------------------------------

    @property
    def paths(self) -> Paths:
        """The async helpers, for `call`."""
        return self._paths

    def stat(self, path: AnyPath, *, follow: bool = True) -> Attr:
        async def run() -> Attr:
            return await self._paths.stat(path, follow=follow)

        return self.call(run)

    def exists(self, path: AnyPath) -> bool:
        return self.call(self._paths.exists, path)

    def walk(self, path: AnyPath) -> Iterator[tuple[bytes, Attr]]:
        """All of it is read before the first is given."""

        async def run() -> list[tuple[bytes, Attr]]:
            return [item async for item in self._paths.walk(path)]

        return iter(self.call(run))

    def read_bytes(self, path: AnyPath) -> bytes:
        return self.call(self._paths.read_bytes, path)

    def write_bytes(self, path: AnyPath, data: Buffer, mode: int = 0o644) -> None:
        self.call(self._paths.write_bytes, path, data, mode)

    def mkdir(self, path: AnyPath, mode: int = 0o755, *, parents: bool = False) -> None:
        async def run() -> None:
            await self._paths.mkdir(path, mode, parents=parents)

        self.call(run)

    def remove(self, path: AnyPath, *, recursive: bool = False) -> int:
        async def run() -> int:
            return await self._paths.remove(path, recursive=recursive)

        return self.call(run)

    def rename(self, source: AnyPath, target: AnyPath, flags: int = 0) -> None:
        self.call(self._paths.rename, source, target, flags)

    def copy_in(
        self, local: str, target: AnyPath, *, recursive: bool = False, progress: Progress | None = None
    ) -> int:
        async def run() -> int:
            return await self._paths.copy_in(local, target, recursive=recursive, progress=progress)

        return self.call(run)

    def copy_out(
        self, source: AnyPath, local: str, *, recursive: bool = False, progress: Progress | None = None
    ) -> int:
        async def run() -> int:
            return await self._paths.copy_out(source, local, recursive=recursive, progress=progress)

        return self.call(run)

    def load(self, path: AnyPath, *, progress: Progress | None = None) -> Usage:
        async def run() -> Usage:
            return await self._paths.load(path, progress=progress)

        return self.call(run)

    def du(self, path: AnyPath) -> Usage:
        return self.call(self._paths.du, path)

    def open(
        self, path: AnyPath, mode: str = "rb", buffering: int = -1
    ) -> io.RawIOBase | io.BufferedReader | io.BufferedWriter | io.BufferedRandom:
        """Like the built-in open, binary modes only; `buffering` 0 gives the raw file."""
        flags = _flags_of(mode)
        try:
            file = self.call(self._paths.open, path, flags)
        except AlluxioFuseError as exc:
            raise _os_error(exc, path) from exc
        raw = RawFile(self, file, mode)
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else DEFAULT_BUFFER_BYTES
        if raw.readable() and raw.writable():
            return io.BufferedRandom(raw, size)
        return io.BufferedReader(raw, size) if raw.readable() else io.BufferedWriter(raw, size)

    def list(self, path: AnyPath) -> _Entries:
        return self.call(self._paths.list, path)


_MODES = {
    "r": os.O_RDONLY,
    "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "x": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
}


def _flags_of(mode: str) -> int:
    kind = mode.replace("b", "").replace("+", "")
    if "b" not in mode or kind not in _MODES or len(mode) != len(set(mode)):
        raise UserError(f"mode {mode!r} is not one of rb, wb, xb, ab, each with or without +")
    flags = _MODES[kind]
    return flags & ~os.O_ACCMODE | os.O_RDWR if "+" in mode else flags


def _os_error(exc: AlluxioFuseError, path: AnyPath) -> OSError:
    return OSError(exc.errno, exc.message or os.strerror(exc.errno), path)


class RawFile(io.RawIOBase):
    """An open file as Python's raw I/O; its position is its own. Threads share it as they share
    any file object: one at a time."""

    def __init__(self, filesystem: BlockingFileSystem, file: OpenFile, mode: str) -> None:
        super().__init__()
        self._filesystem = filesystem
        self._file = file
        self._position = 0
        self.mode = mode
        if file.is_append:
            self._position = file.attr.size

    def _call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        self._check_open()
        try:
            return self._filesystem.call(function, *args)
        except AlluxioFuseError as exc:
            raise OSError(exc.errno, exc.message or os.strerror(exc.errno)) from exc

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")

    def readable(self) -> bool:
        return self._file.is_reader

    def writable(self) -> bool:
        return self._file.is_writer

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._call(self._file.read, self._position, min(len(view), CHUNK_BYTES))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if not view:
            return 0
        count = self._call(self._file.write, self._position, view[:CHUNK_BYTES])
        self._position = self._file.attr.size if self._file.is_append else self._position + count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._check_open()
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence)
        if base is None:
            if whence != os.SEEK_END:
                raise ValueError(f"whence {whence} is not supported")
            base = self._file.attr.size
        if base + offset < 0:
            raise OSError(errno.EINVAL, "negative seek position")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        self._check_open()
        return self._position

    def truncate(self, size: int | None = None) -> int:
        size = self._position if size is None else size
        self._call(self._file.truncate, size)
        return size

    def sync(self) -> None:
        """fsync(2)."""
        self._call(self._file.fsync)

    def close(self) -> None:
        """flush and release; OSError when what was written could not be kept."""
        if self.closed:
            return
        try:
            if not self._filesystem._is_closed:
                self._call(self._finish)
        finally:
            super().close()

    async def _finish(self) -> None:
        try:
            await self._file.flush()
        finally:
            await self._file.release()
