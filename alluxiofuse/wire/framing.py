"""Frames: how messages lie in a byte stream. Sans-IO: no sockets here.

    u32 header length | u32 payload length | header (msgpack) | payload (raw bytes)

Lengths are little-endian. The header of a request is `[id, method, arguments]`, of an answer
`[id, error or nil, result]` with error = `[code, errno, message]`. A fourth element, when there,
is the number of file descriptors that travel with the frame's first byte (Unix sockets only).
Ids are chosen by the client, ascending from 1; answers may come in any order.

An answer with id 0 answers nothing: it is a sign of life. A server sends one every `ALIVE_S` while
it works at requests of the connection, so a client that waits for answers and gets not a byte for
several times that knows that nobody works for it: the other end is stopped, hangs, or is cut off.

What a receiver refuses with ProtocolError (the stream cannot be trusted any more, so the
connection dies): a length over the limit, an empty header, a header of another shape. What it
answers with BadRequestError (the stream is fine): an unknown method, arguments that do not fit.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta

from alluxiofuse.errors import MAX_MESSAGE_CHARS, AlluxioFuseError, BadRequestError, ProtocolError, to_wire
from alluxiofuse.wire import codec
from alluxiofuse.wire.messages import U32, U63
from alluxiofuse.wire.worker_ops import MAX_IO_BYTES

PREFIX: Final = struct.Struct("<II")
PREFIX_BYTES: Final = PREFIX.size
MAX_HEADER_BYTES: Final = 4 << 20
MAX_PAYLOAD_BYTES: Final = MAX_IO_BYTES + (64 << 10)
MAX_FDS: Final = 4
"""Most descriptors that travel with one frame."""
ALIVE_S: Final = 2.0
RECEIVE_BYTES: Final = 64 << 10
"""What one read asks for while no large payload is under way."""
SMALL_ROOM_BYTES: Final = 4096
"""Rather than read into less room than this, what is there moves to the front."""

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest frame that a receiver takes."""

    header_bytes: int
    payload_bytes: int


LIMITS: Final = Limits(MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES)
HANDSHAKE_LIMITS: Final = Limits(4096, 0)
"""Until a peer has shown who it is, it cannot make us hold more than this."""


H = TypeVar("H")


class RequestHeader(msgspec.Struct, array_like=True, frozen=True):
    id: U63
    method: Annotated[str, Meta(max_length=128)]
    arguments: codec.Raw
    fd_count: Annotated[int, Meta(ge=0, le=MAX_FDS)] = 0


class WireError(msgspec.Struct, array_like=True, frozen=True):
    """An error as it travels; see `errors.from_wire`."""

    code: Annotated[str, Meta(max_length=64)]
    errno: U32
    message: Annotated[str, Meta(max_length=MAX_MESSAGE_CHARS)]


class AnswerHeader(msgspec.Struct, array_like=True, frozen=True):
    id: U63
    error: WireError | None
    result: codec.Raw
    fd_count: Annotated[int, Meta(ge=0, le=MAX_FDS)] = 0


@dataclass(slots=True)
class Frame:
    """One received frame. `payload` is the receiver's own memory."""

    header: bytes
    payload: bytes | bytearray


def _head(header: bytes, payload_bytes: int) -> bytes:
    if len(header) > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise BadRequestError(
            f"message of {len(header)} + {payload_bytes} bytes is over the limit of "
            f"{MAX_HEADER_BYTES} + {MAX_PAYLOAD_BYTES}"
        )
    return PREFIX.pack(len(header), payload_bytes) + header


def encode_request(request_id: int, method: str, arguments: object, payload_bytes: int = 0) -> bytes:
    """Everything of a request's frame but the payload. BadRequestError when over the limits."""
    return _head(codec.encode((request_id, method, arguments)), payload_bytes)


def encode_answer(request_id: int, result: object, payload_bytes: int = 0, fd_count: int = 0) -> bytes:
    """Everything of an answer's frame but the payload. BadRequestError when over the limits."""
    header: tuple[object, ...] = (request_id, None, result)
    if fd_count:
        header = (*header, fd_count)
    return _head(codec.encode(header), payload_bytes)


def encode_error(request_id: int, error: AlluxioFuseError) -> bytes:
    """A whole frame that answers with `error`."""
    code, errno, message = to_wire(error)
    # A name that is not UTF-8 may sit in the message as lone surrogates, which msgpack cannot hold.
    safe = message.encode("utf-8", "backslashreplace").decode()[:MAX_MESSAGE_CHARS]
    return _head(codec.encode((request_id, (code, errno, safe), None)), 0)


ALIVE: Final = encode_answer(0, None)
"""A whole frame: a sign of life."""


def decode_request_header(header: bytes) -> RequestHeader:
    """ProtocolError when it is none."""
    return _decode_header(header, RequestHeader)


def decode_answer_header(header: bytes) -> AnswerHeader:
    """ProtocolError when it is none."""
    return _decode_header(header, AnswerHeader)


def _decode_header(header: bytes, type_: type[H]) -> H:
    try:
        return codec.decode(header, type_)
    except BadRequestError as exc:
        raise ProtocolError(f"malformed frame header: {exc.message}") from None


class FrameReader:
    """Cuts a byte stream into frames, whatever pieces it arrives in.

    Use: receive into `buffer()`, say how much came by `received`, then take `next_frame` until
    it gives None; only then call `buffer` again. A payload that did not arrive together with its
    header is received straight into its own memory, so no payload byte is copied more than once
    after the kernel handed it over.

    `limits` may be changed between frames (they are raised when the handshake is over).
    After a ProtocolError the reader must not be used again.
    """

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self._memory = memoryview(bytearray(RECEIVE_BYTES))
        self._start = 0
        self._end = 0
        """Received and not yet taken: [start, end) of memory."""
        self._need = PREFIX_BYTES
        """Bytes from start that must lie in memory in one piece before there is progress."""
        self._header = b""
        self._payload: bytearray | None = None
        """A payload under way, with its first `_filled` bytes there, and its header."""
        self._filled = 0

    @property
    def is_mid_frame(self) -> bool:
        """A frame has begun and not ended: an end of the stream now is a broken stream."""
        return self._payload is not None or self._end > self._start

    def buffer(self) -> memoryview:
        """Where the next bytes of the stream go; never empty."""
        if self._payload is not None:
            return memoryview(self._payload)[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
            if len(self._memory) > RECEIVE_BYTES:
                self._memory = memoryview(bytearray(RECEIVE_BYTES))
        elif self._start + self._need > len(self._memory) or len(self._memory) - self._end < SMALL_ROOM_BYTES:
            self._make_room()
        return self._memory[self._end :]

    def received(self, count: int) -> None:
        """The first `count` bytes of what `buffer` gave are filled."""
        if self._payload is not None:
            self._filled += count
        else:
            self._end += count

    def feed(self, data: Buffer) -> Iterator[Frame]:
        """The same with copying: all frames that `data` completes."""
        left = memoryview(data)
        while left:
            room = self.buffer()
            count = min(len(room), len(left))
            room[:count] = left[:count]
            self.received(count)
            left = left[count:]
            while (frame := self.next_frame()) is not None:
                yield frame

    def next_frame(self) -> Frame | None:
        """The next complete frame, None when more bytes are needed. ProtocolError: garbage."""
        if self._payload is not None:
            return self._finish_payload(self._payload)
        have = self._end - self._start
        if have < PREFIX_BYTES:
            self._need = PREFIX_BYTES
            return None
        header_bytes, payload_bytes = PREFIX.unpack_from(self._memory, self._start)
        self._check(header_bytes, payload_bytes)
        self._need = PREFIX_BYTES + header_bytes
        if have < self._need:
            return None
        begin = self._start + PREFIX_BYTES
        header = bytes(self._memory[begin : begin + header_bytes])
        self._start = begin = begin + header_bytes
        self._need = PREFIX_BYTES
        if self._end - begin >= payload_bytes:
            self._start += payload_bytes
            return Frame(header, bytes(self._memory[begin : self._start]))
        self._payload = bytearray(payload_bytes)
        self._filled = self._end - begin
        self._payload[: self._filled] = self._memory[begin : self._end]
        self._header, self._start, self._end = header, 0, 0
        return None

    def _finish_payload(self, payload: bytearray) -> Frame | None:
        if self._filled < len(payload):
            return None
        self._payload = None
        return Frame(self._header, payload)

    def _check(self, header_bytes: int, payload_bytes: int) -> None:
        limits = self.limits
        if not 0 < header_bytes <= limits.header_bytes or payload_bytes > limits.payload_bytes:
            raise ProtocolError(
                f"frame of {header_bytes} + {payload_bytes} bytes, the limit is "
                f"{limits.header_bytes} + {limits.payload_bytes}: the peer does not speak this protocol"
            )

    def _make_room(self) -> None:
        """Move what is there to the front, of larger memory when a large header needs it (given
        back when all of it was taken)."""
        kept = bytes(self._memory[self._start : self._end])
        size = max(RECEIVE_BYTES, self._need, len(kept) + 1)
        if size != len(self._memory):
            self._memory = memoryview(bytearray(size))
        self._memory[: len(kept)] = kept
        self._start, self._end = 0, len(kept)
