"""Locks and connections: which locks end when a connection does, and the grace of writers."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable

import trio

from alluxiofuse.errors import StaleError
from alluxiofuse.rpc.base import Peer
from alluxiofuse.worker.slab import DIRTY, WRITING, Lock, Slab
from alluxiofuse.worker.slabs import Slabs

log = logging.getLogger(__name__)


class Leases:
    """Readers' locks end with their connection. A writer's lock outlives it by `grace_s`, so that
    its session can come back; then the slab is sealed as it is and reported as an orphan."""

    def __init__(
        self, slabs: Slabs, *, grace_s: float, seal_orphan: Callable[[Slab], Awaitable[None]]
    ) -> None:
        self._slabs = slabs
        self._grace_s = grace_s
        self._seal_orphan = seal_orphan
        self._locks: dict[int, dict[Lock, None]] = {}
        """Key of a connection -> its locks."""
        self._keys: dict[int, int] = {}
        """id of a living Peer object -> key; entries go before the object may."""
        self._numbers = itertools.count(1)
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Ends grace periods. Cancelled: slabs that are open for writing stay so, for the next
        start."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for lock in list(self._slabs.locks.values()):
                    if lock.is_writer and not lock.peer:
                        self._orphan(lock)
                await trio.sleep_forever()
        finally:
            self._nursery = None

    def bind(self, peer: Peer, lock: Lock) -> None:
        """The lock belongs to this connection from now on."""
        self._unbind(lock)
        key = self._keys.get(id(peer))
        if key is None:
            key = self._keys[id(peer)] = next(self._numbers)
            self._locks[key] = {}
            peer.on_close(lambda: self._closed(peer, key))
        self._locks[key][lock] = None
        lock.peer = key
        lock.orphaned = 0

    def is_bound(self, peer: Peer, lock: Lock) -> bool:
        """The lock belongs to this connection. What still comes by an earlier one was sent by a client
        that has given it up and asked again since."""
        return lock.peer != 0 and self._keys.get(id(peer)) == lock.peer

    def require_bound(self, peer: Peer, lock: Lock) -> None:
        """StaleError: it is not, see `is_bound`."""
        if not self.is_bound(peer, lock):
            self._slabs.counters["requests_refused"] += 1
            raise StaleError(f"lock {lock.id} belongs to another connection by now")

    def writer(self, peer: Peer, lock_id: int) -> Lock:
        """The writer's lock of this connection. StaleError: it is none."""
        lock = self._slabs.lock_of(lock_id)
        self.require_bound(peer, lock)
        if not lock.is_writer:
            raise StaleError(f"lock {lock_id} is not writing: begin again")
        return lock

    def release(self, lock: Lock, *, is_uncommitted: bool = False) -> None:
        """A reader's lock ends. `is_uncommitted`: the master was not told of its seal."""
        self._unbind(lock)
        self._end(lock, is_uncommitted)

    def _end(self, lock: Lock, is_uncommitted: bool) -> None:
        slab = lock.slab
        # The slab may be open again by now, for another writer's container.
        if is_uncommitted and lock.has_sealed and slab.state == DIRTY and not slab.is_gone:
            self._slabs.report_orphan(slab)
        self._slabs.unlock(lock)

    def abandon(self, lock: Lock) -> None:
        """A writer's lock without its connection: the grace period begins."""
        self._unbind(lock)
        self._orphan(lock)

    def orphan_of(self, slab: Slab, session_id: int, *, or_unknown: bool = False) -> Lock | None:
        """The session's own writer's lock in its grace period; with `or_unknown` also one of a life
        before this process's, whose session is not known."""
        if slab.state != WRITING:
            return None
        for lock in self._slabs.locks.values():
            if (
                lock.slab is slab
                and lock.orphaned
                and (lock.session_id == session_id or (or_unknown and lock.session_id == 0))
            ):
                lock.session_id = session_id
                return lock
        return None

    def _unbind(self, lock: Lock) -> None:
        self._locks.get(lock.peer, {}).pop(lock, None)
        lock.peer = 0

    def _closed(self, peer: Peer, key: int) -> None:
        del self._keys[id(peer)]
        for lock in self._locks.pop(key):
            lock.peer = 0
            if lock.is_writer:
                self._orphan(lock)
                continue
            self._end(lock, True)

    def _orphan(self, lock: Lock) -> None:
        lock.orphaned = next(self._numbers)
        if self._nursery is not None:
            self._nursery.start_soon(self._expire, lock, lock.orphaned)

    async def _expire(self, lock: Lock, number: int) -> None:
        await trio.sleep(self._grace_s)
        if lock.orphaned != number or lock.id not in self._slabs.locks:
            return
        slab = lock.slab
        log.warning("a writer of container %x did not come back", slab.container)
        self._slabs.counters["orphaned_writers"] += 1
        self._slabs.stop_writing(lock, -1)
        try:
            if not slab.writers:
                await self._seal_orphan(slab)
        finally:
            self._slabs.unlock(lock)
