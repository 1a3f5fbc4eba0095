"""BeginWrite: a slab becomes writable, a new one or that of the content so far."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

import trio

from alluxiofuse.errors import AlluxioFuseError, BadRequestError, NoSpaceError, StaleError
from alluxiofuse.rpc.base import Answer, Peer
from alluxiofuse.wire.worker_ops import BeginWrite, WriteGrant
from alluxiofuse.worker import growth
from alluxiofuse.worker.accounts import joined, writing_charge
from alluxiofuse.worker.fetcher import Fetcher
from alluxiofuse.worker.growth import MIN_GRANT_BYTES, Growth
from alluxiofuse.worker.leases import Leases
from alluxiofuse.worker.passing import Passing
from alluxiofuse.worker.room import Room, storage_error, trouble_of
from alluxiofuse.worker.sealing import Sealer
from alluxiofuse.worker.slab import DIRTY, MAX_SLAB_BYTES, WRITING, Lock, Slab, round_up
from alluxiofuse.worker.slabs import Slabs

SEND_PATIENCE_S = 5.0
"""How long who makes a file shorter waits for what readers are being sent of it."""


async def sent(slab: Slab) -> None:
    """Until no part of it is on its way to a reader, or he does not take it: he loses the connection."""
    with trio.move_on_after(SEND_PATIENCE_S):
        while slab.sends:
            slab.sent = slab.sent or trio.Event()
            await slab.sent.wait()


class Beginning:
    """Owned by the worker's `Writing`."""

    def __init__(
        self,
        slabs: Slabs,
        room: Room,
        growth: Growth,
        fetcher: Fetcher,
        sealer: Sealer,
        leases: Leases,
        passing: Passing,
        threads: trio.CapacityLimiter,
    ) -> None:
        self._slabs = slabs
        self._room = room
        self._growth = growth
        self._fetcher = fetcher
        self._sealer = sealer
        self._leases = leases
        self._passing = passing
        self._threads = threads
        self._gates: dict[int, trio.Lock] = {}
        """Container -> BeginWrites that take time."""

    def begin(self, peer: Peer, request: BeginWrite) -> Answer[WriteGrant] | Awaitable[Answer[WriteGrant]]:
        if request.container == 0 or request.container == request.old_container:
            raise BadRequestError("BeginWrite needs a new container id")
        slab = self._slabs.get(request.container)
        is_ready = slab is not None and request.container not in self._gates and not slab.must_empty
        if slab is not None and self._busy(slab, request.session_id) is not None:
            is_ready = False
        if (
            slab is not None
            and is_ready
            and not self._sealer.is_punching(slab)
            and self._may_join(slab, request)
        ):
            return self._grant(peer, request, slab)
        is_new = request.old_container == 0 or (request.is_emptying and self._open_one(request) is None)
        if slab is None and is_new and request.container not in self._gates:
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
        return self._growth.grow_now(slab, 0, self._wanted_end(slab, request))

    def _wanted_end(self, slab: Slab, request: BeginWrite) -> int:
        size = os.fstat(self._growth.fd(slab)).st_size
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
                if slab.must_empty:
                    self._finish_emptying(slab)
            if slab is None and request.is_emptying and self._open_one(request) is not None:
                slab = await self._empty(request)
            elif slab is None and request.old_container and request.old_size and not request.is_emptying:
                slab = await self._convert(request)
            elif slab is None:
                slab = await self._create_patiently(request)
            elif not self._may_join(slab, request):
                await self._growth.grow(slab, 0, self._wanted_end(slab, request))
            if slab.state != WRITING:
                raise StaleError(f"container {slab.container:x} is sealed: begin a new one at the master")
            return self._grant(peer, request, slab)

    async def _create_patiently(self, request: BeginWrite) -> Slab:
        needed = max(4096, round_up(request.reserve_bytes))
        deadline = trio.current_time() + growth.PATIENCE_S
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
            await self._fetcher.fetch(old, 0, old.page_count, source=source, patience_s=growth.PATIENCE_S)
            return None
        if old.jobs:
            await self._fetcher.settle(old)
            return None
        if old.must_sync and not old.is_synced:
            # Fetched, or uploaded before it was written back: what is lost here would count as changed.
            fd = os.dup(self._growth.fd(old))
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
        await self._room.make(old.directory, extra, growth.PATIENCE_S)
        return None

    # --- emptying what is open --------------------------------------------------------------------

    def _open_one(self, request: BeginWrite) -> Slab | None:
        """The slab of the content that is not wanted any more, if somebody has it open."""
        old = self._slabs.get(request.old_container)
        return old if old is not None and old.locks and old.state != WRITING else None

    async def _empty(self, request: BeginWrite) -> Slab:
        """The slab that readers have open becomes that of the new container, so that they see it."""
        while (old := self._open_one(request)) is not None:
            self._slabs.pin(old)
            try:
                if old.upload is not None:
                    await old.upload.stop()
                elif old.jobs:
                    self._fetcher.cancel_ahead(old)
                    await self._fetcher.settle(old)
                elif old.sends:
                    await sent(old)
                    if old.sends:
                        break
                else:
                    return self._empty_now(old, request)
            finally:
                self._slabs.unpin(old)
        return await self._create_patiently(request)

    def _empty_now(self, old: Slab, request: BeginWrite) -> Slab:
        wanted = max(4096, round_up(request.reserve_bytes), MIN_GRANT_BYTES)
        room = (old.charged + max(0, old.directory.available)) & ~4095
        try:
            self._slabs.begin_emptied(old, request.container, min(wanted, room))
        except OSError as exc:
            raise storage_error(exc, old.directory, self._slabs.counters) from None
        return old

    def _finish_emptying(self, slab: Slab) -> None:
        try:
            self._slabs.finish_emptying(slab)
        except OSError as exc:
            raise storage_error(exc, slab.directory, self._slabs.counters) from None

    # --- the lock ---------------------------------------------------------------------------------

    def _grant(self, peer: Peer, request: BeginWrite, slab: Slab) -> Answer[WriteGrant]:
        lock = self._writer_of(slab, request.session_id)
        if not self._leases.is_bound(peer, lock):
            slab.dirty_pages |= self._left_by(lock)
            self._leases.bind(peer, lock)
        passes = request.passes and self._passing.begin(slab)
        lock.passes = lock.passes or passes
        fd = self._growth.fd(slab)
        fds = [fd] if request.want_fd and peer.can_pass_fds else []
        size = os.fstat(fd).st_size
        grant = WriteGrant(lock.id, size, slab.granted_end, bool(fds), slab.directory.is_durable, passes)
        return Answer(grant, fds=fds)

    @staticmethod
    def _left_by(lock: Lock) -> int:
        """Pages that were perhaps written by a connection which the lock had before, maybe of a process
        that died: nobody else knows which."""
        return -1 if lock.peer or lock.orphaned else 0

    def _writer_of(self, slab: Slab, session_id: int) -> Lock:
        """The session's one writer's lock of a slab, taken up again or new."""
        if slab.writers:
            orphan = self._leases.orphan_of(slab, session_id, or_unknown=True)
            if orphan is not None:
                return orphan
            for lock in self._slabs.locks.values():
                if lock.slab is slab and lock.is_writer and lock.session_id == session_id:
                    return lock
        return self._slabs.lock(slab, session_id, is_writer=True)
