"""When metadata of under storages must be asked for, and what needn't be asked again.

The notes of what was compared and when: synchronous, in memory only, cheap enough for every lookup.
`ufs_loader` does the asking.
"""

from __future__ import annotations

import math
import stat
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from alluxiofuse.ids import ROOT_INO
from alluxiofuse.master import places
from alluxiofuse.master.clock import Clock
from alluxiofuse.master.mounts import MountTable
from alluxiofuse.master.persist_plan import is_clean
from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.store import Store, u64

K = TypeVar("K")
T = TypeVar("T")

PAGE_ENTRIES = 1000
"""Of a listing."""
MIN_ASKS = 8
LOCAL_ENTRIES_PER_ASK = 10
"""Asking for a name costs as much as listing and comparing this many, at least, in a store with
directories (measured: 0.4 ms for one, 20 us for each of many)."""
MAX_ABSENT = 100_000
"""Notes of each kind."""
FOREVER_S = 3600.0
"""cache_s where metadata is never compared again."""
COMPARE_SHARE = 10
"""A directory whose comparison took a while is compared again after so many times that at the earliest,
so that at most a tenth of the time goes into it however large it is."""
MAX_COMPARED_S = 300.0
"""But no later than this."""


class Freshness:
    """Owned by the master's thread."""

    def __init__(self, store: Store, mounts: MountTable, clock: Clock) -> None:
        self._store = store
        self._mounts = mounts
        self._clock = clock
        self._absent: OrderedDict[tuple[int, bytes], int] = OrderedDict()
        """Names that the store did not have, and when (wall clock)."""
        self._compared: OrderedDict[int, tuple[int, float]] = OrderedDict()
        """Of directories: when a whole listing was begun (wall clock), and for how long all entries count
        as compared with it."""
        self._asked: OrderedDict[int, tuple[int, int]] = OrderedDict()
        """Of directories: how many names the last listing had, how many were asked for since."""
        self._unreachable_until_s: dict[int, float] = {}
        """Of mounts whose store did not answer."""

    def needs_child(self, parent: int, parent_record: InodeRecord, name: bytes, child: int | None) -> bool:
        """Before a lookup of `name` is answered: `load_child`?"""
        interval_s = self._mounts.sync_interval_s(parent_record.mount_id)
        if child is not None:
            if interval_s < 0:
                return False
            record = self._store.inode(child)
            return record is not None and self.needs_refresh(child, record)
        if not parent_record.is_in_ufs and parent != ROOT_INO and parent_record.is_loaded:
            return False
        if parent_record.is_loaded:
            if interval_s < 0 or self._is_fresh(parent_record.listed_at_ns, interval_s):
                return False
            if self._is_unreachable(parent_record.mount_id):
                return False
            if self._listed_left_s(parent) > 0:
                return False
        absent_ns = self._absent.get((parent, name))
        if absent_ns is None:
            return True
        return interval_s >= 0 and not self._is_fresh(absent_ns, interval_s)

    def needs_children(self, ino: int, record: InodeRecord) -> bool:
        """Before a listing is answered: `load_children`?"""
        if not record.is_loaded:
            return True
        interval_s = self._mounts.sync_interval_s(record.mount_id)
        if interval_s < 0 or self._listed_left_s(ino) > 0:
            return False
        if not record.is_in_ufs and not places.is_mount_root(self._store, ino, record):
            return False
        return not self._is_unreachable(record.mount_id) and not self._is_moving(ino, record)

    def needs_refresh(self, ino: int, record: InodeRecord) -> bool:
        """Before attributes are answered: `refresh`?"""
        interval_s = self._mounts.sync_interval_s(record.mount_id)
        if interval_s < 0 or self._is_fresh(record.checked_at_ns, interval_s):
            return False
        if self._listed_left_s(record.parent) > 0:
            return False
        if not record.is_in_ufs or not record.parent or record.is_local_only or record.home:
            return False
        if ino == ROOT_INO or self._is_unreachable(record.mount_id):
            return False
        if stat.S_ISDIR(record.mode):
            if not self._mounts.capabilities(record.mount_id).has_directories:
                return False
            if places.is_mount_root(self._store, ino, record):
                return False
        return self._store.get("persist", b"s" + u64(ino)) is None

    def cache_s(self, record: InodeRecord) -> float:
        """For how long attributes may be cached without asking again."""
        interval_s = self._mounts.sync_interval_s(record.mount_id)
        if interval_s < 0:
            return FOREVER_S
        if interval_s == 0 or not is_clean(record):
            return interval_s
        left_s = max(self._listed_left_s(record.parent), self._own_left_s(record, interval_s))
        if left_s <= 0 and (stat.S_ISDIR(record.mode) or not record.checked_at_ns):
            # Roots, and directories that wait in the persist log, are not compared; whoever asks for
            # a name below compares that. Without this every path through them would ask again.
            return interval_s
        return max(0.0, left_s)

    def listed_cache_s(self, directory: int, record: InodeRecord) -> Callable[[InodeRecord], float]:
        """`cache_s` for the entries of one page of a listing, at once."""
        left_s, mount_id = self._listed_left_s(directory), record.mount_id
        if left_s <= 0:
            return self.cache_s

        def cache_s(child: InodeRecord) -> float:
            if child.parent == directory and child.mount_id == mount_id and is_clean(child):
                return left_s
            return self.cache_s(child)

        return cache_s

    def _listed_left_s(self, directory: int) -> float:
        """For how long the entries of a directory still count as compared, by a whole listing; that they
        were found as they were is noted once, not in thousands of records. 0: they do not."""
        at_ns, valid_s = self._compared.get(directory, (0, 0.0))
        return max(0.0, valid_s - self._age_s(at_ns)) if valid_s else 0.0

    def _own_left_s(self, record: InodeRecord, interval_s: float) -> float:
        """The same of an inode that was compared by itself."""
        if not record.checked_at_ns:
            return 0.0
        return max(0.0, interval_s - self._age_s(record.checked_at_ns))

    def _is_fresh(self, at_ns: int, interval_s: float) -> bool:
        return self._age_s(at_ns) < interval_s

    def _age_s(self, at_ns: int) -> float:
        """How long ago by the wall clock, as notes of it outlive this process. What lies in the future was
        noted before the clock was set back: infinitely long ago."""
        age_ns = self._clock.now_ns() - at_ns
        return age_ns / 1e9 if age_ns >= 0 else math.inf

    def _is_unreachable(self, mount_id: int) -> bool:
        """It rests; or what it says could not be written down."""
        if self._store.is_failed:
            return True
        return self._clock.monotonic() < self._unreachable_until_s.get(mount_id, 0.0)

    def _is_moving(self, ino: int, record: InodeRecord) -> bool:
        """It, or a directory above, has not been moved in the store yet: compared after that."""
        return record.location is not None or places.moving_ancestor(self._store, record) != 0

    # --- which way is cheaper ---------------------------------------------------------------------

    def _is_listing_cheaper(self, parent: int, mount_id: int) -> bool:
        """Many single names were asked for since the last listing: one listing then answers for all
        names until the interval is over. What is asked in vain costs at most as much again."""
        known_count, asked_count = self._asked.get(parent, (0, 0))
        remember(self._asked, parent, (known_count, asked_count + 1))
        has_directories = self._mounts.capabilities(mount_id).has_directories
        entries_per_ask = LOCAL_ENTRIES_PER_ASK if has_directories else PAGE_ENTRIES // 2
        return asked_count >= MIN_ASKS + known_count // entries_per_ask

    def _is_comparison_cheaper(self, record: InodeRecord) -> bool:
        interval_s = self._mounts.sync_interval_s(record.mount_id)
        above = self._store.inode(record.parent) if record.parent else None
        if interval_s <= 0 or above is None or not above.is_loaded or above.mount_id != record.mount_id:
            return False
        return self._is_listing_cheaper(record.parent, record.mount_id)

    # --- what was found out -----------------------------------------------------------------------

    def _note_compared(self, ino: int, mount_id: int, began_ns: int, cost_s: float) -> None:
        """All entries, by a listing. Where metadata is compared always or never, nothing is noted."""
        interval_s = self._mounts.sync_interval_s(mount_id)
        if interval_s > 0:
            valid_s = max(interval_s, min(MAX_COMPARED_S, COMPARE_SHARE * cost_s))
            remember(self._compared, ino, (began_ns, valid_s))

    def _note_listed(self, ino: int, count: int) -> None:
        """How many names there are; none was asked for by itself since."""
        remember(self._asked, ino, (count, 0))

    def _note_same(self, ino: int) -> None:
        """The same, when they are as many as before."""
        self._note_listed(ino, self._asked.get(ino, (0, 0))[0])

    def _note_absent(self, parent: int, name: bytes) -> None:
        remember(self._absent, (parent, name), self._clock.now_ns())

    def _note_unreachable(self, mount_id: int, pause_s: float) -> None:
        self._unreachable_until_s[mount_id] = self._clock.monotonic() + pause_s


def remember(known: OrderedDict[K, T], key: K, value: T) -> None:
    """As the newest; the oldest goes when there are too many."""
    known.pop(key, None)
    known[key] = value
    if len(known) > MAX_ABSENT:
        known.popitem(last=False)
