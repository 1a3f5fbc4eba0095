"""Whose the other end of a TCP connection on this machine is, and what comes of it."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from functools import partial

import pytest
import trio
from rpc_world import Echo, WhoAmI, misbehaving_service, run

from alluxiofuse.rpc import localpeer
from alluxiofuse.rpc.client import connect_tcp
from alluxiofuse.rpc.localpeer import uid_of_local_peer
from alluxiofuse.rpc.security import Security
from alluxiofuse.rpc.server import serve_tcp

NOBODY = 65534
SECRET = b"a secret that is long enough"


@pytest.fixture(params=["sock_diag", "proc"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "proc":

        def missing(sock: socket.socket) -> int | None:
            raise OSError("this kernel has no sock_diag")

        monkeypatch.setattr(localpeer, "_ask_kernel", missing)
    return


@pytest.mark.parametrize(
    ("family", "host"),
    [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.9.8.7"), (socket.AF_INET6, "::1")],
)
def test_uid_of_a_peer(method: None, family: socket.AddressFamily, host: str) -> None:
    with socket.socket(family) as listener, socket.socket(family) as client:
        try:
            listener.bind((host, 0))
        except OSError:
            pytest.skip(f"no {host} on this machine")
        listener.listen()
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        with server:
            assert uid_of_local_peer(server) == os.geteuid()
            assert uid_of_local_peer(client) == os.geteuid()
            client.close()
            # Its requests may still be on their way; it must not count as root's, whose uid is 0.
            assert uid_of_local_peer(server) is None


def test_a_half_closed_peer_is_nobody(method: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        with server:
            client.shutdown(socket.SHUT_WR)
            assert uid_of_local_peer(server) is None


def test_our_own_user_needs_no_secret_on_loopback() -> None:
    async def main() -> None:
        async with misbehaving_service() as service, trio.open_nursery() as nursery:
            address = await nursery.start(partial(serve_tcp, service, "127.0.0.1", 0, security=Security()))
            connection = await connect_tcp(
                nursery, address.host, address.port, role="test", security=Security()
            )
            me = await connection.call(WhoAmI())
            assert (me.is_trusted, me.is_authenticated, me.uid) == (True, False, os.geteuid())
            nursery.cancel_scope.cancel()

    run(main)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
@pytest.mark.parametrize("secret", [None, SECRET])
def test_another_user_needs_the_secret(secret: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = []

    async def main() -> None:
        security = Security(secret)
        async with misbehaving_service() as service, trio.open_nursery() as nursery:
            address = await nursery.start(partial(serve_tcp, service, "127.0.0.1", 0, security=security))
            said.append(await trio.to_thread.run_sync(_as_nobody, address.port, secret))
            nursery.cancel_scope.cancel()

    run(main)
    if secret is None:
        assert said[0].startswith("AuthError")
        assert f"uid {NOBODY} may not use this port" in said[0]
        assert "--secret-file" in said[0]
        assert f"uid={NOBODY}" in caplog.text
    else:
        assert said == ["welcome"]


def _as_nobody(port: int, secret: bytes | None) -> str:
    """What a process of another user is told when it connects and asks for something."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer = "nothing"
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            answer = trio.run(_ask, port, secret)
        except BaseException as exc:
            while isinstance(exc, BaseExceptionGroup):
                exc = exc.exceptions[0]
            answer = f"{type(exc).__name__}: {exc}"
        finally:
            os.write(write_fd, answer.encode())
            os._exit(0)
    os.close(write_fd)
    with closing(os.fdopen(read_fd, "rb")) as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    return said


async def _ask(port: int, secret: bytes | None) -> str:
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            connection = await connect_tcp(nursery, "127.0.0.1", port, role="test", security=Security(secret))
            await connection.call(Echo("x"))
            nursery.cancel_scope.cancel()
    return "welcome"
