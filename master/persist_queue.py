"""Which entries of the persist log are due, which wait for others, and which paths are in use.

Plain state of the persister, no I/O, no clock of its own. Bounded: entries beyond `MAX_KEYS` are not
taken in; the persister then scans the store again later.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from alluxiofuse.master import places
from alluxiofuse.master.persist_log import Key

MAX_KEYS = 100_000


class ReadyQueue:
    """Keys with the instant (monotonic, seconds) from which they may be looked at."""

    def __init__(self) -> None:
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._order = itertools.count()
        self._blocked: dict[Key, dict[Key, None]] = {}
        """Blocker -> those that wait for it (which are in `_due` too, as a second chance)."""
        self._parked: dict[int, dict[Key, None]] = {}
        """Mount -> those that were due when nothing more could be started there; oldest first. Minus the
        mount id: uploads, when no more of these could be."""
        self._parked_count = 0
        self.has_dropped = False
        """Keys were given up: they are to be found by scanning the store. Reset by who does."""

    def __len__(self) -> int:
        return len(self._due) + self._parked_count

    def park(self, mount_id: int, key: Key) -> None:
        """It was popped, but its mount takes no more (or no more uploads: minus its id) now."""
        parked = self._parked.setdefault(mount_id, {})
        self._parked_count += key not in parked
        parked[key] = None

    def parked(self) -> list[int]:
        """Mounts that have parked keys."""
        return list(self._parked)

    def unpark(self, mount_id: int, count: int, now_s: float) -> None:
        """The `count` oldest are due again."""
        parked = self._parked.get(mount_id, {})
        for key in list(itertools.islice(parked, count)):
            del parked[key]
            self._parked_count -= 1
            self._due.pop(key, None)  # an instant of its own, later than this
            self.put(key, now_s)
        if not parked:
            self._parked.pop(mount_id, None)

    def put(self, key: Key, due_s: float) -> bool:
        """Enter, or change the instant. A queue that is full of what is parked gives some of that up
        (`has_dropped`), so that one mount that is out of order does not stop the others. False: full."""
        if key not in self._due and len(self) >= MAX_KEYS and not self._drop_parked():
            return False
        self._due[key] = due_s
        heapq.heappush(self._heap, (due_s, next(self._order), key))
        if len(self._heap) > 4 * MAX_KEYS:
            self._heap = [(due, next(self._order), key) for key, due in self._due.items()]
            heapq.heapify(self._heap)
        return True

    def _drop_parked(self) -> bool:
        """The newest one of the mount with most."""
        mount_id = max(self._parked, key=lambda one: len(self._parked[one]), default=None)
        if mount_id is None:
            return False
        parked = self._parked[mount_id]
        parked.popitem()
        self._parked_count -= 1
        if not parked:
            del self._parked[mount_id]
        self.has_dropped = True
        return True

    def advance(self, key: Key, due_s: float) -> None:
        """Not later than `due_s`."""
        known = self._due.get(key)
        if known is None or known > due_s:
            self.put(key, due_s)

    def block(self, key: Key, blocker: Key, due_s: float) -> None:
        """Due when `blocker` has finished, at the latest at `due_s`."""
        self.put(key, due_s)
        self._blocked.setdefault(blocker, {})[key] = None

    def finished(self, blocker: Key, now_s: float) -> None:
        for key in self._blocked.pop(blocker, ()):
            self.advance(key, now_s)

    def pop(self, now_s: float) -> Key | None:
        """A key that is due, taken out."""
        while self._heap and self._heap[0][0] <= now_s:
            due, _, key = heapq.heappop(self._heap)
            if self._due.get(key) == due:
                del self._due[key]
                return key
        return None

    def resting(self) -> list[Key]:
        """All keys that nothing else has to finish for."""
        waiting = {key for keys in self._blocked.values() for key in keys}
        return [key for key in self._due if key not in waiting]

    def due_s(self, key: Key) -> float | None:
        return self._due.get(key)

    def discard(self, key: Key) -> None:
        self._due.pop(key, None)

    @property
    def next_due_s(self) -> float | None:
        while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None


@dataclass(frozen=True, slots=True)
class Lock:
    mount_id: int
    path: bytes
    is_tree: bool
    """With everything below."""


class PathLocks:
    """Paths at which something is going on right now. Bounded by the persister's parallelism: some
    thousands when directories are removed, so that every question is answered by looking up the path
    and those above it, never by going through all."""

    def __init__(self) -> None:
        self._held: dict[Key, tuple[Lock, ...]] = {}
        self._at: dict[_Place, dict[Key, bool]] = {}
        """Who holds this very path; True: with everything below."""
        self._below: dict[_Place, Counter[Key]] = {}
        """Who holds something below this path, and how much."""

    def conflict(self, locks: Iterable[Lock], key: Key) -> Key | None:
        """Who else holds one that conflicts."""
        for lock in locks:
            place = (lock.mount_id, lock.path)
            found = _other(self._at.get(place, ()), key)
            if found is None and lock.is_tree:
                found = _other(self._below.get(place, ()), key)
            if found is None:
                found = self._tree_above(lock, key)
            if found is not None:
                return found
        return None

    def _tree_above(self, lock: Lock, key: Key) -> Key | None:
        for above in _above(lock.path):
            for holder, is_tree in self._at.get((lock.mount_id, above), {}).items():
                if is_tree and holder != key:
                    return holder
        return None

    def hold(self, key: Key, locks: Iterable[Lock]) -> None:
        """Instead of what the key held before."""
        self.release(key)
        self._held[key] = tuple(locks)
        for lock in self._held[key]:
            at = self._at.setdefault((lock.mount_id, lock.path), {})
            at[key] = at.get(key, False) or lock.is_tree
            for above in _above(lock.path):
                self._below.setdefault((lock.mount_id, above), Counter())[key] += 1

    def release(self, key: Key) -> None:
        for lock in self._held.pop(key, ()):
            _take_out(self._at, (lock.mount_id, lock.path), key)
            for above in _above(lock.path):
                _take_out(self._below, (lock.mount_id, above), key)

    def is_held(self, key: Key) -> bool:
        return key in self._held


_Place = tuple[int, bytes]
"""(mount id, path)."""


def _above(path: bytes) -> Iterator[bytes]:
    """All directories above, the mount's own first."""
    if path:
        yield b""
    yield from places.prefixes(path)


def _other(holders: Iterable[Key], key: Key) -> Key | None:
    return next((holder for holder in holders if holder != key), None)


def _take_out(
    table: dict[_Place, Counter[Key]] | dict[_Place, dict[Key, bool]], place: _Place, key: Key
) -> None:
    holders = table.get(place)
    if holders is None or key not in holders:
        return
    if isinstance(holders, Counter) and holders[key] > 1:
        holders[key] -= 1
        return
    del holders[key]
    if not holders:
        del table[place]
