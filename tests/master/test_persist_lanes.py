"""When a mount rests, and which keys wait for it."""

from __future__ import annotations

from alluxiofuse.master import persist_queue
from alluxiofuse.master.persist_lanes import MAX_REST_S, RESTS_AFTER, Lanes
from alluxiofuse.master.persist_queue import ReadyQueue

MOUNT, OTHER = 1, 2


def fail(lanes: Lanes, now: float) -> None:
    lanes.started(MOUNT, is_upload=False)
    lanes.failed(MOUNT, "no answer", now)
    lanes.ended(MOUNT, is_upload=False)


def test_a_mount_rests_after_a_few_failures_in_a_row() -> None:
    lanes = Lanes(4, 8)
    for _ in range(RESTS_AFTER - 1):
        fail(lanes, 0.0)
    lanes.answered(MOUNT)
    for _ in range(RESTS_AFTER - 1):
        fail(lanes, 0.0)
        assert lanes.is_open(MOUNT, 0.0)
    assert lanes.resting() == []
    fail(lanes, 0.0)
    assert not lanes.is_open(MOUNT, 0.0)
    assert lanes.resting() == [(MOUNT, "no answer")]
    assert lanes.is_open(OTHER, 0.0)
    assert lanes.rest_count == 1


def test_one_probe_a_rest_and_rests_are_bounded() -> None:
    lanes, now = Lanes(4, 8), 0.0
    for _ in range(RESTS_AFTER):
        fail(lanes, now)
    for _ in range(20):
        due = lanes.next_due_s(now)
        assert due is not None
        assert now < due <= now + MAX_REST_S * 1.5
        assert lanes.room(MOUNT, due - 0.01) == 0
        now = due
        assert lanes.room(MOUNT, now) == 1
        lanes.started(MOUNT, is_upload=True)
        assert not lanes.is_open(MOUNT, now), "one is under way"
        lanes.failed(MOUNT, "still none", now)
        lanes.ended(MOUNT, is_upload=True)
    now = lanes.next_due_s(now) or now
    lanes.started(MOUNT, is_upload=True)
    lanes.answered(MOUNT)
    lanes.ended(MOUNT, is_upload=True)
    assert lanes.room(MOUNT, now) == 4
    assert lanes.next_due_s(now) is None
    assert not lanes.is_busy()


def test_what_was_begun_before_a_rest_does_not_make_it_longer() -> None:
    lanes = Lanes(4, 8)
    for _ in range(8):
        lanes.started(MOUNT, is_upload=True)
    assert not lanes.takes_upload(MOUNT)
    assert lanes.upload_room(MOUNT, 0.0) == 0
    assert lanes.room(MOUNT, 0.0) == 4
    for _ in range(8):
        lanes.failed(MOUNT, "no answer", 0.0)
        lanes.ended(MOUNT, is_upload=True)
    assert lanes.rest_count == 1
    assert lanes.takes_upload(MOUNT)


def test_parked_keys_come_back_in_order_and_count() -> None:
    queue = ReadyQueue()
    for key in range(10, 15):
        queue.put(key, 0.0)
        assert queue.pop(0.0) == key
        queue.park(MOUNT, key)
        queue.park(MOUNT, key)
    queue.put(12, 99.0)  # it was changed meanwhile
    assert queue.parked() == [MOUNT]
    assert len(queue) == 6
    queue.unpark(MOUNT, 3, 1.0)
    assert [queue.pop(1.0) for _ in range(4)] == [10, 11, 12, None]
    queue.unpark(MOUNT, 3, 1.0)
    assert [queue.pop(1.0) for _ in range(3)] == [13, 14, None]
    assert queue.parked() == []
    assert len(queue) == 0


def test_parked_keys_are_bounded_like_all_others() -> None:
    queue = ReadyQueue()
    for key in range(persist_queue.MAX_KEYS):
        assert queue.put(key, 0.0)
    for key in range(persist_queue.MAX_KEYS):
        assert queue.pop(0.0) == key
        queue.park(MOUNT, key)
    assert queue.put(-1, 0.0), "a mount that is out of order does not stop the others"
    assert len(queue) == persist_queue.MAX_KEYS
    assert queue.has_dropped, "the store is scanned again later"
