"""Locks on paths, against their definition; and that they stay cheap when thousands are held."""

from __future__ import annotations

import random
import sys
from types import FrameType
from typing import Any

import pytest

from alluxiofuse.master import persist_queue
from alluxiofuse.master.persist_queue import Lock, PathLocks, ReadyQueue
from alluxiofuse.master.places import is_below


def conflicts(a: Lock, b: Lock) -> bool:
    if a.mount_id != b.mount_id:
        return False
    return (
        a.path == b.path
        or (a.is_tree and is_below(b.path, a.path))
        or (b.is_tree and is_below(a.path, b.path))
    )


def test_as_defined() -> None:
    chance = random.Random(7)
    paths = [b"", b"a", b"ab", b"a/b", b"a/b/c", b"a/bc", b"b", b"b/a", b"b/a/c"]
    locks = PathLocks()
    held: dict[int, tuple[Lock, ...]] = {}

    def some() -> tuple[Lock, ...]:
        return tuple(
            Lock(chance.choice([1, 2]), chance.choice(paths), chance.random() < 0.4)
            for _ in range(chance.randint(0, 2))
        )

    found_count = 0
    for _ in range(20_000):
        key = chance.randint(1, 6)
        if chance.random() < 0.4:
            locks.release(key)
            held.pop(key, None)
        elif chance.random() < 0.4:
            held[key] = some()
            locks.hold(key, held[key])
        wanted = some()
        others = {
            other
            for other, theirs in held.items()
            if other != key and any(conflicts(a, b) for a in wanted for b in theirs)
        }
        found = locks.conflict(wanted, key)
        assert found in others if others else found is None
        found_count += found is not None
        assert locks.is_held(key) == (key in held)
    assert 1000 < found_count < 19_000
    for key in list(held):
        locks.release(key)
    assert not locks._held
    assert not locks._at
    assert not locks._below


def test_a_mount_that_is_out_of_order_does_not_fill_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persist_queue, "MAX_KEYS", 10)
    queue = ReadyQueue()
    for ino in range(12):
        if queue.put(ino, 0.0):
            queue.pop(1.0)
            queue.park(1, ino)
    assert (len(queue), queue.has_dropped) == (10, True)
    queue.has_dropped = False
    for ino in range(100, 104):
        assert queue.put(ino, 5.0)
    assert (len(queue), queue.has_dropped) == (10, True)
    assert [queue.pop(6.0) for _ in range(5)] == [100, 101, 102, 103, None]
    queue.unpark(1, 100, 7.0)
    assert [queue.pop(7.0) for _ in range(7)] == [0, 1, 2, 3, 4, 5, None], "the oldest are kept"
    for ino in range(10):
        assert queue.put(ino, 0.0)
    assert not queue.put(11, 0.0), "nothing is parked"


def test_the_number_that_is_held_does_not_matter() -> None:
    """A removal of a large directory holds thousands, and asks as often: counted in lines that run."""

    def lines(held_count: int) -> int:
        locks = PathLocks()
        for number in range(held_count):
            locks.hold(number, (Lock(1, b"big/%d" % number, False),))
        count = 0

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal count
            count += 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            assert locks.conflict((Lock(1, b"big/new", False),), -1) is None
        finally:
            sys.settrace(before)
        return count

    assert lines(5000) == lines(10)
