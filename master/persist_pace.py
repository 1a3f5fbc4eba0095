"""When the persister gives way to programs.

An upload costs the daemon about as much time as the creation of the small file that it uploads, so a
program that makes many files would make them at half the speed. While changes come quickly, what is
due waits, for a few seconds at most; a program that goes on for longer shares the machine with its
uploads. Plain state, no clock of its own.
"""

from __future__ import annotations

BUSY_PER_S = 200.0
"""Changes a second from which on programs count as busy."""
SAMPLE_S = 0.1


class Pace:
    def __init__(self, patience_s: float) -> None:
        """`patience_s`: for how long it gives way in a row."""
        self._patience_s = patience_s
        self._sampled_at_s = 0.0
        self._sampled_count = 0
        self._busy_since_s: float | None = None

    def gives_way(self, now_s: float, change_count: int) -> bool:
        """`change_count`: how many changes programs asked for so far."""
        elapsed_s = now_s - self._sampled_at_s
        if elapsed_s >= SAMPLE_S:
            if change_count - self._sampled_count < BUSY_PER_S * elapsed_s:
                self._busy_since_s = None
            elif self._busy_since_s is None:
                self._busy_since_s = now_s
            self._sampled_at_s, self._sampled_count = now_s, change_count
        since_s = self._busy_since_s
        return since_s is not None and now_s - since_s < self._patience_s
