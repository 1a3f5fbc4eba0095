"""One open file: what a file handle of the FUSE layer, of the CLI or of Python stands for."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable

import trio

from alluxiofuse.client import passing, reading
from alluxiofuse.client.content import Content
from alluxiofuse.client.reading import InSlab
from alluxiofuse.client.writing import SealedMeanwhile
from alluxiofuse.errors import AlluxioFuseError, FsError
from alluxiofuse.rpc.base import Buffer
from alluxiofuse.wire import master_ops as ops
from alluxiofuse.wire.types import Attr

log = logging.getLogger(__name__)


class OpenFile:
    """From `FileSystem.open` or `create`; ends with `release` (exactly once).

    All OpenFiles of one inode in a FileSystem see the same bytes: a read gives what another handle
    has just written. Calls may be made from many tasks of the FileSystem's trio thread.
    Errors are AlluxioFuseErrors; a read or write after `release`, or against `flags`, is EBADF.
    """

    __slots__ = (
        "_content",
        "flags",
        "ino",
        "is_append",
        "is_flushed",
        "is_reader",
        "is_released",
        "is_writer",
        "keep_cache",
        "read_container",
    )

    def __init__(self, content: Content, flags: int, *, keep_cache: bool) -> None:
        self._content = content
        self.ino = content.ino
        self.flags = flags
        """The os.O_* flags of open(2)."""
        self.is_writer = flags & os.O_ACCMODE != os.O_RDONLY
        self.is_reader = flags & os.O_ACCMODE != os.O_WRONLY
        self.is_append = bool(flags & os.O_APPEND)
        self.is_flushed = False
        """Nothing was written by it since its last flush (which is most likely its last at all)."""
        self.is_released = False
        self.keep_cache = keep_cache
        """The content has not changed since the inode was last opened through this FileSystem: what
        the kernel has in its page cache is good."""
        self.read_container = 0
        """Sealed content that it last read from."""
        content.files.append(self)

    @property
    def attr(self) -> Attr:
        """Live: while this client writes the file, size and mtime are those of the bytes so far."""
        return self._content.live_attr

    async def read(self, offset: int, size: int) -> Buffer:
        """Bytes [offset, offset + size); fewer only at the end of the file, zeros in holes."""
        if self.is_released or not self.is_reader:
            raise FsError(errno.EBADF)
        return await reading.read(self, self._content, offset, size)

    async def read_in_place(self, offset: int, size: int) -> Buffer | InSlab:
        """The same, without a copy where the bytes are in a file that this process may read."""
        if self.is_released or not self.is_reader:
            raise FsError(errno.EBADF)
        return await reading.read(self, self._content, offset, size, in_place=True)

    async def write(self, offset: int, data: Buffer, *, is_append: bool | None = None) -> int:
        """How many bytes were written, from the start of `data`; fewer than given only when the room
        ended (ENOSPC when there was none at all). `is_append`: to the end, whatever `offset` is; None:
        as the file was opened."""
        if self.is_released or not self.is_writer:
            raise FsError(errno.EBADF)
        self.is_flushed = False
        content = self._content
        is_append = self.is_append if is_append is None else is_append
        while True:
            writing = content.writing
            if writing is None or not writing.takes_writes:
                writing = await content.begun(len(data))
            try:
                return await writing.write(offset, data, is_append=is_append)
            except SealedMeanwhile:
                continue

    async def pass_on(self) -> int:
        """For the kernel to read, and to write if the file was opened for that: a descriptor (this file's,
        for reading only) of the one file that has all of the content, and that all changes at its worker go
        to, until the last release of the inode. -1: there is none, or it may not have it now."""
        return await passing.descriptor(self, self._content)

    async def truncate(self, size: int) -> None:
        """ftruncate(2); growing makes a hole."""
        if self.is_released or not self.is_writer:
            raise FsError(errno.EINVAL)
        self.is_flushed = False
        await self._content.truncate(size)

    async def flush(self) -> None:
        """close(2) of one descriptor; may come many times. What was written is then at the master
        (and, under CACHE_THROUGH, in the under storage). Raises what writing failed with before."""
        if self.is_writer and not self.is_released:
            self.is_flushed = True
            await self._content.flush(self)

    async def load(self, progress: Callable[[int], None] | None = None) -> None:
        """Bring all of the file into a worker's cache; `progress` is told bytes as they come.
        NoSpaceError: it does not fit; UnavailableError: no worker is running."""
        await reading.load(self, self._content, progress)

    async def fsync(self, is_datasync: bool = False) -> None:
        """fsync(2): data on a durable tier or in the under storage, metadata on the master's disk."""
        session = self._content.core.session
        begun = await session.call(ops.BeginSync(), is_idempotent=True)
        await self._content.fsync()
        if begun:
            await session.call(ops.SyncMetadata(begun), is_idempotent=True)

    async def release(self) -> None:
        """The last descriptor is gone. Never raises an AlluxioFuseError; what fails is logged."""
        if self.is_released:
            return
        self.is_released = True
        content = self._content
        try:
            content.files.remove(self)
            # Also when it only emptied the file: O_RDONLY | O_TRUNC.
            if content.writing is not None and not content.is_written:
                with trio.CancelScope(shield=True):
                    await content.last_writer_left()
        except AlluxioFuseError as exc:
            log.error("release of inode %d: %s", self.ino, exc)
        finally:
            content.core.closed(content)
