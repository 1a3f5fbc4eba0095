"""EndWrite: the last writer's seal."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable

import trio

from alluxiofuse.errors import AlluxioFuseError, StaleError, StateError, UnavailableError
from alluxiofuse.ids import page_length
from alluxiofuse.rpc.base import Peer
from alluxiofuse.wire.worker_ops import EndWrite, WriteEnd
from alluxiofuse.worker import checksums
from alluxiofuse.worker.checksums import bits
from alluxiofuse.worker.leases import Leases
from alluxiofuse.worker.room import storage_error
from alluxiofuse.worker.sealing import Sealer
from alluxiofuse.worker.slab import DIRTY, WRITING, Lock, Slab
from alluxiofuse.worker.slabs import Slabs

log = logging.getLogger(__name__)


class Ending:
    """Owned by the worker's `Writing`."""

    def __init__(self, slabs: Slabs, sealer: Sealer, leases: Leases, threads: trio.CapacityLimiter) -> None:
        self._slabs = slabs
        self._sealer = sealer
        self._leases = leases
        self._threads = threads
        self.nursery: trio.Nursery | None = None
        """For seals, which go on whether or not the client waits for them; None while the worker stops."""
        self._left: set[Slab] = set()
        """Those that `_seal_left` is at."""

    def end(self, peer: Peer, request: EndWrite) -> WriteEnd | Awaitable[WriteEnd]:
        lock = self._slabs.lock_of(request.lock_id)
        slab = lock.slab
        self._leases.require_bound(peer, lock)
        if not lock.is_writer:
            return self._ended_before(lock, request)
        self._slabs.stop_writing(lock, self._changed_pages(lock, request))
        try:
            if slab.passes and not slab.writers and self._slabs.fds.is_written_elsewhere(slab):
                return self._end_slowly(lock, request)
            fd = self._fd(slab)
            found = os.fstat(fd)
        except OSError as exc:
            self._slabs.write_again(lock, 0)
            raise storage_error(exc, slab.directory, self._slabs.counters) from None
        if slab.writers:
            return WriteEnd(found.st_size, found.st_mtime_ns, False)
        if request.may_revert and self._revert(lock):
            return self._reverted(lock)
        pages = self._slabs.pages_to_seal(slab, found)
        must_sync = slab.must_sync and not slab.is_synced_as(found)
        if pages.bit_count() > 1 or slab.pins or must_sync:
            return self._end_slowly(lock, request)
        return self._end_now(lock, request, fd, found, pages)

    @staticmethod
    def _changed_pages(lock: Lock, request: EndWrite) -> int:
        """As far as its client knows; for `Slabs.stop_writing`."""
        if lock.passes:
            return 0  # `Slabs.pages_to_seal` looks at the file.
        dirty = request.dirty_pages
        return -1 if dirty is None else int.from_bytes(dirty, "little")

    def _fd(self, slab: Slab) -> int:
        """Where others may be asked about, none by which we would be in their way ourselves. OSError."""
        fds = self._slabs.fds
        return fds.for_reading(slab) if slab.passes else fds.for_writing(slab)

    def _end_now(
        self, lock: Lock, request: EndWrite, fd: int, found: os.stat_result, pages: int
    ) -> WriteEnd | Awaitable[WriteEnd]:
        slab = lock.slab
        try:
            sums = checksums.page_checksums(fd, bits(pages), found.st_size)
        except OSError as exc:
            self._slabs.write_again(lock, pages)
            raise storage_error(exc, slab.directory, self._slabs.counters) from None
        if any(checksums.is_zero(v, page_length(page, found.st_size)) for page, v in sums.items()):
            return self._end_slowly(lock, request)
        try:
            self._slabs.seal(slab, found.st_size, sums)
        except StateError:
            self._slabs.write_again(lock, pages)
            raise
        lock.has_sealed = True
        return WriteEnd(found.st_size, found.st_mtime_ns, True)

    def _ended_before(self, lock: Lock, request: EndWrite) -> WriteEnd | Awaitable[WriteEnd]:
        """The answer to a repeated EndWrite, whose first answer was not heard."""
        slab = lock.slab
        if not lock.ended:
            raise StaleError(f"lock {lock.id} is not writing")
        if slab.state == WRITING and slab.container == lock.ended and not slab.writers:
            return self._end_slowly(lock, request)
        return self._reverted(lock) if lock.has_reverted else self._ended(lock)

    def _reverted(self, lock: Lock) -> WriteEnd | Awaitable[WriteEnd]:
        """The answer. Bytes that were durable once, and are nowhere else, are those of the old container
        after a power failure too: the master, told of this, forgets the new one."""
        slab = lock.slab
        is_promised = slab.state == DIRTY and slab.is_kept and slab.directory.is_durable
        return self._synced(lock) if is_promised else self._ended(lock)

    async def _synced(self, lock: Lock) -> WriteEnd:
        await trio.to_thread.run_sync(self._slabs.index.sync, limiter=self._threads)
        return self._ended(lock)

    def _ended(self, lock: Lock) -> WriteEnd:
        """What became of it, as things are."""
        slab = lock.slab
        try:
            found = os.fstat(self._slabs.fds.for_reading(slab))
        except OSError as exc:
            raise storage_error(exc, slab.directory, self._slabs.counters) from None
        is_open = slab.state == WRITING and slab.container == lock.ended
        is_sealed = lock.has_sealed and slab.container == lock.ended and not is_open
        return WriteEnd(found.st_size, found.st_mtime_ns, is_sealed, lock.has_reverted)

    def _revert(self, lock: Lock) -> bool:
        """Nobody has it open for writing. StateError: it is as it was."""
        slab = lock.slab
        try:
            if not self._slabs.may_revert(slab, os.fstat(self._fd(slab))):
                return False
            self._slabs.revert(slab)
        except StateError:
            self._slabs.write_again(lock, 0)
            raise
        except OSError as exc:
            log.warning("container %x is sealed, though unchanged: %s", slab.container, exc.strerror)
            return False
        self._slabs.counters["reverted"] += 1
        lock.has_reverted = True
        return True

    async def _end_slowly(self, lock: Lock, request: EndWrite) -> WriteEnd:
        """The seal goes on when the caller is cancelled. When it fails, the lock is a writer's again:
        the client may try again, or leave it to `_seal_left`."""
        if self.nursery is None:
            raise UnavailableError("the worker is stopping")
        outcome: list[WriteEnd | AlluxioFuseError] = []
        done = trio.Event()

        async def seal() -> None:
            try:
                outcome.append(await self._seal(lock, request))
            except AlluxioFuseError as exc:
                outcome.append(exc)
                self._slabs.write_again(lock, 0)
                if lock.id not in self._slabs.locks:
                    self._leave(lock.slab)
            finally:
                done.set()

        self.nursery.start_soon(seal)
        await done.wait()
        if not outcome:
            raise UnavailableError("the worker is stopping")
        if isinstance(outcome[0], AlluxioFuseError):
            raise outcome[0]
        return outcome[0]

    async def _seal(self, lock: Lock, request: EndWrite) -> WriteEnd:
        slab = lock.slab
        self._slabs.pin(slab)
        try:
            is_free = not slab.passes or await self._sealer.is_let_go(slab)
            if is_free and request.may_revert and slab.container == lock.ended and self._revert(lock):
                end = self._reverted(lock)
                return end if isinstance(end, WriteEnd) else await end
            end = await self._sealer.seal(slab)
        finally:
            self._slabs.unpin(slab)
        # Another seal, of what was left by those who wrote before us, may have come first: told twice.
        is_over = slab.container == lock.ended and slab.state != WRITING and not slab.is_gone
        lock.has_sealed = lock.has_sealed or end.is_sealed or is_over
        if end.is_sealed and lock.id not in self._slabs.locks:
            self._slabs.report_orphan(slab)  # Its client went meanwhile and heard nothing of it.
        if not end.is_sealed and slab.container == lock.ended:
            self._leave(slab)
        return WriteEnd(end.size, end.mtime_ns, lock.has_sealed, lock.has_reverted)

    def _leave(self, slab: Slab) -> None:
        """It is sealed as soon as that is possible, and the master is told."""
        is_due = slab.state == WRITING and not slab.writers and slab not in self._left
        if is_due and self.nursery is not None:
            self._left.add(slab)
            self.nursery.start_soon(self._seal_left, slab, self._slabs.lock(slab, 0))

    async def _seal_left(self, slab: Slab, lock: Lock) -> None:
        try:
            await self._sealer.seal_orphan(slab)
        finally:
            self._left.discard(slab)
            self._slabs.unlock(lock)
