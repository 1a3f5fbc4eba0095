"""How many requests one connector has on their way at once, and how often it tries again.

A store that says "slow down" (503 SlowDown, 429) gets fewer requests at once and a pause that all
threads keep, so that many readers are not many times as many retries. No sockets here.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from alluxiofuse.errors import UfsError, UfsUnavailableError

T = TypeVar("T")

ATTEMPTS = 3
FIRST_PAUSE_S = 0.2
"""Before the second attempt, and after the first "slow down"; a random half more or less."""
MAX_PAUSE_S = 5.0
MOST_AT_ONCE = 64
"""More than all callers of one connector have threads: no limit until the store complains."""


class Throttled(UfsUnavailableError):
    """The store asked for fewer requests."""


class Damaged(UfsUnavailableError):
    """A body that is not the one that the store's checksum belongs to."""


class NoAnswer(UfsUnavailableError):
    """Refused, silent, or cut off before the end."""


class Pace:
    """Shared by the threads of one connector; all state under `_changed`."""

    def __init__(
        self,
        timeout_s: float,
        *,
        now: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """`timeout_s`: no attempt begins later than this after the call began. `now` and `wait` are
        the clock (tests bring their own)."""
        self._timeout_s = timeout_s
        self._now = now
        self._wait = wait
        self._changed = threading.Condition()
        self._running = 0
        self._limit = MOST_AT_ONCE
        self._pause_s = 0.0
        self._resume_at_s = 0.0
        """Nothing is sent before."""
        self._good_count = 0
        """Since the limit was last changed."""
        self._counts: Counter[str] = Counter()

    @property
    def limit(self) -> int:
        """Requests that may be on their way now."""
        return self._limit

    def counts(self) -> dict[str, int]:
        """For `UnderStorage.counts`."""
        with self._changed:
            found = dict(self._counts)
        if self._limit < MOST_AT_ONCE:
            found["ufs_requests_at_most"] = self._limit
        return found

    def count(self, what: str) -> None:
        with self._changed:
            self._counts[what] += 1

    def run(self, work: Callable[[], T]) -> T:
        """`work` is one request: it raises UfsErrors. UfsUnavailableError and its kinds are tried again,
        `ATTEMPTS` times in all (Throttled: as often as the pauses allow), as long as the timeout has
        not passed since the beginning. So a silent store costs one timeout, and at most two where it
        fell silent at a later attempt. Not to be nested."""
        deadline_s = self._now() + self._timeout_s
        attempt = 0
        while True:
            attempt += 1
            try:
                with self._turn(deadline_s):
                    return work()
            except UfsUnavailableError as error:
                self._failed(error)
                is_last = attempt >= ATTEMPTS and not isinstance(error, Throttled)
                if is_last or self._now() >= deadline_s:
                    self.count("ufs_given_up")
                    raise
                self.count("ufs_retries")
            pause_s = FIRST_PAUSE_S * 4 ** min(attempt - 1, ATTEMPTS - 2)
            self._wait(pause_s * random.uniform(0.5, 1.5))  # noqa: S311

    # --- within -----------------------------------------------------------------------------------

    @contextmanager
    def _turn(self, deadline_s: float) -> Iterator[None]:
        """Waits for its turn; Throttled when the deadline passes meanwhile."""
        with self._changed:
            while (pause_s := self._resume_at_s - self._now()) > 0 or self._running >= self._limit:
                if self._now() >= deadline_s:
                    raise Throttled("the store asks for fewer requests than are wanted of it")
                if pause_s > 0:
                    self._changed.release()
                    try:
                        self._wait(min(pause_s, max(0.01, deadline_s - self._now())))
                    finally:
                        self._changed.acquire()
                else:
                    self._changed.wait(1.0)
            self._running += 1
        is_good = False
        try:
            yield
            is_good = True
        except UfsUnavailableError:
            raise
        except UfsError:
            is_good = True  # an answer, if not the one that was hoped for
            raise
        finally:
            with self._changed:
                self._running -= 1
                if is_good and self._limit < MOST_AT_ONCE:
                    self._speed_up()
                self._changed.notify()

    def _speed_up(self) -> None:
        """One more at once for each full round that went well."""
        self._good_count += 1
        if self._good_count >= self._limit:
            self._good_count = 0
            self._limit += 1
            self._pause_s /= 2
            self._changed.notify()

    def _failed(self, error: UfsUnavailableError) -> None:
        names = {Throttled: "ufs_throttled", Damaged: "ufs_damaged_bodies", NoAnswer: "ufs_no_answer"}
        self.count(names.get(type(error), "ufs_server_errors"))
        if not isinstance(error, Throttled):
            return
        with self._changed:
            now = self._now()
            if now < self._resume_at_s:
                return  # all that were on their way together are refused together: one complaint
            self._limit = max(1, min(self._limit, self._running + 1) // 2)
            self._good_count = 0
            self._pause_s = min(MAX_PAUSE_S, max(FIRST_PAUSE_S, self._pause_s * 2))
            self._resume_at_s = now + self._pause_s * random.uniform(0.5, 1.5)  # noqa: S311
