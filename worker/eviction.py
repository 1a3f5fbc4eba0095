"""Which slabs give way. LRU, decided synchronously as a plan; `room.Room` carries it out.

A victim is the least recently used clean block of the directory whose slab nobody uses. Its slab
moves as a whole to the next lower tier when that has room (or can make some, by a plan of its own);
otherwise the block is punched out of a big slab, a small slab is dropped. When that is not enough,
dirty slabs that nobody uses are moved down, never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

from alluxiofuse.worker.slab import CLEAN, DIRTY, Slab
from alluxiofuse.worker.tiers import Directory, Tiers


@dataclass(frozen=True, slots=True)
class Drop:
    slab: Slab


@dataclass(frozen=True, slots=True)
class Punch:
    slab: Slab
    pages: int


@dataclass(frozen=True, slots=True)
class Move:
    slab: Slab
    target: Directory
    cost_bytes: int


Step = Drop | Punch | Move


def may_drop(slab: Slab) -> bool:
    return slab.state == CLEAN and slab.is_idle and not slab.is_moving and not slab.is_gone


def may_move(slab: Slab) -> bool:
    return slab.state in (CLEAN, DIRTY) and slab.is_idle and not slab.is_moving and not slab.is_gone


class Planner:
    """One plan under construction: what the directories would have free after its steps."""

    def __init__(self, tiers: Tiers) -> None:
        self.steps: list[Step] = []
        self._tiers = tiers
        self._free: dict[Directory, int] = {}
        self._taken: set[Slab] = set()
        """Slabs that move or are dropped."""
        self._punched: set[Slab] = set()

    def free(self, directory: Directory) -> int:
        return self._free.get(directory, directory.available)

    def make_room(self, directory: Directory, needed_bytes: int) -> bool:
        """Add steps until `directory` has `needed_bytes` free; False when that can't be reached (the
        steps so far stay: they free what can be freed)."""
        if needed_bytes > directory.limit_bytes:
            return False
        for key in directory.order:
            slab, block = key if isinstance(key, tuple) else (key, 0)
            if self.free(directory) >= needed_bytes:
                return True
            if slab not in self._taken and may_drop(slab):
                self._evict(directory, slab, block)
        for slab in directory.dirty:
            if self.free(directory) >= needed_bytes:
                return True
            if slab not in self._taken and may_move(slab):
                self._move(directory, slab)
        return self.free(directory) >= needed_bytes

    def _evict(self, directory: Directory, slab: Slab, block: int) -> None:
        if slab not in self._punched and self._move(directory, slab):
            return
        pages = slab.block_pages(block) & slab.present
        if pages == slab.present:
            self._take(directory, slab)
            self.steps.append(Drop(slab))
            return
        self._punched.add(slab)
        self._free[directory] = self.free(directory) + slab.cost_of(pages)
        self.steps.append(Punch(slab, pages))

    def _move(self, directory: Directory, slab: Slab) -> bool:
        cost = slab.charged
        below = self._tiers.below(directory)
        target = max(below, key=self.free, default=None)
        if target is None:
            return False
        if self.free(target) < cost:
            target = max(below, key=lambda d: d.reachable)
            if target.reachable < cost or not self.make_room(target, cost):
                return False
        self._take(directory, slab)
        self._free[target] = self.free(target) - cost
        self.steps.append(Move(slab, target, cost))
        return True

    def _take(self, directory: Directory, slab: Slab) -> None:
        self._taken.add(slab)
        self._free[directory] = self.free(directory) + slab.charged


def plan_room(tiers: Tiers, directory: Directory, needed_bytes: int) -> tuple[list[Step], bool]:
    """Steps that bring `directory` to `needed_bytes` free, in order, and whether they suffice.
    Valid until the next change of any slab; await-free."""
    planner = Planner(tiers)
    return planner.steps, planner.make_room(directory, needed_bytes)
