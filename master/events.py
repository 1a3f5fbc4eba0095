"""What changed, for clients that watch. Plain state with a wake-up; nothing is stored.

Every event has a sequence number. The first number of a life is taken from the wall clock in
microseconds, so it is beyond all numbers of an earlier life, and a client that comes back after a
restart of the master is told to drop everything.
"""

from __future__ import annotations

from collections import deque

import trio

from alluxiofuse.wire.master_ops import WatchAnswer
from alluxiofuse.wire.types import Event

MAX_EVENTS_PER_ANSWER = 10_000


class _Watcher:
    """A session that watches: its acknowledged number, and its sleeping polls."""

    __slots__ = ("acknowledged", "first_foreign", "sleepers")

    def __init__(self, after: int) -> None:
        self.acknowledged = after
        self.first_foreign = 0
        """While it sleeps: number of the first event that is for it; 0: none yet. What is older is
        its own doing, so it does not matter if that fell out of the buffer."""
        self.sleepers: list[trio.Event] = []


class Events:
    """Owned by the master's only thread; no method awaits between looking and changing."""

    def __init__(self, max_events: int, first_seq: int = 1) -> None:
        self._kept: deque[tuple[int, Event]] = deque(maxlen=max_events)
        """(session that did it, event) of the newest numbers, ending with `seq`."""
        self.seq = first_seq
        """Number of the newest event."""
        self._watchers: dict[int, _Watcher] = {}
        self._acknowledged = trio.Event()
        """Replaced whenever some session's acknowledged number rises or a session ends."""

    def publish(self, origin_session: int, *events: Event) -> int:
        """Number of the last one. Sessions other than `origin_session` (0: nobody) are woken."""
        for event in events:
            self.seq += 1
            self._kept.append((origin_session, event))
        for session_id, watcher in self._watchers.items():
            if session_id != origin_session and events:
                watcher.first_foreign = watcher.first_foreign or self.seq - len(events) + 1
                for sleeper in watcher.sleepers:
                    sleeper.set()
        return self.seq

    async def watch(self, session_id: int, after: int, wait_s: float) -> WatchAnswer:
        """See `master_ops.Watch`. The caller has checked the session."""
        watcher = self._watchers.get(session_id)
        if watcher is None:
            watcher = self._watchers[session_id] = _Watcher(after)
        self._acknowledge(watcher, after)
        answer = self._collect(session_id, after)
        if answer.events or answer.is_reset or wait_s == 0:
            return answer
        seen = self.seq
        watcher.first_foreign = 0
        wake = trio.Event()
        watcher.sleepers.append(wake)
        try:
            with trio.move_on_after(wait_s):
                await wake.wait()
        finally:
            watcher.sleepers.remove(wake)
        if not watcher.first_foreign:
            return WatchAnswer(self.seq, False, [])
        return self._collect(session_id, max(seen, watcher.first_foreign - 1))

    def _collect(self, session_id: int, after: int) -> WatchAnswer:
        oldest = self.seq - len(self._kept) + 1
        if after + 1 < oldest or after > self.seq:
            return WatchAnswer(self.seq, True, [])
        found: list[Event] = []
        for index in range(after + 1 - oldest, len(self._kept)):
            origin, event = self._kept[index]
            if origin != session_id:
                found.append(event)
                if len(found) == MAX_EVENTS_PER_ANSWER:
                    return WatchAnswer(oldest + index, False, found)
        return WatchAnswer(self.seq, False, found)

    def _acknowledge(self, watcher: _Watcher, seq: int) -> None:
        if seq > watcher.acknowledged:
            watcher.acknowledged = seq
            self._stir()

    def _stir(self) -> None:
        self._acknowledged.set()
        self._acknowledged = trio.Event()

    def forget(self, session_id: int) -> None:
        """The session ended: nobody waits for its acknowledgement any more."""
        watcher = self._watchers.pop(session_id, None)
        if watcher is not None:
            for sleeper in watcher.sleepers:
                sleeper.set()
            self._stir()

    async def wait_acknowledged(self, seq: int, timeout_s: float) -> bool:
        """Until every watching session has applied all events up to `seq`; False after `timeout_s`."""
        with trio.move_on_after(timeout_s):
            while any(w.acknowledged < seq for w in self._watchers.values()):
                await self._acknowledged.wait()
            return True
        return False
