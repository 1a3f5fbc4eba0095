"""Tiers and their directories: quotas, what is used, the order of eviction, the allocator. No I/O.

Owned by `slabs.Slabs`, which keeps `used`, `evictable` and the orders up to date.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from alluxiofuse.wire.types import Tier

if TYPE_CHECKING:
    from alluxiofuse.worker.slab import Slab

WRITE_SHARE = 0.2
"""Of a directory that takes new files: not to be filled by fetching for files that are open."""


class Directory:
    """One storage directory of a tier."""

    def __init__(self, root: str, directory_id: int, quota_bytes: int, tier: int, is_durable: bool) -> None:
        self.root = root
        self.directory_id = directory_id
        self.quota_bytes = quota_bytes
        self.tier = tier
        """Number of its tier, 0 is the fastest."""
        self.is_durable = is_durable
        self.is_for_writing = True
        """New files are written here: `Tiers` says so."""
        self.limit_bytes = quota_bytes
        """At most the quota; less while others fill the filesystem."""
        self.takes_passthrough = False
        """It can be told who has its files open (`openers`)."""
        self.tells_each_write = False
        """Two states of a file's content never have the same ctime (`layout.tells_each_write`)."""
        self.trouble = ""
        """Why it is out of use; see `health`."""
        self.is_readable = True
        self.is_suspect = False
        """A file operation failed since it was last looked at."""
        self.used = 0
        """Charged to slabs, and held for slabs on their way here."""
        self.held = 0
        """The part of `used` for slabs that are being moved here."""
        self.evictable = 0
        """The part of `used` of clean slabs that nobody uses."""
        self.order: OrderedDict[Slab | tuple[Slab, int], None] = OrderedDict()
        """All clean blocks, least recently used first, slabs in use included: (slab, block), or just the
        slab when it has one block only (70 bytes less for each of a million small files)."""
        self.dirty: OrderedDict[Slab, None] = OrderedDict()
        """Sealed dirty slabs, oldest first: they can be moved, not dropped."""

    @property
    def available(self) -> int:
        return 0 if self.trouble else self.limit_bytes - self.used

    @property
    def reachable(self) -> int:
        """What could be had by evicting all that may be evicted."""
        return 0 if self.trouble else self.available + self.evictable

    @property
    def reader_room(self) -> int:
        """How much more may be fetched for files that are open: what they hold can't be evicted, and
        the rest is left for new files, whose writers would get ENOSPC."""
        kept = int(self.limit_bytes * WRITE_SHARE) if self.is_for_writing else 0
        return self.reachable - kept

    def note_full(self) -> None:
        """The filesystem said ENOSPC below the quota: nothing more until `refit`."""
        self.limit_bytes = max(0, min(self.limit_bytes, self.used))

    def refit(self, free_bytes: int) -> bool:
        """The filesystem has `free_bytes` now; True when there is more room than before."""
        before = self.limit_bytes
        self.limit_bytes = min(self.quota_bytes, max(before, self.used + free_bytes))
        return self.limit_bytes > before


class Tiers:
    """All directories, fastest tier first. The allocator is MaxFree: within a tier, the directory
    with the most room."""

    def __init__(self, aliases: list[str], directories: list[Directory]) -> None:
        self.aliases = aliases
        self.directories = directories
        has_durable = any(d.is_durable for d in directories)
        for directory in directories:
            directory.is_for_writing = directory.is_durable == has_durable
        self._by_tier: list[list[Directory]] = [
            [d for d in directories if d.tier == number] for number in range(len(aliases))
        ]

    def below(self, directory: Directory) -> list[Directory]:
        """Directories of the next lower tier."""
        lower = directory.tier + 1
        return [d for d in self._by_tier[lower] if not d.trouble] if lower < len(self._by_tier) else []

    def for_reading(self, size_bytes: int, only_durable: bool = False) -> Directory | None:
        """Where a new slab of clean bytes goes: the first tier with a directory that can hold all of
        it (after evicting), else the roomiest directory of all. None when no directory has any room."""
        candidates = [d for d in self.directories if (d.is_durable or not only_durable) and not d.trouble]
        for group in self._grouped(candidates):
            fitting = [d for d in group if d.reachable >= size_bytes]
            if fitting:
                return max(fitting, key=lambda d: (d.available >= size_bytes, d.reachable))
        best = max(candidates, key=lambda d: d.reachable, default=None)
        return best if best is not None and best.reachable > 0 else None

    def for_writing(self, size_bytes: int) -> list[Directory]:
        """Directories for a slab that will be written, best first: of the first durable tier that
        can hold `size_bytes`; MEM only where no durable tier works. At least one, perhaps in trouble."""
        working = [d for d in self.directories if not d.trouble] or self.directories
        is_durable = any(d.is_durable for d in working)
        candidates = [d for d in working if d.is_durable == is_durable]
        ranked: list[Directory] = []
        for group in self._grouped(candidates):
            ranked += sorted(group, key=lambda d: (-int(d.available >= size_bytes), -d.reachable))
        return sorted(ranked, key=lambda d: d.reachable < size_bytes)

    def _grouped(self, directories: list[Directory]) -> Iterator[list[Directory]]:
        for number in range(len(self.aliases)):
            group = [d for d in directories if d.tier == number]
            if group:
                yield group

    def report(self) -> list[Tier]:
        return [
            Tier(
                alias,
                sum(d.quota_bytes for d in group if not d.trouble),
                sum(max(0, d.used) for d in group if not d.trouble),
                [d.root for d in group],
                [f"{d.root}: {d.trouble}"[:500] for d in group if d.trouble],
            )
            for alias, group in zip(self.aliases, self._by_tier, strict=True)
        ]
