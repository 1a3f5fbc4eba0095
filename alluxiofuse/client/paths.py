"""Path-based helpers on top of a FileSystem, for the CLI and Python users. All are async.

A path is absolute in the namespace, bytes or str (str is encoded as os.fsencode does).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from alluxiofuse.client.filesystem import FileSystem, OpenFile
from alluxiofuse.rpc.base import Buffer
from alluxiofuse.wire.types import Attr, Caller, DirEntry

AnyPath = bytes | str
Progress = Callable[[int], None]
"""Called with the number of bytes that were done since the last call."""


class Usage(NamedTuple):
    size_bytes: int
    file_count: int
    directory_count: int


class Paths:
    """One user's view of a FileSystem by path."""

    def __init__(self, fs: FileSystem, who: Caller | None = None) -> None:
        """`who` None: the user of this process, with its groups."""
        raise NotImplementedError

    async def stat(self, path: AnyPath, *, follow: bool = True) -> Attr:
        raise NotImplementedError

    async def exists(self, path: AnyPath) -> bool:
        raise NotImplementedError

    async def list(self, path: AnyPath) -> list[DirEntry]:
        """Entries of a directory; ENOTDIR for anything else."""
        raise NotImplementedError

    def walk(self, path: AnyPath) -> AsyncIterator[tuple[bytes, Attr]]:
        """(absolute path, attributes) of `path` and everything below it, parents first; symlinks
        are not followed."""
        raise NotImplementedError

    async def open(self, path: AnyPath, flags: int = 0, mode: int = 0o644) -> OpenFile:
        """os.open(): with os.O_CREAT it creates."""
        raise NotImplementedError

    async def read_bytes(self, path: AnyPath) -> bytes:
        raise NotImplementedError

    async def write_bytes(self, path: AnyPath, data: Buffer, mode: int = 0o644) -> None:
        """Create or replace."""
        raise NotImplementedError

    async def mkdir(self, path: AnyPath, mode: int = 0o755, *, parents: bool = False) -> None:
        """`parents`: mkdir -p."""
        raise NotImplementedError

    async def remove(self, path: AnyPath, *, recursive: bool = False) -> int:
        """A file, symlink or (empty, unless recursive) directory; how many inodes were removed."""
        raise NotImplementedError

    async def rename(self, source: AnyPath, target: AnyPath, flags: int = 0) -> None:
        """rename(2): `target` is the new name itself, never "into a directory"."""
        raise NotImplementedError

    async def copy_in(
        self, local: str, target: AnyPath, *, recursive: bool = False, progress: Progress | None = None
    ) -> int:
        """From the local filesystem to `target` (the new name itself); bytes copied."""
        raise NotImplementedError

    async def copy_out(
        self, source: AnyPath, local: str, *, recursive: bool = False, progress: Progress | None = None
    ) -> int:
        """To the local filesystem, to the name `local` itself; bytes copied."""
        raise NotImplementedError

    async def copy(
        self, source: AnyPath, target: AnyPath, *, recursive: bool = False, progress: Progress | None = None
    ) -> int:
        """Within the namespace."""
        raise NotImplementedError

    async def load(self, path: AnyPath, *, parallel: int = 8, progress: Progress | None = None) -> Usage:
        """Bring everything below `path` into the cache."""
        raise NotImplementedError

    async def du(self, path: AnyPath) -> Usage:
        raise NotImplementedError
