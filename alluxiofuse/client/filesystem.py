"""The virtual filesystem of one client: addressed by inode, ignorant of kernels.

The FUSE layer, the path helpers (`paths`) and the blocking facade stand on it. All methods are
called in the trio thread of `run`, from any number of tasks. Errors are AlluxioFuseErrors whose
`errno` is that of the system call of the same name; an inode that is gone is ESTALE.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import trio

from alluxiofuse.client.open_file import OpenFile
from alluxiofuse.client.session import CacheListener
from alluxiofuse.client.workers import WorkerPool
from alluxiofuse.config import ClientConfig
from alluxiofuse.rpc.base import Connection
from alluxiofuse.wire import master_ops as ops
from alluxiofuse.wire.types import Attr, Caller, DirEntry, FsUsage

__all__ = ["CacheListener", "FileSystem", "OpenFile"]

DIR_PAGE_ENTRIES = 2000


class FileSystem:
    def __init__(
        self,
        master: Connection,
        workers: WorkerPool,
        config: ClientConfig,
        *,
        name: str = "client",
        hostname: str = "",
    ) -> None:
        """`name` is for people ("fuse /mnt/a"). `hostname` "": this machine's. `workers` is run by
        this FileSystem and belongs to it."""
        raise NotImplementedError

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Open the session (then `task_status.started()`), keep it, until cancelled. Cancelled, it
        first commits what is being written, best effort, within a few seconds."""
        raise NotImplementedError

    def set_listener(self, listener: CacheListener | None) -> None:
        """Who is told what became void. Before `run`, or at any time in its thread."""
        raise NotImplementedError

    @property
    def is_watch_healthy(self) -> bool:
        """False: the master has not been heard of for a lease; then cache nothing (timeouts of 0)."""
        raise NotImplementedError

    # --- names and attributes -----------------------------------------------------------------------

    async def lookup(self, who: Caller, parent: int, name: bytes) -> Attr:
        raise NotImplementedError

    async def getattr(self, ino: int) -> Attr:
        raise NotImplementedError

    async def setattr(
        self,
        who: Caller,
        ino: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        atime_now: bool = False,
        mtime_now: bool = False,
        file: OpenFile | None = None,
    ) -> Attr:
        """chmod, chown, utimens and truncate in one. `file`: the handle of ftruncate(2)."""
        raise NotImplementedError

    async def resolve(self, who: Caller, path: bytes, follow: bool = True) -> list[Attr]:
        """Attributes of every directory on an absolute path and, last, of what it names."""
        raise NotImplementedError

    def readdir(self, who: Caller, ino: int, after: bytes = b"") -> AsyncIterator[list[DirEntry]]:
        """Pages of entries in byte order of their names, from behind `after`; without . and .."""
        raise NotImplementedError

    async def list(self, who: Caller, ino: int) -> list[DirEntry]:
        """The whole directory."""
        raise NotImplementedError

    async def mkdir(self, who: Caller, parent: int, name: bytes, mode: int) -> Attr:
        raise NotImplementedError

    async def mknod(self, who: Caller, parent: int, name: bytes, mode: int, rdev: int = 0) -> Attr:
        raise NotImplementedError

    async def symlink(self, who: Caller, parent: int, name: bytes, target: bytes) -> Attr:
        raise NotImplementedError

    async def readlink(self, ino: int) -> bytes:
        raise NotImplementedError

    async def link(self, who: Caller, ino: int, parent: int, name: bytes) -> Attr:
        raise NotImplementedError

    async def unlink(self, who: Caller, parent: int, name: bytes) -> ops.Unlinked:
        raise NotImplementedError

    async def rmdir(self, who: Caller, parent: int, name: bytes) -> None:
        raise NotImplementedError

    async def rename(
        self, who: Caller, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> ops.Renamed:
        """`flags`: RENAME_NOREPLACE (1) or 0."""
        raise NotImplementedError

    async def access(self, who: Caller, ino: int, mask: int) -> None:
        """EACCES unless `mask` (4 read, 2 write, 1 execute) is allowed."""
        raise NotImplementedError

    async def statfs(self) -> FsUsage:
        raise NotImplementedError

    async def getxattr(self, who: Caller, ino: int, name: bytes) -> bytes:
        raise NotImplementedError

    async def setxattr(self, who: Caller, ino: int, name: bytes, value: bytes, flags: int = 0) -> None:
        raise NotImplementedError

    async def listxattr(self, ino: int) -> list[bytes]:  # type: ignore[valid-type]
        raise NotImplementedError

    async def removexattr(self, who: Caller, ino: int, name: bytes) -> None:
        raise NotImplementedError

    async def sync(self) -> None:
        """sync(2), syncfs(2): all that the master has answered survives its machine."""
        raise NotImplementedError

    # --- content ------------------------------------------------------------------------------------

    async def create(
        self, who: Caller, parent: int, name: bytes, mode: int, flags: int = os.O_RDWR
    ) -> tuple[Attr, OpenFile]:
        """open(2) with O_CREAT; EEXIST with O_EXCL. `mode`: permission bits after umask."""
        raise NotImplementedError

    async def open(self, who: Caller, ino: int, flags: int = os.O_RDONLY) -> OpenFile:
        """open(2) of an inode; O_TRUNC is done here, O_APPEND is kept in the file."""
        raise NotImplementedError
