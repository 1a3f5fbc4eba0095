"""What both ends of a connection look like, whatever the transport.

A client holds a `Connection` and calls ops on it. A daemon writes a `Service`: one handler per
request class. `rpc.server` serves a Service on sockets, `rpc.client` dials one, and
`rpc.inprocess` joins the two directly, without bytes in between.

Handlers are plain functions where they need no await (they then run inline, as one serialised
step), else coroutine functions. A handler raises `AlluxioFuseError`s only; anything else is a bug:
it is logged with its traceback, counted, and answered as code "internal", EIO.

A coroutine handler is cancelled when its connection ends or the daemon shuts down; in process also
when its caller is cancelled. What must not stop halfway belongs into a nursery of the daemon.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from alluxiofuse.wire.messages import Request

R = TypeVar("R")

_log = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class FileRange:
    """A payload that is sent straight from a file (sendfile): [offset, offset + length) of `fd`.
    The sender does not close `fd`; `on_sent` is called exactly once when it is no longer needed,
    also when sending failed. A file shorter than promised breaks the connection."""

    fd: int
    offset: int
    length: int
    on_sent: Callable[[], None] | None = None


@dataclass(slots=True)
class Answer(Generic[R]):
    """A result with what does not fit in msgpack.

    As returned by a handler: `payload` bytes or a FileRange, `fds` descriptors to pass (Unix and
    in-process only; dropped on TCP; at most 4). The transport duplicates descriptors as soon as the
    handler returns: the handler keeps its own. A payload buffer is sent in place, so it must stay
    unchanged after the handler returned; a FileRange's fd stays open until `on_sent`.
    As received by a caller: `payload` is a Buffer, `fds` are the caller's to close.
    """

    result: R
    payload: Buffer | FileRange = b""
    fds: list[int] = field(default_factory=list)

    def close_fds(self) -> None:
        """By a caller that does not want the descriptors (any more). Idempotent."""
        while self.fds:
            os.close(self.fds.pop())


@dataclass(slots=True)
class Peer:
    """Who is at the other end of a connection, as the server knows it."""

    name: str
    """For logs: "127.0.0.1:4711", "unix uid=0 pid=12", "in-process"."""
    is_trusted: bool
    """May speak for any user (`Caller.groups` None): proved the shared secret, is the same uid or
    root on a Unix socket or, where no secret is in use, on loopback TCP, or is in process."""
    is_authenticated: bool
    """Proved the secret, Unix credentials of the same uid or root, or in process. Only such peers
    are told secret mount options."""
    can_pass_fds: bool
    uid: int | None = None
    """Unix sockets, and TCP where no secret is in use: the peer's uid."""
    _on_close: list[Callable[[], None]] = field(default_factory=list)

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call `callback` (plain, quick) once when the connection has ended. Locks hang on this."""
        self._on_close.append(callback)

    def closed(self) -> None:
        """By the transport, once."""
        callbacks, self._on_close = self._on_close, []
        for callback in callbacks:
            try:
                callback()
            except Exception:
                _log.exception("an on_close callback for %s failed: a bug", self.name)


Handler = Callable[[Peer, Any, Buffer], Any | Awaitable[Any]]
"""(peer, request, payload) -> R | Answer[R], or an awaitable of it. `payload` is valid only until
the handler returns."""


class Service(ABC):
    """The handlers of one daemon. The transport checks `handlers` against `ops` at start-up."""

    @property
    @abstractmethod
    def ops(self) -> dict[str, type[Request[Any]]]:
        """All declared ops (`requests_of(master_ops)`)."""

    @property
    @abstractmethod
    def handlers(self) -> dict[type[Request[Any]], Handler]:
        """Exactly one handler for each of `ops`."""


class Connection(ABC):
    """A client's end. Calls may be made from many tasks at once (they are pipelined) and are
    answered in any order. Over a socket each ends: when the other end shows no sign of life
    (ConnectionLost, the connection is over), without an answer within the request's `DEADLINE_S`
    (UnavailableError), or when the program on whose behalf it is made is told to stop (EINTR, see
    `interrupt`).

    Cancelling a call abandons its answer: the request may still be carried out by the server.
    A broken transport makes all pending and later calls raise ConnectionLost; a Connection never
    reconnects by itself (`rpc.client.Reconnecting` does).
    """

    @abstractmethod
    async def exchange(
        self,
        request: Request[R],
        payload: Buffer = b"",
        *,
        on_late: Callable[[R], None] | None = None,
    ) -> Answer[R]:
        """Send, wait, and give result, payload and descriptors; raises what the handler raised.
        `on_late` (plain, quick) is given the result when it comes after the call was cancelled or
        given up: to give back what the answer holds. Its descriptors are closed already."""

    async def call(self, request: Request[R], payload: Buffer = b"") -> R:
        """The result alone (descriptors and payload, if any, are dropped)."""
        answer = await self.exchange(request, payload)
        answer.close_fds()
        return answer.result

    @property
    def may_lose_answers(self) -> bool:
        """It may break when a request has been carried out and its answer is not here yet."""
        return True

    @property
    @abstractmethod
    def can_pass_fds(self) -> bool: ...

    @property
    @abstractmethod
    def is_closed(self) -> bool: ...

    @abstractmethod
    async def aclose(self) -> None:
        """Close now; pending calls raise ConnectionLost. Idempotent."""
