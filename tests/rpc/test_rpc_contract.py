"""What holds on every transport. Nobody overrides a test; what a transport cannot do it says."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from rpc_world import (
    Blob,
    Descriptors,
    Echo,
    Echoed,
    Fail,
    Identity,
    Large,
    Later,
    WhoAmI,
    World,
    misbehaving_service,
    run,
    until,
)

from alluxiofuse.errors import (
    AlluxioFuseError,
    BadRequestError,
    ConnectionLost,
    FsError,
    StaleError,
)
from alluxiofuse.rpc.base import Connection
from alluxiofuse.rpc.client import connect_tcp, connect_unix
from alluxiofuse.rpc.inprocess import InProcess
from alluxiofuse.rpc.security import Security
from alluxiofuse.rpc.server import serve_tcp, serve_unix
from alluxiofuse.wire.messages import Request

SECRET = b"0123456789abcdef0123456789abcdef"


class TransportContract:
    passes_fds = False
    is_authenticated = True
    knows_uid = True
    crosses_wire = True

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path

    def open_world(self) -> AbstractAsyncContextManager[World]:
        raise NotImplementedError

    def run(self, body: Any) -> None:
        async def main() -> None:
            async with self.open_world() as world:
                await body(world)

        run(main)

    def test_answers_a_call(self) -> None:
        async def body(world: World) -> None:
            connection = await world.connect()
            assert await connection.call(Echo("hä", 7)) == Echoed("hä", 7, 0)
            assert await connection.call(Later(5)) == 5

        self.run(body)

    @pytest.mark.parametrize("size", [0, 1, 100, 40_000, 70_000, 1 << 20, 8 << 20])
    def test_payloads_travel_both_ways(self, size: int) -> None:
        async def body(world: World) -> None:
            connection = await world.connect()
            data = os.urandom(size)
            for buffer in (data, bytearray(data), memoryview(data)):
                answer = await connection.exchange(Echo("x"), buffer)
                assert answer.result.payload_bytes == size
                assert bytes(answer.payload) == data  # type: ignore[arg-type]

        self.run(body)

    @pytest.mark.parametrize("later", [False, True])
    @pytest.mark.parametrize("from_file", [False, True])
    def test_blobs_from_memory_and_file(self, from_file: bool, later: bool) -> None:
        async def body(world: World) -> None:
            connection = await world.connect()
            for offset, size in ((0, 0), (0, 1), (5, 1000), (4096, 3 << 20), (1, (4 << 20) - 1)):
                answer = await connection.exchange(Blob(offset, size, from_file, later))
                assert bytes(answer.payload) == world.service.content[offset : offset + size]  # type: ignore[arg-type]
            await until(lambda: world.service.ranges_sent == world.service.ranges_given)

        self.run(body)

    def test_many_calls_at_once(self) -> None:
        async def body(world: World) -> None:
            connection = await world.connect()
            done: set[int] = set()

            async def one(number: int) -> None:
                if number % 3 == 0:
                    assert await connection.call(Later(number)) == number
                elif number % 3 == 1:
                    assert (await connection.call(Echo("x", number))).number == number
                else:
                    answer = await connection.exchange(Blob(number, 5000, number % 2 == 0))
                    assert bytes(answer.payload) == world.service.content[number : number + 5000]  # type: ignore[arg-type]
                done.add(number)

            async with trio.open_nursery() as nursery:
                for number in range(600):
                    nursery.start_soon(one, number)
            assert done == set(range(600))
            assert world.service.ranges_sent == world.service.ranges_given

        self.run(body)

    def test_slow_handler_does_not_hold_up_others(self) -> None:
        async def body(world: World) -> None:
            connection = await world.connect()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.call, Later(1, waits=True))
                await until(lambda: world.service.started_count == 1)
                assert await connection.call(Later(2)) == 2
                assert (await connection.call(Echo("x", 3))).number == 3
                world.service.gate.set()

        self.run(body)

    @pytest.mark.parametrize("later", [False, True])
    def test_errors_keep_code_errno_and_message(self, later: bool) -> None:
        async def body(world: World) -> None:
            connection = await world.connect()
            with pytest.raises(FsError) as caught:
                await connection.call(Fail("fs", later))
            assert (caught.value.errno, caught.value.message) == (2, "a/b")
            with pytest.raises(StaleError, match="gone"):
                await connection.call(Fail("stale", later))
            for how in ("undecodable", "long"):
                with pytest.raises(StaleError):
                    await connection.call(Fail(how, later))
            assert (await connection.call(Echo("x"))).text == "x"

        self.run(body)

    def test_error_inside_a_group_is_that_error(self) -> None:
        async def body(world: World) -> None:
            with pytest.raises(StaleError, match="inside"):
                await (await world.connect()).call(Fail("group", True))

        self.run(body)

    @pytest.mark.parametrize("how", ["bug", "too many descriptors", "dead descriptor"])
    @pytest.mark.parametrize("later", [False, True])
    def test_bugs_are_logged_and_answered_as_eio(
        self, how: str, later: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        if how == "dead descriptor" and not self.passes_fds:
            pytest.skip("passes no descriptors")

        async def body(world: World) -> None:
            connection = await world.connect()
            with pytest.raises(AlluxioFuseError) as caught:
                await connection.call(Fail(how, later))
            assert (caught.value.code, caught.value.errno) == ("internal", 5)
            assert "secret" not in caught.value.message
            assert (await connection.call(Echo("x"))).text == "x"

        with caplog.at_level(logging.ERROR):
            self.run(body)
        assert len([record for record in caplog.records if record.exc_info]) == 1

    def test_answers_that_cannot_travel_are_bugs(self, caplog: pytest.LogCaptureFixture) -> None:
        if not self.crosses_wire:
            pytest.skip("nothing travels")

        async def body(world: World) -> None:
            connection = await world.connect()
            requests: list[Request[Any]] = [Fail("unencodable"), Large(5 << 20)]
            for request in requests:
                with pytest.raises(AlluxioFuseError) as caught:
                    await connection.call(request)
                assert caught.value.code == "internal"
            large = await connection.call(Large(1 << 20))
            assert len(large) == 1 << 20

        self.run(body)

    def test_oversized_and_unfit_requests(self) -> None:
        if not self.crosses_wire:
            pytest.skip("nothing travels")

        async def body(world: World) -> None:
            connection = await world.connect()
            with pytest.raises(BadRequestError):
                await connection.call(Echo("x"), bytes(9 << 20))
            with pytest.raises(BadRequestError):
                await connection.call(Large(1, bytes(5 << 20)))
            with pytest.raises(BadRequestError, match=r"test\.echo"):
                await connection.call(Echo("x", 1001))
            with pytest.raises(BadRequestError):
                await connection.call(Echo(7))  # type: ignore[arg-type]
            assert (await connection.call(Large(1, bytes(1 << 20)))) == b"\0"

        self.run(body)

    def test_undeclared_request(self) -> None:
        class Unknown(Echo):
            OP = "test.unknown"

        async def body(world: World) -> None:
            connection = await world.connect()
            with pytest.raises(BadRequestError, match="unknown"):
                await connection.call(Unknown("x"))
            assert (await connection.call(Echo("x"))).text == "x"

        self.run(body)

    def test_cancelled_call_abandons_only_its_answer(self) -> None:
        async def body(world: World) -> None:
            connection = await world.connect()
            for _ in range(20):
                with trio.move_on_after(0.001):
                    await connection.call(Later(1, waits=True))
            with trio.CancelScope() as scope:
                scope.cancel()
                await connection.exchange(Blob(0, 4 << 20, True))
            if self.passes_fds:
                with trio.CancelScope() as scope:
                    scope.cancel()
                    answer = await connection.exchange(Descriptors(0, 3))
                    answer.close_fds()  # In process it comes before the cancellation does.
            world.service.gate.set()
            assert await connection.call(Later(3)) == 3
            assert (await connection.call(Echo("x", 3))).number == 3

        self.run(body)

    def test_short_file_breaks_the_connection(self) -> None:
        async def body(world: World) -> None:
            connection = await world.connect()
            with pytest.raises(ConnectionLost):
                await connection.exchange(Blob(4 << 20, 100_000, True))
            assert connection.is_closed
            await until(lambda: world.service.ranges_sent == 1)
            assert (await (await world.connect()).call(Echo("x"))).text == "x"

        self.run(body)

    def test_closing_ends_calls_and_tells_the_service(self) -> None:
        async def body(world: World) -> None:
            connection = await world.connect()
            await connection.call(WhoAmI())
            lost = 0

            async def call() -> None:
                nonlocal lost
                with pytest.raises(ConnectionLost):
                    await connection.call(Later(1, waits=True))
                lost += 1

            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(call)
                await until(lambda: world.service.started_count == 3)
                assert world.service.closed_count == 0
                await connection.aclose()
                await connection.aclose()
            assert lost == 3
            assert connection.is_closed
            with pytest.raises(ConnectionLost):
                await connection.call(Echo("x"))
            await until(lambda: world.service.closed_count == 1)
            assert world.service.cancelled_count == 3

        self.run(body)

    def test_identity(self) -> None:
        async def body(world: World) -> None:
            connection = await world.connect()
            found: Identity = await connection.call(WhoAmI())
            assert found.is_trusted
            assert found.is_authenticated == self.is_authenticated
            assert found.can_pass_fds == self.passes_fds == connection.can_pass_fds
            assert found.uid == (os.geteuid() if self.knows_uid else None)
            assert found.name

        self.run(body)

    @pytest.mark.parametrize("payload", ["", "memory", "file"])
    def test_descriptors(self, payload: str) -> None:
        async def body(world: World) -> None:
            connection = await world.connect()

            async def one(number: int) -> None:
                answer = await connection.exchange(Descriptors(number * 10, number % 5, payload))
                assert len(answer.fds) == (number % 5 if self.passes_fds else 0)
                if payload == "file":
                    assert bytes(answer.payload) == world.service.content[:100_000]  # type: ignore[arg-type]
                for fd, expected in zip(answer.fds, answer.result, strict=False):
                    assert os.read(fd, 10) == str(expected).encode()
                    assert not os.get_inheritable(fd)
                answer.close_fds()

            async with trio.open_nursery() as nursery:
                for number in range(100):
                    nursery.start_soon(one, number)
                    nursery.start_soon(connection.call, Echo("between"))
            await connection.call(Descriptors(0, 4))  # They are dropped, and closed.
            await until(lambda: world.service.ranges_sent == world.service.ranges_given)

        self.run(body)


class TestTcp(TransportContract):
    is_authenticated = False
    security = Security()

    @asynccontextmanager
    async def open_world(self) -> AsyncIterator[World]:
        async with misbehaving_service() as service, trio.open_nursery() as nursery:
            serve = partial(serve_tcp, service, "127.0.0.1", 0, security=self.security)
            address = await nursery.start(serve)

            async def connect() -> Connection:
                return await connect_tcp(
                    nursery, address.host, address.port, role="test", security=self.security
                )

            yield World(service, connect)
            nursery.cancel_scope.cancel()


class TestTcpWithSecret(TestTcp):
    is_authenticated = True
    knows_uid = False
    security = Security(SECRET, "cluster-1")


class TestUnix(TransportContract):
    passes_fds = True

    @asynccontextmanager
    async def open_world(self) -> AsyncIterator[World]:
        path = str(self.directory / "socket")
        async with misbehaving_service() as service, trio.open_nursery() as nursery:
            await nursery.start(partial(serve_unix, service, path, security=Security(SECRET)))

            async def connect() -> Connection:
                return await connect_unix(nursery, path, role="test", security=Security())

            yield World(service, connect)
            nursery.cancel_scope.cancel()
        assert not os.listdir(self.directory)


class TestInProcess(TransportContract):
    passes_fds = True
    crosses_wire = False

    @asynccontextmanager
    async def open_world(self) -> AsyncIterator[World]:
        async with misbehaving_service() as service:

            async def connect() -> Connection:
                return InProcess(service)

            yield World(service, connect)
