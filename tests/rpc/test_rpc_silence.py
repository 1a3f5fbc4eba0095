"""Calls end when nobody works at them, and only then."""

from __future__ import annotations

import os
import socket

import pytest
import trio
from rpc_site import SocketAsStream, site, welcome
from rpc_world import Blob, Echo, Later, run, until

from alluxiofuse.errors import ConnectionLost, UnavailableError
from alluxiofuse.rpc import client, interrupt, serverconnection
from alluxiofuse.rpc.client import connect_tcp
from alluxiofuse.rpc.security import Security

LOOK_S = 0.05


@pytest.fixture(autouse=True)
def short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LOOK_S", LOOK_S)
    monkeypatch.setattr(serverconnection, "ALIVE_S", LOOK_S / 10)


async def _after_many_looks() -> None:
    await trio.sleep(LOOK_S * client.MAX_QUIET_LOOKS * 3)


def test_calls_to_a_server_that_is_stopped_end() -> None:
    """It has let us in, takes what we send, and says nothing any more."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            async with trio.open_nursery() as nursery:
                mute: list[trio.socket.SocketType] = []

                async def serve() -> None:
                    sock, _ = await trio.socket.from_stdlib_socket(listener).accept()
                    mute.append(sock)
                    await welcome(SocketAsStream(sock))

                nursery.start_soon(serve)
                port = listener.getsockname()[1]
                connection = await connect_tcp(nursery, "127.0.0.1", port, role="test", security=Security())
                await _after_many_looks()  # Silence is no failure while nobody waits.
                assert not connection.is_closed
                with pytest.raises(ConnectionLost, match="no sign of life"):
                    await connection.call(Echo("hello"))
                assert connection.is_closed
                mute[0].close()
                nursery.cancel_scope.cancel()

    run(main)


def test_so_does_a_call_that_is_made_at_once() -> None:
    """Before the connection's own task has run for the first time."""

    async def main() -> None:
        async with site() as here, trio.open_nursery() as nursery:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                listener.setblocking(False)

                async def serve() -> None:
                    sock, _ = await trio.socket.from_stdlib_socket(listener).accept()
                    await welcome(SocketAsStream(sock))
                    await trio.sleep_forever()

                nursery.start_soon(serve)
                port = listener.getsockname()[1]
                connection = await connect_tcp(
                    nursery, "127.0.0.1", port, role="test", security=here.security
                )
                with pytest.raises(ConnectionLost, match="no sign of life"):
                    await connection.call(Echo("hello"))
                nursery.cancel_scope.cancel()

    run(main)


def test_a_handler_may_take_its_time() -> None:
    async def main() -> None:
        async with site() as here:
            connection = await here.connect()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.call, Later(1, waits=True))
                await until(lambda: here.service.running_count == 1)
                await _after_many_looks()
                here.service.gate.set()
            assert (await connection.call(Echo("still here"))).text == "still here"

    run(main)


def test_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection lives on, and who cares hears what came of it."""
    monkeypatch.setattr(Later, "DEADLINE_S", LOOK_S * 3)

    async def main() -> None:
        async with site() as here:
            connection = await here.connect()
            late: list[int] = []
            with pytest.raises(UnavailableError, match=r"did not answer .* within"):
                await connection.exchange(Later(7, waits=True), on_late=late.append)
            assert not connection.is_closed
            assert not late
            here.service.gate.set()
            await until(lambda: late == [7])
            assert (await connection.call(Echo("still here"))).text == "still here"

    run(main)


def test_what_was_cancelled_is_heard_of_late() -> None:
    async def main() -> None:
        async with site() as here:
            connection = await here.connect()
            late: list[int] = []
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:

                    async def ask() -> None:
                        await connection.exchange(Later(7, waits=True), on_late=late.append)

                    nursery.start_soon(ask)
                    await until(lambda: here.service.running_count == 1)
                    scope.cancel()
            here.service.gate.set()
            await until(lambda: late == [7])

    run(main)


def test_a_signal_that_is_not_pending_interrupts_nobody() -> None:
    assert not interrupt.is_told_to_stop(0)
    assert not interrupt.is_told_to_stop(os.getpid())
    assert not interrupt.is_told_to_stop(1 << 30), "of another namespace"


def test_so_may_handlers_that_fill_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server reads no more from it, and shows life nevertheless."""
    monkeypatch.setattr(serverconnection, "MAX_IN_FLIGHT", 2)

    async def main() -> None:
        async with site() as here:
            connection = await here.connect()
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(connection.call, Later(number, waits=True))
                await until(lambda: here.service.running_count == 2)
                await _after_many_looks()
                here.service.gate.set()
            assert not connection.is_closed

    run(main)


def test_a_large_answer_on_a_slow_line_is_a_sign_of_life() -> None:
    """Bytes trickle: no whole frame for long, but never silence."""

    async def main() -> None:
        async with site() as here:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                listener.setblocking(False)

                async def relay() -> None:
                    near = trio.SocketStream((await trio.socket.from_stdlib_socket(listener).accept())[0])
                    async with near, await here.dial() as far, trio.open_nursery() as pumps:
                        pumps.start_soon(_pump, near, far, 0.0)
                        pumps.start_soon(_pump, far, near, LOOK_S / 5)

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(relay)
                    port = listener.getsockname()[1]
                    connection = await connect_tcp(
                        nursery, "127.0.0.1", port, role="test", security=here.security
                    )
                    answer = await connection.exchange(Blob(0, 64 << 10, False))
                    assert answer.payload == here.service.content[: 64 << 10]
                    nursery.cancel_scope.cancel()

    run(main)


async def _pump(source: trio.SocketStream, target: trio.SocketStream, pause_s: float) -> None:
    while data := await source.receive_some(1024 if pause_s else None):
        await target.send_all(data)
        await trio.sleep(pause_s)
