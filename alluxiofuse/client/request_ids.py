"""Ids of a client's changes: which slots are free, and the next number (`wire.messages.Change`)."""

from __future__ import annotations

import trio

from alluxiofuse.wire.messages import MAX_SLOTS, request_id


class RequestIds:
    """Numbers go on through all sessions of a client, so they grow in each slot whatever happens.
    Owned by the trio thread of its Session."""

    def __init__(self) -> None:
        self._free: list[int] = []
        """Slots that were used and are not now, the last one used last: few are used again and again."""
        self._slot_count = 0
        self._number = 0
        self._given_back = trio.Event()

    async def take(self) -> int:
        """A slot, for one request at a time, until `give_back`. Waits when all are in use."""
        while not self._free:
            if self._slot_count < MAX_SLOTS:
                self._slot_count += 1
                return self._slot_count - 1
            self._given_back = trio.Event()
            await self._given_back.wait()
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """The request's answer was heard, or nobody waits for it any more."""
        self._free.append(slot)
        self._given_back.set()

    def next(self, slot: int) -> int:
        """An id for a new request in this slot."""
        self._number += 1
        return request_id(slot, self._number)
