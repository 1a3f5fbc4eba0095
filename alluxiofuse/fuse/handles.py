"""Open files and open directories of the mount.

A handle is a small number that is never reused, and its record says how to open the same thing
again (inode and flags): what the kernel holds is no pointer into this process.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
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

    @property
    def is_writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


REOPEN_FLAGS = ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC)


@dataclass(slots=True)
class DirHandle:
    """A directory as it was when it was read from the start: positions are stable, nothing is
    listed twice or left out because something else changed. Rewinding reads it anew."""

    ino: int
    entries: list[DirEntry] = field(default_factory=list)
    asked_at: list[int] = field(default_factory=list)
    """For each entry, `ChangeLog.now` before its page was asked for."""
    pages: AsyncIterator[list[DirEntry]] | None = None
    """What is still to come; None before the first and after the last page."""
    lock: trio.Lock = field(default_factory=trio.Lock)
    """One listing request at a time: threads may share a descriptor."""

    async def start(self, pages: AsyncIterator[list[DirEntry]]) -> None:
        """From the beginning, with a new listing."""
        await self.close()
        self.entries.clear()
        self.asked_at.clear()
        self.pages = pages

    async def load(self, count: int, now: int) -> bool:
        """Have at least `count` entries. False when the directory ends before; one page is asked for
        at a time, `now` being the change counter before. Under `lock`."""
        while len(self.entries) < count and self.pages is not None:
            try:
                page = await anext(self.pages)
            except StopAsyncIteration:
                self.pages = None
                break
            except BaseException:
                self.pages = None
                raise
            self.entries += page
            self.asked_at += [now] * len(page)
        return len(self.entries) >= count

    async def close(self) -> None:
        pages, self.pages = self.pages, None
        if isinstance(pages, AsyncGenerator):
            await pages.aclose()


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
