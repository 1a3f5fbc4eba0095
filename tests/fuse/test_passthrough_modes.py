"""Which opens of one inode may be answered how, without a kernel: see `fuse.passthrough`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import trio

from alluxiofuse.fuse.passthrough import ORDINARY, Mode, Passthrough


class Kernel:
    """A `BackingDevice` that takes all."""

    def __init__(self) -> None:
        self.open_ids: set[int] = set()
        self._last = 0

    def open_backing(self, fd: int) -> int:
        self._last += 1
        self.open_ids.add(self._last)
        return self._last

    def close_backing(self, backing_id: int) -> None:
        self.open_ids.remove(backing_id)


@pytest.fixture
def slab() -> Iterator[int]:
    fd = os.memfd_create("slab")
    yield fd
    os.close(fd)


def opened(table: Passthrough, fd: int, *, is_direct: bool = False) -> Mode:
    async def pass_on() -> int:
        return fd

    return trio.run(lambda: table.opened(1, pass_on, is_direct=is_direct))


@pytest.mark.parametrize("is_direct", [False, True])
def test_nothing_is_passed_while_it_may_be_in_the_page_cache(slab: int, is_direct: bool) -> None:
    """A direct open too may be mapped."""
    table, kernel = Passthrough(), Kernel()
    table.enable(kernel)
    first = opened(table, -1, is_direct=is_direct)
    assert first == (Mode(is_direct=True) if is_direct else ORDINARY)
    second = opened(table, slab)
    assert second == ORDINARY
    table.released(1, first)
    assert opened(table, slab) == ORDINARY, "the second is open still"
    for _ in range(2):
        table.released(1, second)
    third = opened(table, slab)
    assert third.backing_id
    assert opened(table, -1, is_direct=is_direct) == Mode(third.backing_id, is_direct=True)
    table.released(1, third)
    assert kernel.open_ids == {third.backing_id}
    table.released(1, third)
    assert kernel.open_ids == set()
    assert not table._inodes


def test_without_a_device_nothing_is_counted(slab: int) -> None:
    table = Passthrough()
    assert opened(table, slab, is_direct=True) == Mode(is_direct=True)
    assert opened(table, slab) == ORDINARY
    table.released(1, ORDINARY)
    assert not table._inodes
