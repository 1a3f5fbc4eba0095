"""Ids of a client's changes: which slots are free, and the next number (`wire.messages.Change`)."""

from __future__ import annotations

from collections.abc import Collection

import trio

from alluxiofuse.client.intents import LIFE_SHIFT
from alluxiofuse.wire.messages import MAX_SLOTS


class RequestIds:
    """Numbers go on through all sessions of a client, so they grow in each slot whatever happens.
    Owned by the trio thread of its Session."""

    def __init__(self, life: int = 0, reserved: Collection[int] = ()) -> None:
        """`life`: of a client that has taken over from others, how many there were. `reserved`: slots that
        are in use until they are given back."""
        self._free: list[int] = []
        """Slots that were used and are not now, the last one used last: few are used again and again."""
        self._slot_count = 0
        self._reserved = frozenset(reserved)
        self._number = life << LIFE_SHIFT
        self._given_back = trio.Event()

    async def take(self) -> int:
        """A slot, for one request at a time, until `give_back`. Waits when all are in use."""
        while not self._free:
            if self._slot_count < MAX_SLOTS:
                self._slot_count += 1
                if self._slot_count - 1 in self._reserved:
                    continue
                return self._slot_count - 1
            self._given_back = trio.Event()
            await self._given_back.wait()
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """The request's answer was heard, or nobody waits for it any more."""
        self._free.append(slot)
        self._given_back.set()

    def next_number(self) -> int:
        """For a new request, in any slot."""
        self._number += 1
        return self._number
