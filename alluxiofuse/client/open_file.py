"""One open file: what a file handle of the FUSE layer, of the CLI or of Python stands for."""

from __future__ import annotations

from alluxiofuse.rpc.base import Buffer
from alluxiofuse.wire.types import Attr


class OpenFile:
    """From `FileSystem.open` or `create`; ends with `release` (exactly once).

    All OpenFiles of one inode in a FileSystem see the same bytes: a read gives what another handle
    has just written. Calls may be made from many tasks of the FileSystem's trio thread.
    Errors are AlluxioFuseErrors; a read or write after `release` is EBADF.
    """

    ino: int
    flags: int
    """The os.O_* flags of open(2)."""

    @property
    def attr(self) -> Attr:
        """Live: while this client writes the file, size and mtime are those of the bytes so far."""
        raise NotImplementedError

    @property
    def keep_cache(self) -> bool:
        """The content has not changed since the inode was last opened through this FileSystem: what
        the kernel has in its page cache is good."""
        raise NotImplementedError

    async def read(self, offset: int, size: int) -> Buffer:
        """Bytes [offset, offset + size); fewer only at the end of the file, zeros in holes."""
        raise NotImplementedError

    async def write(self, offset: int, data: Buffer) -> int:
        """How many bytes were written, from the start of `data`; fewer than given only when the room
        ended (ENOSPC when there was none at all). With O_APPEND `offset` is ignored."""
        raise NotImplementedError

    async def truncate(self, size: int) -> None:
        """ftruncate(2); growing makes a hole."""
        raise NotImplementedError

    async def flush(self) -> None:
        """close(2) of one descriptor; may come many times. What was written is then at the master
        (and, under CACHE_THROUGH, in the under storage). Raises what writing failed with before."""
        raise NotImplementedError

    async def fsync(self, is_datasync: bool = False) -> None:
        """fsync(2): data on a durable tier or in the under storage, metadata on the master's disk."""
        raise NotImplementedError

    async def release(self) -> None:
        """The last descriptor is gone. Never raises; what fails is logged."""
        raise NotImplementedError
