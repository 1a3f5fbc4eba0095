"""Handlers of writers: BeginWrite, Reserve, Write, Truncate, EndWrite, SyncContainer.

Small work is done at once in a plain function; a coroutine is returned only when something must be
waited for. Between BeginWrite and the seal the slab's file is the truth.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable

import trio

from alluxiofuse.errors import (
    BadRequestError,
    FsError,
    StaleError,
)
from alluxiofuse.ids import PAGE_BYTES, pages_of
from alluxiofuse.rpc.base import Answer, Buffer, Peer
from alluxiofuse.wire.messages import NOTHING, Nothing
from alluxiofuse.wire.worker_ops import (
    MAX_IO_BYTES,
    BeginWrite,
    EndWrite,
    ForgetMtime,
    Reserve,
    Reserved,
    SyncContainer,
    Truncate,
    Write,
    WriteEnd,
    WriteGrant,
)
from alluxiofuse.worker import checksums, growth
from alluxiofuse.worker.beginning import Beginning, sent
from alluxiofuse.worker.ending import Ending
from alluxiofuse.worker.fetcher import Fetcher
from alluxiofuse.worker.growth import Growth
from alluxiofuse.worker.leases import Leases
from alluxiofuse.worker.open_slabs import NOT_WRITTEN
from alluxiofuse.worker.passing import Passing
from alluxiofuse.worker.room import Room, storage_error
from alluxiofuse.worker.sealing import Sealer
from alluxiofuse.worker.slab import MAX_SLAB_BYTES, WRITING, Lock, Slab, span
from alluxiofuse.worker.slabs import Slabs

log = logging.getLogger(__name__)

_INLINE_BYTES = 1 << 20


class Writing:
    """Owned by the worker."""

    def __init__(self, slabs: Slabs, room: Room, fetcher: Fetcher, *, grace_s: float) -> None:
        self._slabs = slabs
        self._room = room
        self._threads = trio.CapacityLimiter(4)
        self._growth = Growth(slabs, room)
        self._passing = Passing(slabs, self._growth, room, self._threads)
        self._sealer = Sealer(slabs, self._threads)
        self.leases = Leases(slabs, grace_s=grace_s, seal_orphan=self._sealer.seal_orphan)
        self._beginning = Beginning(
            slabs, room, self._growth, fetcher, self._sealer, self.leases, self._passing, self._threads
        )
        self._ending = Ending(slabs, self._sealer, self.leases, self._threads)

    async def run(self) -> None:
        """Carries seals to their end, whether or not the client waits for them."""
        try:
            async with trio.open_nursery() as nursery:
                self._ending.nursery = self._passing.nursery = nursery
                nursery.start_soon(self.leases.run)
                nursery.start_soon(self._passing.run)
                try:
                    await trio.sleep_forever()
                finally:  # Before it is closed: programs and clients go on asking.
                    self._ending.nursery = self._passing.nursery = None
        finally:
            self._passing.stop()

    def begin(self, peer: Peer, request: BeginWrite) -> Answer[WriteGrant] | Awaitable[Answer[WriteGrant]]:
        return self._beginning.begin(peer, request)

    def end(self, peer: Peer, request: EndWrite) -> WriteEnd | Awaitable[WriteEnd]:
        return self._ending.end(peer, request)

    # --- room -------------------------------------------------------------------------------------

    def reserve(self, peer: Peer, request: Reserve) -> Reserved | Awaitable[Reserved]:
        slab = self.leases.writer(peer, request.lock_id).slab
        if self._growth.grow_now(slab, request.start, request.end):
            return self._growth.reserved(slab, request)
        return self._reserve_slowly(peer, request)

    async def _reserve_slowly(self, peer: Peer, request: Reserve) -> Reserved:
        slab = self.leases.writer(peer, request.lock_id).slab
        await self._growth.grow(slab, request.start, request.end)
        self.leases.writer(peer, request.lock_id)
        return self._growth.reserved(slab, request)

    # --- writing through the worker ---------------------------------------------------------------

    def write(self, peer: Peer, request: Write, payload: Buffer) -> int | Awaitable[int]:
        lock = self.leases.writer(peer, request.lock_id)
        slab = lock.slab
        length = len(payload)
        if length > MAX_IO_BYTES:
            raise BadRequestError(f"a write of more than {MAX_IO_BYTES} bytes")
        if request.is_repeat:
            number, at = lock.append
            if number == request.number:
                return at
            if not number:  # The lock is another one than that by which it was sent before.
                raise StaleError("it is not known whether this append was done")
        # Of an append: about there, as those who have the descriptor append too.
        offset = os.fstat(self._growth.fd(slab)).st_size if request.append else request.offset
        if not length:
            return offset
        if length > _INLINE_BYTES or not self._growth.grow_now(slab, offset, offset + length):
            return self._write_slowly(peer, request, offset, bytes(payload))
        self._touch(slab, offset, length)
        try:
            _put(self._growth.fd(slab), payload, offset, request.append)
        except OSError as exc:
            raise storage_error(exc, slab.directory, self._slabs.counters) from None
        return self._appended(lock, request, offset, length) if request.append else offset

    async def _write_slowly(self, peer: Peer, request: Write, offset: int, data: bytes) -> int:
        lock = self.leases.writer(peer, request.lock_id)
        slab = lock.slab
        self._slabs.pin(slab)
        lock.busy_count += 1
        try:
            await self._growth.grow(slab, offset, offset + len(data))
            self.leases.writer(peer, request.lock_id)
            self._touch(slab, offset, len(data))
            fd = os.dup(self._growth.fd(slab))
            try:
                await trio.to_thread.run_sync(_put, fd, data, offset, request.append, limiter=self._threads)
            finally:
                os.close(fd)
            return self._appended(lock, request, offset, len(data)) if request.append else offset
        except OSError as exc:
            raise storage_error(exc, slab.directory, self._slabs.counters) from None
        finally:
            lock.busy_count -= 1
            if lock.idle is not None and not lock.busy_count:
                lock.idle.set()
                lock.idle = None
            self._slabs.unpin(slab)

    def _appended(self, lock: Lock, request: Write, start: int, length: int) -> int:
        """What was appended lies between `start` and the end: account for all of that. Where it is,
        unless others have appended since."""
        slab = lock.slab
        end = os.fstat(self._growth.fd(slab)).st_size
        if end > start + length:
            self._touch(slab, start, end - start)
            self._growth.grow_now(slab, start, end)
        offset = max(start, end - length)
        lock.append = (request.number, offset)
        return offset

    @staticmethod
    def _touch(slab: Slab, offset: int, length: int) -> None:
        touched = pages_of(offset, length)
        slab.dirty_pages |= span(touched.start, len(touched))

    def truncate(self, peer: Peer, request: Truncate) -> Nothing | Awaitable[Nothing]:
        """Growing makes a hole and needs no room beyond the page in which it begins."""
        slab = self.leases.writer(peer, request.lock_id).slab
        if request.size > MAX_SLAB_BYTES:
            raise FsError(errno.EFBIG)
        if slab.sends or not self._growth.may_grow_to(slab, request.size):
            return self._truncate_slowly(peer, request)
        return self._truncate_now(slab, request.size)

    async def _truncate_slowly(self, peer: Peer, request: Truncate) -> Nothing:
        slab = self.leases.writer(peer, request.lock_id).slab
        self._slabs.pin(slab)
        try:
            await sent(slab)
            deadline = trio.current_time() + growth.PATIENCE_S
            while slab.state == WRITING and not self._growth.may_grow_to(slab, request.size):
                await self._room.make(slab.directory, PAGE_BYTES, deadline - trio.current_time())
            return self._truncate_now(self.leases.writer(peer, request.lock_id).slab, request.size)
        finally:
            self._slabs.unpin(slab)

    def _truncate_now(self, slab: Slab, size: int) -> Nothing:
        fd = self._growth.fd(slab)
        try:
            before = os.fstat(fd).st_size
            os.ftruncate(fd, size)
        except OSError as exc:
            raise storage_error(exc, slab.directory, self._slabs.counters) from None
        slab.dirty_pages |= -1 << min(before, size) // PAGE_BYTES
        return NOTHING

    # --- SyncContainer ----------------------------------------------------------------------------

    async def sync(self, peer: Peer, request: SyncContainer) -> bool:
        """The slab's data, then the index that says whose it is."""
        slab = self._slabs.lock_of(request.lock_id).slab
        if not slab.directory.is_durable:
            return False
        fd = -1
        try:
            fd = os.dup(self._slabs.fds.for_reading(slab))
            await self._sealer.sync(slab, fd)
        except OSError as exc:
            raise storage_error(exc, slab.directory, self._slabs.counters) from None
        finally:
            if fd >= 0:
                os.close(fd)
        slab.is_kept = True
        return True

    # --- ForgetMtime ------------------------------------------------------------------------------

    def forget_mtime(self, peer: Peer, request: ForgetMtime) -> int:
        slab = self._slabs.get(request.container)
        if slab is None:
            raise StaleError(f"container {request.container:x} is not here")
        try:
            if slab.state != WRITING:  # Sealed, which the master hears soon: as it is, it stays.
                return os.stat(self._slabs.path(slab)).st_mtime_ns
            if slab.sealed_mtime_ns is not None:
                return slab.sealed_mtime_ns
            fd = self._growth.fd(slab)
            mtime_ns = os.fstat(fd).st_mtime_ns
            os.utime(fd, NOT_WRITTEN)
            slab.is_touched = slab.is_touched or mtime_ns != NOT_WRITTEN[1]
        except OSError as exc:
            raise storage_error(exc, slab.directory, self._slabs.counters) from None
        return mtime_ns


def _put(fd: int, data: Buffer, offset: int, is_append: bool) -> None:
    if is_append:
        checksums.append_all(fd, data)
    else:
        checksums.pwrite_all(fd, data, offset)
