"""What strangers, dead peers and a busy life do to a server."""

from __future__ import annotations

import logging
import socket
from functools import partial

import pytest
import trio
from rpc_site import SECRET, drain, site, welcome
from rpc_world import (
    Blob,
    Echo,
    Later,
    WhoAmI,
    misbehaving_service,
    run,
    until,
)

from alluxiofuse.errors import (
    AuthError,
    ConnectionLost,
    PeerError,
    ProtocolError,
    UnavailableError,
)
from alluxiofuse.rpc import server, serverconnection
from alluxiofuse.rpc.client import SocketConnection, connect_tcp
from alluxiofuse.rpc.security import Security
from alluxiofuse.rpc.server import serve_tcp
from alluxiofuse.wire.framing import (
    FrameReader,
    decode_answer_header,
    encode_answer,
    encode_request,
)
from alluxiofuse.wire.handshake import ClientHandshake

HANDSHAKE_LOG = "alluxiofuse.rpc.server"

# --- the handshake on real sockets ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("security", "role", "error", "words"),
    [
        (Security(), "test", AuthError, "requires a secret"),
        (Security(b"x" * 32), "test", AuthError, "secret"),
        (Security(SECRET), "master", ProtocolError, "address of a test"),
    ],
)
def test_refused_clients_get_one_sentence_and_a_line_in_the_log(
    security: Security, role: str, error: type[PeerError], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with site(SECRET) as here:
            with pytest.raises(error, match=words) as caught:
                await here.connect(security, role)
            assert str(here.address) in caught.value.message
            await until(lambda: "refused 127.0.0.1:" in caplog.text)
            assert here.service.peers == []
            await here.check_alive()

    with caplog.at_level(logging.INFO):
        run(main)
    assert SECRET.decode() not in caplog.text
    assert "x" * 32 not in caplog.text


def test_client_with_a_secret_leaves_a_server_without_one() -> None:
    async def main() -> None:
        async with site() as here:
            with pytest.raises(AuthError, match="server has none"):
                await here.connect(Security(SECRET))

    run(main)


def test_foreign_cluster_and_clusters_learnt_later() -> None:
    async def main() -> None:
        async with site(SECRET) as here:
            assert (await here.connect(Security(SECRET, "c1"))).cluster_id == ""
            here.security.cluster_id = "c1"
            assert (await here.connect(Security(SECRET))).cluster_id == "c1"
            with pytest.raises(AuthError, match="different clusters"):
                await here.connect(Security(SECRET, "c2"))

    run(main)


def test_replay_of_a_recorded_handshake_gets_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with site(SECRET) as here:
            machine = ClientHandshake(here.security, "test", uses_secret=True)
            recorded = [machine.start()]
            async with await here.dial() as stream:
                await stream.send_all(recorded[0])
                (frame,) = FrameReader().feed(await stream.receive_some())
                recorded.append(machine.receive(frame.header))
                await stream.send_all(recorded[1])
                (frame,) = FrameReader().feed(await stream.receive_some())
                machine.receive(frame.header)
                assert machine.is_done
            async with await here.dial() as stream:
                await stream.send_all(b"".join(recorded) + encode_request(2, "test.who_am_i", []))
                frames = list(FrameReader().feed(await drain(stream)))
            assert len(frames) == 2
            error = decode_answer_header(frames[1].header).error
            assert error is not None
            assert error.code == "auth"
            assert here.service.peers == []
            await until(lambda: "not the server's" in caplog.text)

    run(main)


def test_silent_peers_are_dropped(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_S", 0.05)

    async def main() -> None:
        async with site(SECRET) as here, await here.dial() as stream:
            assert await drain(stream) == b""
            await here.check_alive()

    run(main)
    assert "not done within" in caplog.text


def test_flood_of_silent_peers_does_not_lock_out_honest_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_HANDSHAKES", 4)

    async def main() -> None:
        async with site(SECRET) as here:
            streams = [await here.dial() for _ in range(10)]
            await here.check_alive()
            for stream in streams[:6]:
                assert await drain(stream) == b""
            for stream in streams:
                await stream.aclose()

    run(main)


def test_log_of_refusals_is_limited(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with site(SECRET) as here:
            for _ in range(60):
                with pytest.raises(AuthError):
                    await here.connect(Security())

    run(main)
    assert 10 < len([r for r in caplog.records if r.name == HANDSHAKE_LOG]) < 40


def test_mere_knock_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with site(SECRET) as here:
            await (await here.dial()).aclose()
            await here.check_alive()

    run(main)
    assert not [r for r in caplog.records if r.name == HANDSHAKE_LOG]


def test_unresponsive_server_times_out() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            with socket.create_server(("127.0.0.1", 0)) as silent:
                port = silent.getsockname()[1]
                with pytest.raises(UnavailableError, match=r"within 0\.05 s"):
                    await connect_tcp(
                        nursery, "127.0.0.1", port, role="test", security=Security(), timeout_s=0.05
                    )
            with pytest.raises(UnavailableError, match="nobody answers"):
                await connect_tcp(nursery, "127.0.0.1", port, role="test", security=Security())
            with pytest.raises(UnavailableError, match="not known"):
                await connect_tcp(nursery, "no.such.host.invalid", 1, role="test", security=Security())

    run(main)


# --- a busy life ----------------------------------------------------------------------------------


def test_backpressure_bounds_the_handlers_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serverconnection, "MAX_IN_FLIGHT", 16)

    async def main() -> None:
        async with site() as here:
            connection = await here.connect()
            done = []

            async def one(number: int) -> None:
                done.append(await connection.call(Later(number, waits=True)))

            async with trio.open_nursery() as nursery:
                for number in range(100):
                    nursery.start_soon(one, number)
                await until(lambda: here.service.started_count == 16)
                await here.check_alive()
                assert here.service.started_count == 16
                here.service.gate.set()
            assert sorted(done) == list(range(100))
            assert here.service.most_running_count == 16

    run(main)


def test_payload_bytes_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serverconnection, "MAX_IN_FLIGHT_BYTES", 3 << 20)

    async def main() -> None:
        async with site() as here:
            connection = await here.connect()
            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(connection.call, Later(number, waits=True), bytes(1 << 20))
                await until(lambda: here.service.started_count == 4)
                here.service.gate.set()
            assert here.service.started_count == 10

    run(main)


@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize("later", [True, False])
def test_dead_reader_blocks_nobody_and_leaves_nothing(from_file: bool, later: bool) -> None:
    async def main() -> None:
        async with site() as here:
            async with await here.dial_in() as stream:
                request = Blob(0, 4 << 20, from_file, later)
                for number in range(1, 31):
                    await stream.send_all(encode_request(number, request.OP, request))
                if from_file:
                    await until(lambda: here.service.ranges_given > 0)
                await here.check_alive()
            await until(lambda: here.service.ranges_sent == here.service.ranges_given)
            await here.check_alive()

    run(main)


def test_shutdown_cancels_handlers_and_closes_connections() -> None:
    async def main() -> None:
        async with trio.open_nursery() as clients, misbehaving_service() as service:
            lost = []

            async def call(connection: SocketConnection) -> None:
                try:
                    await connection.call(Later(1, waits=True))
                except ConnectionLost as exc:
                    lost.append(exc)

            async with trio.open_nursery() as nursery:
                address = await nursery.start(
                    partial(serve_tcp, service, "127.0.0.1", 0, security=Security())
                )
                for _ in range(3):
                    connection = await connect_tcp(
                        clients, "127.0.0.1", address.port, role="test", security=Security()
                    )
                    await connection.call(WhoAmI())
                    clients.start_soon(call, connection)
                await until(lambda: service.started_count == 3)
                nursery.cancel_scope.cancel()
            assert service.cancelled_count == 3
            assert service.closed_count == 3
            await until(lambda: len(lost) == 3)

    run(main)


def test_call_cancelled_inside_a_large_frame_does_not_break_the_others() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
            may_read = trio.Event()
            got: list[int] = []

            async def serve() -> None:
                async with listener, await listener.accept() as stream:
                    reader = await welcome(stream)
                    await may_read.wait()
                    while data := await stream.receive_some():
                        for frame in reader.feed(data):
                            got.append(len(frame.payload))
                            await stream.send_all(encode_answer(len(got), ["x", 0, 0]))

            nursery.start_soon(serve)
            port = listener.socket.getsockname()[1]
            connection = await connect_tcp(nursery, "127.0.0.1", port, role="test", security=Security())
            payload = bytearray(8 << 20)  # More than the buffers of a loopback connection hold.
            with trio.move_on_after(0.05) as scope:
                await connection.call(Echo("cut"), payload)
            assert scope.cancelled_caught
            payload[:] = b"\xff" * len(payload)
            may_read.set()
            await until(lambda: got == [8 << 20])  # The rest goes out without another call.
            assert (await connection.call(Echo("x"))).text == "x"
            await connection.aclose()

    run(main)
