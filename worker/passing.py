"""Slabs that kernels write by themselves (docs/adr/0001-passthrough.md): who may, and what it costs.

Nobody says what is written, so the files are looked at, as often as the room that is left demands, and
charged with what they have grown by. Near the end of the room the brake is put on: then each write that
needs more asks for it before it is done, as Reserve does. Stores through mappings can't be asked: into a
sparse file they cost what they cost.
"""

from __future__ import annotations

import logging
import os

import trio

from alluxiofuse.errors import AlluxioFuseError
from alluxiofuse.ids import pages_of
from alluxiofuse.worker.brake import Access, Brake
from alluxiofuse.worker.growth import Growth, written_extent
from alluxiofuse.worker.room import Room, storage_error
from alluxiofuse.worker.slab import WRITING, Slab, round_up, span
from alluxiofuse.worker.slabs import Slabs
from alluxiofuse.worker.tiers import Directory

log = logging.getLogger(__name__)

TOP_SPEED = 8 << 30
"""Bytes a second that kernels write at most, all together."""
MIN_PAUSE_S = 0.01
MAX_PAUSE_S = 1.0
"""Between two looks at the files: a directory is never full before the next one, at top speed."""
LOOK_SHARE = 0.05
"""Of the time that may be spent on looking."""
HEADROOM_BYTES = 1 << 30
"""With less left the brake is on: it is what is written at top speed in the time that a look and the brake
may take on a busy machine."""
AHEAD_SHARE = 8
"""The headroom is kept free by evicting while kernels write, in directories so many times as large."""
RETRY_S = 1.0
"""After evicting did not get there."""
MIN_ROOM_BYTES = 1 << 30
ROOM_SHARE = 0.25
"""Of the quota: where there is no brake, so much must be left to begin. What is written before it is
charged can't be stopped there, but what begins later can."""
_SLABS_PER_STEP = 100


class Passing:
    """Owned by the worker's `Writing`."""

    def __init__(self, slabs: Slabs, growth: Growth, room: Room, threads: trio.CapacityLimiter) -> None:
        self._slabs = slabs
        self._growth = growth
        self._room = room
        self._threads = threads
        self._brake: Brake | None = None
        self._without_brake: set[Directory] = set()
        self._watched: dict[tuple[int, int], Slab] = {}
        """Inode -> slab, of those that the brake can be put on. Read by the brake's thread too."""
        self._inodes: dict[Slab, tuple[int, int]] = {}
        self._pressed: set[Directory] = set()
        """Where the brake is on."""
        self._asked: set[Directory] = set()
        """Where it was asked for room since the last look."""
        self._seen: dict[Slab, tuple[int, int]] = {}
        """Blocks and size at the last look."""
        self._retry_at: dict[Directory, float] = {}
        self._look_s = 0.0
        """How long the last look took."""
        self._wake = trio.Event()
        self._is_resting = False
        """There is nothing to look at."""
        self.nursery: trio.Nursery | None = None
        """For programs that wait for room; None when nobody is to wait: before `run`, and from its end on."""
        slabs.passing_ended = self._ended

    async def run(self) -> None:
        """Cancelled: kernels write on unseen; the next start sees what they did."""
        while True:
            pause_s = self._pause_s()
            self._is_resting = pause_s == float("inf")
            with trio.move_on_after(pause_s):
                await self._wake.wait()
            self._wake, self._is_resting = trio.Event(), False
            began = trio.current_time()
            await self._look()
            self._look_s = trio.current_time() - began

    def stop(self) -> None:
        """When no task of `nursery` runs any more. Who waits goes on."""
        if self._brake is not None:
            self._brake.stop()
            self._brake = None

    # --- who may ----------------------------------------------------------------------------------

    def begin(self, slab: Slab) -> bool:
        """Kernels may write to the slab by what they open from now on."""
        directory = slab.directory
        if not directory.takes_passthrough:
            return False
        needed = max(MIN_ROOM_BYTES, int(directory.quota_bytes * ROOM_SHARE))
        if not (slab in self._inodes or self._watch(slab)) and directory.reachable < needed:
            return False
        if not self._slabs.let_pass(slab):
            self._ended(slab)
            return False
        if directory.available < HEADROOM_BYTES or self._is_resting:
            self._wake.set()
        return True

    def _watch(self, slab: Slab) -> bool:
        """The brake can be put on the slab. It is not taken off what is being watched for a moment, and
        is put on at once where there is little room."""
        directory = slab.directory
        if directory in self._without_brake or self.nursery is None:
            return False
        try:
            if self._brake is None:
                token = trio.lowlevel.current_trio_token()
                self._brake = Brake(
                    self._is_granted, lambda access: token.run_sync_soon(self._on_access, access)
                )
            path = self._slabs.path(slab)
            found = os.stat(path)
            inode = found.st_dev, found.st_ino
            self._brake.watch(path)
            self._watched[inode], self._inodes[slab] = slab, inode
            if directory in self._pressed:
                self._brake.press(path)
            elif directory.available < HEADROOM_BYTES:
                self._press(directory)
        except OSError as exc:
            log.info("what kernels write in %s can't be braked: %s", directory.root, exc.strerror)
            self._without_brake.add(directory)
            return False
        return True

    def _ended(self, slab: Slab) -> None:
        """It is sealed, or is no more: `Slabs.passing_ended`."""
        self._seen.pop(slab, None)
        inode = self._inodes.pop(slab, None)
        if inode is not None:
            del self._watched[inode]
            if self._brake is not None:
                self._brake.forget(self._slabs.path(slab))

    # --- looking at the files ---------------------------------------------------------------------

    def _pause_s(self) -> float:
        if not self._slabs.passing:
            return float("inf")
        loose = {slab.directory for slab in self._slabs.passing if not self._is_braked(slab)}
        left = [max(0, directory.available) / TOP_SPEED for directory in loose]
        return max(MIN_PAUSE_S, self._look_s / LOOK_SHARE, min([MAX_PAUSE_S, *left]))

    def _is_braked(self, slab: Slab) -> bool:
        return slab in self._inodes and slab.directory in self._pressed

    async def _look(self) -> None:
        active, self._asked = self._asked, set()
        for number, slab in enumerate(list(self._slabs.passing)):
            if number % _SLABS_PER_STEP == 0:
                await trio.lowlevel.checkpoint()
            if await self._charge(slab):
                active.add(slab.directory)
        for directory in {slab.directory for slab in self._slabs.passing} | self._pressed:
            await self._keep_room(directory, is_active=directory in active)

    async def _charge(self, slab: Slab) -> bool:
        """What it has grown by; whether it has."""
        if slab not in self._slabs.passing or slab.must_empty or slab.directory.trouble:
            return False
        before = slab.charged
        try:
            found = os.stat(self._slabs.path(slab))
            seen = found.st_blocks, found.st_size
            if self._seen.get(slab) == seen:
                return False
            self._seen[slab] = seen
            if found.st_blocks * 512 >= found.st_size:
                extent = found.st_size, 0
            else:
                extent = await self._sparse_extent(slab, found.st_size)
        except OSError as exc:
            storage_error(exc, slab.directory, self._slabs.counters)
            return False
        if slab in self._slabs.passing:
            self._slabs.charge_written(slab, *extent)
        return slab.charged > before

    async def _sparse_extent(self, slab: Slab, size: int) -> tuple[int, int]:
        fd = os.dup(self._slabs.fds.for_reading(slab))
        try:
            return await trio.to_thread.run_sync(written_extent, fd, size, limiter=self._threads)
        finally:
            os.close(fd)

    async def _keep_room(self, directory: Directory, *, is_active: bool) -> None:
        if directory.available >= HEADROOM_BYTES:
            self._release(directory)
            return
        is_fresh = directory not in self._pressed
        self._press(directory)
        if is_fresh:  # What was written until it was on.
            for slab in [slab for slab in self._slabs.passing if slab.directory is directory]:
                await self._charge(slab)
        target = self._ahead_bytes(directory)
        retry_at = self._retry_at.get(directory)
        is_due = is_active if retry_at is None else trio.current_time() >= retry_at
        if not is_due or directory.available >= target:
            return
        await self._room.free_up(directory, target)
        self._retry_at.pop(directory, None)
        if directory.available >= HEADROOM_BYTES:
            self._release(directory)
        elif directory.available < target and is_active:  # Once more, also when nothing is written then.
            self._retry_at[directory] = trio.current_time() + RETRY_S

    @staticmethod
    def _ahead_bytes(directory: Directory) -> int:
        """What is kept free by evicting while kernels write: enough to do without the brake. In a small
        directory that would be most of it."""
        return HEADROOM_BYTES * 3 // 2 if directory.limit_bytes >= AHEAD_SHARE * HEADROOM_BYTES else 0

    # --- the brake --------------------------------------------------------------------------------

    def _press(self, directory: Directory) -> None:
        if directory not in self._pressed:
            self._pressed.add(directory)
            self._set_brake(directory, is_on=True)

    def _release(self, directory: Directory) -> None:
        if directory in self._pressed:
            self._pressed.discard(directory)
            self._set_brake(directory, is_on=False)

    def _set_brake(self, directory: Directory, *, is_on: bool) -> None:
        for slab in [slab for slab in self._inodes if slab.directory is directory]:
            assert self._brake is not None
            set_one = self._brake.press if is_on else self._brake.release
            try:
                set_one(self._slabs.path(slab))
            except OSError as exc:
                log.warning("the brake on container %x is as it was: %s", slab.container, exc.strerror)

    def _is_granted(self, access: Access) -> bool:
        """In the brake's thread: `granted_end` and `islands` are read as they are at some moment."""
        slab = self._watched.get(access.inode)
        if slab is None or not slab.passes or access.end <= round_up(slab.granted_end):
            return True
        pages = pages_of(access.start, access.end - access.start)
        return not span(pages.start, len(pages)) & ~slab.islands

    def _on_access(self, access: Access) -> None:
        slab = self._watched.get(access.inode)
        if slab is None or self.nursery is None:
            self._answer(access, is_allowed=True)
            return
        self._asked.add(slab.directory)
        self._wake.set()
        self.nursery.start_soon(self._find_room, slab, access)

    async def _find_room(self, slab: Slab, access: Access) -> None:
        is_allowed = True
        try:
            if slab.state == WRITING:
                await self._growth.grow(slab, access.start, access.end)
        except AlluxioFuseError as exc:
            log.info("a program's write to container %x is refused: %s", slab.container, exc.message)
            self._slabs.counters["writes_refused"] += 1
            is_allowed = False
        finally:
            self._answer(access, is_allowed=is_allowed)

    def _answer(self, access: Access, *, is_allowed: bool) -> None:
        if self._brake is None:  # Nobody waits any more.
            os.close(access.fd)
        else:
            self._brake.answer(access, is_allowed=is_allowed)
