"""What watching sessions are told, and what not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from alluxiofuse.master.events import Events
from alluxiofuse.wire.master_ops import WatchAnswer
from alluxiofuse.wire.types import EVENT_ATTR, Event

A, B = 1, 2


def in_trio(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    @wraps(test)
    def run() -> None:
        async def main() -> None:
            with trio.fail_after(1000):
                await test()

        trio.run(main, clock=MockClock(autojump_threshold=0))

    return run


def attr(ino: int) -> Event:
    return Event(EVENT_ATTR, ino)


@in_trio
async def test_others_are_told_and_the_one_who_did_it_is_not() -> None:
    events = Events(10, first_seq=100)
    events.publish(A, attr(1))
    events.publish(0, attr(2))
    assert [e.ino for e in (await events.watch(B, 100, 0)).events] == [1, 2]
    assert [e.ino for e in (await events.watch(A, 100, 0)).events] == [2]


@in_trio
async def test_a_poll_sleeps_until_somebody_else_does_something() -> None:
    events = Events(10)
    answers: list[WatchAnswer] = []

    async def poll() -> None:
        answers.append(await events.watch(A, 1, 30))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(poll)
        await wait_all_tasks_blocked()
        events.publish(A, attr(1))
        await wait_all_tasks_blocked()
        assert answers == []
        events.publish(B, attr(2))
    assert [e.ino for e in answers[0].events] == [2]
    assert answers[0].seq == 3


@in_trio
async def test_a_quiet_poll_ends_after_its_time_and_skips_its_own_events() -> None:
    events = Events(10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(events.watch, A, 1, 30)
        await wait_all_tasks_blocked()
        events.publish(A, attr(1))
    answer = await events.watch(A, 2, 0)
    assert (answer.seq, answer.is_reset, answer.events) == (2, False, [])


@in_trio
async def test_its_own_flood_while_it_sleeps_is_no_reason_for_a_reset() -> None:
    events = Events(3)
    answers: list[WatchAnswer] = []

    async def poll() -> None:
        answers.append(await events.watch(A, 1, 30))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(poll)
        await wait_all_tasks_blocked()
        for ino in range(20):
            events.publish(A, attr(ino))
        events.publish(B, attr(99))
    assert [e.ino for e in answers[0].events] == [99]
    assert not answers[0].is_reset


@in_trio
async def test_missed_events_are_a_reset() -> None:
    events = Events(3, first_seq=100)
    for ino in range(5):
        events.publish(0, attr(ino))
    assert (await events.watch(A, 101, 0)).is_reset
    assert not (await events.watch(A, 102, 0)).is_reset
    assert (await events.watch(A, 50, 0)).is_reset, "a number of an earlier life"
    assert (await events.watch(A, 1000, 0)).is_reset, "a number that was never given"


@in_trio
async def test_waiting_for_acknowledgement() -> None:
    events = Events(10)
    await events.watch(A, 1, 0)
    await events.watch(B, 1, 0)
    seq = events.publish(0, attr(1))
    assert not await events.wait_acknowledged(seq, 1)
    done: list[bool] = []

    async def wait() -> None:
        done.append(await events.wait_acknowledged(seq, 60))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        await events.watch(A, seq, 0)
        await wait_all_tasks_blocked()
        assert done == []
        events.forget(B)
    assert done == [True]
