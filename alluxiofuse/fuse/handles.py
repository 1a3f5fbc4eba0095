"""Open files and open directories of the mount.

A handle is a small number that is never reused, and its record says how to open the same thing
again (inode and flags): what the kernel holds is no pointer into this process.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from alluxiofuse.client.filesystem import OpenFile
from alluxiofuse.errors import FsError
from alluxiofuse.wire.types import DirEntry


@dataclass(slots=True)
class FileHandle:
    ino: int
    flags: int
    """Of open(2), without O_CREAT, O_EXCL and O_TRUNC: those are not to be repeated."""
    file: OpenFile
    thread: int = 0
    """Who opened it; most likely who reads and writes it too, of which libfuse tells us nothing."""
    kills_privileges: bool = False
    """Writing by it takes set-user-id and the like away, and the kernel leaves that to us."""
    is_written: bool = False

    @property
    def is_writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


MAX_PAGES = 2
"""Of an open directory, held whole."""
REOPEN_FLAGS = ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC)


@dataclass(slots=True)
class Page:
    """Some of the entries of an open directory, as the master gave them."""

    start: int
    """Index of the first one in the whole listing."""
    entries: list[DirEntry]
    asked_at: int
    """`ChangeLog.now` before they were asked for."""


class DirHandle:
    """A directory as it was when it was read from the start: positions are stable, nothing is
    listed twice or left out because something else changed. Rewinding reads it anew.

    Only the last two pages are held whole (the kernel goes back by less than a reply); of what lies
    before them just the names, some 60 bytes each. A reader that goes further back is given the
    entries as they are then, from behind the name before that position.
    """

    __slots__ = ("_list", "_names", "_pages", "_rest", "ino", "lock")

    def __init__(self, ino: int, list_from: Callable[[bytes], AsyncIterator[list[DirEntry]]]) -> None:
        """`list_from(name)`: pages of entries in order, from behind `name`, b"" being the start."""
        self.ino = ino
        self.lock = trio.Lock()
        """One listing request at a time: threads may share a descriptor."""
        self._list = list_from
        self._names: list[bytes] = []
        """Of all entries before the pages that are held."""
        self._pages: deque[Page] = deque()
        self._rest: AsyncIterator[list[DirEntry]] | None = None
        """What is still to come; None before the first and after the last page."""

    async def start(self) -> None:
        """From the beginning, with a new listing. Under `lock`."""
        await self._read_from(0)

    async def _read_from(self, index: int) -> None:
        await self.close()
        for page in self._pages:
            self._names += [entry.name for entry in page.entries]
        self._pages.clear()
        del self._names[index:]
        self._rest = self._list(self._names[-1] if self._names else b"")

    async def page_at(self, index: int, now: Callable[[], int]) -> Page | None:
        """The page that holds entry `index`; None when the directory ends before. One page is asked
        for at a time, `now` being the change counter. Under `lock`."""
        if index < len(self._names):
            await self._read_from(index)
        while True:
            for page in self._pages:
                if page.start <= index < page.start + len(page.entries):
                    return page
            if self._rest is None or not await self._load(now()):
                return None

    async def _load(self, now: int) -> bool:
        assert self._rest is not None
        try:
            entries = await anext(self._rest)
        except StopAsyncIteration:
            self._rest = None
            return False
        except BaseException:
            self._rest = None
            raise
        last = self._pages[-1] if self._pages else None
        start = len(self._names) if last is None else last.start + len(last.entries)
        self._pages.append(Page(start, entries, now))
        if len(self._pages) > MAX_PAGES:
            self._names += [entry.name for entry in self._pages.popleft().entries]
        return True

    async def close(self) -> None:
        rest, self._rest = self._rest, None
        if isinstance(rest, AsyncGenerator):
            await rest.aclose()


H = TypeVar("H")


class HandleTable(Generic[H]):
    """Numbers for handles, from 1 up."""

    def __init__(self) -> None:
        self._next = 1
        self._handles: dict[int, H] = {}

    def __len__(self) -> int:
        return len(self._handles)

    def add(self, handle: H) -> int:
        number = self._next
        self._next += 1
        self._handles[number] = handle
        return number

    def get(self, number: int) -> H:
        """EBADF when there is none (the kernel never asks for such)."""
        try:
            return self._handles[number]
        except KeyError:
            raise FsError(errno.EBADF, f"no open handle {number}") from None

    def pop(self, number: int) -> H:
        handle = self.get(number)
        del self._handles[number]
        return handle

    def values(self) -> list[H]:
        return list(self._handles.values())
