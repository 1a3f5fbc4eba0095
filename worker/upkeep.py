"""What the worker does now and then by itself: names that are not needed any more, an index that could
not be written, directories that fail."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import trio

from alluxiofuse import state_disk
from alluxiofuse.errors import StateError, UserError
from alluxiofuse.worker import health, layout
from alluxiofuse.worker.layout import Claims, slab_path
from alluxiofuse.worker.slab import CLEAN, Slab
from alluxiofuse.worker.slabs import Slabs
from alluxiofuse.worker.tiers import Directory

log = logging.getLogger(__name__)

EVERY_S = 1.0
SLABS_PER_STEP = 200
"""Looked at before others have their turn."""
PROBE_EVERY_S = 5.0
"""Between looks at a directory in trouble."""
PROBE_PATIENCE_S = 10.0
"""A directory that does not answer for so long fails."""


class Upkeep:
    """Owned by the worker; `run` is its only task."""

    def __init__(self, slabs: Slabs, claims: Claims) -> None:
        self._slabs = slabs
        self._claims = claims
        self._probe_at: dict[Directory, float] = {}
        self._probing: dict[Directory, trio.CapacityLimiter] = {
            directory: trio.CapacityLimiter(1) for directory in slabs.tiers.directories
        }
        """A probe that hangs keeps its thread, and no second one is begun."""

    async def run(self) -> None:
        """Until cancelled. What is left over then is removed at the next start."""
        while True:
            await trio.sleep(EVERY_S)
            if self._slabs.index.is_failed:
                await self._heal_index()
            if self._slabs.old_names:
                await self.remove_old_names()
            for directory in self._slabs.tiers.directories:
                if directory.is_suspect or directory.trouble:
                    await self._look_at(directory)

    async def _heal_index(self) -> None:
        index = self._slabs.index
        if await trio.to_thread.run_sync(state_disk.can_be_written, index.directory):
            index.heal()

    async def remove_old_names(self) -> None:
        """Those of now, as soon as the index is durable."""
        taken = list(self._slabs.old_names)
        try:
            await trio.to_thread.run_sync(self._slabs.index.sync)
        except StateError:
            return
        self._slabs.remove_old_names(taken)

    # --- directories ------------------------------------------------------------------------------

    async def _look_at(self, directory: Directory) -> None:
        now = trio.current_time()
        if directory.trouble and now < self._probe_at.get(directory, 0.0):
            await self._let_go(directory)
            return
        self._probe_at[directory] = now + PROBE_EVERY_S
        directory.is_suspect = False
        trouble, is_readable = await self._probe(directory)
        if not trouble:
            if directory.trouble:
                await self._take_back(directory)
            return
        if trouble != directory.trouble:
            log.error("tier directory %s is out of use: %s", directory.root, trouble)
            self._slabs.counters["directories_failed"] += 1
        directory.trouble, directory.is_readable = trouble, is_readable
        await self._let_go(directory)

    async def _probe(self, directory: Directory) -> tuple[str, bool]:
        limiter = self._probing[directory]
        if not limiter.available_tokens:
            return f"no answer within {PROBE_PATIENCE_S:g} s", False
        marker = self._claims.markers[directory.root]
        with trio.move_on_after(PROBE_PATIENCE_S):
            return await trio.to_thread.run_sync(
                health.probe, Path(directory.root), marker, abandon_on_cancel=True, limiter=limiter
            )
        return f"no answer within {PROBE_PATIENCE_S:g} s", False

    async def _let_go(self, directory: Directory) -> None:
        """Its lock and its descriptors, so that it can be unmounted and repaired; when it can't be read,
        its clean slabs too, as they become free."""
        for number, slab in enumerate(self._in(directory)):
            if number % SLABS_PER_STEP == 0:
                await trio.lowlevel.checkpoint()
            if slab.is_gone or slab.directory is not directory:
                continue
            self._slabs.fds.forget(slab)
            if not directory.is_readable and slab.state == CLEAN and not slab.pins and not slab.is_moving:
                self._slabs.forget_clean(slab)
        self._claims.release(directory.root)

    def _in(self, directory: Directory) -> Iterator[Slab]:
        yield from [slab for slab in self._slabs.by_container.values() if slab.directory is directory]

    async def _take_back(self, directory: Directory) -> None:
        try:
            await trio.to_thread.run_sync(self._claims.renew, directory.root)
            found = await trio.to_thread.run_sync(
                lambda: list(layout.stored_slabs(Path(directory.root), is_removing=False))
            )
        except (UserError, StateError, OSError) as exc:
            log.error("tier directory %s stays out of use: %s", directory.root, exc)
            return
        directory.trouble, directory.is_readable = "", True
        known = self._slabs.by_container
        for container in found:
            slab = known.get(container)
            if slab is None or slab.directory is not directory:
                path = slab_path(directory.root, container)
                self._slabs.old_names[path] = None
        log.warning("tier directory %s is in use again", directory.root)
        self._slabs.counters["directories_back"] += 1
        self._slabs.room_changed()
