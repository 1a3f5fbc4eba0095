"""A TCP server that tests poke at, and ends of connections made by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol

import trio
from rpc_world import (
    Echo,
    MisbehavingService,
    misbehaving_service,
)

from alluxiofuse.rpc.address import TcpAddress
from alluxiofuse.rpc.client import SocketConnection, connect_tcp
from alluxiofuse.rpc.security import Security
from alluxiofuse.rpc.server import serve_tcp
from alluxiofuse.wire.framing import (
    FrameReader,
)
from alluxiofuse.wire.handshake import ClientHandshake, ServerHandshake

SECRET = b"0123456789abcdef0123456789abcdef"


class Site:
    """A TCP server that tests poke at."""

    def __init__(
        self, nursery: trio.Nursery, service: MisbehavingService, address: TcpAddress, security: Security
    ) -> None:
        self.nursery = nursery
        self.service = service
        self.address = address
        self.security = security

    async def connect(self, security: Security | None = None, role: str = "test") -> SocketConnection:
        return await connect_tcp(
            self.nursery,
            self.address.host,
            self.address.port,
            role=role,
            security=security or self.security,
        )

    async def dial(self) -> trio.SocketStream:
        """A stranger's connection."""
        return await trio.open_tcp_stream(self.address.host, self.address.port)

    async def dial_in(self) -> trio.SocketStream:
        """A stranger's connection that has done the handshake."""
        stream = await self.dial()
        machine = ClientHandshake(self.security, "test", uses_secret=True)
        await stream.send_all(machine.start())
        reader = FrameReader()
        while not machine.is_done:
            for frame in reader.feed(await stream.receive_some()):
                if answer := machine.receive(frame.header):
                    await stream.send_all(answer)
        return stream

    async def check_alive(self) -> None:
        connection = await self.connect()
        assert (await connection.call(Echo("alive"))).text == "alive"
        await connection.aclose()


@asynccontextmanager
async def site(secret: bytes | None = None) -> AsyncIterator[Site]:
    security = Security(secret)
    async with misbehaving_service() as service, trio.open_nursery() as nursery:
        address = await nursery.start(partial(serve_tcp, service, "127.0.0.1", 0, security=security))
        yield Site(nursery, service, address, security)
        nursery.cancel_scope.cancel()


async def drain(stream: trio.SocketStream) -> bytes:
    """All that comes until the other end closes."""
    data = b""
    try:
        while piece := await stream.receive_some():
            data += piece
    except trio.BrokenResourceError:
        pass
    return data


async def send_quietly(stream: trio.SocketStream, data: bytes) -> None:
    try:
        await stream.send_all(data)
        await stream.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # The server has seen enough.


class Stream(Protocol):
    async def receive_some(self) -> bytes | bytearray: ...

    async def send_all(self, data: bytes) -> None: ...


async def welcome(stream: Stream) -> FrameReader:
    machine = ServerHandshake(Security(), "test", uses_secret=True)
    reader = FrameReader()
    while not machine.is_done:
        for frame in reader.feed(await stream.receive_some()):
            await stream.send_all(machine.receive(frame.header))
    return reader


class SocketAsStream:
    """A trio socket with the two methods that `welcome` uses."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock

    async def receive_some(self) -> bytes:
        return await self._sock.recv(1000)

    async def send_all(self, data: bytes) -> None:
        assert await self._sock.send(data) == len(data)
