"""Frames, without sockets: whole, split, a byte at a time, mutated, and over the limits."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alluxiofuse.errors import BadRequestError, ProtocolError, StaleError
from alluxiofuse.wire import codec
from alluxiofuse.wire.framing import (
    HANDSHAKE_LIMITS,
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    PREFIX,
    RECEIVE_BYTES,
    Frame,
    FrameReader,
    Limits,
    decode_answer_header,
    decode_request_header,
    encode_answer,
    encode_error,
    encode_request,
)

HEADERS = st.binary(min_size=1, max_size=40) | st.integers(1, 3 * RECEIVE_BYTES).map(lambda n: b"h" * n)
PAYLOADS = st.binary(max_size=40) | st.integers(0, 3 * RECEIVE_BYTES).map(lambda n: b"p" * n)
FRAMES = st.lists(st.tuples(HEADERS, PAYLOADS), max_size=6)


def on_wire(frames: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(PREFIX.pack(len(h), len(p)) + h + p for h, p in frames)


def pairs(frames: list[Frame]) -> list[tuple[bytes, bytes]]:
    return [(frame.header, bytes(frame.payload)) for frame in frames]


@settings(deadline=None, max_examples=60)
@given(FRAMES, st.randoms(use_true_random=False), st.sampled_from([1, 7, 100, 5000, RECEIVE_BYTES, 1 << 20]))
def test_any_split_gives_the_same_frames(
    frames: list[tuple[bytes, bytes]], rng: random.Random, piece_bytes: int
) -> None:
    data = on_wire(frames)
    if len(data) > 5000 * piece_bytes:
        piece_bytes = 5000
    reader = FrameReader()
    got: list[Frame] = []
    while data:
        count = rng.randint(1, piece_bytes)
        got += reader.feed(data[:count])
        data = data[count:]
    assert pairs(got) == frames
    assert not reader.is_mid_frame


@settings(deadline=None, max_examples=30)
@given(FRAMES)
def test_byte_at_a_time(frames: list[tuple[bytes, bytes]]) -> None:
    frames = [(h[:50], p[:50]) for h, p in frames]
    reader = FrameReader()
    got = [frame for byte in on_wire(frames) for frame in reader.feed(bytes([byte]))]
    assert pairs(got) == frames


@settings(deadline=None, max_examples=60)
@given(FRAMES.filter(bool), st.floats(0, 1, exclude_max=True))
def test_truncated_stream_is_mid_frame_or_between(frames: list[tuple[bytes, bytes]], where: float) -> None:
    data = on_wire(frames)
    cut = int(len(data) * where)
    reader = FrameReader()
    got = pairs(list(reader.feed(data[:cut])))
    assert got == frames[: len(got)]
    assert reader.is_mid_frame == (len(on_wire(got)) != cut)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.binary(max_size=300), max_size=10))
def test_any_bytes_give_frames_or_protocol_error(pieces: list[bytes]) -> None:
    reader = FrameReader(Limits(200, 100))
    try:
        for piece in pieces:
            for frame in reader.feed(piece):
                assert 0 < len(frame.header) <= 200
                assert len(frame.payload) <= 100
                for decode in (decode_request_header, decode_answer_header):
                    try:
                        decode(frame.header)
                    except ProtocolError:
                        pass
    except ProtocolError:
        pass


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_mutated_headers_decode_or_are_refused(data: st.DataObject) -> None:
    frame = bytearray(encode_request(7, "master.lookup", [1, b"name", {"a": 1.5}], 0)[PREFIX.size :])
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    for decode in (decode_request_header, decode_answer_header):
        try:
            header = decode(bytes(frame))
        except ProtocolError:
            continue
        assert header.id >= 0
        assert 0 <= header.fd_count <= 4


@pytest.mark.parametrize(
    ("header_bytes", "payload_bytes"),
    [
        (0, 0),
        (MAX_HEADER_BYTES + 1, 0),
        (1, MAX_PAYLOAD_BYTES + 1),
        (0xFFFFFFFF, 0xFFFFFFFF),
    ],
)
def test_over_the_limit(header_bytes: int, payload_bytes: int) -> None:
    with pytest.raises(ProtocolError, match="limit"):
        list(FrameReader().feed(PREFIX.pack(header_bytes, payload_bytes)))


def test_limits_before_the_handshake_and_raised_after_it() -> None:
    reader = FrameReader(HANDSHAKE_LIMITS)
    small, large = on_wire([(b"h" * 4096, b"")]), on_wire([(b"h" * 5000, b"p" * 100)])
    frames = []
    for frame in reader.feed(small + large):  # The second has arrived with the first.
        frames.append(frame)
        reader.limits = Limits(10_000, 1000)
    assert pairs(frames) == [(b"h" * 4096, b""), (b"h" * 5000, b"p" * 100)]
    with pytest.raises(ProtocolError):
        list(FrameReader(HANDSHAKE_LIMITS).feed(PREFIX.pack(100, 1)))


def test_largest_frame_passes_and_memory_shrinks_again() -> None:
    reader = FrameReader()
    header, payload = b"h" * MAX_HEADER_BYTES, b"p" * MAX_PAYLOAD_BYTES
    assert pairs(list(reader.feed(on_wire([(header, payload)])))) == [(header, payload)]
    assert len(reader.buffer()) == RECEIVE_BYTES


def test_large_payload_is_received_in_place() -> None:
    reader = FrameReader()
    head = encode_request(1, "m", None, 1 << 20)
    list(reader.feed(head))
    room = reader.buffer()
    assert len(room) == 1 << 20
    room[:] = bytes(1 << 20)
    reader.received(1 << 20)
    frame = reader.next_frame()
    assert frame is not None
    assert frame.payload is room.obj


def test_headers_round_trip() -> None:
    request = decode_request_header(encode_request(3, "a.b", [1, "x"])[PREFIX.size :])
    assert (request.id, request.method, request.fd_count) == (3, "a.b", 0)
    assert codec.decode(request.arguments, list) == [1, "x"]
    answer = decode_answer_header(encode_answer(4, {"k": b"v"}, fd_count=2)[PREFIX.size :])
    assert (answer.id, answer.error, answer.fd_count) == (4, None, 2)
    assert codec.decode(answer.result, dict) == {"k": b"v"}


def test_error_round_trip_bounds_and_undecodable_names() -> None:
    header = decode_answer_header(encode_error(5, StaleError("é\udcff" + "\udcff" * 1000))[PREFIX.size :])
    assert header.error is not None
    assert header.error.code == "stale"
    assert header.error.message.startswith("é\\udcff")
    assert len(header.error.message) <= 500


def test_sender_is_told_what_is_too_large() -> None:
    with pytest.raises(BadRequestError, match="limit"):
        encode_request(1, "m", bytes(MAX_HEADER_BYTES))
    with pytest.raises(BadRequestError, match="limit"):
        encode_answer(1, None, MAX_PAYLOAD_BYTES + 1)


@pytest.mark.parametrize(
    "header",
    [
        None,
        {},
        [],
        [1],
        [1, "m"],
        [-1, "m", []],
        [1, b"m", []],
        [1, "m" * 129, []],
        [1, "m", [], 5],
        [1, "m", [], -1],
        [1 << 63, "m", []],
    ],
)
def test_misshapen_request_headers(header: object) -> None:
    with pytest.raises(ProtocolError):
        decode_request_header(codec.encode(header))


def test_deeply_nested_header_is_refused() -> None:
    with pytest.raises(ProtocolError):
        decode_request_header(b"\x93\x01\xa1m" + b"\x91" * 1_000_000)
