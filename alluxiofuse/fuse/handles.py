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
from typing import Generic, Protocol, TypeVar

import trio

from alluxiofuse.client.filesystem import OpenFile
from alluxiofuse.errors import FsError, StaleError
from alluxiofuse.fuse.memory import (
    IS_DIRECT,
    IS_DIRECTORY,
    KILLS_PRIVILEGES,
    HandleRecord,
    Memory,
)
from alluxiofuse.fuse.passthrough import ORDINARY, Mode
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
    mode: Mode = ORDINARY

    @property
    def record(self) -> HandleRecord:
        """For the next daemon."""
        mode = self.mode
        bits = KILLS_PRIVILEGES if self.kills_privileges else 0
        bits |= IS_DIRECT if mode.is_direct else 0
        return HandleRecord(
            self.ino, self.flags & 0xFFFFFFFF, bits, mode.backing_id, self.thread, *mode.identity
        )

    @property
    def is_writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


MAX_PAGES = 2
"""Of an open directory, held whole."""


def mode_of(record: HandleRecord) -> Mode:
    """How the open was answered of which an earlier daemon noted `record`."""
    identity = record.device, record.device_ino
    return Mode(record.backing_id, is_direct=bool(record.bits & IS_DIRECT), identity=identity)


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

    __slots__ = ("_list", "_names", "_pages", "_rest", "_unknown_count", "ino", "lock", "reply_count")

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
        self._unknown_count = 0
        """Of entries before `_names`, which a former daemon listed."""
        self.reply_count = 0

    @property
    def record(self) -> HandleRecord:
        return HandleRecord(self.ino, bits=IS_DIRECTORY)

    def go_on(self, index: int, name: bytes) -> None:
        """As if entries up to and with that at `index`, which is `name`, had been listed. Under `lock`."""
        self._pages.clear()
        self._names, self._unknown_count = [name], index
        self._rest = self._list(name)

    @property
    def is_started(self) -> bool:
        return bool(self._names or self._pages or self._rest)

    async def start(self) -> None:
        """From the beginning, with a new listing. Under `lock`."""
        await self._read_from(0)

    async def _read_from(self, index: int) -> None:
        await self.close()
        if index < self._unknown_count:  # By count: nobody knows the names any more.
            self._names, index, self._unknown_count = [], 0, 0
            self._pages.clear()
        for page in self._pages:
            self._names += [entry.name for entry in page.entries]
        self._pages.clear()
        del self._names[index - self._unknown_count :]
        self._rest = self._list(self._names[-1] if self._names else b"")

    async def page_at(self, index: int, now: Callable[[], int]) -> Page | None:
        """The page that holds entry `index`; None when the directory ends before. One page is asked
        for at a time, `now` being the change counter. Under `lock`."""
        if index < self._unknown_count + len(self._names):
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
        start = self._unknown_count + len(self._names) if last is None else last.start + len(last.entries)
        self._pages.append(Page(start, entries, now))
        if len(self._pages) > MAX_PAGES:
            self._names += [entry.name for entry in self._pages.popleft().entries]
        return True

    async def close(self) -> None:
        rest, self._rest = self._rest, None
        if isinstance(rest, AsyncGenerator):
            await rest.aclose()


class Recorded(Protocol):
    @property
    def record(self) -> HandleRecord: ...


H = TypeVar("H", bound=Recorded)


class HandleTable(Generic[H]):
    """Numbers for handles, from 1 up; with `memory`, such as outlive this daemon."""

    def __init__(self, memory: Memory | None = None) -> None:
        self._next = 1
        self._handles: dict[int, H] = {}
        self._memory = memory
        self._lost: set[int] = set()

    def __len__(self) -> int:
        return len(self._handles)

    def add(self, handle: H) -> int:
        if self._memory is not None:
            number = self._memory.add_handle(handle.record)
        else:
            number = self._next
            self._next += 1
        self._handles[number] = handle
        return number

    def restore(self, number: int, handle: H | None) -> None:
        """The kernel has it from a former daemon. None: what it was is gone."""
        if handle is None:
            self._lost.add(number)
        else:
            self._handles[number] = handle

    def get(self, number: int) -> H:
        """EBADF when there is none (the kernel never asks for such); ESTALE: it got lost with a daemon."""
        try:
            return self._handles[number]
        except KeyError:
            if number in self._lost:
                raise StaleError("it was open when the daemon ended, and is gone") from None
            raise FsError(errno.EBADF, f"no open handle {number}") from None

    def pop(self, number: int) -> H | None:
        """None: there is none (any more)."""
        if number in self._lost:
            self._lost.discard(number)
        elif number not in self._handles:
            return None
        if self._memory is not None:
            self._memory.remove_handle(number)
        return self._handles.pop(number, None)

    def values(self) -> list[H]:
        return list(self._handles.values())
