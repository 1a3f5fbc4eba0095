"""The first exchange on every connection. Sans-IO: no sockets here.

    client                                              server
    hello(version, role, cluster, nonce, wants_proof) ->
                     <- welcome(version, cluster, nonce, requires_proof, proof of the server)
    prove(proof of the client) ->                        only when a secret is in use
                     <- nothing                          (an empty answer: come in)

Both are ordinary frames under small limits. A proof is HMAC-SHA256, keyed with the shared secret,
over a label, the version, the role, both cluster ids and both nonces, each with its length before
it. The labels of the two directions differ, so a proof cannot be sent back to its maker; each side
puts 32 fresh random bytes in, so a recorded handshake is worth nothing later. The secret itself
never travels. What this does not do: it neither encrypts nor signs what follows (that is TLS's
work), so whoever can alter packets between two honest ends can take over the connection.

A refusal is an answer with one clear sentence that holds nothing of ours but the sentence.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from typing import Annotated, Final, TypeVar

from msgspec import Meta

from alluxiofuse.errors import (
    AlluxioFuseError,
    AuthError,
    BadRequestError,
    PeerError,
    ProtocolError,
    from_wire,
)
from alluxiofuse.wire import codec
from alluxiofuse.wire.framing import (
    decode_answer_header,
    decode_request_header,
    encode_answer,
    encode_error,
    encode_request,
)
from alluxiofuse.wire.messages import NOTHING, Message, Nothing

PROTOCOL_VERSION: Final = 2
NONCE_BYTES: Final = 32
MIN_SECRET_BYTES: Final = 16
HELLO_OP: Final = "hello"
PROVE_OP: Final = "prove"
_CLIENT_LABEL: Final = b"alluxiofuse handshake: client to server"
_SERVER_LABEL: Final = b"alluxiofuse handshake: server to client"

Nonce = Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Proof = Annotated[bytes, Meta(max_length=32)]
Short = Annotated[str, Meta(max_length=64)]
M = TypeVar("M")


@dataclass(slots=True, eq=False)
class Security:
    """What a process knows about who may talk to whom. Shared by all its connections."""

    secret: bytes | None = field(default=None, repr=False)
    """Shared by all daemons and clients of a cluster; None: none is used (loopback only)."""
    cluster_id: str = ""
    """The cluster this process belongs to, "" until it is known. It may be set later, when it
    is learnt (a worker at its first registration); handshakes from then on check it."""

    def __post_init__(self) -> None:
        if self.secret is not None and len(self.secret) < MIN_SECRET_BYTES:
            raise ValueError(f"a secret has at least {MIN_SECRET_BYTES} bytes")

    def __repr__(self) -> str:
        state = "none" if self.secret is None else "set"
        return f"Security(secret=<{state}>, cluster_id={self.cluster_id!r})"


class Hello(Message):
    """A newer version may append fields; the first stays what it is, so that versions can be told."""

    version: Annotated[int, Meta(ge=0, le=1 << 31)]
    role: Short
    """Which service the client expects here: "master", "worker"."""
    cluster_id: Short
    nonce: Nonce
    wants_proof: bool
    """The client holds a secret and stays only when the server proves that it has it too."""


class HelloVersion(Message):
    """As much of a hello as every version understands."""

    version: Annotated[int, Meta(ge=0, le=1 << 31)]


class Welcome(Message):
    version: Annotated[int, Meta(ge=0, le=1 << 31)]
    cluster_id: Short
    nonce: Nonce
    requires_proof: bool
    proof: Proof
    """b"" when no secret is in use."""


class Prove(Message):
    proof: Proof


def _proof(secret: bytes, label: bytes, hello: Hello, cluster_id: str, server_nonce: bytes) -> bytes:
    parts = (
        label,
        str(hello.version).encode(),
        hello.role.encode(),
        hello.cluster_id.encode(),
        cluster_id.encode(),
        hello.nonce,
        server_nonce,
    )
    message = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return hmac.digest(secret, message, hashlib.sha256)


def _is_foreign(ours: str, theirs: str) -> bool:
    return bool(ours) and bool(theirs) and ours != theirs


class ServerHandshake:
    """The server's side of one handshake.

    Feed each received frame's header to `receive` and send what it gives, until `is_done` or
    `refusal` is set; after a refusal the connection is closed.
    """

    def __init__(
        self, security: Security, role: str, *, uses_secret: bool, peer_refusal: AuthError | None = None
    ) -> None:
        """`uses_secret` False: the transport has already shown who the peer is (Unix
        credentials). `peer_refusal`: it has, and this peer may not come in."""
        self._secret = security.secret if uses_secret else None
        self._checks_secret = uses_secret
        self._cluster_id = security.cluster_id
        self._role = role
        self._peer_refusal = peer_refusal
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._hello: Hello | None = None
        self.is_done = False
        self.refusal: PeerError | None = None
        """Why the peer was refused; for the log."""

    @property
    def has_begun(self) -> bool:
        """The peer has said hello."""
        return self._hello is not None

    @property
    def is_proved(self) -> bool:
        """The peer has shown that it knows the secret."""
        return self.is_done and self._secret is not None

    def receive(self, header: bytes) -> bytes:
        """The frame to answer with. Never raises for what a peer sent."""
        request_id = 0
        try:
            request = decode_request_header(header)
            request_id = request.id
            if self.is_done or self.refusal is not None:
                raise ProtocolError("the handshake is over")
            if self._hello is None:
                return encode_answer(request_id, self._on_hello(request.method, request.arguments))
            return encode_answer(request_id, self._on_prove(self._hello, request.method, request.arguments))
        except BadRequestError:
            self.refusal = ProtocolError("malformed handshake: the peer does not speak this protocol")
        except PeerError as exc:
            self.refusal = exc
        return encode_error(request_id, self.refusal)

    def _on_hello(self, method: str, arguments: codec.Raw) -> Welcome:
        if method != HELLO_OP:
            raise ProtocolError("a connection begins with hello")
        if self._peer_refusal is not None:
            raise self._peer_refusal
        version = codec.decode(arguments, HelloVersion).version
        if version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the client speaks protocol version {version}, the server {PROTOCOL_VERSION}: "
                "install the same release on both"
            )
        hello = codec.decode(arguments, Hello)
        if hello.role != self._role:
            raise ProtocolError(f"this is the address of a {self._role}, the client expects another service")
        if _is_foreign(self._cluster_id, hello.cluster_id):
            raise AuthError("client and server belong to different clusters")
        if self._secret is not None and not hello.wants_proof:
            raise AuthError("the server requires a secret and the client has none: give it --secret-file")
        if self._checks_secret and self._secret is None and hello.wants_proof:
            raise AuthError("the client has a secret and the server has none: give the server --secret-file")
        self._hello = hello
        self.is_done = self._secret is None
        return Welcome(
            version=PROTOCOL_VERSION,
            cluster_id=self._cluster_id,
            nonce=self._nonce,
            requires_proof=self._secret is not None,
            proof=self._prove(_SERVER_LABEL, hello),
        )

    def _on_prove(self, hello: Hello, method: str, arguments: codec.Raw) -> Nothing:
        if method != PROVE_OP:
            raise AuthError("requests are taken only after the handshake")
        proof = codec.decode(arguments, Prove).proof
        if not hmac.compare_digest(proof, self._prove(_CLIENT_LABEL, hello)):
            raise AuthError("the client's secret is not the server's")
        self.is_done = True
        return NOTHING

    def _prove(self, label: bytes, hello: Hello) -> bytes:
        if self._secret is None:
            return b""
        return _proof(self._secret, label, hello, self._cluster_id, self._nonce)


class ClientHandshake:
    """The client's side: send `start()`, then for each received header send what `receive`
    gives (b"": nothing), until `is_done`. Errors mean: close the connection."""

    def __init__(self, security: Security, role: str, *, uses_secret: bool) -> None:
        """`uses_secret` False: the transport shows each end who the other is."""
        self._secret = security.secret if uses_secret else None
        self._hello = Hello(
            version=PROTOCOL_VERSION,
            role=role,
            cluster_id=security.cluster_id,
            nonce=secrets.token_bytes(NONCE_BYTES),
            wants_proof=self._secret is not None,
        )
        self._welcome: Welcome | None = None
        self.is_done = False
        self.cluster_id = ""
        """The server's, once done; "" when it does not know yet."""

    def start(self) -> bytes:
        return encode_request(0, HELLO_OP, self._hello)

    def receive(self, header: bytes) -> bytes:
        """AuthError: refused, or the server did not prove the secret. ProtocolError: no server
        of ours, or another version."""
        answer = decode_answer_header(header)
        if answer.error is not None:
            raise self._refused(from_wire(answer.error.code, answer.error.errno, answer.error.message))
        if self._welcome is None:
            return self._on_welcome(self._decode(answer.result, Welcome))
        if self.is_done:
            raise ProtocolError("an answer to no request")
        self._decode(answer.result, Nothing)
        self._finish(self._welcome)
        return b""

    def _on_welcome(self, welcome: Welcome) -> bytes:
        if welcome.version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the server speaks protocol version {welcome.version}, this client {PROTOCOL_VERSION}: "
                "install the same release on both"
            )
        if _is_foreign(self._hello.cluster_id, welcome.cluster_id):
            raise AuthError("client and server belong to different clusters")
        self._welcome = welcome
        if self._secret is None:
            if welcome.requires_proof:
                raise AuthError("the server requires a secret: give --secret-file")
            self._finish(welcome)
            return b""
        expected = self._prove(_SERVER_LABEL, self._secret, welcome)
        if not welcome.requires_proof or not hmac.compare_digest(welcome.proof, expected):
            raise AuthError("the server's secret is not ours: check --secret-file on both sides")
        return encode_request(1, PROVE_OP, Prove(proof=self._prove(_CLIENT_LABEL, self._secret, welcome)))

    def _finish(self, welcome: Welcome) -> None:
        self.cluster_id = welcome.cluster_id
        self.is_done = True

    def _prove(self, label: bytes, secret: bytes, welcome: Welcome) -> bytes:
        return _proof(secret, label, self._hello, welcome.cluster_id, welcome.nonce)

    @staticmethod
    def _decode(data: codec.Raw, type_: type[M]) -> M:
        try:
            return codec.decode(data, type_)
        except BadRequestError:
            raise ProtocolError("malformed handshake: this is no server of ours") from None

    @staticmethod
    def _refused(error: AlluxioFuseError) -> AlluxioFuseError:
        """The refusal as our error. Its words come from someone who has shown nothing yet."""
        words = "".join(char if char.isprintable() else "?" for char in error.message)
        return AuthError(words) if isinstance(error, AuthError) else ProtocolError(words)
