"""What slabs cost: the sums and orders of the directories. No I/O.

Invariants (`validation.validate` checks them):
* `directory.used` = sum of `charged` of its slabs + `held`; `charged` = cost of the present pages +
  `reserved` (while WRITING: `reserved` alone).
* `directory.evictable` = sum of `charged` of its clean slabs without locks, pins or a move.
* `directory.order` names exactly the blocks of clean slabs that have a present page.
* `dirty_bytes` = sum of `charged` of sealed dirty slabs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from alluxiofuse.ids import DEFAULT_BLOCK_BYTES, PAGE_BYTES
from alluxiofuse.worker.slab import BLOCK_PAGES, CLEAN, DIRTY, WRITING, Slab, round_up
from alluxiofuse.worker.tiers import Directory, Tiers


def joined(granted_end: int, islands: int) -> tuple[int, int]:
    """The granted end moved behind the granted pages that follow it without a gap, and the rest."""
    page = granted_end // PAGE_BYTES
    rest = islands >> page
    run = (~rest & (rest + 1)).bit_length() - 1
    if run:
        granted_end = (page + run) * PAGE_BYTES
    return granted_end, rest >> run << (page + run)


def writing_charge(granted_end: int, islands: int) -> int:
    """What a slab costs while it is open for writing below `granted_end` and in `islands`. What it
    costs once it is sealed is never more, as long as the page in which the granted end lies is the
    file's last."""
    return round_up(granted_end) + islands.bit_count() * PAGE_BYTES


def order_key(slab: Slab, block: int) -> Slab | tuple[Slab, int]:
    """In `Directory.order`. A clean slab keeps its size, so it keeps its keys."""
    return (slab, block) if slab.size > DEFAULT_BLOCK_BYTES else slab


class Accounts:
    """The part of `slabs.Slabs` that counts."""

    def __init__(self, tiers: Tiers, high_watermark: float) -> None:
        self.tiers = tiers
        self.dirty_bytes = 0
        self.room_changed: Callable[[], None] = lambda: None
        """Called when something may have become free."""
        self.pressure: Callable[[], None] = lambda: None
        """Called when a directory rose above the high watermark."""
        self._high_watermark = high_watermark

    # --- accounting -------------------------------------------------------------------------------

    def account(self, slab: Slab) -> None:
        """Bring the directory's sums in line with the slab; tell who waits for room."""
        directory = slab.directory
        is_writing = slab.state == WRITING
        charged = 0
        if not slab.is_gone:
            charged = slab.reserved + (0 if is_writing else slab.cost_of(slab.present))
        is_evictable = slab.state == CLEAN and slab.is_idle and not slab.is_moving and not slab.is_gone
        evictable = charged if is_evictable else 0
        gained = (slab.charged - charged) + (evictable - slab.evictable)
        directory.used += charged - slab.charged
        directory.evictable += evictable - slab.evictable
        is_higher = charged > slab.charged
        slab.charged, slab.evictable = charged, evictable
        if gained > 0:
            self.room_changed()
        if is_higher and directory.used > self._high_watermark * directory.limit_bytes:
            self.pressure()

    def reserve(self, slab: Slab, size_bytes: int) -> bool:
        """Charge bytes about to be written, when they fit; nothing is evicted."""
        if size_bytes > slab.directory.available:
            return False
        slab.reserved += size_bytes
        self.account(slab)
        return True

    def unreserve(self, slab: Slab, size_bytes: int) -> None:
        slab.reserved -= size_bytes
        self.account(slab)

    def hold(self, directory: Directory, size_bytes: int) -> bool:
        """Room for a slab that is being moved to `directory`."""
        if size_bytes > directory.available:
            return False
        directory.used += size_bytes
        directory.held += size_bytes
        return True

    def release(self, directory: Directory, size_bytes: int) -> None:
        directory.used -= size_bytes
        directory.held -= size_bytes
        self.room_changed()

    def touch(self, slab: Slab, pages: Iterable[int]) -> None:
        """These pages were used now."""
        order = slab.directory.order
        for block in {page // BLOCK_PAGES for page in pages}:
            key = order_key(slab, block)
            if key in order:
                order.move_to_end(key)

    def touch_all(self, slab: Slab) -> None:
        self.touch(slab, range(0, slab.page_count, BLOCK_PAGES))

    def enlist(self, slab: Slab, pages: int) -> None:
        """Blocks of `pages` that became present become the most recently used of a clean slab."""
        order = slab.directory.order
        step = BLOCK_PAGES // 8
        raw = pages.to_bytes((pages.bit_length() + 7) // 8, "little")
        first = ((pages & -pages).bit_length() - 1) // BLOCK_PAGES if pages else 0
        for block in range(first, -(-len(raw) // step)):
            if any(raw[block * step : (block + 1) * step]):
                key = order_key(slab, block)
                order[key] = None
                order.move_to_end(key)

    def delist(self, slab: Slab) -> None:
        order = slab.directory.order
        for block in range(slab.block_count):
            order.pop(order_key(slab, block), None)
        slab.directory.dirty.pop(slab, None)

    def count_dirty(self, slab: Slab, state: int) -> None:
        if slab.state == DIRTY and state != DIRTY:
            self.dirty_bytes -= slab.charged
