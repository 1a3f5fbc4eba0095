"""Client and daemon in one process: a call is a function call, nothing is encoded."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import trio

from alluxiofuse.errors import AlluxioFuseError, ConnectionLost
from alluxiofuse.rpc.base import Answer, Buffer, Connection, FileRange, Peer, Service
from alluxiofuse.rpc.filerange import read_range
from alluxiofuse.rpc.reconnecting import NotSentError
from alluxiofuse.rpc.service import HandlerTable, as_answer, as_awaitable, duplicates, is_awaitable, release
from alluxiofuse.wire.messages import Request

MAX_UNBROKEN_CALLS = 100
"""Calls of plain handlers after which others get a turn."""
R = TypeVar("R")


class InProcess(Connection):
    """A connection to a Service in the same trio loop.

    What differs from the wire: requests and results are shared, not copied, so neither side may
    change them afterwards; arguments are not checked against their declared bounds; a call of a
    plain handler mostly does not yield; cancelling a call cancels its handler.
    The same: payloads, ownership of descriptors, bugs in handlers (logged, EIO), closing.
    """

    def __init__(self, service: Service, name: str = "in-process") -> None:
        """TypeError: the service's handlers do not match its ops."""
        self._table = HandlerTable(service)
        self._peer = Peer(name, is_trusted=True, is_authenticated=True, can_pass_fds=True, uid=os.geteuid())
        self._waiting: set[trio.CancelScope] = set()
        """Of calls whose handlers are at an await."""
        self._unbroken_count = 0
        self._is_closed = False

    @property
    def may_lose_answers(self) -> bool:
        return False

    @property
    def can_pass_fds(self) -> bool:
        return True

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    async def aclose(self) -> None:
        """See `Connection`. The service is told when the handlers under way have ended, which
        they do at once unless they shield themselves."""
        if self._is_closed:
            return
        self._is_closed = True
        for scope in self._waiting:
            scope.cancel()
        if not self._waiting:
            self._peer.closed()

    async def exchange(
        self,
        request: Request[R],
        payload: Buffer = b"",
        *,
        on_late: Callable[[R], None] | None = None,
    ) -> Answer[R]:
        result = await self._ran(request, payload)
        if type(result) is Answer:
            if type(result.payload) is not FileRange:
                return result
        elif not is_awaitable(result):
            return Answer(result)
        return await self._finished(request, result)

    async def call(self, request: Request[R], payload: Buffer = b"") -> R:
        result = await self._ran(request, payload)
        if type(result) is not Answer:
            if not is_awaitable(result):
                return cast(R, result)
            result = await self._finished(request, result)
        elif type(result.payload) is FileRange:
            result = await self._finished(request, result)
        result.close_fds()
        return cast(R, result.result)

    async def _ran(self, request: Request[Any], payload: Buffer) -> Any:
        """A result, or an Answer as its caller gets it; for `_finished` what takes time: an Answer whose
        payload is to be read, or an awaitable."""
        if self._is_closed:
            raise NotSentError("the connection was closed")
        self._unbroken_count += 1
        if self._unbroken_count >= MAX_UNBROKEN_CALLS:
            self._unbroken_count = 0
            await trio.lowlevel.checkpoint()
            if self._is_closed:
                raise NotSentError("the connection was closed")
        try:
            result = self._table.run_decoded(self._peer, request, payload)
            if type(result) is not Answer:
                return result
            if type(result.payload) is not FileRange:
                as_answer(result)
                if result.fds:
                    return Answer(result.result, result.payload, duplicates(result.fds))
            return result
        except AlluxioFuseError:
            raise
        except Exception as exc:
            raise self._table.error_of(exc, request.OP) from None

    async def _finished(self, request: Request[R], result: Any) -> Answer[R]:
        """Of a handler that awaits, or that answers with more than a result."""
        with trio.CancelScope() as scope:
            self._waiting.add(scope)
            try:
                if is_awaitable(result):
                    self._unbroken_count = 0
                    result = await as_awaitable(result)
                return await self._deliver(result)
            except AlluxioFuseError:
                raise
            except Exception as exc:
                raise self._table.error_of(exc, request.OP) from None
            finally:
                self._waiting.remove(scope)
                if self._is_closed and not self._waiting:
                    self._peer.closed()
        raise ConnectionLost("the connection was closed")

    async def _deliver(self, result: Any) -> Answer[Any]:
        try:
            return await _received(result)
        except ConnectionLost:
            await self.aclose()  # A file that is shorter than promised breaks a connection.
            raise


async def _received(result: Any) -> Answer[Any]:
    """What the caller of a socket would have got for a handler's result."""
    answer = result if isinstance(result, Answer) else Answer(result)
    fds: list[int] = []
    payload = answer.payload
    try:
        as_answer(answer)
        fds += duplicates(answer.fds)
        if isinstance(payload, FileRange):
            payload = await read_range(payload)
    except BaseException:
        while fds:
            os.close(fds.pop())
        raise
    finally:
        release(answer.payload)
    return Answer(answer.result, payload, fds)
