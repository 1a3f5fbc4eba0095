"""Seals of slabs: checksums, holes, and then nobody writes to it any more."""

from __future__ import annotations

import logging
import os

import trio

from alluxiofuse.errors import AlluxioFuseError
from alluxiofuse.wire.worker_ops import WriteEnd
from alluxiofuse.worker import checksums
from alluxiofuse.worker.layout import sync_names
from alluxiofuse.worker.room import storage_error
from alluxiofuse.worker.slab import WRITING, Slab
from alluxiofuse.worker.slabs import Slabs

log = logging.getLogger(__name__)

RESEAL_S = 1.0
MAX_RESEAL_S = 60.0
"""Before a seal that failed, and that nobody waits for, is tried again."""
LET_GO_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
"""When to look again whether a kernel, whose program has closed the file, has let go of it."""
LOOK_S = 0.2
MAX_LOOK_S = 1.0
"""Between looks at what is open for writing: a mapping that may last."""
_SEAL_ATTEMPTS = 5
"""Checksums are computed again when the file changed under them: a writer that did not keep to the
rules. After so many times the last ones count."""


class Sealing:
    """Of one slab: the seals that are under way, one after the other."""

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.users = 0
        self.is_punching = False
        """Pages of zeros are being made holes: nobody may begin to write."""


class Sealer:
    """Owned by the worker's `Writing`."""

    def __init__(self, slabs: Slabs, threads: trio.CapacityLimiter) -> None:
        self._slabs = slabs
        self._threads = threads
        self._seals: dict[Slab, Sealing] = {}

    async def seal(self, slab: Slab) -> WriteEnd:
        """Checksums in a thread, then the seal, unless a writer came meanwhile (who then seals), or kernels
        write to it. One at a time for a slab; by its descriptor, as the next writer may rename the file."""
        self._slabs.pin(slab)
        gate = self._seals.setdefault(slab, Sealing())
        gate.users += 1
        try:
            async with gate.lock:
                if slab.passes and not slab.writers and self._slabs.fds.is_written_elsewhere(slab):
                    found = os.stat(self._slabs.path(slab))
                    return WriteEnd(found.st_size, found.st_mtime_ns, False)
                fd = os.dup(self._slabs.fds.for_reading(slab))
                try:
                    return await self._seal_by(slab, fd, gate)
                finally:
                    os.close(fd)
        except OSError as exc:
            raise storage_error(exc, slab.directory, self._slabs.counters) from None
        finally:
            gate.users -= 1
            if not gate.users:
                del self._seals[slab]
            self._slabs.unpin(slab)

    async def _seal_by(self, slab: Slab, fd: int, gate: Sealing) -> WriteEnd:
        for _ in range(_SEAL_ATTEMPTS):
            writes = slab.writes
            found = os.fstat(fd)
            unsealed = WriteEnd(found.st_size, found.st_mtime_ns, False)
            if slab.writers or slab.state != WRITING:
                return unsealed
            pages = self._slabs.pages_to_seal(slab, found)
            if slab.must_sync and not slab.is_synced_as(found):
                # The master, told of the seal, forgets the content that this one was made from.
                await self.sync(slab, fd)
            sums, zeros, filled = await trio.to_thread.run_sync(
                checksums.sealed_checksums, fd, pages, found.st_size, limiter=self._threads
            )
            if slab.writers or slab.writes != writes or slab.state != WRITING:
                return unsealed
            now = os.fstat(fd)
            if (now.st_size, now.st_mtime_ns) == (found.st_size, found.st_mtime_ns):
                break
        if filled:
            gate.is_punching = True  # Who wants to write waits: it would be lost.
            slab.sealed_mtime_ns = found.st_mtime_ns
            writable = os.dup(self._slabs.fds.for_writing(slab))
            try:
                await trio.to_thread.run_sync(checksums.punch_pages, writable, filled, limiter=self._threads)
            finally:
                os.close(writable)
                gate.is_punching, slab.sealed_mtime_ns = False, None
        self._slabs.seal(slab, found.st_size, sums, zeros)
        return WriteEnd(found.st_size, found.st_mtime_ns, True)

    async def is_let_go(self, slab: Slab) -> bool:
        """Nobody has it open for writing, or not any more after a moment. No await has happened since that
        was found."""
        for delay_s in (*LET_GO_S, 0.0):
            if slab.writers or slab.state != WRITING:
                return False
            try:
                if not self._slabs.fds.is_written_elsewhere(slab):
                    return True
            except OSError as exc:
                raise storage_error(exc, slab.directory, self._slabs.counters) from None
            if delay_s:
                await trio.sleep(delay_s)
        return False

    async def sync(self, slab: Slab, fd: int) -> None:
        """The slab's bytes, its name, and the index that says whose it is, in this order. OSError,
        StateError."""
        path, found = self._slabs.path(slab), os.fstat(fd)
        if slab.state == WRITING and not slab.is_unnamed:
            # The index has said so durably since its name was synced, and says nothing new until the seal.
            await trio.to_thread.run_sync(os.fdatasync, fd, limiter=self._threads)
        else:
            is_emptied = not slab.must_empty  # or its record is written once more
            await trio.to_thread.run_sync(
                _sync, fd, path if slab.is_unnamed else "", self._slabs, limiter=self._threads
            )
            if path == self._slabs.path(slab) and is_emptied:
                slab.is_unnamed = False
        if path == self._slabs.path(slab) and not slab.is_unnamed and slab.directory.tells_each_write:
            slab.synced_as = found.st_size, found.st_ctime_ns

    def is_punching(self, slab: Slab) -> bool:
        gate = self._seals.get(slab)
        return gate is not None and gate.is_punching

    async def punched(self, slab: Slab) -> None:
        """Until no pages are being made holes."""
        if (gate := self._seals.get(slab)) is not None and gate.is_punching:
            async with gate.lock:
                pass

    async def seal_orphan(self, slab: Slab) -> None:
        """Until it is sealed, or somebody else writes it. The caller holds a lock."""
        delay_s, look_s = RESEAL_S, LOOK_S
        while slab.state == WRITING and not slab.writers and not slab.is_gone:
            try:
                if (await self.seal(slab)).is_sealed:
                    self._slabs.report_orphan(slab)
                    return
                if slab.passes and not slab.writers:
                    await trio.sleep(look_s)
                    look_s = min(1.2 * look_s, MAX_LOOK_S)
            except AlluxioFuseError as exc:
                log.error("container %x can't be sealed: %s", slab.container, exc.message)
                await trio.sleep(delay_s)
                delay_s = min(2 * delay_s, MAX_RESEAL_S)


def _sync(fd: int, new_path: str, slabs: Slabs) -> None:
    os.fdatasync(fd)
    if new_path:
        sync_names(os.path.dirname(new_path))
    slabs.index.sync()
