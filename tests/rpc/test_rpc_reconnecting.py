"""Reconnecting, over in-process connections that break when told to, on a clock that jumps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from rpc_world import Echo, Fail, Later, MisbehavingService, WhoAmI
from trio.testing import MockClock

from alluxiofuse.errors import (
    AlluxioFuseError,
    AuthError,
    ConnectionLost,
    SessionExpiredError,
    StaleError,
    UnavailableError,
)
from alluxiofuse.rpc.base import Connection
from alluxiofuse.rpc.client import NotSentError, Reconnecting
from alluxiofuse.rpc.inprocess import InProcess


class Line:
    """Dials `service`, unless `failures` has something else to say."""

    def __init__(self, service: MisbehavingService) -> None:
        self.service = service
        self.failures: list[AlluxioFuseError] = []
        self.is_down = False
        self.dialled_at: list[float] = []
        self.dialling = 0
        self.hooked: list[Connection] = []
        self.hook_failures: list[AlluxioFuseError] = []

    async def dial(self) -> Connection:
        self.dialled_at.append(trio.current_time())
        assert self.dialling == 0
        self.dialling += 1
        try:
            await trio.sleep(0.001)
        finally:
            self.dialling -= 1
        if self.failures:
            raise self.failures.pop(0)
        if self.is_down:
            raise UnavailableError("nobody answers")
        return InProcess(self.service)

    async def on_connected(self, connection: Connection) -> None:
        await connection.call(WhoAmI())
        if self.hook_failures:
            raise self.hook_failures.pop(0)
        self.hooked.append(connection)


def virtual(test: Callable[[Line], Awaitable[None]]) -> Callable[[], None]:
    async def main() -> None:
        service = MisbehavingService()
        try:
            await test(Line(service))
        finally:
            service.close()

    def wrapper() -> None:
        trio.run(main, clock=MockClock(autojump_threshold=0))

    wrapper.__name__ = test.__name__
    return wrapper


@virtual
async def test_dials_on_demand_and_once(line: Line) -> None:
    connection = Reconnecting(line.dial, on_connected=line.on_connected)
    assert line.dialled_at == []
    assert connection.current is None
    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(connection.call, Echo("x", number))
    assert len(line.dialled_at) == 1
    assert line.hooked == [connection.current]
    assert connection.can_pass_fds
    assert connection.connected_count == 1


@virtual
async def test_waits_out_failures_with_growing_pauses(line: Line) -> None:
    line.failures = [UnavailableError("down")] * 10 + [ConnectionLost("hung up")] * 2
    connection = Reconnecting(line.dial, patience_s=60)
    assert (await connection.call(Echo("x"))).text == "x"
    pauses = [b - a for a, b in zip(line.dialled_at, line.dialled_at[1:], strict=False)]
    assert len(pauses) == 12
    assert all(0.02 <= pause <= 2.1 for pause in pauses)
    assert pauses[0] < 0.1
    assert max(pauses) > 0.9


@virtual
async def test_patience_ends_with_the_last_reason(line: Line) -> None:
    line.is_down = True
    connection = Reconnecting(line.dial, patience_s=5)
    started = trio.current_time()

    async def one() -> None:
        with pytest.raises(UnavailableError, match="5 s: nobody answers"):
            await connection.call(Echo("x"))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(one)
    assert trio.current_time() - started == pytest.approx(5, abs=0.1)
    assert len(line.dialled_at) < 15
    assert not connection.is_closed
    line.is_down = False
    assert (await connection.call(Echo("x"))).text == "x"


@virtual
async def test_patience_is_spent_once_for_an_outage(line: Line) -> None:
    line.is_down = True
    connection = Reconnecting(line.dial, patience_s=30)
    waited = []
    for _ in range(3):
        started = trio.current_time()
        with pytest.raises(UnavailableError):
            await connection.call(Echo("x"))
        waited.append(trio.current_time() - started)
    assert waited == [pytest.approx(30, abs=0.1), pytest.approx(2, abs=0.1), pytest.approx(2, abs=0.1)]
    line.is_down = False
    await connection.call(Echo("x"))
    assert connection.current is not None
    await connection.current.aclose()
    line.is_down = True
    started = trio.current_time()
    with pytest.raises(UnavailableError):
        await connection.call(Echo("x"))
    assert trio.current_time() - started == pytest.approx(30, abs=0.1), "another outage"


@virtual
async def test_what_waiting_does_not_cure_is_raised_at_once(line: Line) -> None:
    line.failures = [AuthError("wrong secret")]
    connection = Reconnecting(line.dial)
    with pytest.raises(AuthError, match="wrong secret"):
        await connection.call(Echo("x"))
    assert (await connection.call(Echo("x"))).text == "x"


@virtual
async def test_hook_runs_before_calls_and_its_errors_are_raised(line: Line) -> None:
    line.hook_failures = [UnavailableError("not yet"), SessionExpiredError("start anew")]
    connection = Reconnecting(line.dial, on_connected=line.on_connected)
    with pytest.raises(SessionExpiredError):
        await connection.call(Echo("x"))
    assert line.service.closed_count == 2
    await connection.call(Echo("x"))
    assert len(line.hooked) == 1


async def broken_call(connection: Reconnecting, line: Line, **kwargs: Any) -> int | Exception:
    """A call whose connection breaks while it is out."""
    result: list[int | Exception] = []

    async def call() -> None:
        try:
            number = await connection.call(Later(7, waits=True), **kwargs)
            result.append(number)
        except ConnectionLost as exc:
            result.append(exc)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked(0.01)
        current = connection.current
        assert current is not None
        await current.aclose()
        line.service.gate.set()
    return result[0]


@virtual
async def test_broken_call_is_not_sent_again(line: Line) -> None:
    connection = Reconnecting(line.dial)
    await connection.connect()
    assert isinstance(await broken_call(connection, line), ConnectionLost)
    assert line.service.started_count == 1
    assert (await connection.call(Echo("x"))).text == "x"
    assert connection.connected_count == 2


@virtual
async def test_idempotent_call_is_sent_again(line: Line) -> None:
    connection = Reconnecting(line.dial)
    await connection.connect()
    assert await broken_call(connection, line, is_idempotent=True) == 7
    assert line.service.started_count == 2


@virtual
async def test_call_that_breaks_every_connection_gives_up(line: Line) -> None:
    class Poison(InProcess):
        async def exchange(self, request: Any, payload: Any = b"", **_: Any) -> Any:
            await self.aclose()
            raise ConnectionLost("broken by it")

    async def dial() -> Connection:
        line.dialled_at.append(trio.current_time())
        return Poison(line.service)

    connection = Reconnecting(dial)
    with pytest.raises(ConnectionLost, match="times in a row"):
        await connection.call(Echo("x"), is_idempotent=True)
    assert 2 <= len(line.dialled_at) <= 10


@virtual
async def test_call_that_was_never_sent_is_sent(line: Line) -> None:
    connection = Reconnecting(line.dial)
    inner = await connection.connect()
    await inner.aclose()
    with pytest.raises(NotSentError):
        await inner.call(Echo("x"))
    assert (await connection.call(Echo("x"))).text == "x"


@virtual
async def test_errors_of_handlers_pass_and_keep_the_connection(line: Line) -> None:
    connection = Reconnecting(line.dial)
    with pytest.raises(StaleError):
        await connection.call(Fail("stale"))
    assert connection.connected_count == 1
    assert connection.current is not None


@virtual
async def test_cancelled_dialler_hands_over(line: Line) -> None:
    line.failures = [UnavailableError("down")] * 3
    connection = Reconnecting(line.dial)
    async with trio.open_nursery() as nursery:

        async def impatient() -> None:
            with trio.move_on_after(0.02):
                await connection.call(Echo("x"))

        nursery.start_soon(impatient)
        await trio.sleep(0.001)
        assert (await connection.call(Echo("x"))).text == "x"


@virtual
async def test_closed_for_good(line: Line) -> None:
    connection = Reconnecting(line.dial, on_connected=line.on_connected)
    await connection.connect()
    await connection.aclose()
    assert connection.is_closed
    assert line.service.closed_count == 1
    with pytest.raises(ConnectionLost):
        await connection.call(Echo("x"))


@virtual
async def test_closed_while_dialling(line: Line) -> None:
    connection = Reconnecting(line.dial, on_connected=line.on_connected)
    async with trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(ConnectionLost):
                await connection.call(Echo("x"))

        nursery.start_soon(call)
        await trio.sleep(0.0005)
        await connection.aclose()
    assert line.service.closed_count == 1
