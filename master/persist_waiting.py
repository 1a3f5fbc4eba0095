"""Entries of the persist log that have waited for long without failing, and for what: for people."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator

from alluxiofuse.master.persist_failures import Failures
from alluxiofuse.master.persist_log import Key
from alluxiofuse.master.persist_plan import Blocked, Job, Planner
from alluxiofuse.master.records import RemoveEntry, SyncEntry
from alluxiofuse.master.store import Store, decode_record

LONG_NS = 60_000_000_000
MAX_LOOKED_AT = 1000
"""The first entries of each kind: those of inodes by number, so mostly the oldest."""
MAX_LINES = 20


def waiting(
    store: Store,
    planner: Planner,
    name: Callable[[Key], str],
    failing: Failures,
    lost: Container[int],
    now_ns: int,
) -> list[str]:
    """One line each. `failing`: told elsewhere. `lost`: inodes whose bytes no running worker has."""
    lines: list[str] = []
    for key, queued_at_ns in _entries(store):
        if now_ns - queued_at_ns < LONG_NS or key in failing:
            continue
        if len(lines) == MAX_LINES:
            lines.append("and more")
            break
        is_lost = isinstance(key, int) and key in lost
        reason = "no running worker has its bytes" if is_lost else _reason(store, planner, name, key)
        lines.append(f"{name(key)}, for {(now_ns - queued_at_ns) // 1_000_000_000} s: {reason}")
    return lines


def _entries(store: Store) -> Iterator[tuple[Key, int]]:
    for number, (raw, value) in enumerate(store.scan("persist", b"s")):
        if number == MAX_LOOKED_AT:
            break
        yield int.from_bytes(raw, "big"), decode_record(value, SyncEntry, "an entry").queued_at_ns
    for number, (raw, value) in enumerate(store.scan("persist", b"r")):
        if number == MAX_LOOKED_AT:
            break
        key = int.from_bytes(raw[:8], "big"), raw[8:]
        yield key, decode_record(value, RemoveEntry, "an entry").queued_at_ns


def _reason(store: Store, planner: Planner, name: Callable[[Key], str], key: Key) -> str:
    record = store.inode(key) if isinstance(key, int) else None
    if record is not None and record.home:
        return f"open for writing at worker {record.home}"
    found = planner.plan(key)
    if isinstance(found, Job):
        return f"its turn ({found.kind.name.lower()})"
    if isinstance(found, Blocked):
        if found.by == key:
            return "under way"
        return "somebody has it open" if found.by is None else f"waits for {name(found.by)}"
    return "a change of its name or content"
