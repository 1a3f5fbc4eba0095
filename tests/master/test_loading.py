"""The gate: steps that have to wait for an under storage are run again from the start."""

from __future__ import annotations

from collections.abc import Awaitable

import pytest
import trio
from namespace_world import NothingToLoad

from alluxiofuse.errors import AlluxioFuseError, FsError, UfsUnavailableError
from alluxiofuse.master.loading import Gate
from alluxiofuse.master.records import InodeRecord

RECORD = InodeRecord(0o40755, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, b"", 1)


class Slow(NothingToLoad):
    """Asks the store for every name every time (a sync interval of 0)."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    def needs_child(self, parent: int, parent_record: InodeRecord, name: bytes, child: int | None) -> bool:
        return True

    async def load_child(self, parent: int, name: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.asked.append(name)
        if name == b"unreachable":
            raise UfsUnavailableError("no answer")


def test_a_step_asks_once_for_each_name_and_then_runs_whole() -> None:
    async def main() -> None:
        loader = Slow()
        gate = Gate(loader)
        runs: list[int] = []

        def step() -> str:
            runs.append(1)
            for name in (b"a", b"b"):
                gate.child(1, RECORD, name, None)
            return "done"

        result = gate.run(step)
        assert isinstance(result, Awaitable)
        assert await result == "done"
        assert loader.asked == [b"a", b"b"]
        assert len(runs) == 3
        # What one operation had asked another asks again.
        again = gate.run(step)
        assert isinstance(again, Awaitable)
        assert await again == "done"
        assert loader.asked == [b"a", b"b"] * 2

    trio.run(main)


def test_errors_reach_the_caller() -> None:
    async def main() -> None:
        gate = Gate(Slow())
        result = gate.run(lambda: gate.child(1, RECORD, b"unreachable", None))
        assert isinstance(result, Awaitable)
        with pytest.raises(UfsUnavailableError):
            await result

        def fail() -> None:
            gate.child(1, RECORD, b"a", None)
            raise FsError(2)

        result = gate.run(fail)
        assert isinstance(result, Awaitable)
        with pytest.raises(AlluxioFuseError):
            await result
        again = gate.run(lambda: gate.child(1, RECORD, b"a", None))
        assert isinstance(again, Awaitable), "nothing of the operation before is left"
        await again

    trio.run(main)


def test_a_step_that_needs_more_and_more_ends() -> None:
    async def main() -> None:
        gate = Gate(Slow())
        count = [0]

        def step() -> None:
            count[0] += 1
            gate.child(1, RECORD, b"%d" % count[0], None)

        result = gate.run(step)
        assert isinstance(result, Awaitable)
        with pytest.raises(FsError):
            await result

    trio.run(main)
