"""Listening, and Unix sockets: who may connect, and what happens to descriptors."""

from __future__ import annotations

import os
import socket
import stat
import struct
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from rpc_site import SECRET, SocketAsStream, welcome
from rpc_world import (
    Echo,
    MisbehavingService,
    misbehaving_service,
    run,
    trio_test,
    until,
)

from alluxiofuse.errors import (
    PeerError,
    UnavailableError,
    UserError,
)
from alluxiofuse.rpc.client import connect_tcp, connect_unix
from alluxiofuse.rpc.security import Security
from alluxiofuse.rpc.server import serve_tcp, serve_unix
from alluxiofuse.wire.framing import (
    FrameReader,
    decode_answer_header,
    encode_answer,
)
from alluxiofuse.wire.handshake import ClientHandshake

NOBODY = 65534


def refusal(serve: Any, *args: Any, **kwargs: Any) -> str:
    async def main() -> str:
        async with misbehaving_service() as service:
            with pytest.raises(UserError) as caught:
                await serve(service, *args, **kwargs)
            return caught.value.message

    message = run(main)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])  # noqa: S104
def test_no_secret_no_listening_on_the_network(host: str) -> None:
    assert "--secret-file" in refusal(serve_tcp, host, 0, security=Security())


def test_address_that_is_not_ours() -> None:
    assert "does not have that address" in refusal(serve_tcp, "192.0.2.1", 0, security=Security(SECRET))


def test_unknown_host() -> None:
    assert "not known" in refusal(serve_tcp, "no.such.host.invalid", 0, security=Security(SECRET))


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        message = refusal(serve_tcp, "127.0.0.1", other.getsockname()[1], security=Security())
    assert "in use" in message


@trio_test
async def test_localhost_is_served_on_all_its_addresses() -> None:
    async with misbehaving_service() as service, trio.open_nursery() as nursery:
        address = await nursery.start(partial(serve_tcp, service, "localhost", 0, security=Security()))
        connection = await connect_tcp(nursery, "localhost", address.port, role="test", security=Security())
        assert (await connection.call(Echo("x"))).text == "x"
        nursery.cancel_scope.cancel()


@trio_test
async def test_handlers_must_match_the_ops() -> None:
    class Incomplete(MisbehavingService):
        @property
        def handlers(self) -> dict[Any, Any]:
            return {k: v for k, v in super().handlers.items() if k is not Echo}

    service = Incomplete()
    with pytest.raises(TypeError, match=r"test\.echo"):
        await serve_tcp(service, "127.0.0.1", 0, security=Security())
    service.close()


def test_unix_socket_mode_and_stale_file(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def main() -> None:
        async with misbehaving_service() as service, trio.open_nursery() as nursery:
            serve = partial(serve_unix, service, str(path), security=Security())
            await nursery.start(serve)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            with pytest.raises(UserError, match="running daemon"):
                await serve()
            connection = await connect_unix(nursery, str(path), role="test", security=Security())
            assert (await connection.call(Echo("x"))).text == "x"
            nursery.cancel_scope.cancel()

    run(main)
    assert not path.exists()


def test_unix_socket_in_bad_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    assert "a file in its place" in refusal(serve_unix, str(tmp_path / "file"), security=Security())
    assert (tmp_path / "file").read_text() == "precious"
    assert "No such file" in refusal(serve_unix, str(tmp_path / "a" / "b"), security=Security())
    assert "107" in refusal(serve_unix, str(tmp_path / ("x" * 200)), security=Security())


@trio_test
async def test_unix_socket_that_is_not_there() -> None:
    async with trio.open_nursery() as nursery:
        with pytest.raises(UnavailableError, match="nobody answers at unix:/nowhere"):
            await connect_unix(nursery, "/nowhere", role="test", security=Security())
        with pytest.raises(UnavailableError):
            await connect_unix(nursery, "/" + "x" * 200, role="test", security=Security())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_unix_peer_of_another_user_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = Path(os.path.realpath("/tmp")) / f"rpc-{os.getpid()}"  # noqa: S108
    directory.mkdir(0o711)
    path = str(directory / "socket")
    ready_r, ready_w = os.pipe()
    said_r, said_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        _be_nobody(path, ready_r, said_w)

    async def main() -> str:
        async with misbehaving_service() as service, trio.open_nursery() as nursery:
            await nursery.start(partial(serve_unix, service, path, security=Security(), mode=0o666))
            os.write(ready_w, b"x")
            said = (await trio.to_thread.run_sync(os.read, said_r, 500)).decode()
            assert service.peers == []
            nursery.cancel_scope.cancel()
        return said

    try:
        said = run(main)
    finally:
        os.waitpid(pid, 0)
        for fd in (ready_r, ready_w, said_r, said_w):
            os.close(fd)
        directory.rmdir()
    assert said.startswith("AuthError")
    assert f"uid {NOBODY} may not use this socket" in said
    assert f"unix uid={NOBODY} pid={pid}" in caplog.text


def _be_nobody(path: str, ready_r: int, said_w: int) -> None:
    """The child's life: connect as another user, say what came of it."""
    said = "nothing"
    try:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        os.read(ready_r, 1)

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                await connect_unix(nursery, path, role="test", security=Security())

        trio.run(main)
    except BaseException as exc:
        while isinstance(exc, BaseExceptionGroup):
            exc = exc.exceptions[0]
        said = f"{type(exc).__name__}: {exc}"
    finally:
        os.write(said_w, said.encode())
        os._exit(0)


def test_descriptors_sent_by_a_client_are_dropped(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")

    async def main() -> None:
        async with misbehaving_service() as service, trio.open_nursery() as nursery:
            await nursery.start(partial(serve_unix, service, path, security=Security()))
            with trio.socket.socket(socket.AF_UNIX) as sock:
                await sock.connect(path)
                hello = ClientHandshake(Security(), "test", uses_secret=False).start()
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("4i", *[sock.fileno()] * 4))]
                await sock.sendmsg([hello], rights)
                (frame,) = FrameReader().feed(await sock.recv(1000))
                assert decode_answer_header(frame.header).error is None
            nursery.cancel_scope.cancel()

    run(main)


def test_client_refuses_descriptors_that_do_not_fit_their_frames(tmp_path: Path) -> None:
    """Named but not there, there but not named, too many: an end of the connection, and none open."""
    path = str(tmp_path / "socket")
    answer = encode_answer(1, ["x", 0, 0])
    cases = [(encode_answer(1, ["x", 0, 0], fd_count=2), 1), (answer, 1), (answer[:9], 3), (b"", 0)]

    async def serve(listener: trio.socket.SocketType, data: bytes, count: int) -> None:
        sock, _ = await listener.accept()
        with sock:
            await welcome(SocketAsStream(sock))
            await sock.recv(1000)
            rights = [
                (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{count}i", *[sock.fileno()] * count))
            ]
            if data:
                await sock.sendmsg([data], rights if count else [])
                if data == answer[:9]:
                    await sock.sendmsg([answer[9:10]], rights)

    async def main() -> None:
        for data, count in cases:
            with trio.socket.socket(socket.AF_UNIX) as listener:
                await listener.bind(path)
                listener.listen()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(serve, listener, data, count)
                    connection = await connect_unix(nursery, path, role="test", security=Security())
                    if data == answer:
                        # The answer itself was sound; the descriptors after it are not.
                        try:
                            await connection.call(Echo("x"))
                        except PeerError:
                            pass
                    else:
                        with pytest.raises(PeerError):
                            await connection.call(Echo("x"))
                    await until(partial(getattr, connection, "is_closed"))
            os.unlink(path)

    run(main)
