"""Dials daemons: `connect_tcp`, `connect_unix`, `connect`; for long-lived clients `Reconnecting`.

A connection lives in a nursery of the caller's: one task there reads answers. When the nursery is
cancelled the connection closes; when the connection breaks the nursery does not notice.
"""

from __future__ import annotations

import errno
import math
import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import trio

from alluxiofuse.errors import (
    AlluxioFuseError,
    AuthError,
    BadRequestError,
    ConnectionLost,
    PeerError,
    ProtocolError,
    UnavailableError,
    from_wire,
)
from alluxiofuse.rpc import interrupt
from alluxiofuse.rpc.address import Address, TcpAddress, UnixAddress
from alluxiofuse.rpc.base import Answer, Buffer, Connection
from alluxiofuse.rpc.listen import peer_credentials, tune_tcp
from alluxiofuse.rpc.reconnecting import NotSentError, Reconnecting
from alluxiofuse.rpc.tally import tally
from alluxiofuse.rpc.wiresocket import WireSocket
from alluxiofuse.wire import codec
from alluxiofuse.wire.framing import (
    ALIVE_S,
    HANDSHAKE_LIMITS,
    LIMITS,
    AnswerHeader,
    decode_answer_header,
    encode_request,
)
from alluxiofuse.wire.handshake import ClientHandshake, Security
from alluxiofuse.wire.messages import Request, result_type

__all__ = ["Reconnecting", "NotSentError", "SocketConnection", "connect", "connect_tcp", "connect_unix"]

CONNECT_TIMEOUT_S = 10.0
LOOK_S = ALIVE_S
MAX_QUIET_LOOKS = 4
"""A loaded machine may be late with its signs of life."""
MUCH_BYTES = 64 << 10
"""More than many small requests: who takes so much is being sent a large one."""
R = TypeVar("R")
_result_types: dict[type[Request[Any]], Any] = {}


async def connect(
    nursery: trio.Nursery,
    address: Address,
    *,
    role: str,
    security: Security,
    timeout_s: float = CONNECT_TIMEOUT_S,
) -> SocketConnection:
    """A connection to the `role` ("master", "worker") that listens at `address`.

    UnavailableError: nobody answers there in time. AuthError: one side refuses the other.
    ProtocolError: no daemon of ours, another version, or another role.
    """
    if isinstance(address, UnixAddress):
        return await connect_unix(nursery, address.path, role=role, security=security, timeout_s=timeout_s)
    return await connect_tcp(
        nursery, address.host, address.port, role=role, security=security, timeout_s=timeout_s
    )


async def connect_tcp(
    nursery: trio.Nursery,
    host: str,
    port: int,
    *,
    role: str,
    security: Security,
    timeout_s: float = CONNECT_TIMEOUT_S,
) -> SocketConnection:
    """See `connect`. With a secret the server must prove that it has it too."""
    address = TcpAddress(host, port)
    with trio.move_on_after(timeout_s):
        wire = WireSocket(await _dial_tcp(address), HANDSHAKE_LIMITS)
        machine = ClientHandshake(security, role, uses_secret=True)
        return await _start(nursery, wire, machine, address, can_pass_fds=False)
    raise UnavailableError(f"{address} did not answer within {timeout_s:g} s")


async def connect_unix(
    nursery: trio.Nursery,
    path: str,
    *,
    role: str,
    security: Security,
    timeout_s: float = CONNECT_TIMEOUT_S,
) -> SocketConnection:
    """See `connect`. No secret is needed: the kernel tells each side who the other is."""
    address = UnixAddress(path)
    with trio.move_on_after(timeout_s):
        wire = WireSocket(await _dial_unix(address), HANDSHAKE_LIMITS, takes_fds=True)
        machine = ClientHandshake(security, role, uses_secret=False)
        return await _start(nursery, wire, machine, address, can_pass_fds=True)
    raise UnavailableError(f"{address} did not answer within {timeout_s:g} s")


async def _dial_tcp(address: TcpAddress) -> socket.socket:
    try:
        found = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise UnavailableError(f"the host of {address} is not known: {exc}") from None
    reason = "no address"
    for family, kind, protocol, _, place in found:
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as exc:  # An address family that is off here, or no descriptor left.
            reason = exc.strerror or str(exc)
            continue
        try:
            await _connect(sock, place)
            if sock.getsockname() == sock.getpeername():
                # A port of our own range, where nobody listens, can end up connected to itself.
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            tune_tcp(sock)
            return sock
        except OSError as exc:
            sock.close()
            reason = exc.strerror or str(exc)
        except BaseException:
            sock.close()
            raise
    raise UnavailableError(f"nobody answers at {address}: {reason}")


async def _dial_unix(address: UnixAddress) -> socket.socket:
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as exc:
        raise UnavailableError(f"{address} can't be dialled: {exc.strerror}") from None
    try:
        await _connect(sock, address.path)
        _, uid = peer_credentials(sock)
        # As root we go where we are sent; others must not be lured to a stranger's socket.
        if os.geteuid() != 0 and uid not in (0, os.geteuid()):
            raise AuthError(f"{address} belongs to uid {uid}: neither ours nor root's")
        return sock
    except OSError as exc:
        sock.close()
        if exc.errno in (errno.EACCES, errno.EPERM):
            raise AuthError(f"no permission to use {address}") from None
        raise UnavailableError(f"nobody answers at {address}: {exc.strerror or exc}") from None
    except BaseException:
        sock.close()
        raise


async def _connect(sock: socket.socket, place: Any) -> None:
    sock.setblocking(False)
    while True:
        try:
            sock.connect(place)
        except BlockingIOError as exc:
            if exc.errno == errno.EAGAIN:  # A Unix listener's queue is full; it cannot be awaited.
                await trio.sleep(0.01)
                continue
            await trio.lowlevel.wait_writable(sock)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, os.strerror(error)) from None
        return


async def _start(
    nursery: trio.Nursery, wire: WireSocket, machine: ClientHandshake, address: Address, *, can_pass_fds: bool
) -> SocketConnection:
    try:
        await wire.send([machine.start()])
        while not machine.is_done:
            await wire.receive()
            while not machine.is_done and (frame := wire.next_frame()) is not None:
                answer = machine.receive(frame.header)
                if answer:
                    await wire.send([answer])
        wire.set_limits(LIMITS)
        connection = SocketConnection(nursery, wire, address, machine.cluster_id, can_pass_fds=can_pass_fds)
        nursery.start_soon(connection.read_all)
        return connection
    except ConnectionLost as exc:
        wire.close()
        raise UnavailableError(f"{address} hung up during the handshake: {exc.message}") from None
    except PeerError as exc:
        wire.close()
        raise type(exc)(f"{address}: {exc.message}") from None
    except BaseException:
        wire.close()
        raise


class _Call:
    """A request on its way. `task` waits from when the request was sent."""

    __slots__ = ("failure", "fds", "header", "is_waiting", "looks", "on_late", "payload", "request", "task")

    def __init__(self, request: Request[Any], on_late: Callable[[Any], None] | None) -> None:
        self.request = request
        self.on_late = on_late
        self.looks = 0
        """How many looks for signs of life it has seen."""
        self.task = trio.lowlevel.current_task()
        self.is_waiting = False
        self.header: AnswerHeader | None = None
        self.payload: Buffer = b""
        self.fds: list[int] = []
        self.failure: AlluxioFuseError | None = None

    def wake(self) -> None:
        if self.is_waiting:
            self.is_waiting = False
            trio.lowlevel.reschedule(self.task)


class SocketConnection(Connection):
    """A client's end of a TCP or Unix socket; made by `connect`.

    A call takes as long as its handler does (but at most the request's `DEADLINE_S`), and only while
    there is somebody: when calls wait, and for some seconds not a byte comes and nothing large goes, the
    connection is over."""

    def __init__(
        self,
        nursery: trio.Nursery,
        wire: WireSocket,
        address: Address,
        cluster_id: str,
        *,
        can_pass_fds: bool,
    ) -> None:
        self._nursery = nursery
        self._wire = wire
        self._can_pass_fds = can_pass_fds
        self._next_id = 1
        self._calls: dict[int, _Call] = {}
        """Sent, or being sent, and not answered. An answer to an id that is missing here and below
        `_next_id` belongs to a cancelled call."""
        self._late: dict[int, tuple[type[Request[Any]], Callable[[Any], None]]] = {}
        """Cancelled or given up, by callers who want to know what comes nevertheless (`on_late`)."""
        self._failure: PeerError | None = None
        """Why the connection is over."""
        self._silence = trio.CancelScope()
        """Around waiting for bytes; its deadline is the next look for signs of life, infinite while no
        call waits."""
        self._is_heard = False
        """Bytes came since the last look."""
        self._quiet_looks = 0
        """How many looks in a row found no sign of life. Looks are counted, not seconds: time in which
        this process itself was stopped does not speak against the other end."""
        self._taken_bytes = 0
        """What the other end had taken at the last look."""
        self.address = address
        self.cluster_id = cluster_id
        """The server's, "" when it did not know it yet."""

    @property
    def can_pass_fds(self) -> bool:
        return self._can_pass_fds

    @property
    def is_closed(self) -> bool:
        return self._failure is not None

    async def aclose(self) -> None:
        self._fail(ConnectionLost("the connection was closed"))

    async def exchange(
        self,
        request: Request[R],
        payload: Buffer = b"",
        *,
        on_late: Callable[[R], None] | None = None,
    ) -> Answer[R]:
        """See `Connection`. NotSentError (a ConnectionLost): the connection was already gone, so
        the server has not seen the request. BadRequestError: also when it is over the limits."""
        if self._failure is not None:
            raise NotSentError(self._failure.message)
        request_id = self._next_id
        size = payload.nbytes if isinstance(payload, memoryview) else len(payload)
        head = encode_request(request_id, request.OP, request, size)
        self._next_id += 1
        if not self._calls:
            self._begin_to_wait()
        call = self._calls[request_id] = _Call(request, on_late)
        try:
            await self._wire.send((head, payload) if size else (head,))
        except ConnectionLost as exc:
            self._fail(exc)
        except BaseException:
            self._calls.pop(request_id, None)
            _close_all(call.fds)
            if self._failure is None and self._wire.is_mid_send:
                self._expect_late(request_id, call)
                self._nursery.start_soon(self._flush)
            raise
        if call.header is None and call.failure is None:
            await self._wait(request_id, call)
        return self._result(request, call)

    async def _wait(self, request_id: int, call: _Call) -> None:
        def abandon(_: Any) -> trio.lowlevel.Abort:
            del self._calls[request_id]
            self._expect_late(request_id, call)
            return trio.lowlevel.Abort.SUCCEEDED

        call.is_waiting = True
        await trio.lowlevel.wait_task_rescheduled(abandon)

    def _result(self, request: Request[R], call: _Call) -> Answer[R]:
        header = call.header
        if header is None:
            assert call.failure is not None
            raise call.failure
        if header.error is not None:
            _close_all(call.fds)
            raise from_wire(header.error.code, header.error.errno, header.error.message)
        try:
            result = codec.decode(header.result, _result_type(type(request)))
        except BadRequestError as exc:
            _close_all(call.fds)
            raise ProtocolError(f"the answer to {request.OP} is malformed: {exc.message}") from None
        return Answer(result, call.payload, call.fds)

    async def _flush(self) -> None:
        """Send the rest of a frame whose sender was cancelled."""
        try:
            await self._wire.flush()
        except ConnectionLost as exc:
            self._fail(exc)

    async def read_all(self) -> None:
        """The reading task, started by `connect`: hands answers to their calls until the end."""
        try:
            deadline = self._silence.deadline  # A call may have begun before this task did.
            while True:
                with trio.CancelScope(deadline=deadline) as self._silence:
                    await self._take_answers()
                deadline = self._look()
        except PeerError as exc:
            self._fail(exc)
        finally:
            self._fail(ConnectionLost("the connection was closed"))

    async def _take_answers(self) -> None:
        """Cancelled: what came was handed out."""
        while True:
            # Frames that came with the last bytes of the handshake are there already.
            while (frame := self._wire.next_frame()) is not None:
                header = decode_answer_header(frame.header)
                fds = self._wire.take_fds(header.fd_count)
                self._on_answer(header, frame.payload, fds)
            await self._wire.receive()
            self._is_heard = True

    def _begin_to_wait(self) -> None:
        self._quiet_looks = 0
        if self._silence.deadline == math.inf:
            self._silence.deadline = trio.current_time() + LOOK_S

    def _look(self) -> float:
        """For a sign of life; when to look again. ConnectionLost: there was none for too long."""
        self._end_calls()
        if not self._calls:
            return math.inf
        is_alive = self._takes_much() or self._is_heard
        self._is_heard = False
        self._quiet_looks = 0 if is_alive else self._quiet_looks + 1
        if self._quiet_looks >= MAX_QUIET_LOOKS:
            tally["connections_silent"] += 1
            raise ConnectionLost(f"no sign of life for {MAX_QUIET_LOOKS * LOOK_S:g} s")
        return trio.current_time() + LOOK_S

    def _end_calls(self) -> None:
        """Of programs that were told to stop, and those that have waited too long."""
        for request_id, call in list(self._calls.items()):
            call.looks += 1
            if not call.is_waiting:
                continue
            if interrupt.is_told_to_stop(call.task.context.get(interrupt.serving, 0)):
                tally["calls_interrupted"] += 1
                call.failure = interrupt.interrupted()
            elif call.looks * LOOK_S > call.request.DEADLINE_S:
                tally["calls_timed_out"] += 1
                call.failure = UnavailableError(
                    f"{self.address} did not answer {call.request.OP} within {call.request.DEADLINE_S:g} s"
                )
            else:
                continue
            del self._calls[request_id]
            self._expect_late(request_id, call)
            call.wake()

    def _expect_late(self, request_id: int, call: _Call) -> None:
        if call.on_late is not None:
            self._late[request_id] = type(call.request), call.on_late

    def _takes_much(self) -> bool:
        """A large request is on its way on a slow line, and gets on."""
        before, (self._taken_bytes, waiting) = self._taken_bytes, self._wire.progress()
        progress = self._taken_bytes - before
        return progress >= MUCH_BYTES or bool(progress and waiting)

    def _on_answer(self, header: AnswerHeader, payload: Buffer, fds: list[int]) -> None:
        call = self._calls.pop(header.id, None)
        if call is None:
            _close_all(fds)
            kind, on_late = self._late.pop(header.id, (None, None))
            if kind is not None and on_late is not None and header.error is None:
                on_late(codec.decode(header.result, _result_type(kind)))
            if not 0 <= header.id < self._next_id:
                raise ProtocolError("an answer to a request that was never made")
            return
        call.header, call.payload, call.fds = header, payload, fds
        call.wake()

    def _fail(self, failure: PeerError) -> None:
        """End the connection, and all calls on it. Idempotent; contains no await."""
        if self._failure is not None:
            return
        self._failure = failure
        self._wire.close()
        calls, self._calls = self._calls, {}
        self._late.clear()
        for call in calls.values():
            call.failure = ConnectionLost(failure.message)
            call.wake()


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _result_type(request: type[Request[Any]]) -> Any:
    found = _result_types.get(request)
    if found is None:
        found = _result_types[request] = result_type(request)
    return found
