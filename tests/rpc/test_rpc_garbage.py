"""Whatever bytes arrive: an error, never a dead server or a hanging client."""

from __future__ import annotations

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rpc_site import SECRET, drain, send_quietly, site, welcome
from rpc_world import (
    Echo,
    run,
    trio_test,
)

from alluxiofuse.errors import (
    PeerError,
)
from alluxiofuse.rpc.client import connect_tcp
from alluxiofuse.rpc.security import Security
from alluxiofuse.wire.framing import (
    FrameReader,
    decode_answer_header,
    encode_answer,
    encode_request,
)
from alluxiofuse.wire.handshake import ClientHandshake

SETTINGS = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@SETTINGS
@given(st.lists(st.binary(max_size=200), max_size=5), st.booleans(), st.booleans())
def test_any_bytes_do_not_hurt_the_server(pieces: list[bytes], is_inside: bool, has_secret: bool) -> None:
    async def main() -> None:
        async with site(SECRET if has_secret else None) as here:
            stream = await (here.dial_in() if is_inside else here.dial())
            async with stream:
                for piece in pieces:
                    try:
                        await stream.send_all(piece)
                    except trio.BrokenResourceError:
                        break
                await send_quietly(stream, b"")
                await drain(stream)
            await here.check_alive()

    run(main)


@SETTINGS
@given(st.data())
def test_mutated_frames_get_errors_or_the_end(data: st.DataObject) -> None:
    frames = bytearray()
    for number in range(4):
        payload = b"p" * data.draw(st.sampled_from([0, 10]))
        frames += encode_request(number + 1, "test.echo", Echo("text", number), len(payload)) + payload
    for _ in range(data.draw(st.integers(1, 5))):
        frames[data.draw(st.integers(0, len(frames) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frames)))

    async def main() -> None:
        async with site() as here:
            async with await here.dial_in() as stream:
                await send_quietly(stream, bytes(frames[:cut]))
                for frame in FrameReader().feed(await drain(stream)):
                    decode_answer_header(frame.header)
            await here.check_alive()

    run(main)


@trio_test
async def test_frames_a_byte_at_a_time() -> None:
    async with site() as here, await here.dial_in() as stream:
        for byte in encode_request(1, "test.echo", Echo("slow"), 3) + b"abc":
            await stream.send_all(bytes([byte]))
        await stream.send_eof()
        (frame,) = FrameReader().feed(await drain(stream))
        assert frame.payload == b"abc"


@trio_test
async def test_unknown_method_and_bad_arguments_leave_the_connection_alone() -> None:
    async with site() as here, await here.dial_in() as stream:
        requests: list[tuple[str, object]] = [
            ("test.nothing", []),
            ("test.echo", {}),
            ("test.echo", [1]),
            ("test.echo", ["x"]),
        ]
        for method, arguments in requests:
            await stream.send_all(encode_request(1, method, arguments))
        await stream.send_eof()
        answers = [decode_answer_header(f.header) for f in FrameReader().feed(await drain(stream))]
        assert [a.error and a.error.code for a in answers] == ["bad_request"] * 3 + [None]


@trio_test
async def test_requests_sent_with_the_last_handshake_bytes_are_answered() -> None:
    async with site() as here, await here.dial() as stream:
        machine = ClientHandshake(here.security, "test", uses_secret=True)
        await stream.send_all(machine.start() + encode_request(1, "test.echo", Echo("early")))
        await stream.send_eof()
        assert len(list(FrameReader().feed(await drain(stream)))) == 2


@SETTINGS
@given(st.binary(max_size=200), st.booleans())
def test_garbage_from_a_server_never_hangs_the_client(garbage: bytes, is_answer: bool) -> None:
    """A server that is honest in the handshake and then sends anything, and closes or stays."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]

            async def serve() -> None:
                async with listener, await listener.accept() as stream:
                    await welcome(stream)
                    await stream.receive_some()
                    if is_answer:
                        await stream.send_all(encode_answer(1, None, len(garbage)))
                    await send_quietly(stream, garbage)
                    await drain(stream)

            nursery.start_soon(serve)
            port = listener.socket.getsockname()[1]
            connection = await connect_tcp(nursery, "127.0.0.1", port, role="test", security=Security())
            with pytest.raises(PeerError):
                await connection.call(Echo("x"))
            await connection.aclose()

    run(main)
