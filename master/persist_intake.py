"""How entries of the persist log come into the persister's queue."""

from __future__ import annotations

import math

from alluxiofuse.master.persist_log import Key, PersistLog
from alluxiofuse.master.persist_queue import MAX_KEYS, PathLocks, ReadyQueue
from alluxiofuse.master.records import INTENT_RENAME, IntentRecord
from alluxiofuse.master.store import Store, decode_record


class Intake:
    def __init__(
        self, store: Store, persist_log: PersistLog, queue: ReadyQueue, locks: PathLocks, delay_s: float
    ) -> None:
        """`delay_s`: how long a new entry rests."""
        self._store = store
        self._log = persist_log
        self._queue = queue
        self._locks = locks
        self._delay_s = delay_s
        self._scan_after: bytes | None = None
        """The key at which the last scan of the store stopped; None: it has been around."""

    def resolve_renames_first(self) -> None:
        """Renames that a kill interrupted: first of all, so that locations can be relied on."""
        for _, value in self._store.scan("persist", b"i"):
            intent = decode_record(value, IntentRecord, "an entry of the persist log")
            if intent.kind == INTENT_RENAME:
                self._queue.put(intent.ino, -math.inf)

    def take_in(self, now: float, hurried: set[Key]) -> None:
        """New entries, from the log's memory or by scanning the store; `hurried` (emptied) are due now."""
        for key in self._log.take_touched():
            if not self._queue.put(key, now + self._delay_s):
                self._log.is_overflowed = True
        while hurried:
            self._queue.put(hurried.pop(), now)
        if self._queue.has_dropped:
            self._queue.has_dropped, self._log.is_overflowed = False, True
        if self._log.is_overflowed and len(self._queue) < MAX_KEYS // 2:
            self._scan(now)

    def _scan(self, now: float) -> None:
        """Go on through the store where the last scan stopped; around once, all has been seen."""
        for key, _ in self._store.scan("persist", b"", self._scan_after):
            found = _key_of(key)
            if found is None or (isinstance(found, int) and self._locks.is_held(found)):
                continue
            if len(self._queue) >= MAX_KEYS - 1:
                return
            self._scan_after = key
            self._queue.advance(found, now + self._delay_s)
        if self._scan_after is None or len(self._queue) < MAX_KEYS // 2:
            self._log.is_overflowed = False
        self._scan_after = None


def _key_of(raw: bytes) -> Key | None:
    """The entry that a key of the `persist` family belongs to."""
    if raw[:1] == b"s":
        return int.from_bytes(raw[1:9], "big")
    if raw[:1] == b"r":
        return int.from_bytes(raw[1:9], "big"), raw[9:]
    return None
