"""Which answers that are still under way are out of date already.

An answer of the master may overtake, or be overtaken by, the news that what it says has changed.
Whoever asks remembers `now` before the question; if its subject was noted since, the answer may be
used once but not be cached: not by the client (`content.Content`), nor by the kernel (`fuse.view`, which
has a log of its own: what the mount itself does is no news to the kernel). The same holds for pages of
a directory listing that the kernel takes bit by bit. Belongs to the trio thread.
"""

from __future__ import annotations

from collections import OrderedDict

Key = int | tuple[int, bytes]
"""An inode number, or (parent, name)."""

MAX_KEYS = 50_000


class ChangeLog:
    """The last change of each recently changed key, on a counter of its own."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._now = 0
        self._floor = 0
        """Answers to questions asked before this are out of date, whatever they are about: notes as
        old as that were dropped."""
        self._last: OrderedDict[Key, int] = OrderedDict()
        """In the order of their last change, so that the first is the oldest (which a dict finds only by
        going over all that was taken from its front)."""

    @property
    def now(self) -> int:
        return self._now

    def note(self, *keys: Key) -> None:
        """These change at this moment."""
        self._now += 1
        for key in keys:
            self._last.pop(key, None)
            self._last[key] = self._now
        while len(self._last) > self._max_keys:
            _, self._floor = self._last.popitem(last=False)

    def note_all(self) -> None:
        """Everything may have changed."""
        self._now += 1
        self._last.clear()
        self._floor = self._now

    def is_current(self, since: int, *keys: Key) -> bool:
        """None of `keys` has changed since `now` was `since`."""
        if since == self._now:
            return True
        if since < self._floor:
            return False
        return all(self._last.get(key, 0) <= since for key in keys)
