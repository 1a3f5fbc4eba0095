"""The handshake, without sockets."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alluxiofuse.errors import AuthError, PeerError, ProtocolError
from alluxiofuse.wire import codec, handshake
from alluxiofuse.wire.framing import (
    PREFIX,
    decode_answer_header,
    decode_request_header,
    encode_answer,
    encode_error,
    encode_request,
)
from alluxiofuse.wire.handshake import ClientHandshake, Hello, Prove, Security, ServerHandshake, Welcome

SECRET = b"a shared secret of thirty-two by"
OTHER = b"another secret of thirty-two byt"


def body(frame: bytes) -> bytes:
    """The header of a whole frame, as the other side's reader gives it."""
    assert PREFIX.unpack_from(frame) == (len(frame) - PREFIX.size, 0)
    return frame[PREFIX.size :]


def shake(client: ClientHandshake, server: ServerHandshake) -> list[bytes]:
    """Let them talk; all frames, client's and server's in turn."""
    frames = [client.start()]
    while frames[-1]:
        frames.append(server.receive(body(frames[-1])))
        frames.append(client.receive(body(frames[-1])))
    return frames


def pair(
    client: Security, server: Security, *, uses_secret: bool = True
) -> tuple[ClientHandshake, ServerHandshake]:
    return (
        ClientHandshake(client, "master", uses_secret=uses_secret),
        ServerHandshake(server, "master", uses_secret=uses_secret),
    )


@pytest.mark.parametrize(("ours", "theirs"), [("", ""), ("c1", ""), ("", "c1"), ("c1", "c1")])
@pytest.mark.parametrize("secret", [None, SECRET])
def test_both_come_in(secret: bytes | None, ours: str, theirs: str) -> None:
    client, server = pair(Security(secret, ours), Security(secret, theirs))
    frames = shake(client, server)
    assert client.is_done
    assert server.is_done
    assert server.is_proved == (secret is not None)
    assert client.cluster_id == theirs
    assert server.refusal is None
    assert all(SECRET not in frame for frame in frames)


def test_without_secrets_on_a_unix_socket() -> None:
    client, server = pair(Security(SECRET), Security(OTHER), uses_secret=False)
    shake(client, server)
    assert client.is_done
    assert server.is_done
    assert not server.is_proved


@pytest.mark.parametrize(
    ("ours", "theirs", "error", "words"),
    [
        (None, SECRET, AuthError, "requires a secret"),
        (SECRET, None, AuthError, "server has none"),
        (OTHER, SECRET, AuthError, "not ours"),
    ],
)
def test_secrets_that_do_not_match(
    ours: bytes | None, theirs: bytes | None, error: type[PeerError], words: str
) -> None:
    client, server = pair(Security(ours), Security(theirs))
    with pytest.raises(error, match=words):
        shake(client, server)
    assert not client.is_done
    assert not server.is_done


def test_foreign_cluster_is_refused_by_the_server() -> None:
    client, server = pair(Security(SECRET, "c1"), Security(SECRET, "c2"))
    with pytest.raises(AuthError, match="different clusters"):
        shake(client, server)
    assert isinstance(server.refusal, AuthError)


def test_foreign_cluster_is_refused_by_the_client() -> None:
    client = ClientHandshake(Security(None, "c1"), "master", uses_secret=True)
    client.start()
    welcome = Welcome(handshake.PROTOCOL_VERSION, "c2", bytes(32), False, b"")
    with pytest.raises(AuthError, match="different clusters"):
        client.receive(body(encode_answer(0, welcome)))


def test_other_version_is_named_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    client = ClientHandshake(Security(SECRET), "master", uses_secret=True)
    ours = handshake.PROTOCOL_VERSION
    monkeypatch.setattr(handshake, "PROTOCOL_VERSION", ours + 1)
    server = ServerHandshake(Security(SECRET), "master", uses_secret=True)
    with pytest.raises(
        ProtocolError, match=f"version {ours}, the server {ours + 1}: install the same release"
    ):
        shake(client, server)
    answer = Welcome(ours + 2, "", bytes(32), False, b"")
    with pytest.raises(ProtocolError, match=f"version {ours + 2}, this client {ours + 1}"):
        client.receive(body(encode_answer(0, answer)))


def test_newer_hello_of_another_shape_is_told_by_its_version() -> None:
    server = ServerHandshake(Security(SECRET), "master", uses_secret=True)
    server.receive(body(encode_request(0, "hello", [9, {"all": "new"}])))
    assert server.refusal is not None
    assert "version 9" in server.refusal.message


def test_wrong_role() -> None:
    client = ClientHandshake(Security(), "worker", uses_secret=True)
    with pytest.raises(ProtocolError, match="address of a master"):
        shake(client, ServerHandshake(Security(), "master", uses_secret=True))


def test_peer_that_may_not_come_in() -> None:
    client = ClientHandshake(Security(), "master", uses_secret=False)
    refusal = AuthError("uid 7 may not")
    server = ServerHandshake(Security(), "master", uses_secret=False, peer_refusal=refusal)
    with pytest.raises(AuthError, match="uid 7"):
        shake(client, server)
    assert not server.is_done


def test_replay_of_a_recorded_client() -> None:
    client, server = pair(Security(SECRET), Security(SECRET))
    frames = shake(client, server)
    again = ServerHandshake(Security(SECRET), "master", uses_secret=True)
    again.receive(body(frames[0]))
    again.receive(body(frames[2]))
    assert isinstance(again.refusal, AuthError)
    assert not again.is_done


def test_replay_of_a_recorded_server() -> None:
    client, server = pair(Security(SECRET), Security(SECRET))
    frames = shake(client, server)
    victim = ClientHandshake(Security(SECRET), "master", uses_secret=True)
    victim.start()
    with pytest.raises(AuthError, match="not ours"):
        victim.receive(body(frames[1]))


def test_proof_cannot_be_reflected() -> None:
    """Neither the server's proof back to it, nor a client's nonce into our own hello."""
    server = ServerHandshake(Security(SECRET), "master", uses_secret=True)
    hello = Hello(handshake.PROTOCOL_VERSION, "master", "", bytes(32), True)
    answer = decode_answer_header(body(server.receive(body(encode_request(0, "hello", hello)))))
    welcome = codec.decode(answer.result, Welcome)
    server.receive(body(encode_request(1, "prove", Prove(welcome.proof))))
    assert isinstance(server.refusal, AuthError)

    victim = ClientHandshake(Security(SECRET), "master", uses_secret=True)
    asked = codec.decode(decode_request_header(body(victim.start())).arguments, Hello)
    oracle = ServerHandshake(Security(SECRET), "worker", uses_secret=True)
    hello = Hello(handshake.PROTOCOL_VERSION, "worker", "", asked.nonce, True)
    got = oracle.receive(body(encode_request(0, "hello", hello)))
    with pytest.raises(AuthError):  # The proof of a worker is none of a master.
        victim.receive(body(got))


@pytest.mark.parametrize("nothing", [b"", bytes(32)])
def test_server_that_claims_to_need_no_proof(nothing: bytes) -> None:
    client = ClientHandshake(Security(SECRET), "master", uses_secret=True)
    client.start()
    with pytest.raises(AuthError):
        client.receive(
            body(encode_answer(0, Welcome(handshake.PROTOCOL_VERSION, "", bytes(32), False, nothing)))
        )


def first(method: str, arguments: object) -> bytes:
    return body(encode_request(0, method, arguments))


@pytest.mark.parametrize(
    "send",
    [
        lambda: first("master.lookup", [1]),
        lambda: first("prove", Prove(bytes(32))),
        lambda: first("hello", []),
        lambda: first("hello", [1, "master", "", b"short", True]),
        lambda: b"\xc1",
        lambda: b"GET / HTTP/1.1",
    ],
)
def test_garbage_is_refused_without_telling_anything(send: Callable[[], bytes]) -> None:
    server = ServerHandshake(Security(SECRET, "the cluster"), "master", uses_secret=True)
    answer = decode_answer_header(body(server.receive(send())))
    assert server.refusal is not None
    assert answer.error is not None
    assert "the cluster" not in answer.error.message
    assert bytes(answer.result) == b"\xc0"


def test_request_before_the_proof() -> None:
    server = ServerHandshake(Security(SECRET), "master", uses_secret=True)
    server.receive(first("hello", Hello(handshake.PROTOCOL_VERSION, "master", "", bytes(32), True)))
    server.receive(first("master.lookup", [1]))
    assert isinstance(server.refusal, AuthError)
    server.receive(first("prove", Prove(bytes(32))))
    assert not server.is_done


@settings(deadline=None, max_examples=200)
@given(st.lists(st.binary(min_size=1, max_size=100), min_size=1, max_size=4))
def test_any_headers_never_raise_in_the_server_nor_let_in(headers: list[bytes]) -> None:
    server = ServerHandshake(Security(SECRET), "master", uses_secret=True)
    for header in headers:
        assert decode_answer_header(body(server.receive(header))).error is not None
    assert not server.is_done


@settings(deadline=None, max_examples=200)
@given(st.binary(min_size=1, max_size=100))
def test_any_header_is_a_peer_error_in_the_client(header: bytes) -> None:
    client = ClientHandshake(Security(SECRET), "master", uses_secret=True)
    client.start()
    with pytest.raises(PeerError):
        client.receive(header)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_mutated_handshake_lets_nobody_in(data: st.DataObject) -> None:
    client, server = pair(Security(SECRET), Security(SECRET))
    frames = [bytearray(client.start())]
    frames.append(bytearray(server.receive(body(bytes(frames[0])))))
    proof = bytearray(client.receive(body(bytes(frames[1]))))
    at = data.draw(st.integers(len(proof) - 32, len(proof) - 1))
    proof[at] ^= data.draw(st.integers(1, 255))
    server.receive(body(bytes(proof)))
    assert not server.is_done
    assert isinstance(server.refusal, AuthError)


def test_refusal_cannot_paint_the_terminal() -> None:
    client = ClientHandshake(Security(), "master", uses_secret=True)
    with pytest.raises(AuthError) as caught:
        client.receive(body(encode_error(0, AuthError("\x1b[31mred\nline"))))
    assert caught.value.message == "?[31mred?line"


def test_secret_shows_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    security = Security(SECRET, "c1")
    server = ServerHandshake(security, "master", uses_secret=True)
    logging.getLogger("test").error("%r %s %r", security, security, vars(server).get("x"))
    assert SECRET.decode() not in f"{security!r} {security} {security!s} {caplog.text}"
    assert "secret=<set>" in repr(security)
    assert "secret=<none>" in repr(Security())


def test_short_secret() -> None:
    with pytest.raises(ValueError, match="16"):
        Security(b"short")
