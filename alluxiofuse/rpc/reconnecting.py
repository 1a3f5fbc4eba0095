"""A connection that comes back."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from alluxiofuse.errors import ConnectionLost, PeerError, UnavailableError
from alluxiofuse.rpc import interrupt
from alluxiofuse.rpc.base import Answer, Buffer, Connection
from alluxiofuse.rpc.tally import tally
from alluxiofuse.wire.messages import Request

MIN_BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0
PATIENCE_S = 30.0
SHORT_PATIENCE_S = 2.0
"""Of a call that begins when an outage has lasted longer than patience."""
MAX_ATTEMPTS = 8
"""Connections that one call may break before it gives up: it might be what breaks them."""
R = TypeVar("R")


class NotSentError(ConnectionLost):
    """The connection was gone before the request was sent: it has certainly not been done."""


class Reconnecting(Connection):
    """Dials when a call needs it, again and again with growing pauses, one dial at a time.

    A call that finds no connection waits for one up to `patience_s`, then raises UnavailableError
    with the last reason. That patience is spent once for one outage: who comes when nobody has answered
    for longer waits `SHORT_PATIENCE_S`. What waiting does not cure (AuthError, ProtocolError, and whatever
    else `dial` or `on_connected` raise) is raised at once. A call whose connection broke while it was
    out raises ConnectionLost, for it may have been done; with `is_idempotent` it is sent again.
    Patience begins anew whenever a connection was lost. A program that is told to stop gets EINTR.

    Cancelled while dialling: the attempt is given up, and the next call dials.
    """

    def __init__(
        self,
        dial: Callable[[], Awaitable[Connection]],
        *,
        on_connected: Callable[[Connection], Awaitable[None]] | None = None,
        patience_s: float = PATIENCE_S,
        can_pass_fds: bool = False,
    ) -> None:
        """`on_connected` gets each new connection before any call does, to take up sessions; it
        must use that connection and not this object. `can_pass_fds`: what is said before the
        first connection."""
        self._dial = dial
        self._on_connected = on_connected
        self._patience_s = patience_s
        self._can_pass_fds = can_pass_fds
        self._connection: Connection | None = None
        self._dialling = trio.Lock()
        """Held by the one task that dials; guards the two below."""
        self._backoff_s = 0.0
        self._dial_at = 0.0
        """Not before this time, on trio's clock."""
        self._reason = "it was never reached"
        self._missed_since: float | None = None
        """Since when calls have found no connection; None: there is one, or nobody asked."""
        self._is_closed = False
        self.connected_count = 0
        """How often a connection was made, for metrics and to notice a change."""

    @property
    def current(self) -> Connection | None:
        """The connection in use, None while there is none."""
        connection = self._connection
        return None if self._is_closed or connection is None or connection.is_closed else connection

    @property
    def can_pass_fds(self) -> bool:
        return self._can_pass_fds

    @property
    def is_closed(self) -> bool:
        """`aclose` was called. While merely disconnected this is false."""
        return self._is_closed

    async def aclose(self) -> None:
        self._is_closed = True
        if self._connection is not None:
            await self._connection.aclose()

    async def exchange(
        self,
        request: Request[R],
        payload: Buffer = b"",
        *,
        on_late: Callable[[R], None] | None = None,
        is_idempotent: bool = False,
    ) -> Answer[R]:
        for _ in range(MAX_ATTEMPTS):
            connection = self.current or await self.connect()
            try:
                return await connection.exchange(request, payload, on_late=on_late)
            except ConnectionLost as exc:
                self._reason = exc.message
                if isinstance(exc, NotSentError):
                    continue
                if not is_idempotent:
                    raise
                tally["calls_repeated"] += 1
        raise ConnectionLost(f"the connection broke {MAX_ATTEMPTS} times in a row: {self._reason}")

    async def call(self, request: Request[R], payload: Buffer = b"", *, is_idempotent: bool = False) -> R:
        answer = await self.exchange(request, payload, is_idempotent=is_idempotent)
        answer.close_fds()
        return answer.result

    async def connect(self, patience_s: float | None = None) -> Connection:
        """Make sure that there is a connection; errors as of a call. `patience_s`: whatever the outage
        has cost others."""
        if self._connection is not None and self._connection.is_closed:
            self._connection = None
            tally["connections_lost"] += 1
            self._missed_since = None
        now = trio.current_time()
        if self._missed_since is None:
            self._missed_since = now
        if patience_s is None:
            left = self._missed_since + self._patience_s - now
            patience_s = max(left, min(SHORT_PATIENCE_S, self._patience_s))
        with trio.move_on_after(patience_s):
            return await interrupt.watched(self._connected)
        raise UnavailableError(f"no connection within {patience_s:g} s: {self._reason}")

    async def _connected(self) -> Connection:
        async with self._dialling:
            while True:
                if self._is_closed:
                    raise ConnectionLost("the connection was closed")
                if (connection := self.current) is not None:
                    return connection
                await trio.sleep_until(self._dial_at)
                await self._dial_once()

    async def _dial_once(self) -> None:
        # Set before the attempt, so that it holds also when that is cancelled or fails oddly.
        self._backoff_s = min(MAX_BACKOFF_S, max(MIN_BACKOFF_S, 2 * self._backoff_s))
        self._dial_at = trio.current_time() + self._backoff_s * random.uniform(0.5, 1.0)  # noqa: S311
        try:
            connection = await self._dial()
            try:
                if self._on_connected is not None:
                    await self._on_connected(connection)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await connection.aclose()
                raise
        except (ConnectionLost, UnavailableError) as exc:
            self._reason = exc.message
            return
        except PeerError as exc:
            self._reason = exc.message
            raise
        if self._is_closed:
            await connection.aclose()
            return
        self._backoff_s = 0.0
        self._dial_at = trio.current_time() + MIN_BACKOFF_S
        self._can_pass_fds = connection.can_pass_fds
        self._connection = connection
        self._missed_since = None
        self.connected_count += 1
        if self.connected_count > 1:
            tally["reconnects"] += 1
