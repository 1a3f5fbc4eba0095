"""A logger for what strangers can cause: at most a few lines a second, however many they cause."""

from __future__ import annotations

import logging
import time

BURST_LINES = 20
LINES_PER_S = 1.0


class LimitedLog:
    """Passes lines on while there is budget (`BURST_LINES`, refilled with `LINES_PER_S`), counts
    the others and names their number with the next line that passes. Used from one thread."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._budget = float(BURST_LINES)
        self._refilled_at = time.monotonic()
        self.dropped_count = 0

    def warning(self, message: str, *args: object) -> None:
        if self._spend():
            self._logger.warning(message + self._more(), *args)

    def exception(self, message: str, *args: object, exc: BaseException) -> None:
        """With the traceback of `exc`."""
        if self._spend():
            self._logger.error(message + self._more(), *args, exc_info=exc)

    def _spend(self) -> bool:
        now = time.monotonic()
        self._budget = min(float(BURST_LINES), self._budget + (now - self._refilled_at) * LINES_PER_S)
        self._refilled_at = now
        if self._budget < 1.0:
            self.dropped_count += 1
            return False
        self._budget -= 1.0
        return True

    def _more(self) -> str:
        dropped, self.dropped_count = self.dropped_count, 0
        return f" ({dropped} more like this were not logged)" if dropped else ""
