"""What keeps failing, and when it is tried again. Plain state of the persister."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from alluxiofuse.errors import AlluxioFuseError, UfsError, UfsUnavailableError
from alluxiofuse.master.persist_log import Key

MAX_FAILURES = 100_000
MAX_RETRY_S = 60.0
MAX_UNAVAILABLE_RETRY_S = 5.0
"""Of what failed because the store did not answer: then the whole mount rests (`persist_lanes`)."""


@dataclass(slots=True)
class Failure:
    count: int
    message: str
    is_permanent: bool
    """Will not go away by waiting (permission, a name the store refuses); retried all the same."""


class Failures:
    def __init__(self, first_retry_s: float) -> None:
        self.first_retry_s = first_retry_s
        self._known: dict[Key, Failure] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._known

    def get(self, key: Key) -> Failure | None:
        return self._known.get(key)

    def failed(self, key: Key, exc: AlluxioFuseError) -> Failure:
        is_permanent = isinstance(exc, UfsError) and not isinstance(exc, UfsUnavailableError)
        return self.note(key, exc.message or exc.code, is_permanent)

    def note(self, key: Key, message: str, is_permanent: bool = False) -> Failure:
        """One more time; beyond `MAX_FAILURES` entries are not remembered."""
        known = self._known.pop(key, None)
        failure = Failure(1 if known is None else known.count + 1, message, is_permanent)
        if len(self._known) < MAX_FAILURES:
            self._known[key] = failure
        return failure

    def forget(self, key: Key) -> None:
        self._known.pop(key, None)

    def backoff_s(self, key: Key) -> float:
        """How long to wait before the next attempt."""
        failure = self._known.get(key)
        count = 1 if failure is None else min(failure.count, 20)
        most_s = MAX_RETRY_S if failure is None or failure.is_permanent else MAX_UNAVAILABLE_RETRY_S
        backoff_s: float = min(most_s, self.first_retry_s * 2.0 ** (count - 1))
        return backoff_s * random.uniform(0.5, 1.5)  # noqa: S311

    def items(self) -> Iterator[tuple[Key, Failure]]:
        yield from list(self._known.items())
