"""The invalidator: order, bounds, errors, and that nobody waits for it."""

import errno
import threading
from collections.abc import Iterator

import pytest

from alluxiofuse.fuse.invalidation import Invalidator

WAIT_S = 10.0


class RecordingKernel:
    """Remembers what it was told; `gate` cleared makes it wait in a call, as the kernel does for a
    request that is not answered yet."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.errno = 0

    def invalidate_inode(self, inode: int, attr_only: bool = False) -> None:
        self._called("attr" if attr_only else "data", inode)

    def invalidate_entry(self, inode_p: int, name: bytes) -> None:
        self._called("entry", inode_p, name)

    def _called(self, *call: object) -> None:
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        self.calls.append(call)
        if self.errno:
            raise OSError(self.errno, "kernel says no")


@pytest.fixture
def kernel() -> RecordingKernel:
    return RecordingKernel()


@pytest.fixture
def invalidator(kernel: RecordingKernel) -> Iterator[Invalidator]:
    overflows: list[int] = []
    made = Invalidator(kernel, lambda: overflows.append(1), max_pending=5)
    made.overflows = overflows  # type: ignore[attr-defined]
    made.start()
    yield made
    kernel.gate.set()
    made.close()
    assert made.join(WAIT_S)


def test_orders_are_carried_out_in_order(kernel: RecordingKernel, invalidator: Invalidator) -> None:
    invalidator.attr(5)
    invalidator.entry(1, b"a")
    invalidator.data(6)
    assert invalidator.wait_idle(WAIT_S)
    assert kernel.calls == [("attr", 5), ("entry", 1, b"a"), ("data", 6)]


def test_giving_orders_does_not_wait_for_the_kernel(
    kernel: RecordingKernel, invalidator: Invalidator
) -> None:
    kernel.gate.clear()
    invalidator.data(1)
    assert kernel.entered.wait(WAIT_S)
    for _ in range(100):
        invalidator.attr(2)  # returns, though the kernel does not
    assert not invalidator.wait_idle(0)
    kernel.gate.set()
    assert invalidator.wait_idle(WAIT_S)
    assert kernel.calls == [("data", 1), ("attr", 2)]  # the same order once


def test_too_many_orders_become_a_reset(kernel: RecordingKernel, invalidator: Invalidator) -> None:
    kernel.gate.clear()
    invalidator.data(1)
    assert kernel.entered.wait(WAIT_S)
    for ino in range(10, 16):
        invalidator.data(ino)
    assert invalidator.overflows == [1]  # type: ignore[attr-defined]
    invalidator.reset([(1, b"top")], [7, 8])
    kernel.gate.set()
    assert invalidator.wait_idle(WAIT_S)
    assert kernel.calls == [("data", 1), ("entry", 1, b"top"), ("data", 7), ("data", 8)]


def test_news_do_not_wait_for_the_end_of_a_reset(kernel: RecordingKernel, invalidator: Invalidator) -> None:
    """A reset of a million inodes takes seconds; were news to pile up behind it, they would overflow into
    the next reset."""
    kernel.gate.clear()
    invalidator.data(1)
    assert kernel.entered.wait(WAIT_S)
    invalidator.reset([(1, b"top")], range(10, 20))
    invalidator.attr(5)
    invalidator.entry(6, b"new")
    kernel.gate.set()
    assert invalidator.wait_idle(WAIT_S)
    assert {("attr", 5), ("entry", 6, b"new")} < set(kernel.calls[:6])
    assert [call for call in kernel.calls if call[0] == "data"] == [
        ("data", ino) for ino in (1, *range(10, 20))
    ]


@pytest.mark.parametrize("code", [errno.ENODEV, errno.EINVAL])
def test_a_refusal_does_not_end_the_thread(
    kernel: RecordingKernel, invalidator: Invalidator, code: int
) -> None:
    kernel.errno = code
    invalidator.data(1)
    invalidator.data(2)
    assert invalidator.wait_idle(WAIT_S)
    assert kernel.calls == [("data", 1), ("data", 2)]


def test_closed_while_stuck_it_ends_with_its_last_order(
    kernel: RecordingKernel, invalidator: Invalidator
) -> None:
    kernel.gate.clear()
    invalidator.data(1)
    assert kernel.entered.wait(WAIT_S)
    invalidator.data(2)
    invalidator.close()
    assert not invalidator.join(0)
    kernel.gate.set()
    assert invalidator.join(WAIT_S)
    invalidator.data(3)
    assert kernel.calls == [("data", 1)]
