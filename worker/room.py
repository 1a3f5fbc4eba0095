"""Making room: carries out eviction plans, keeps directories below the high watermark, and lets
those wait whose room will come from uploads."""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter

import trio

from alluxiofuse import descriptors
from alluxiofuse.errors import AlluxioFuseError, FsError, NoSpaceError, StateError
from alluxiofuse.worker import checksums
from alluxiofuse.worker.eviction import Drop, Move, Punch, Step, may_drop, may_move, plan_room
from alluxiofuse.worker.layout import slab_path
from alluxiofuse.worker.slab import DIRTY, Slab
from alluxiofuse.worker.slabs import Slabs
from alluxiofuse.worker.tiers import Directory

log = logging.getLogger(__name__)

_MAX_FAILED_PLANS = 20
"""Plans that looked sufficient and were not (others took the room, a move failed) before giving up."""


def storage_error(exc: OSError, directory: Directory, counters: Counter[str]) -> AlluxioFuseError:
    """What a failed file operation in a tier directory means to a client. A filesystem that is full
    below the quota counts as full until it has room again; whatever else fails is EIO."""
    if exc.errno in descriptors.EXHAUSTED:
        counters["descriptors_exhausted"] += 1
        return FsError(exc.errno or errno.EMFILE, "the worker has too many open files")
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        directory.note_full()
        return NoSpaceError("a tier's filesystem is full")
    counters["storage_errors"] += 1
    directory.is_suspect = True  # `upkeep` looks at it.
    if not directory.trouble:
        log.error("tier directory %s: %s", directory.root, exc.strerror)
    return FsError(errno.EIO, f"tier directory {directory.root}: {exc.strerror}")


def trouble_of(directory: Directory) -> AlluxioFuseError:
    """What it means to a client that wants something of a directory out of use."""
    return FsError(errno.EIO, f"tier directory {directory.root}: {directory.trouble}")


class Room:
    """Gives directories room. Tasks of the worker; the plans are made in await-free stretches."""

    def __init__(self, slabs: Slabs, *, high_watermark: float, low_watermark: float) -> None:
        self._slabs = slabs
        self._high = high_watermark
        self._low = low_watermark
        self._busy = {directory: trio.Lock() for directory in slabs.tiers.directories}
        self._changed = trio.Event()
        self._waiting = 0
        self._pressed = trio.Event()
        self._pressed.set()  # Quotas may be smaller than before.
        self._limiter = trio.CapacityLimiter(2)
        slabs.room_changed = self._on_change
        slabs.pressure = lambda: self._pressed.set()

    def _on_change(self) -> None:
        if self._waiting:
            self._changed.set()
            self._changed = trio.Event()

    # --- for allocations --------------------------------------------------------------------------

    def make_now(self, directory: Directory, size_bytes: int) -> bool:
        """Room without waiting: what is free, or becomes so by dropping and punching alone."""
        if directory.available >= size_bytes:
            return True
        if directory.reachable < size_bytes:
            return False
        steps, is_enough = plan_room(self._slabs.tiers, directory, size_bytes)
        if not is_enough or any(isinstance(step, Move) for step in steps):
            return False
        for step in steps:
            self._execute_now(step)
        return directory.available >= size_bytes

    async def make(self, directory: Directory, size_bytes: int, patience_s: float = 0.0) -> None:
        """Returns when `size_bytes` are available (take them before the next await). Waits at most
        `patience_s` while dirty slabs of the directory are being persisted. NoSpaceError. Cancelled:
        what was evicted is evicted."""
        deadline = trio.current_time() + patience_s
        failed_plans = 0
        while not self.make_now(directory, size_bytes):
            if directory.trouble:
                raise trouble_of(directory)
            async with self._busy[directory]:
                steps, is_enough = plan_room(self._slabs.tiers, directory, size_bytes)
                if is_enough:
                    await self._execute(steps, directory, size_bytes)
            if directory.available >= size_bytes:
                return
            left = deadline - trio.current_time()
            failed_plans += is_enough
            if failed_plans > _MAX_FAILED_PLANS or (
                not is_enough and not await self._wait(directory, size_bytes, left)
            ):
                self._slabs.counters["no_space"] += 1
                raise NoSpaceError("no tier has room: everything in it is in use or not persisted yet")

    async def _wait(self, directory: Directory, size_bytes: int, timeout_s: float) -> bool:
        """Until something changed; False when waiting makes no sense."""
        if timeout_s <= 0 or not directory.dirty or size_bytes > directory.limit_bytes:
            return False
        self._waiting += 1
        try:
            with trio.move_on_after(timeout_s) as scope:
                await self._changed.wait()
        finally:
            self._waiting -= 1
        return not scope.cancelled_caught

    async def reserve(self, slab: Slab, size_bytes: int, patience_s: float = 0.0) -> None:
        """`Slabs.reserve`, after making room. NoSpaceError. The caller holds a lock or pin."""
        while not self._slabs.reserve(slab, size_bytes):
            await self.make(slab.directory, size_bytes, patience_s)

    # --- in the background ------------------------------------------------------------------------

    async def run(self) -> None:
        """Brings directories above the high watermark down to the low one, as far as it goes. Stops
        between slabs when cancelled."""
        while True:
            await self._pressed.wait()
            self._pressed = trio.Event()
            for directory in self._slabs.tiers.directories:
                if directory.used > self._high * directory.limit_bytes:
                    target = int((1 - self._low) * directory.limit_bytes)
                    await self.free_up(directory, target)
            await trio.lowlevel.checkpoint()

    async def free_up(self, directory: Directory, size_bytes: int) -> None:
        """`size_bytes` available, as far as evicting can do it. Stops between slabs when cancelled."""
        async with self._busy[directory]:
            steps, _ = plan_room(self._slabs.tiers, directory, size_bytes)
            await self._execute(steps, directory, size_bytes)

    async def move(self, slab: Slab, target: Directory) -> bool:
        """Move an idle sealed slab; False when it could not be done or is in use meanwhile."""
        if not may_move(slab) or not self.make_now(target, slab.charged):
            return False
        return await self._move(Move(slab, target, slab.charged))

    # --- execution --------------------------------------------------------------------------------

    async def _execute(self, steps: list[Step], directory: Directory, enough_bytes: int) -> None:
        for step in steps:
            if directory.available >= enough_bytes:
                return
            if isinstance(step, Move):
                await self._move(step)
            else:
                self._execute_now(step)
                await trio.lowlevel.checkpoint()

    def _execute_now(self, step: Step) -> None:
        slab = step.slab
        if not may_drop(slab):
            return
        try:
            if isinstance(step, Drop) or not slab.present & ~step.pages:  # type: ignore[union-attr]
                self._slabs.drop(slab)
                self._slabs.counters["evicted_slabs"] += 1
            elif isinstance(step, Punch) and self._slabs.fds.is_held_elsewhere(slab):
                self._slabs.counters["held_by_strangers"] += 1
            elif isinstance(step, Punch):
                self._slabs.drop_pages(slab, step.pages)
                self._slabs.counters["evicted_blocks"] += 1
        except OSError as exc:
            storage_error(exc, slab.directory, self._slabs.counters)

    async def _move(self, step: Move) -> bool:
        slab, target = step.slab, step.target
        if not may_move(slab) or slab.charged > step.cost_bytes or target is slab.directory:
            return False
        if not self._slabs.hold(target, step.cost_bytes):
            return False
        before = (slab.container, slab.state, slab.present, slab.directory)
        new_path = slab_path(target.root, slab.container)
        self._slabs.old_names.pop(new_path, None)
        slab.is_moving = True
        self._slabs.account(slab)
        is_moved = False
        try:
            await trio.to_thread.run_sync(
                checksums.copy_pages,
                self._slabs.path(slab),
                new_path,
                slab.present & ~slab.zeros,
                slab.size,
                slab.state == DIRTY and target.is_durable,
                limiter=self._limiter,
            )
            slab.is_moving = False
            if may_move(slab) and before == (slab.container, slab.state, slab.present, slab.directory):
                self._slabs.relocate(slab, target, step.cost_bytes)
                self._slabs.counters["demoted_slabs"] += 1
                is_moved = True
        except OSError as exc:
            storage_error(exc, target, self._slabs.counters)
        except StateError:
            pass  # logged
        finally:
            slab.is_moving = False
            if not is_moved:
                self._slabs.release(target, step.cost_bytes)
                self._slabs.account(slab)
                try:
                    os.unlink(new_path)
                except FileNotFoundError:
                    pass
        return is_moved
