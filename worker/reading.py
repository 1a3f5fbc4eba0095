"""Handlers of readers: Attach, Detach, Fetch, Read, StatContainer."""

from __future__ import annotations

import errno
import logging
import os
from collections import OrderedDict
from collections.abc import Awaitable
from functools import partial

import trio

from alluxiofuse.errors import ChecksumError, NoSpaceError, StaleError
from alluxiofuse.ids import pages_of
from alluxiofuse.rpc.base import Answer, FileRange, Peer
from alluxiofuse.wire.messages import NOTHING, Nothing
from alluxiofuse.wire.types import UfsSource
from alluxiofuse.wire.worker_ops import (
    Attach,
    Attached,
    ContainerStat,
    Detach,
    Fetch,
    Presence,
    Read,
    ReadResult,
    StatContainer,
)
from alluxiofuse.worker.checksums import wire_checksum
from alluxiofuse.worker.fetcher import Fetcher
from alluxiofuse.worker.leases import Leases
from alluxiofuse.worker.readahead import ReadAhead
from alluxiofuse.worker.room import storage_error
from alluxiofuse.worker.slab import CLEAN, MAX_LISTED_PAGES, MAX_SLAB_BYTES, WRITING, Lock, Slab, span
from alluxiofuse.worker.slabs import Slabs

log = logging.getLogger(__name__)

_NOTHING_ATTACHED = Attached(0, Presence(False, b""), False, False)
_MAX_TRACKERS = 4096
_INLINE_READ_BYTES = 1 << 20
ATTACH_VERIFY_BYTES = 8 << 20
"""Slabs up to this size are verified as a whole when they are attached after a restart; of larger
ones Fetch verifies what is asked for."""


class Reading:
    """Owned by the worker."""

    def __init__(self, slabs: Slabs, fetcher: Fetcher, leases: Leases) -> None:
        self._slabs = slabs
        self._fetcher = fetcher
        self._leases = leases
        self._trackers: OrderedDict[tuple[int, int], ReadAhead] = OrderedDict()
        """(session, container) -> accesses by Read, least recent first."""
        self._threads = trio.CapacityLimiter(4)

    # --- Attach, Detach ---------------------------------------------------------------------------

    def attach(self, peer: Peer, request: Attach) -> Answer[Attached] | Awaitable[Answer[Attached]]:
        slab = self._find(request.container, request.size, request.source)
        if slab is None:
            return Answer(_NOTHING_ATTACHED)
        # A lock of its own: what the session has given up writing would never be sealed if it were taken up.
        lock = self._slabs.lock(slab, request.session_id)
        self._leases.bind(peer, lock)
        self._slabs.touch_all(slab)
        self._fetcher.verify_now(slab)
        is_checked = slab.state == WRITING or not slab.present & ~slab.verified
        if is_checked or slab.size > ATTACH_VERIFY_BYTES:
            return self._attached(peer, request, lock)
        return self._attach_verified(peer, request, lock)

    async def _attach_verified(self, peer: Peer, request: Attach, lock: Lock) -> Answer[Attached]:
        try:
            await self._fetcher.verify(lock.slab)
        except ChecksumError:
            pass  # its page is missing from the presence; Fetch says why
        except BaseException:
            self._leases.release(lock)
            raise
        self._slabs.lock_of(lock.id)
        return self._attached(peer, request, lock)

    def _attached(self, peer: Peer, request: Attach, lock: Lock) -> Answer[Attached]:
        slab = lock.slab
        fds: list[int] = []
        if request.want_fd and peer.can_pass_fds:
            try:
                pool = self._slabs.fds
                fds.append(pool.for_writing(slab) if lock.is_writer else pool.for_reading(slab))
            except OSError as exc:
                raise storage_error(exc, slab.directory, self._slabs.counters) from None
        where = slab.directory
        attached = Attached(
            lock.id, slab.presence(), bool(fds), where.is_durable, passes=where.takes_passthrough
        )
        return Answer(attached, fds=fds)

    def detach(self, peer: Peer, request: Detach) -> Nothing:
        """Locks that have ended already are passed over. A writer that detaches without EndWrite is
        treated like one whose connection ended."""
        for lock_id in request.lock_ids:
            lock = self._slabs.locks.get(lock_id)
            if lock is None or not self._leases.is_bound(peer, lock):
                continue
            slab = lock.slab
            if lock.is_writer:
                self._leases.abandon(lock)
                continue
            self._leases.release(lock, is_uncommitted=request.is_uncommitted)
            if not slab.locks and slab.jobs:
                self._fetcher.cancel_ahead(slab)
        return NOTHING

    def _find(self, container: int, size: int, source: UfsSource | None) -> Slab | None:
        """The slab, made when there is none; None when it can't be cached. StaleError when the
        container is not here and has no source, or is of another size here."""
        slab = self._slabs.get(container)
        if slab is not None:
            if slab.state != WRITING and slab.size != size:
                raise StaleError(f"container {container:x} has another size here: look it up again")
            if source is not None and slab.state == CLEAN:
                slab.source = source
            return slab
        if source is None or container == 0:
            raise StaleError(f"container {container:x} is not at this worker")
        directory = self._slabs.tiers.for_reading(size)
        if directory is None or size > min(MAX_SLAB_BYTES, MAX_LISTED_PAGES << 20):
            return None
        try:
            slab = self._slabs.create(container, size, directory)
        except OSError as exc:
            storage_error(exc, directory, self._slabs.counters)
            return None
        slab.source = source
        return slab

    # --- Fetch ------------------------------------------------------------------------------------

    def fetch(self, peer: Peer, request: Fetch) -> Presence | Awaitable[Presence]:
        lock = self._slabs.lock_of(request.lock_id)
        slab = lock.slab
        pages = pages_of(request.offset, min(request.length, max(0, slab.size - request.offset)))
        if slab.state == WRITING or not pages:
            return slab.presence()
        self._slabs.touch(slab, pages)
        ahead = partial(self._fetcher.read_ahead, slab, lock.ahead, pages.start, len(pages), request.length)
        if not span(pages.start, len(pages)) & ~slab.verified:
            ahead()
            return slab.presence()
        return self._fetch(slab, pages, ahead)

    async def _fetch(self, slab: Slab, pages: range, ahead: partial[None]) -> Presence:
        self._slabs.pin(slab)
        try:
            await self._fetcher.fetch(slab, pages.start, len(pages), after_start=ahead)
            self._slabs.counters["fetches"] += 1
            return slab.presence()
        finally:
            self._slabs.unpin(slab)

    # --- Read -------------------------------------------------------------------------------------

    def read(self, peer: Peer, request: Read) -> Answer[ReadResult] | Awaitable[Answer[ReadResult]]:
        slab = self._slabs.get(request.container)
        is_open = slab is not None and slab.state == WRITING
        if not is_open and (not request.length or request.offset >= request.size):
            return _in_memory(b"")
        slab = self._find(request.container, request.size, request.source)
        if slab is None:
            return self._read_through(request)
        if slab.state == WRITING:
            return self._read_open(slab, request)
        pages = self._pages(slab, request)
        self._slabs.touch(slab, pages)
        self._fetcher.verify_now(slab)
        if span(pages.start, len(pages)) & ~slab.verified:
            return self._read_fetched(slab, request, pages)
        if slab.present != slab.all_pages:
            self._ahead(slab, request, pages)
        return self._send(slab, request)

    @staticmethod
    def _pages(slab: Slab, request: Read) -> range:
        return pages_of(request.offset, min(request.length, slab.size - request.offset))

    def _ahead(self, slab: Slab, request: Read, pages: range) -> None:
        key = (request.session_id, request.container)
        tracker = self._trackers.setdefault(key, ReadAhead())
        self._trackers.move_to_end(key)
        if len(self._trackers) > _MAX_TRACKERS:
            self._trackers.popitem(last=False)
        self._fetcher.read_ahead(slab, tracker, pages.start, len(pages), request.length)

    async def _read_fetched(self, slab: Slab, request: Read, pages: range) -> Answer[ReadResult]:
        self._slabs.pin(slab)
        try:
            ahead = partial(self._ahead, slab, request, pages)
            await self._fetcher.fetch(slab, pages.start, len(pages), source=request.source, after_start=ahead)
            if slab.state == WRITING:
                return await self._read_open(slab, request)
            return self._send(slab, request)
        except NoSpaceError:
            return await self._read_through(request)
        finally:
            self._slabs.unpin(slab)

    def _send(self, slab: Slab, request: Read) -> Answer[ReadResult]:
        """By sendfile; the slab stays pinned until it is sent, and no writer makes it shorter."""
        length = min(request.length, slab.size - request.offset)
        fd = -1
        try:
            fd = os.dup(self._slabs.fds.for_reading(slab))
            if os.fstat(fd).st_size < request.offset + length:
                raise OSError(errno.EIO, "a slab's file is shorter than it should be")
        except OSError as exc:
            if fd >= 0:
                os.close(fd)
            raise storage_error(exc, slab.directory, self._slabs.counters) from None
        self._slabs.pin(slab)
        slab.sends += 1

        def on_sent() -> None:
            os.close(fd)
            slab.sends -= 1
            if not slab.sends and slab.sent is not None:
                slab.sent.set()
                slab.sent = None
            self._slabs.unpin(slab)

        self._slabs.counters["sent_bytes"] += length
        return Answer(ReadResult(0), FileRange(fd, request.offset, length, on_sent))

    async def _read_open(self, slab: Slab, request: Read) -> Answer[ReadResult]:
        """What has been written so far; the file may shrink at any time, so through memory."""
        try:
            fd = os.dup(self._slabs.fds.for_reading(slab))
            try:
                if request.length <= _INLINE_READ_BYTES:
                    return _in_memory(os.pread(fd, request.length, request.offset))
                return _in_memory(
                    await trio.to_thread.run_sync(
                        os.pread, fd, request.length, request.offset, limiter=self._threads
                    )
                )
            finally:
                os.close(fd)
        except OSError as exc:
            raise storage_error(exc, slab.directory, self._slabs.counters) from None

    async def _read_through(self, request: Read) -> Answer[ReadResult]:
        if request.source is None:
            raise StaleError(f"container {request.container:x} is not at this worker")
        length = min(request.length, request.size - request.offset)
        return _in_memory(await self._fetcher.read_through(request.source, request.offset, length))

    # --- StatContainer ----------------------------------------------------------------------------

    def stat(self, peer: Peer, request: StatContainer) -> ContainerStat:
        """Of sealed containers too, as far as they are complete here."""
        slab = self._slabs.get(request.container)
        if slab is None:
            raise StaleError(f"container {request.container:x} is not at this worker")
        try:
            found = os.fstat(self._slabs.fds.for_reading(slab))
        except OSError as exc:
            raise storage_error(exc, slab.directory, self._slabs.counters) from None
        size = found.st_size if slab.state == WRITING else slab.size
        mtime_ns = found.st_mtime_ns if slab.sealed_mtime_ns is None else slab.sealed_mtime_ns
        return ContainerStat(size, mtime_ns, found.st_blocks * 512)


def _in_memory(data: bytes | memoryview) -> Answer[ReadResult]:
    return Answer(ReadResult(wire_checksum(data)), data)
