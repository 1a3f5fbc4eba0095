"""What the worker does now and then by itself: names that are not needed any more."""

from __future__ import annotations

import logging

import trio

from alluxiofuse.errors import StateError
from alluxiofuse.worker.slabs import Slabs

log = logging.getLogger(__name__)

EVERY_S = 1.0


class Upkeep:
    """Owned by the worker; `run` is its only task."""

    def __init__(self, slabs: Slabs) -> None:
        self._slabs = slabs

    async def run(self) -> None:
        """Until cancelled. What is left over then is removed at the next start."""
        while True:
            await trio.sleep(EVERY_S)
            if self._slabs.old_names:
                await self.remove_old_names()

    async def remove_old_names(self) -> None:
        """Those of now, as soon as the index is durable."""
        taken = list(self._slabs.old_names)
        try:
            await trio.to_thread.run_sync(self._slabs.index.sync)
        except StateError:
            return
        self._slabs.remove_old_names(taken)
