"""Read-through: ranges of under storages into slabs, once per page however many ask for it.

A `Job` is one range of pages of one slab that a thread fetches (or, for pages found on disk after a
restart, verifies). Jobs that somebody waits for go before those that only read ahead. Bytes go from
the connector's buffer by pwrite to the slab, checksums are computed in the same thread; only then
the pages become present (`Slabs.add_pages`).
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable

import trio

from alluxiofuse.errors import (
    AlluxioFuseError,
    ChecksumError,
    NoSpaceError,
    StaleError,
    StateError,
    UfsChangedError,
    UfsUnavailableError,
    UnavailableError,
)
from alluxiofuse.ids import PAGE_BYTES
from alluxiofuse.ufs.base import UnderStorage
from alluxiofuse.wire.types import UfsSource
from alluxiofuse.worker import checksums
from alluxiofuse.worker.checksums import bits, mask_runs
from alluxiofuse.worker.mounts import Mounts
from alluxiofuse.worker.readahead import ReadAhead
from alluxiofuse.worker.room import Room, storage_error
from alluxiofuse.worker.slab import WRITING, Slab, span
from alluxiofuse.worker.slabs import Slabs

log = logging.getLogger(__name__)

ATTEMPTS = 4
BACKOFF_S = 0.1
"""Before the second attempt; four times as long before each further one."""
RETRY_WITHIN_S = 10.0
"""What took longer to fail is not tried again here: the connector has been patient already."""
PATIENCE_S = 60.0
"""A reader whose pages do not come gives up after this long, unless the store has answered others
meanwhile: then it only waits its turn."""
SILENT_S = 5.0
"""For how long reads fail at once after one that found the store silent: a program's read(2) is
often several requests of the kernel's, each of which would wait as long again."""
INLINE_VERIFY_BYTES = 256 << 10
_VERIFY_PAGES = 64
"""Most pages verified by one job."""


class Job:
    """Pages [first, first + count) of a slab. Pins the slab until it is done."""

    __slots__ = ("count", "done", "error", "first", "is_demand", "is_started", "reserved", "slab", "source")

    def __init__(self, slab: Slab, first: int, count: int, source: UfsSource | None, reserved: int) -> None:
        self.slab = slab
        self.first = first
        self.count = count
        self.source = source
        """None: verify what is in the slab."""
        self.reserved = reserved
        self.done = trio.Event()
        self.error: AlluxioFuseError | None = None
        self.is_demand = True
        self.is_started = False

    @property
    def pages(self) -> int:
        return span(self.first, self.count)


def read_exactly(storage: UnderStorage, source: UfsSource, offset: int, length: int) -> memoryview:
    """Blocking. UfsUnavailableError when fewer bytes came than the source must have there."""
    data = memoryview(storage.read(source.path, offset, length, source.fingerprint)).cast("B")
    if len(data) != length:
        raise UfsUnavailableError(f"{len(data)} bytes came instead of {length}")
    return data


def _silent() -> UfsUnavailableError:
    return UfsUnavailableError(f"the under storage did not answer within {PATIENCE_S:g} s")


class _Range:
    """Fetches one range into a slab, in a thread; the checksums of its pages. It owns `fd`, so that a
    thread that is left alone (a stop while the store hangs) writes to nothing else."""

    def __init__(self, storage: UnderStorage, source: UfsSource, fd: int, first: int, length: int) -> None:
        self._storage, self._source, self._fd = storage, source, fd
        self._first, self._length = first, length
        self._is_begun = False
        self._is_given_up = False

    def run(self) -> list[int]:
        """Blocking."""
        self._is_begun = True
        try:
            data = read_exactly(self._storage, self._source, self._first * PAGE_BYTES, self._length)
            if self._is_given_up:
                raise UnavailableError("the worker is stopping")
            return checksums.store_pages(self._fd, self._first, data)
        finally:
            os.close(self._fd)

    def give_up(self) -> None:
        """Nobody waits for it any more (or it has ended)."""
        self._is_given_up = True
        if not self._is_begun:
            os.close(self._fd)


class Fetcher:
    """Owned by the worker; `fetch` and `read_around` may be called by any of its tasks."""

    def __init__(
        self, slabs: Slabs, room: Room, mounts: Mounts, *, parallel: int, read_ahead_bytes: int
    ) -> None:
        self._slabs = slabs
        self._room = room
        self._mounts = mounts
        self._ahead_pages = read_ahead_bytes // PAGE_BYTES
        self._parallel = parallel
        self._threads: dict[int, trio.CapacityLimiter] = {}
        """By mount id, so that a store that hangs holds up nobody else's reads."""
        self._direct: dict[int, trio.CapacityLimiter] = {}
        """The same, for reads that are not cached."""
        self._answered_at_s: dict[int, float] = {}
        """By mount id: when a range last came."""
        self._silent_until_s: dict[int, float] = {}
        """By mount id: until when nothing is asked."""
        self._verifiers = trio.CapacityLimiter(2)
        self._demand: deque[Job] = deque()
        self._ahead: deque[Job] = deque()
        self._running: dict[int, int] = {}
        """Running fetches by mount id."""
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Carries jobs out until cancelled; then waits for the threads that are reading and fails
        all other jobs."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await trio.sleep_forever()
        finally:
            self._nursery = None
            for job in dict.fromkeys([*self._demand, *self._ahead]):
                if not job.is_started:
                    self._finish(job, None, UnavailableError("the worker is stopping"))
            self._demand.clear()
            self._ahead.clear()

    # --- asking -----------------------------------------------------------------------------------

    async def fetch(
        self,
        slab: Slab,
        first: int,
        count: int,
        *,
        source: UfsSource | None = None,
        patience_s: float = 0.0,
        after_start: Callable[[], None] | None = None,
    ) -> None:
        """Returns when the pages are present and verified. The caller holds a lock or pin. Without
        `patience_s` it is for a reader, who leaves room for writers. `after_start` is called once the
        jobs are queued (to read ahead behind them). Errors: NoSpaceError, UfsErrors, ChecksumError (a
        page of dirty content), StaleError (no source). Cancelled: the jobs go on."""
        wanted = span(first, count) & slab.all_pages
        while slab.state != WRITING and (missing := wanted & ~slab.verified):
            if self._nursery is None:
                raise UnavailableError("the worker is stopping")
            fresh = missing & ~slab.inflight
            absent = fresh & ~slab.present
            if absent:
                where = self._source(slab, source)
                self._check_silent(where.mount_id)
                if self._mounts.known(where.mount_id) is None:
                    await self._mounts.storage(where.mount_id)
                    continue
                absent = self._widened(slab, absent, where)
                cost = slab.cost_of(absent)
                if not patience_s and slab.directory.reader_room < cost:
                    raise NoSpaceError("open files hold as much of the tier as they may")
                if slab.directory.available < cost:
                    await self._room.make(slab.directory, cost, patience_s)
                    continue
                for start, number in self._ranges(absent, where):
                    self._start(slab, start, number, where, is_demand=True)
            if fresh & slab.present:
                self._start_verifying(slab, fresh & slab.present)
            if after_start is not None:
                after_start()
                after_start = None
            await self._wait(slab, missing)

    def read_ahead(self, slab: Slab, tracker: ReadAhead, first: int, count: int, length_bytes: int) -> None:
        """Start fetching what a sequential reader will want next, as far as there is room."""
        begin, end = tracker.advance(first, first + count, length_bytes, self._ahead_pages)
        end = min(end, slab.page_count)
        if begin >= end or slab.state == WRITING:
            return
        fresh = span(begin, end - begin) & ~slab.verified & ~slab.inflight
        if fresh & slab.present:
            self._start_verifying(slab, fresh & slab.present, is_demand=False)
        where = slab.source
        if where is None or self._mounts.known(where.mount_id) is None:
            return
        for start, number in self._ranges(fresh & ~slab.present, where):
            if not self._start(slab, start, number, where, is_demand=False):
                return

    def cancel_ahead(self, slab: Slab) -> None:
        """Nobody reads it any more: drop jobs that have not started and nobody waits for."""
        for job in [job for job in self._ahead if job.slab is slab and not job.is_started]:
            if not job.is_demand:
                self._ahead.remove(job)
                self._finish(job, None, StaleError("nobody reads the container any more"))

    async def read_through(self, source: UfsSource, offset: int, length: int) -> memoryview:
        """Bytes straight from the under storage, not cached."""
        storage = await self._mounts.storage(source.mount_id)
        self._slabs.counters["uncached_reads"] += 1
        self._check_silent(source.mount_id)
        limiter = self._limiter(self._direct, source.mount_id)
        began = trio.current_time()
        with trio.move_on_after(PATIENCE_S):
            for attempt in range(ATTEMPTS):
                try:
                    return await trio.to_thread.run_sync(
                        read_exactly, storage, source, offset, length, limiter=limiter, abandon_on_cancel=True
                    )
                except UfsUnavailableError as exc:
                    if attempt == ATTEMPTS - 1 or trio.current_time() - began > RETRY_WITHIN_S:
                        raise self._given_up(exc) from None
                await trio.sleep(BACKOFF_S * 4**attempt)
        raise self._given_up(_silent())

    async def verify(self, slab: Slab) -> None:
        """Every present page that was not verified yet. ChecksumError for dirty content. The caller
        holds a lock or pin."""
        while pending := slab.present & ~slab.verified:
            if pending & ~slab.inflight:
                self._start_verifying(slab, pending & ~slab.inflight)
            await self._wait(slab, pending)

    def verify_now(self, slab: Slab) -> None:
        """The same at once, for a slab of at most `INLINE_VERIFY_BYTES`; errors show at `fetch`."""
        pending = slab.present & ~slab.verified & ~slab.inflight
        if not pending or slab.size > INLINE_VERIFY_BYTES or slab.state == WRITING:
            return
        pages = list(bits(pending))
        try:
            found = checksums.page_checksums(self._slabs.fds.for_reading(slab), pages, slab.size)
            self._slabs.settle_verification(slab, found, self._slabs.stored_checksums(slab, pages))
        except OSError as exc:
            storage_error(exc, slab.directory, self._slabs.counters)

    async def settle(self, slab: Slab) -> None:
        """Until no job of the slab is under way."""
        while slab.jobs:
            await slab.jobs[0].done.wait()

    async def _wait(self, slab: Slab, pages: int) -> None:
        """Until the jobs of these pages are done; the first error among them."""
        for job in [job for job in slab.jobs or () if job.pages & pages]:
            if not job.is_demand:
                job.is_demand = True
                self._demand.append(job)
                self._pump()
            await self._end_of(job)
            if job.error is not None:
                raise job.error

    async def _end_of(self, job: Job) -> None:
        """Until it is done; UfsUnavailableError when its store has been silent for too long."""
        since_s = trio.current_time()
        while not job.done.is_set():
            with trio.move_on_at(since_s + PATIENCE_S):
                await job.done.wait()
                return
            mount_id = 0 if job.source is None else job.source.mount_id
            answered_at_s = self._answered_at_s.get(mount_id, 0.0)
            if mount_id and answered_at_s <= since_s:
                raise self._given_up(_silent())
            since_s = max(answered_at_s, trio.current_time() - PATIENCE_S + 1.0)

    def _note_silence(self, mount_id: int, began_s: float) -> None:
        """What began then failed; nothing else was answered since."""
        now = trio.current_time()
        if now - began_s > RETRY_WITHIN_S and self._answered_at_s.get(mount_id, 0.0) <= began_s:
            self._silent_until_s[mount_id] = now + SILENT_S

    def _check_silent(self, mount_id: int) -> None:
        if trio.current_time() < self._silent_until_s.get(mount_id, 0.0):
            raise self._given_up(UfsUnavailableError("the under storage did not answer a moment ago"))

    def _given_up(self, exc: UfsUnavailableError) -> UfsUnavailableError:
        """A program is told EIO."""
        self._slabs.counters["reads_given_up"] += 1
        return exc

    def _limiter(self, limiters: dict[int, trio.CapacityLimiter], mount_id: int) -> trio.CapacityLimiter:
        if mount_id not in limiters:
            limiters[mount_id] = trio.CapacityLimiter(self._parallel)
        return limiters[mount_id]

    @staticmethod
    def _source(slab: Slab, source: UfsSource | None) -> UfsSource:
        found = source or slab.source
        if found is None:
            raise StaleError(f"container {slab.container:x} is not complete here and has no source")
        return found

    def _widened(self, slab: Slab, pages: int, source: UfsSource) -> int:
        """All pages, where the store's checksum is of the whole file and there is room."""
        storage = self._mounts.known(source.mount_id)
        whole_bytes = storage.capabilities.whole_read_bytes if storage else 0
        if slab.size > whole_bytes or slab.present or slab.inflight:
            return pages
        has_room = slab.cost_of(slab.all_pages) <= slab.directory.reader_room
        return slab.all_pages if has_room else pages

    def _ranges(self, pages: int, source: UfsSource) -> list[tuple[int, int]]:
        """Runs of pages, cut at the connector's preferred size."""
        storage = self._mounts.known(source.mount_id)
        preferred = storage.capabilities.preferred_read_bytes if storage else 8 << 20
        step = max(1, preferred // PAGE_BYTES)
        return [
            (first + at, min(step, count - at))
            for first, count in mask_runs(pages)
            for at in range(0, count, step)
        ]

    # --- jobs -------------------------------------------------------------------------------------

    def _enter(self, job: Job) -> None:
        slab = job.slab
        self._slabs.pin(slab)
        slab.inflight |= job.pages
        if slab.jobs is None:
            slab.jobs = []
        slab.jobs.append(job)

    def _start(self, slab: Slab, first: int, count: int, source: UfsSource, *, is_demand: bool) -> bool:
        """False: no room."""
        cost = slab.cost_of(span(first, count))
        if not is_demand and slab.directory.reader_room < cost:
            return False
        if self._nursery is None or not self._slabs.reserve(slab, cost):
            return False
        job = Job(slab, first, count, source, cost)
        job.is_demand = is_demand
        self._enter(job)
        (self._demand if is_demand else self._ahead).append(job)
        self._pump()
        return True

    def _start_verifying(self, slab: Slab, pages: int, *, is_demand: bool = True) -> None:
        if self._nursery is None:
            raise UnavailableError("the worker is stopping")
        for first, count in mask_runs(pages):
            for at in range(0, count, _VERIFY_PAGES):
                job = Job(slab, first + at, min(_VERIFY_PAGES, count - at), None, 0)
                job.is_demand, job.is_started = is_demand, True
                self._enter(job)
                self._nursery.start_soon(self._verify, job)

    def _pump(self) -> None:
        """Start what may run now."""
        while self._nursery is not None:
            job = self._next(self._demand) or self._next(self._ahead)
            if job is None or job.source is None:
                return
            job.is_started = True
            mount_id = job.source.mount_id
            self._running[mount_id] = self._running.get(mount_id, 0) + 1
            self._nursery.start_soon(self._run, job, job.source)

    def _next(self, queue: deque[Job]) -> Job | None:
        """The first job that waits, whose mount has a thread free and whose connector takes one more
        range of the file."""
        for job in list(queue):
            if job.is_started:
                queue.remove(job)
                continue
            assert job.source is not None
            if self._running.get(job.source.mount_id, 0) >= self._parallel:
                continue
            storage = self._mounts.known(job.source.mount_id)
            if storage is None or self._reading(job.slab) < max(1, storage.capabilities.max_parallel_reads):
                queue.remove(job)
                return job
        return None

    @staticmethod
    def _reading(slab: Slab) -> int:
        return sum(job.is_started and job.source is not None for job in slab.jobs or ())

    async def _run(self, job: Job, source: UfsSource) -> None:
        sums: list[int] | None = None
        error: AlluxioFuseError = UnavailableError("the worker is stopping")
        try:
            sums = await self._attempt(job, source)
        except AlluxioFuseError as exc:
            error = exc
        except OSError as exc:
            error = storage_error(exc, job.slab.directory, self._slabs.counters)
            self._discard(job)
        except Exception:
            log.exception("a fetch failed: a bug in a connector")
            error = AlluxioFuseError("a fetch failed inside the worker: see its log")
        finally:
            self._running[source.mount_id] -= 1
            self._finish(job, sums, None if sums is not None else error)
            self._pump()

    async def _attempt(self, job: Job, source: UfsSource) -> list[int]:
        storage = await self._mounts.storage(source.mount_id)
        end = min((job.first + job.count) * PAGE_BYTES, job.slab.size)
        length = end - job.first * PAGE_BYTES
        limiter = self._limiter(self._threads, source.mount_id)
        began = trio.current_time()
        for attempt in range(ATTEMPTS):
            fd = os.dup(self._slabs.fds.for_writing(job.slab))
            work = _Range(storage, source, fd, job.first, length)
            try:
                sums = await trio.to_thread.run_sync(work.run, limiter=limiter, abandon_on_cancel=True)
                self._answered_at_s[source.mount_id] = trio.current_time()
                self._slabs.counters["ufs_read_bytes"] += length
                return sums
            except UfsUnavailableError as exc:
                self._slabs.counters["fetch_retries"] += 1
                if attempt == ATTEMPTS - 1 or trio.current_time() - began > RETRY_WITHIN_S:
                    self._note_silence(source.mount_id, began)
                    raise self._given_up(exc) from None
            finally:
                work.give_up()
            await trio.sleep(BACKOFF_S * 4**attempt)
        raise UfsChangedError("unreachable")

    def _discard(self, job: Job) -> None:
        """Give back what a failed job may have written: its pages are not present."""
        try:
            fd = self._slabs.fds.for_writing(job.slab)
            checksums.punch_hole(fd, job.first * PAGE_BYTES, job.count * PAGE_BYTES)
        except OSError as exc:
            log.warning("a half fetched page stays allocated: %s", exc.strerror)

    async def _verify(self, job: Job) -> None:
        slab = job.slab
        error: AlluxioFuseError | None = UnavailableError("the worker is stopping")
        pages = range(job.first, job.first + job.count)
        try:
            stored = self._slabs.stored_checksums(slab, pages)
            fd = os.dup(self._slabs.fds.for_reading(slab))
            try:
                found = await trio.to_thread.run_sync(
                    checksums.page_checksums, fd, pages, slab.size, limiter=self._verifiers
                )
            finally:
                os.close(fd)
            known = slab.damaged
            bad = self._slabs.settle_verification(slab, found, stored)
            error = None
            if bad:
                error = ChecksumError(f"{len(bad)} pages of container {slab.container:x} are damaged")
            if slab.damaged != known:
                log.error("dirty container %x: pages damaged: %s", slab.container, bad[:10])
        except OSError as exc:
            error = storage_error(exc, slab.directory, self._slabs.counters)
        finally:
            self._finish(job, None, error)

    def _finish(self, job: Job, sums: list[int] | None, error: AlluxioFuseError | None) -> None:
        slab = job.slab
        job.error = error
        slab.inflight &= ~job.pages
        if slab.jobs is not None:
            slab.jobs.remove(job)
            if not slab.jobs:
                slab.jobs = None
        if sums is not None:
            try:
                self._slabs.add_pages(slab, job.first, sums, job.reserved)
            except StateError as exc:
                # As without room: it is read through.
                job.error = NoSpaceError(f"nothing can be cached: {exc.message}")
                self._discard(job)
        if job.error is not None and job.reserved:
            self._slabs.unreserve(slab, job.reserved)
        job.done.set()
        self._slabs.unpin(slab)
