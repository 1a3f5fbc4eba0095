"""How far to fetch ahead of a reader. A plain state machine, one per lock."""

from __future__ import annotations

FIRST_WINDOW_PAGES = 8
"""One range as under storages like them; a whole small file."""
GROWTH = 4
REORDER_PAGES = 16
"""How far behind the newest access one may be and still belong to the same sequential reader: the
kernel has several requests of its read-ahead under way, which arrive in any order."""
_BULK_BYTES = 128 << 10
"""A first access at the start that asks for this much looks like a sequential one."""


class ReadAhead:
    """Sees the page ranges that one reader misses and answers what to fetch beyond them.

    The window grows by `GROWTH` with each step of a sequential reader, up to `limit_pages`, and
    shrinks as much by each jump. A single small access never fetches more than its own pages.
    """

    __slots__ = ("end", "seen", "window")

    def __init__(self) -> None:
        self.seen = 0
        """One beyond the last page that was asked for."""
        self.end = 0
        """One beyond the last page that was fetched ahead."""
        self.window = 0

    def advance(self, first: int, end: int, length_bytes: int, limit_pages: int) -> tuple[int, int]:
        """[first, end) was asked for with `length_bytes`; the range of pages to fetch ahead now
        (empty when enough is under way)."""
        fresh = self.seen == 0
        if not fresh and self.seen - REORDER_PAGES <= first and end <= self.seen:
            return end, end
        is_sequential = (
            first == 0 and length_bytes >= _BULK_BYTES
            if fresh
            else self.seen - REORDER_PAGES <= first <= max(self.seen, self.end)
        )
        self.seen = max(end, 1)
        if not is_sequential:
            self.window //= GROWTH
            self.end = end
            return end, end
        ahead = max(self.end, end)
        if ahead - end > self.window // 2:
            return end, end
        self.window = min(limit_pages, max(FIRST_WINDOW_PAGES, self.window * GROWTH))
        self.end = max(ahead, end + self.window)
        return ahead, self.end
