"""A small service that misbehaves on request, and what the tests of transports share."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Any, ClassVar, TypeVar

import trio
from msgspec import Meta

from alluxiofuse.errors import FsError, StaleError
from alluxiofuse.rpc.base import Answer, Buffer, Connection, FileRange, Handler, Peer, Service
from alluxiofuse.wire.messages import NOTHING, Message, Nothing, Request, Text

TIMEOUT_S = 30.0
T = TypeVar("T")


class Echo(Request["Echoed"]):
    """Answers its arguments and its payload, inline."""

    OP: ClassVar[str] = "test.echo"
    text: Text
    number: Annotated[int, Meta(ge=0, le=1000)] = 0


class Echoed(Message):
    text: str
    number: int
    payload_bytes: int


class Later(Request[int]):
    """A coroutine handler; waits for `service.gate` when `waits`."""

    OP: ClassVar[str] = "test.later"
    number: int
    waits: bool = False


class Fail(Request[Nothing]):
    OP: ClassVar[str] = "test.fail"
    how: str
    later: bool = False


class Blob(Request[int]):
    """`size` bytes as payload, from memory or from the service's file."""

    OP: ClassVar[str] = "test.blob"
    offset: int
    size: int
    from_file: bool
    later: bool = False


class Descriptors(Request[list[int]]):
    """`count` descriptors, of pipes that hold their number, with or without a payload."""

    OP: ClassVar[str] = "test.descriptors"
    first: int
    count: int
    payload: str = ""


class WhoAmI(Request["Identity"]):
    OP: ClassVar[str] = "test.who_am_i"


class Identity(Message):
    name: str
    is_trusted: bool
    is_authenticated: bool
    can_pass_fds: bool
    uid: int | None


class Large(Request[bytes]):
    """A result (not a payload) of `size` bytes."""

    OP: ClassVar[str] = "test.large"
    size: int
    padding: bytes = b""


OPS: dict[str, type[Request[Any]]] = {
    request.OP: request for request in (Echo, Later, Fail, Blob, Descriptors, WhoAmI, Large)
}


class MisbehavingService(Service):
    """Open for inspection."""

    def __init__(self) -> None:
        self.gate = trio.Event()
        self.started_count = 0
        self.cancelled_count = 0
        self.running_count = 0
        self.most_running_count = 0
        self.closed_count = 0
        self.ranges_given = 0
        self.ranges_sent = 0
        self.peers: list[Peer] = []
        self.content = os.urandom(1 << 16) * 64
        self.file_fd = os.memfd_create("content")
        os.write(self.file_fd, self.content)

    def close(self) -> None:
        os.close(self.file_fd)

    @property
    def ops(self) -> dict[str, type[Request[Any]]]:
        return OPS

    @property
    def handlers(self) -> dict[type[Request[Any]], Handler]:
        return {
            Echo: self.echo,
            Later: self.later,
            Fail: self.fail,
            Blob: self.blob,
            Descriptors: self.descriptors,
            WhoAmI: self.who_am_i,
            Large: lambda peer, request, payload: bytes(request.size),
        }

    def echo(self, peer: Peer, request: Echo, payload: Buffer) -> Answer[Echoed]:
        return Answer(Echoed(request.text, request.number, len(payload)), bytes(payload))

    async def later(self, peer: Peer, request: Later, payload: Buffer) -> int:
        self.started_count += 1
        self.running_count += 1
        self.most_running_count = max(self.most_running_count, self.running_count)
        try:
            if request.waits:
                await self.gate.wait()
            else:
                await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            self.cancelled_count += 1
            raise
        finally:
            self.running_count -= 1
        return request.number

    def fail(self, peer: Peer, request: Fail, payload: Buffer) -> Awaitable[Any] | Any:
        if request.later:
            return self._fail_later(request.how)
        return _fail(request.how)

    async def _fail_later(self, how: str) -> Any:
        await trio.lowlevel.checkpoint()
        if how == "group":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                raise StaleError("inside a group")
        return _fail(how)

    def blob(self, peer: Peer, request: Blob, payload: Buffer) -> Any:
        answer: Answer[int]
        if request.from_file:
            self.ranges_given += 1
            answer = Answer(request.size, FileRange(self.file_fd, request.offset, request.size, self._sent))
        else:
            view = memoryview(self.content)[request.offset : request.offset + request.size]
            answer = Answer(request.size, view)
        return _later(answer) if request.later else answer

    def _sent(self) -> None:
        self.ranges_sent += 1

    def descriptors(self, peer: Peer, request: Descriptors, payload: Buffer) -> Answer[list[int]]:
        numbers = list(range(request.first, request.first + request.count))
        answer = Answer(numbers, b"p" * 100_000 if request.payload == "memory" else b"")
        if request.payload == "file":
            self.ranges_given += 1
            answer.payload = FileRange(self.file_fd, 0, 100_000, self._sent)
        for number in numbers:
            reading, writing = os.pipe()
            os.write(writing, str(number).encode())
            os.close(writing)
            answer.fds.append(reading)
        # As every handler does: it keeps its own descriptors, and may close them at once.
        trio.lowlevel.current_trio_token().run_sync_soon(_close_all, list(answer.fds))
        return answer

    def who_am_i(self, peer: Peer, request: WhoAmI, payload: Buffer) -> Identity:
        self.peers.append(peer)
        peer.on_close(self._closed)
        return Identity(peer.name, peer.is_trusted, peer.is_authenticated, peer.can_pass_fds, peer.uid)

    def _closed(self) -> None:
        self.closed_count += 1


def _fail(how: str) -> Any:
    match how:
        case "fs":
            raise FsError(2, "a/b")
        case "stale":
            raise StaleError("gone")
        case "long":
            raise StaleError("x" * 10_000 + "\udcff")
        case "undecodable":
            raise StaleError("name \udcff")
        case "bug":
            raise ZeroDivisionError("secret detail")
        case "unencodable":
            return object()
        case "too many descriptors":
            return Answer(NOTHING, fds=[0] * 5)
        case "dead descriptor":
            return Answer(NOTHING, fds=[99_999])
        case _:
            raise AssertionError(how)


async def _later(answer: Answer[T]) -> Answer[T]:
    await trio.lowlevel.checkpoint()
    return answer


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


class World:
    """A running service and a way to dial it."""

    def __init__(self, service: MisbehavingService, connect: Callable[[], Awaitable[Connection]]) -> None:
        self.service = service
        self.connect = connect


OpenWorld = Callable[[], AbstractAsyncContextManager[World]]


@asynccontextmanager
async def misbehaving_service() -> AsyncIterator[MisbehavingService]:
    service = MisbehavingService()
    try:
        yield service
    finally:
        service.close()


async def until(condition: Callable[[], bool]) -> None:
    """Poll; the test's own deadline ends it."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.002)


def open_fds() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            pass
    return found


def run(main: Callable[[], Awaitable[T]]) -> T:
    """trio.run with a deadline, and no descriptor may be left open."""

    async def limited() -> T:
        with trio.fail_after(TIMEOUT_S):
            return await main()

    gc.collect()  # What earlier tests left is not to be closed in between.
    before = open_fds()
    result = trio.run(limited)
    gc.collect()
    left = open_fds()
    assert left == before, f"more: {left.items() - before.items()}, fewer: {before.items() - left.items()}"
    return result


def trio_test(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test function."""

    @functools.wraps(test)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        run(functools.partial(test, *args, **kwargs))

    return wrapper
