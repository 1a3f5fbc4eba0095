"""A lock that costs nothing while nobody else has it."""

from __future__ import annotations

import trio


class QuickLock:
    """As `trio.Lock` in `async with`, in the same order for those who wait, but taking it is a checkpoint
    only when somebody has it: once around the loop takes as long as a small call of the master."""

    def __init__(self) -> None:
        self._lock = trio.Lock()

    async def __aenter__(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(self, *exc_info: object) -> None:
        self._lock.release()
