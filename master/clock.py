"""Time as the master sees it: injectable, so that tests drive leases and intervals."""

from __future__ import annotations

import time
from collections.abc import Callable

import trio


class Clock:
    """Two clocks that must not be mixed up.

    `now_ns` is the wall clock: what goes into records, may jump. `monotonic` is trio's (seconds,
    only inside `trio.run`): what leases and deadlines are measured with; MockClock drives it.
    """

    def __init__(self, wall_ns: Callable[[], int] = time.time_ns) -> None:
        self.now_ns = wall_ns

    def monotonic(self) -> float:
        return trio.current_time()
