"""Room for slabs that are open for writing: what is granted, generously, and what that costs."""

from __future__ import annotations

import errno
import os

import trio

from alluxiofuse.errors import FsError
from alluxiofuse.ids import PAGE_BYTES, page_count, pages_of
from alluxiofuse.wire.worker_ops import Reserve, Reserved
from alluxiofuse.worker.accounts import joined, writing_charge
from alluxiofuse.worker.checksums import data_pages
from alluxiofuse.worker.room import Room, storage_error
from alluxiofuse.worker.slab import MAX_SLAB_BYTES, WRITING, Slab, round_up, span
from alluxiofuse.worker.slabs import Slabs

MIN_GRANT_BYTES = 1 << 20
MAX_GRANT_BYTES = 64 << 20
MAX_GAP_BYTES = 1 << 20
"""A write further behind what is granted leaves a hole that costs nothing."""
PATIENCE_S = 60.0
"""How long writers wait for room that uploads will make."""


def page_end(offset: int) -> int:
    """End of the page that `offset` - 1 is in."""
    return -(-offset // PAGE_BYTES) * PAGE_BYTES


def written_extent(fd: int, size: int) -> tuple[int, int]:
    """What of a file has data, as a granted end and islands. Blocks; moves the descriptor's offset."""
    data = data_pages(fd, size)
    return (size, 0) if data == (1 << page_count(size)) - 1 else joined(0, data)


class Growth:
    """Owned by the worker."""

    def __init__(self, slabs: Slabs, room: Room) -> None:
        self._slabs = slabs
        self._room = room

    def grow_now(self, slab: Slab, start: int, end: int) -> bool:
        """Grant [start, end), and generously beyond, within what is free now."""
        if end <= slab.granted_end:
            return True
        if end > MAX_SLAB_BYTES:
            raise FsError(errno.EFBIG)
        if start > slab.granted_end + MAX_GAP_BYTES:
            return self._grow_island(slab, pages_of(start, end - start))
        is_inside = self._is_inside(slab, end)
        if is_inside:
            end = page_end(end)  # the last page that is granted is a whole one
        generous = round_up(end + max(MIN_GRANT_BYTES, min(end, MAX_GRANT_BYTES)))
        free = round_up(slab.granted_end) + (slab.directory.available & ~4095)
        granted = min(generous, free)
        if is_inside:
            granted -= granted % PAGE_BYTES
        return (granted >= end and self._slabs.grant(slab, granted)) or self._slabs.grant(slab, end)

    def _is_inside(self, slab: Slab, end: int) -> bool:
        """The file has, or may get, bytes beyond: each page with data in it will be charged whole."""
        return bool(slab.islands) or end < os.fstat(self.fd(slab)).st_size

    def _grow_island(self, slab: Slab, pages: range) -> bool:
        """Far behind what is granted: these pages alone, and more the longer the run that they end."""
        wanted = span(pages.start, len(pages))
        if not wanted & ~slab.islands:
            return True
        below = (1 << pages.start) - 1
        run = pages.start - (~slab.islands & below).bit_length()
        generous = span(pages.start, len(pages) + min(run, MAX_GRANT_BYTES // PAGE_BYTES))
        end = page_end(slab.granted_end)  # the file will go on behind that page
        return self._slabs.grant(slab, end, generous) or self._slabs.grant(slab, end, wanted)

    def _needed(self, slab: Slab, start: int, end: int) -> int:
        """What granting [start, end) costs at least."""
        if start > slab.granted_end + MAX_GAP_BYTES:
            pages = pages_of(start, end - start)
            granted = joined(page_end(slab.granted_end), slab.islands | span(pages.start, len(pages)))
        else:
            end = page_end(end) if self._is_inside(slab, end) else end
            granted = joined(max(end, slab.granted_end), slab.islands)
        return max(0, writing_charge(*granted) - slab.reserved)

    async def grow(self, slab: Slab, start: int, end: int) -> None:
        self._slabs.pin(slab)
        try:
            deadline = trio.current_time() + PATIENCE_S
            while slab.state == WRITING and not self.grow_now(slab, start, end):
                needed = self._needed(slab, start, end)
                await self._room.make(slab.directory, needed, deadline - trio.current_time())
        finally:
            self._slabs.unpin(slab)

    def may_grow_to(self, slab: Slab, size: int) -> bool:
        """The page at the granted end will be a whole one."""
        end = min(size, page_end(slab.granted_end))
        needed = round_up(end) - round_up(slab.granted_end)
        return end <= slab.granted_end or (
            self._room.make_now(slab.directory, needed) and self._slabs.grant(slab, end)
        )

    @staticmethod
    def reserved(slab: Slab, request: Reserve) -> Reserved:
        """The answer to a Reserve that was granted."""
        if request.end <= slab.granted_end:
            return Reserved(slab.granted_end)
        first = request.start // PAGE_BYTES
        rest = slab.islands >> first
        run = (~rest & (rest + 1)).bit_length() - 1
        return Reserved((first + run) * PAGE_BYTES, first * PAGE_BYTES)

    def fd(self, slab: Slab) -> int:
        """`Descriptors.for_writing`, with errors as clients get them."""
        try:
            return self._slabs.fds.for_writing(slab)
        except OSError as exc:
            raise storage_error(exc, slab.directory, self._slabs.counters) from None
