"""One accepted connection: from frames to handlers and back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import trio

from alluxiofuse.errors import AlluxioFuseError, BadRequestError, ConnectionLost, PeerError
from alluxiofuse.rpc.base import Answer, Buffer, FileRange, Peer
from alluxiofuse.rpc.service import (
    HandlerTable,
    as_answer,
    as_awaitable,
    duplicates,
    is_awaitable,
    payload_length,
    release,
)
from alluxiofuse.rpc.wiresocket import WireSocket
from alluxiofuse.wire.framing import (
    ALIVE,
    ALIVE_S,
    Frame,
    decode_request_header,
    encode_answer,
    encode_error,
)

MAX_IN_FLIGHT = 256
"""Coroutine handlers of one connection at one time; at this number we stop reading."""
MAX_IN_FLIGHT_BYTES = 64 << 20
"""Request payloads held by them; above this too."""
MAX_BATCH = 128
"""Inline requests after which their answers go out and others get a turn."""
MAX_BATCH_BYTES = 1 << 20
"""Answer payloads after which they go out."""


class Outgoing:
    """One answer on its way. It owns its descriptors, and its claim on a FileRange, until
    `finish` (once, whether it was sent or not)."""

    __slots__ = ("fds", "head", "payload")

    def __init__(self, head: bytes, payload: Buffer | FileRange = b"", fds: Sequence[int] = ()) -> None:
        self.head = head
        self.payload = payload
        self.fds = fds

    def finish(self) -> None:
        for fd in self.fds:
            os.close(fd)
        release(self.payload)


class ServerConnection:
    """Serves one peer that has been let in; owned by the task that calls `run`."""

    def __init__(self, wire: WireSocket, table: HandlerTable, peer: Peer) -> None:
        self._wire = wire
        self._table = table
        self._peer = peer
        self._batch: list[Outgoing] = []
        """Answers of inline handlers, not yet sent. Owned by the reading task."""
        self._batch_bytes = 0
        self._in_flight = 0
        self._in_flight_bytes = 0
        self._has_room = trio.Event()
        """Set when a coroutine handler ended, for the reading task if it waits."""
        self._is_showing_life = False

    async def run(self) -> None:
        """Until the peer leaves, sends garbage, or we are cancelled. All handlers have ended and
        all that was not sent is released when it returns; then the peer is told to be closed."""
        try:
            async with trio.open_nursery() as nursery:
                try:
                    await self._read_all(nursery)
                except PeerError:
                    pass  # Gone or garbage: in both cases this connection is over.
                nursery.cancel_scope.cancel()
        finally:
            self._wire.close()
            for outgoing in self._batch:
                outgoing.finish()
            self._peer.closed()

    async def _read_all(self, nursery: trio.Nursery) -> None:
        while True:
            # Frames that came with the last bytes of the handshake are there already.
            while (frame := self._wire.next_frame()) is not None:
                await self._on_request(frame, nursery)
                if len(self._batch) >= MAX_BATCH:
                    await self._send_batch()
                    await trio.lowlevel.checkpoint()
                elif self._batch_bytes >= MAX_BATCH_BYTES:
                    await self._send_batch()
            await self._send_batch()
            await self._wire.receive()

    async def _on_request(self, frame: Frame, nursery: trio.Nursery) -> None:
        request = decode_request_header(frame.header)
        try:
            result = self._table.run(self._peer, request.method, request.arguments, frame.payload)
            if not is_awaitable(result):
                self._put(self._outgoing(request.id, request.method, result))
                return
        except Exception as exc:
            self._put(Outgoing(encode_error(request.id, self._table.error_of(exc, request.method))))
            return
        size = len(frame.payload)
        self._in_flight += 1
        self._in_flight_bytes += size
        nursery.start_soon(self._finish_later, request.id, request.method, result, size)
        if not self._is_showing_life:
            self._is_showing_life = True
            nursery.start_soon(self._show_life)
        if self._is_full():
            await self._send_batch()
        while self._is_full():
            self._has_room = trio.Event()
            await self._has_room.wait()

    def _is_full(self) -> bool:
        return self._in_flight >= MAX_IN_FLIGHT or self._in_flight_bytes > MAX_IN_FLIGHT_BYTES

    async def _show_life(self) -> None:
        """While coroutine handlers run, tell the client now and then that somebody is there."""
        try:
            await trio.sleep(ALIVE_S)
            while self._in_flight:
                await self._wire.send([ALIVE])
                await trio.sleep(ALIVE_S)
        except ConnectionLost:
            pass  # The reading task sees it too.
        finally:
            self._is_showing_life = False

    async def _finish_later(self, request_id: int, method: str, result: Any, size: int) -> None:
        try:
            outgoing = await self._finished(request_id, method, result)
            try:
                await self._send(outgoing)
            finally:
                outgoing.finish()
        except ConnectionLost:
            pass  # The reading task sees it too and ends the connection.
        finally:
            self._in_flight -= 1
            self._in_flight_bytes -= size
            self._has_room.set()

    async def _finished(self, request_id: int, method: str, result: Any) -> Outgoing:
        try:
            return self._outgoing(request_id, method, await as_awaitable(result))
        except Exception as exc:
            return Outgoing(encode_error(request_id, self._table.error_of(exc, method)))

    def _outgoing(self, request_id: int, method: str, result: Any) -> Outgoing:
        """A handler's result as a frame; raises what is wrong with it, having released it."""
        answer = result if isinstance(result, Answer) else Answer(result)
        fds: list[int] = []
        try:
            as_answer(answer)
            if self._peer.can_pass_fds:
                fds += duplicates(answer.fds)
            head = encode_answer(request_id, answer.result, payload_length(answer.payload), len(fds))
        except BaseException as exc:
            Outgoing(b"", answer.payload, fds).finish()
            if isinstance(exc, BadRequestError):
                raise AlluxioFuseError(f"the answer to {method} is too large") from None
            raise
        return Outgoing(head, answer.payload, fds)

    def _put(self, outgoing: Outgoing) -> None:
        self._batch.append(outgoing)
        self._batch_bytes += payload_length(outgoing.payload)

    async def _send_batch(self) -> None:
        """Send the answers that have gathered, with as few system calls as they allow."""
        batch = self._batch
        if not batch:
            return
        self._batch, self._batch_bytes = [], 0
        pieces: list[Buffer] = []
        try:
            for outgoing in batch:
                if isinstance(outgoing.payload, FileRange) or outgoing.fds:
                    if pieces:
                        await self._wire.send(pieces)
                        pieces = []
                    await self._send(outgoing)
                else:
                    pieces.append(outgoing.head)
                    pieces.append(outgoing.payload)
            if pieces:
                await self._wire.send(pieces)
        finally:
            for outgoing in batch:
                outgoing.finish()

    async def _send(self, outgoing: Outgoing) -> None:
        if isinstance(outgoing.payload, FileRange):
            await self._wire.send_file(outgoing.head, outgoing.payload, outgoing.fds)
        else:
            await self._wire.send([outgoing.head, outgoing.payload], outgoing.fds)
