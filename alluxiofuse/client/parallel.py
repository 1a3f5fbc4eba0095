"""Doing many things with a bound on how many at once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio

T = TypeVar("T")


async def for_each(items: AsyncIterator[T], do: Callable[[T], Awaitable[None]], parallel: int) -> None:
    """`do` each item, at most `parallel` at once; items are taken as they are needed. The first
    exception cancels the rest and is raised as it is."""
    room = trio.Semaphore(parallel)

    async def one(item: T) -> None:
        try:
            await do(item)
        finally:
            room.release()

    with unwrapped():
        async with trio.open_nursery() as nursery:
            async for item in items:
                await room.acquire()
                nursery.start_soon(one, item)


@contextmanager
def unwrapped() -> Iterator[None]:
    """Turn the exception groups of nurseries back into the one exception that mattered."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise _first(group) from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first that is no mere cancellation."""
    found = [_first(one) if isinstance(one, BaseExceptionGroup) else one for one in group.exceptions]
    return next((one for one in found if not isinstance(one, trio.Cancelled)), found[0])
