"""Time for whoever holds a lease."""

from __future__ import annotations

import time
from collections.abc import Callable

import trio


def _boot_time() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class BootClock(trio.abc.Clock):
    """Seconds since the machine was started, those included for which it was suspended: a lease that ran
    out meanwhile is over. The monotonic clock, which trio has by itself, stands still then; it is for
    who grants a lease, and must not count time in which it could not listen. Neither follows the wall
    clock. clock_gettime(2)."""

    def __init__(self, read: Callable[[], float] = _boot_time) -> None:
        self._read = read

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self._read()

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return deadline - self._read()
