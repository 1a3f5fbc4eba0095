"""Handlers of writers: BeginWrite, Reserve, Write, Truncate, EndWrite, SyncContainer.

Small work is done at once in a plain function; a coroutine is returned only when something must be
waited for. Between BeginWrite and the seal the slab's file is the truth.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

import trio

from alluxiofuse.errors import (
    AlluxioFuseError,
    BadRequestError,
    FsError,
    NoSpaceError,
    StaleError,
    StateError,
    UnavailableError,
)
from alluxiofuse.ids import PAGE_BYTES, page_length, pages_of
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
from alluxiofuse.worker import checksums
from alluxiofuse.worker.accounts import joined, writing_charge
from alluxiofuse.worker.checksums import bits
from alluxiofuse.worker.fetcher import Fetcher
from alluxiofuse.worker.leases import Leases
from alluxiofuse.worker.room import Room, storage_error, trouble_of
from alluxiofuse.worker.sealing import Sealer
from alluxiofuse.worker.slab import DIRTY, MAX_SLAB_BYTES, WRITING, Lock, Slab, round_up, span
from alluxiofuse.worker.slabs import NOT_WRITTEN, Slabs

log = logging.getLogger(__name__)

MIN_GRANT_BYTES = 1 << 20
MAX_GRANT_BYTES = 64 << 20
MAX_GAP_BYTES = 1 << 20
"""A write further behind what is granted leaves a hole that costs nothing."""
PATIENCE_S = 60.0
"""How long writers wait for room that uploads will make."""
SEND_PATIENCE_S = 5.0
"""How long who makes a file shorter waits for what readers are being sent of it."""
_INLINE_BYTES = 1 << 20


def page_end(offset: int) -> int:
    """End of the page that `offset` - 1 is in."""
    return -(-offset // PAGE_BYTES) * PAGE_BYTES


class Writing:
    """Owned by the worker."""

    def __init__(self, slabs: Slabs, room: Room, fetcher: Fetcher, *, grace_s: float) -> None:
        self._slabs = slabs
        self._room = room
        self._fetcher = fetcher
        self._threads = trio.CapacityLimiter(4)
        self._sealer = Sealer(slabs, self._threads)
        self.leases = Leases(slabs, grace_s=grace_s, seal_orphan=self._sealer.seal_orphan)
        self._gates: dict[int, trio.Lock] = {}
        """Container -> BeginWrites that take time."""
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Carries seals to their end, whether or not the client waits for them."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self.leases.run)
                await trio.sleep_forever()
        finally:
            self._nursery = None

    # --- BeginWrite -------------------------------------------------------------------------------

    def begin(self, peer: Peer, request: BeginWrite) -> Answer[WriteGrant] | Awaitable[Answer[WriteGrant]]:
        if request.container == 0 or request.container == request.old_container:
            raise BadRequestError("BeginWrite needs a new container id")
        slab = self._slabs.get(request.container)
        is_ready = slab is not None and request.container not in self._gates
        if slab is not None and self._busy(slab, request.session_id) is not None:
            is_ready = False
        if (
            slab is not None
            and is_ready
            and not self._sealer.is_punching(slab)
            and self._may_join(slab, request)
        ):
            return self._grant(peer, request, slab)
        if slab is None and request.old_container == 0 and request.container not in self._gates:
            slab = self._create_now(request.container, request.reserve_bytes)
            if slab is not None:
                return self._grant(peer, request, slab)
        return self._begin_slowly(peer, request)

    def _busy(self, slab: Slab, session_id: int) -> Lock | None:
        """The session's lock, when writes that came by an earlier connection are still under way: they
        must not end after those that will come by this one."""
        if slab.writers:
            for lock in self._slabs.locks.values():
                if lock.slab is slab and lock.session_id == session_id and lock.busy_count:
                    return lock
        return None

    def _may_join(self, slab: Slab, request: BeginWrite) -> bool:
        if slab.state != WRITING:
            raise StaleError(f"container {slab.container:x} is sealed: begin a new one at the master")
        return self._grow_now(slab, 0, self._wanted_end(slab, request))

    def _wanted_end(self, slab: Slab, request: BeginWrite) -> int:
        size = os.fstat(self._fd(slab)).st_size
        if not request.reserve_bytes or size > slab.granted_end:
            return slab.granted_end  # Of a sparse file each write reserves what it needs.
        return size + request.reserve_bytes

    def _create_now(self, container: int, reserve_bytes: int) -> Slab | None:
        """A new empty slab in the best directory that has room now."""
        needed = max(4096, round_up(reserve_bytes))
        failure: AlluxioFuseError | None = None
        for directory in self._slabs.tiers.for_writing(needed):
            if directory.trouble:
                failure = trouble_of(directory)
            elif self._room.make_now(directory, needed):
                room = directory.available & ~4095
                try:
                    charge = min(room, max(needed, MIN_GRANT_BYTES))
                    return self._slabs.create_writing(container, directory, charge)
                except OSError as exc:
                    error = storage_error(exc, directory, self._slabs.counters)
                    if not isinstance(error, NoSpaceError):
                        failure = error
        if failure is not None:
            raise failure
        return None

    @asynccontextmanager
    async def _gate(self, container: int) -> AsyncIterator[None]:
        lock = self._gates.setdefault(container, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._gates.pop(container, None)

    async def _begin_slowly(self, peer: Peer, request: BeginWrite) -> Answer[WriteGrant]:
        async with self._gate(request.container):
            slab = self._slabs.get(request.container)
            if slab is not None:
                while (busy := self._busy(slab, request.session_id)) is not None:
                    busy.idle = busy.idle or trio.Event()
                    await busy.idle.wait()
                await self._sealer.punched(slab)
            if slab is None and request.old_container and request.old_size:
                slab = await self._convert(request)
            elif slab is None:
                slab = await self._create_patiently(request)
            elif not self._may_join(slab, request):
                await self._grow(slab, 0, self._wanted_end(slab, request))
            if slab.state != WRITING:
                raise StaleError(f"container {slab.container:x} is sealed: begin a new one at the master")
            return self._grant(peer, request, slab)

    async def _create_patiently(self, request: BeginWrite) -> Slab:
        needed = max(4096, round_up(request.reserve_bytes))
        deadline = trio.current_time() + PATIENCE_S
        directories = self._slabs.tiers.for_writing(needed)
        for patient in (False, True):
            for directory in directories:
                try:
                    left = deadline - trio.current_time() if patient else 0.0
                    await self._room.make(directory, needed, left)
                except NoSpaceError:
                    continue
                slab = self._create_now(request.container, request.reserve_bytes)
                if slab is not None:
                    return slab
        raise NoSpaceError("no tier has room for a new file")

    async def _convert(self, request: BeginWrite) -> Slab:
        """The slab of the old container, complete, becomes that of the new one."""
        old = self._slabs.get(request.old_container) or self._create_copy(request)
        if old.state == WRITING or old.size != request.old_size:
            raise StaleError(f"container {request.old_container:x} is not what it was at the master")
        await self._move_to_durable(old)
        if old.is_gone or old.container != request.old_container:
            raise StaleError(f"container {request.old_container:x} is here no more")
        self._slabs.pin(old)
        # The master may know that it is in the under storage before we are told.
        old.is_kept = old.is_kept or request.source is not None
        try:
            while (granted := await self._ready(old, request)) is None:
                if old.state == WRITING:
                    raise StaleError(f"container {request.old_container:x} has become another one")
            is_promised = old.state == DIRTY and old.is_kept and old.directory.is_durable
            self._slabs.begin_writing(old, request.container, *granted)
            if is_promised:
                # Or a loss of the index would leave the old container, whose bytes are changing.
                await trio.to_thread.run_sync(self._slabs.index.sync, limiter=self._threads)
            return old
        except OSError as exc:
            raise storage_error(exc, old.directory, self._slabs.counters) from None
        finally:
            self._slabs.unpin(old)

    def _create_copy(self, request: BeginWrite) -> Slab:
        """An empty clean slab of the old container, to be filled from its source."""
        if request.source is None or request.old_size > MAX_SLAB_BYTES:
            raise StaleError(f"container {request.old_container:x} is not at this worker")
        best = self._slabs.tiers.for_writing(round_up(request.old_size + request.reserve_bytes))[0]
        try:
            return self._slabs.create(request.old_container, request.old_size, best)
        except OSError as exc:
            raise storage_error(exc, best, self._slabs.counters) from None

    async def _move_to_durable(self, slab: Slab) -> None:
        """Out of MEM when nobody has it open and a durable tier has room: its bytes will be dirty."""
        if not slab.directory.is_durable and slab.is_idle and slab.present:
            target = self._slabs.tiers.for_writing(slab.charged)[0]
            if target.is_durable:
                await self._room.move(slab, target)

    async def _ready(self, old: Slab, request: BeginWrite) -> tuple[int, int] | None:
        """One step towards a slab that can become another container: None, or the end and the pages
        to be granted when nothing is left to do (then no await has happened since)."""
        if old.state == WRITING:
            return None
        if old.upload is not None:
            await old.upload.stop()
            return None
        if old.verified != old.all_pages:
            source = request.source or old.source
            await self._fetcher.fetch(old, 0, old.page_count, source=source, patience_s=PATIENCE_S)
            return None
        if old.jobs:
            await self._fetcher.settle(old)
            return None
        if old.must_sync and not old.is_synced:
            # Fetched, or uploaded before it was written back: what is lost here would count as changed.
            fd = os.dup(self._fd(old))
            try:
                old.is_synced = True  # Unless it changes meanwhile.
                await self._sealer.sync(old, fd)
            except BaseException:
                old.is_synced = False
                raise
            finally:
                os.close(fd)
            return None
        granted = joined(0, old.present & ~old.zeros) if old.zeros else (old.size + request.reserve_bytes, 0)
        extra = writing_charge(*granted) - old.charged
        if extra <= max(0, old.directory.available):
            return granted
        await self._room.make(old.directory, extra, PATIENCE_S)
        return None

    def _grant(self, peer: Peer, request: BeginWrite, slab: Slab) -> Answer[WriteGrant]:
        lock = self._writer_of(slab, request.session_id)
        self.leases.bind(peer, lock)
        fd = self._fd(slab)
        fds = [fd] if request.want_fd and peer.can_pass_fds else []
        size = os.fstat(fd).st_size
        grant = WriteGrant(lock.id, size, slab.granted_end, bool(fds), slab.directory.is_durable)
        return Answer(grant, fds=fds)

    def _writer_of(self, slab: Slab, session_id: int) -> Lock:
        """The session's one writer's lock of a slab, taken up again or new."""
        if slab.writers:
            orphan = self.leases.orphan_of(slab, session_id, or_unknown=True)
            if orphan is not None:
                return orphan
            for lock in self._slabs.locks.values():
                if lock.slab is slab and lock.is_writer and lock.session_id == session_id:
                    return lock
        return self._slabs.lock(slab, session_id, is_writer=True)

    # --- room -------------------------------------------------------------------------------------

    def _grow_now(self, slab: Slab, start: int, end: int) -> bool:
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
        return bool(slab.islands) or end < os.fstat(self._fd(slab)).st_size

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

    async def _grow(self, slab: Slab, start: int, end: int) -> None:
        self._slabs.pin(slab)
        try:
            deadline = trio.current_time() + PATIENCE_S
            while slab.state == WRITING and not self._grow_now(slab, start, end):
                needed = self._needed(slab, start, end)
                await self._room.make(slab.directory, needed, deadline - trio.current_time())
        finally:
            self._slabs.unpin(slab)

    def reserve(self, peer: Peer, request: Reserve) -> Reserved | Awaitable[Reserved]:
        slab = self._writer(peer, request.lock_id).slab
        if self._grow_now(slab, request.start, request.end):
            return self._reserved(slab, request)
        return self._reserve_slowly(peer, request)

    async def _reserve_slowly(self, peer: Peer, request: Reserve) -> Reserved:
        slab = self._writer(peer, request.lock_id).slab
        await self._grow(slab, request.start, request.end)
        self._writer(peer, request.lock_id)
        return self._reserved(slab, request)

    @staticmethod
    def _reserved(slab: Slab, request: Reserve) -> Reserved:
        if request.end <= slab.granted_end:
            return Reserved(slab.granted_end)
        first = request.start // PAGE_BYTES
        rest = slab.islands >> first
        run = (~rest & (rest + 1)).bit_length() - 1
        return Reserved((first + run) * PAGE_BYTES, first * PAGE_BYTES)

    # --- writing through the worker ---------------------------------------------------------------

    def write(self, peer: Peer, request: Write, payload: Buffer) -> int | Awaitable[int]:
        lock = self._writer(peer, request.lock_id)
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
        offset = os.fstat(self._fd(slab)).st_size if request.append else request.offset
        if not length:
            return offset
        if length > _INLINE_BYTES or not self._grow_now(slab, offset, offset + length):
            return self._write_slowly(peer, request, offset, bytes(payload))
        self._touch(slab, offset, length)
        try:
            _put(self._fd(slab), payload, offset, request.append)
        except OSError as exc:
            raise storage_error(exc, slab.directory, self._slabs.counters) from None
        return self._appended(lock, request, offset, length) if request.append else offset

    async def _write_slowly(self, peer: Peer, request: Write, offset: int, data: bytes) -> int:
        lock = self._writer(peer, request.lock_id)
        slab = lock.slab
        self._slabs.pin(slab)
        lock.busy_count += 1
        try:
            await self._grow(slab, offset, offset + len(data))
            self._writer(peer, request.lock_id)
            self._touch(slab, offset, len(data))
            fd = os.dup(self._fd(slab))
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
        end = os.fstat(self._fd(slab)).st_size
        if end > start + length:
            self._touch(slab, start, end - start)
            self._grow_now(slab, start, end)
        offset = max(start, end - length)
        lock.append = (request.number, offset)
        return offset

    @staticmethod
    def _touch(slab: Slab, offset: int, length: int) -> None:
        touched = pages_of(offset, length)
        slab.dirty_pages |= span(touched.start, len(touched))

    def truncate(self, peer: Peer, request: Truncate) -> Nothing | Awaitable[Nothing]:
        """Growing makes a hole and needs no room beyond the page in which it begins."""
        slab = self._writer(peer, request.lock_id).slab
        if request.size > MAX_SLAB_BYTES:
            raise FsError(errno.EFBIG)
        if slab.sends or not self._may_grow_to(slab, request.size):
            return self._truncate_slowly(peer, request)
        return self._truncate_now(slab, request.size)

    async def _truncate_slowly(self, peer: Peer, request: Truncate) -> Nothing:
        slab = self._writer(peer, request.lock_id).slab
        self._slabs.pin(slab)
        try:
            with trio.move_on_after(SEND_PATIENCE_S):  # Who does not take it loses the connection.
                while slab.sends:
                    slab.sent = slab.sent or trio.Event()
                    await slab.sent.wait()
            deadline = trio.current_time() + PATIENCE_S
            while slab.state == WRITING and not self._may_grow_to(slab, request.size):
                await self._room.make(slab.directory, PAGE_BYTES, deadline - trio.current_time())
            return self._truncate_now(self._writer(peer, request.lock_id).slab, request.size)
        finally:
            self._slabs.unpin(slab)

    def _may_grow_to(self, slab: Slab, size: int) -> bool:
        """The page at the granted end will be a whole one."""
        end = min(size, page_end(slab.granted_end))
        needed = round_up(end) - round_up(slab.granted_end)
        return end <= slab.granted_end or (
            self._room.make_now(slab.directory, needed) and self._slabs.grant(slab, end)
        )

    def _truncate_now(self, slab: Slab, size: int) -> Nothing:
        fd = self._fd(slab)
        try:
            before = os.fstat(fd).st_size
            os.ftruncate(fd, size)
        except OSError as exc:
            raise storage_error(exc, slab.directory, self._slabs.counters) from None
        slab.dirty_pages |= -1 << min(before, size) // PAGE_BYTES
        return NOTHING

    # --- EndWrite ---------------------------------------------------------------------------------

    def end(self, peer: Peer, request: EndWrite) -> WriteEnd | Awaitable[WriteEnd]:
        lock = self._slabs.lock_of(request.lock_id)
        slab = lock.slab
        self._require_bound(peer, lock)
        if not lock.is_writer:
            return self._ended_before(lock)
        fd = self._fd(slab)
        dirty = request.dirty_pages
        self._slabs.stop_writing(lock, -1 if dirty is None else int.from_bytes(dirty, "little"))
        found = os.fstat(fd)
        if slab.writers:
            return WriteEnd(found.st_size, found.st_mtime_ns, False)
        pages = self._slabs.pages_to_seal(slab, found.st_size)
        if pages.bit_count() > 1 or slab.pins or slab.must_sync:
            return self._end_slowly(lock)
        try:
            sums = checksums.page_checksums(fd, bits(pages), found.st_size)
        except OSError as exc:
            self._slabs.write_again(lock, pages)
            raise storage_error(exc, slab.directory, self._slabs.counters) from None
        if any(checksums.is_zero(v, page_length(page, found.st_size)) for page, v in sums.items()):
            return self._end_slowly(lock)
        try:
            self._slabs.seal(slab, found.st_size, sums)
        except StateError:
            self._slabs.write_again(lock, pages)
            raise
        lock.has_sealed = True
        return WriteEnd(found.st_size, found.st_mtime_ns, True)

    def _ended_before(self, lock: Lock) -> WriteEnd | Awaitable[WriteEnd]:
        """The answer to a repeated EndWrite, whose first answer was not heard."""
        slab = lock.slab
        if not lock.ended:
            raise StaleError(f"lock {lock.id} is not writing")
        is_open = slab.state == WRITING and slab.container == lock.ended
        if is_open and not slab.writers:
            return self._end_slowly(lock)
        found = os.fstat(self._fd(slab))
        is_sealed = lock.has_sealed and slab.container == lock.ended and not is_open
        return WriteEnd(found.st_size, found.st_mtime_ns, is_sealed)

    async def _end_slowly(self, lock: Lock) -> WriteEnd:
        """The seal goes on when the caller is cancelled. When it fails, the lock is a writer's again:
        the client may try again, or leave it to `_seal_orphan`."""
        if self._nursery is None:
            raise UnavailableError("the worker is stopping")
        outcome: list[WriteEnd | AlluxioFuseError] = []
        done = trio.Event()

        async def seal() -> None:
            try:
                end = await self._sealer.seal(lock.slab)
                lock.has_sealed = lock.has_sealed or end.is_sealed
                outcome.append(WriteEnd(end.size, end.mtime_ns, lock.has_sealed))
                if end.is_sealed and lock.id not in self._slabs.locks:
                    self._slabs.report_orphan(lock.slab)  # Its client went meanwhile and heard nothing of it.
            except AlluxioFuseError as exc:
                outcome.append(exc)
                self._slabs.write_again(lock, 0)
                if lock.id not in self._slabs.locks and self._nursery is not None:
                    self._nursery.start_soon(self._seal_left, lock.slab)
            finally:
                done.set()

        self._nursery.start_soon(seal)
        await done.wait()
        if not outcome:
            raise UnavailableError("the worker is stopping")
        if isinstance(outcome[0], AlluxioFuseError):
            raise outcome[0]
        return outcome[0]

    async def _seal_left(self, slab: Slab) -> None:
        """What its last writer left without a seal."""
        lock = self._slabs.lock(slab, 0)
        try:
            await self._sealer.seal_orphan(slab)
        finally:
            self._slabs.unlock(lock)

    # --- SyncContainer ----------------------------------------------------------------------------

    async def sync(self, peer: Peer, request: SyncContainer) -> bool:
        """The slab's data, then the index that says whose it is."""
        slab = self._slabs.lock_of(request.lock_id).slab
        if not slab.directory.is_durable:
            return False
        fd = os.dup(self._fd(slab))
        try:
            await self._sealer.sync(slab, fd)
        except OSError as exc:
            raise storage_error(exc, slab.directory, self._slabs.counters) from None
        finally:
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
            fd = self._fd(slab)
            mtime_ns = os.fstat(fd).st_mtime_ns
            os.utime(fd, NOT_WRITTEN)
        except OSError as exc:
            raise storage_error(exc, slab.directory, self._slabs.counters) from None
        return mtime_ns

    # --- common -----------------------------------------------------------------------------------

    def _writer(self, peer: Peer, lock_id: int) -> Lock:
        lock = self._slabs.lock_of(lock_id)
        self._require_bound(peer, lock)
        if not lock.is_writer:
            raise StaleError(f"lock {lock_id} is not writing: begin again")
        return lock

    def _require_bound(self, peer: Peer, lock: Lock) -> None:
        if not self.leases.is_bound(peer, lock):
            self._slabs.counters["requests_refused"] += 1
            raise StaleError(f"lock {lock.id} belongs to another connection by now")

    def _fd(self, slab: Slab) -> int:
        try:
            return self._slabs.fds.for_writing(slab)
        except OSError as exc:
            raise storage_error(exc, slab.directory, self._slabs.counters) from None


def _put(fd: int, data: Buffer, offset: int, is_append: bool) -> None:
    if is_append:
        checksums.append_all(fd, data)
    else:
        checksums.pwrite_all(fd, data, offset)
