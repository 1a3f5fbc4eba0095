"""Serves a `Service` on TCP and Unix sockets.

    async with trio.open_nursery() as nursery:
        address = await nursery.start(partial(serve_tcp, service, "127.0.0.1", 19998, security=security))

Both functions run until they are cancelled; then all connections are closed, their handlers
cancelled, and their peers told to be closed. What a peer does never ends them.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import trio

from alluxiofuse import descriptors
from alluxiofuse.errors import AuthError, ConnectionLost, PeerError
from alluxiofuse.rpc.address import TcpAddress, UnixAddress
from alluxiofuse.rpc.base import Peer, Service
from alluxiofuse.rpc.listen import listen_tcp, listen_unix, peer_credentials, remove_unix, tune_tcp
from alluxiofuse.rpc.localpeer import uid_of_local_peer
from alluxiofuse.rpc.ratelimit import LimitedLog
from alluxiofuse.rpc.serverconnection import ServerConnection
from alluxiofuse.rpc.service import HandlerTable
from alluxiofuse.rpc.wiresocket import WireSocket
from alluxiofuse.wire.framing import HANDSHAKE_LIMITS, LIMITS
from alluxiofuse.wire.handshake import Security, ServerHandshake

HANDSHAKE_S = 10.0
"""A peer that has not shown who it is within this time is dropped."""
MAX_HANDSHAKES = 64
"""Connections that may be unauthenticated at one time; one more, and the oldest is dropped, so
that honest peers, who need a few milliseconds, get in while somebody floods us."""
ACCEPT_PAUSE_S = 0.1
MAX_CONNECTIONS = 10_000
CONNECTIONS_SHARE = 0.1
"""Of the process's descriptors, for each place that is listened at."""
_OUT_OF_RESOURCES = {*descriptors.EXHAUSTED, errno.ENOBUFS, errno.ENOMEM}

_log = logging.getLogger(__name__)


async def serve_tcp(
    service: Service,
    host: str,
    port: int,
    *,
    security: Security,
    task_status: trio.TaskStatus[TcpAddress] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve on every address of `host`; port 0 takes a free one. Started with the real address.
    Peers prove the secret; when none is in use they must be of our uid or root, as on a Unix socket.

    UserError: the address is in use or not ours, or is not a loopback address and there is no
    secret. TypeError: the service's handlers do not match its ops.
    """
    table = HandlerTable(service)
    sockets = await listen_tcp(host, port, has_secret=security.secret is not None)
    acceptor = _Acceptor(table, security, partial(_tcp_peer, security))
    try:
        task_status.started(TcpAddress(host, sockets[0].getsockname()[1]))
        await acceptor.run(sockets)
    finally:
        _close(sockets)


async def serve_unix(
    service: Service,
    path: str,
    *,
    security: Security,
    mode: int = 0o600,
    task_status: trio.TaskStatus[UnixAddress] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve on a Unix socket of this `mode`; peers must be of our uid or root, whatever the mode.

    A socket file that a dead daemon left is replaced; ours is removed at the end. UserError: a live
    one serves there, or the socket cannot be made. TypeError: as above.
    """
    table = HandlerTable(service)
    listener, made = listen_unix(path, mode)
    acceptor = _Acceptor(table, security, _unix_peer)
    try:
        task_status.started(UnixAddress(path))
        await acceptor.run([listener])
    finally:
        remove_unix(path, made)
        _close([listener])


def _close(sockets: list[socket.socket]) -> None:
    for listener in sockets:
        trio.lowlevel.notify_closing(listener)
        listener.close()


@dataclass(frozen=True, slots=True)
class Arrival:
    """Who is at the other end, as far as the transport knows."""

    peer: Peer
    uses_secret: bool
    refusal: AuthError | None = None
    """Why it may not come in."""


def _tcp_peer(security: Security, sock: socket.socket) -> Arrival:
    tune_tcp(sock)
    host, port = sock.getpeername()[:2]
    name = str(TcpAddress(host, port))
    if security.secret is not None:
        peer = Peer(name, is_trusted=True, is_authenticated=True, can_pass_fds=False)
        return Arrival(peer, uses_secret=True)
    # Without a secret we listen on loopback only, where the kernel knows whose the other end is.
    uid = uid_of_local_peer(sock)
    if uid is not None:
        name += f" uid={uid}"
    is_allowed = uid in (0, os.geteuid())
    peer = Peer(name, is_trusted=is_allowed, is_authenticated=False, can_pass_fds=False, uid=uid)
    who = "a user that can't be told" if uid is None else f"uid {uid}"
    reason = (
        f"{who} may not use this port: without a secret only the daemon's own user and root may, "
        "give --secret-file to both"
    )
    return Arrival(peer, uses_secret=True, refusal=None if is_allowed else AuthError(reason))


def _unix_peer(sock: socket.socket) -> Arrival:
    pid, uid = peer_credentials(sock)
    is_allowed = uid in (0, os.geteuid())
    peer = Peer(
        f"unix uid={uid} pid={pid}",
        is_trusted=is_allowed,
        is_authenticated=is_allowed,
        can_pass_fds=is_allowed,
        uid=uid,
    )
    reason = f"uid {uid} may not use this socket: only the daemon's own user and root may"
    return Arrival(peer, uses_secret=False, refusal=None if is_allowed else AuthError(reason))


class _Acceptor:
    """Accepts connections, lets them prove themselves, and serves them. `_handshakes` belongs to
    the await-free stretches of its tasks."""

    def __init__(
        self, table: HandlerTable, security: Security, identify: Callable[[socket.socket], Arrival]
    ) -> None:
        self._table = table
        self._security = security
        self._identify = identify
        self._handshakes: dict[trio.CancelScope, None] = {}
        """Of connections that have not proved themselves yet, oldest first."""
        self._max_connections = descriptors.share(CONNECTIONS_SHARE, most=MAX_CONNECTIONS)
        self._connection_count = 0
        self._limited = LimitedLog(_log)

    async def run(self, listeners: list[socket.socket]) -> None:
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(self._accept_all, listener, nursery)

    async def _accept_all(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            try:
                sock, _ = listener.accept()
            except OSError as exc:
                if exc.errno in _OUT_OF_RESOURCES:
                    self._limited.warning("cannot accept connections: %s", exc.strerror)
                    await trio.sleep(ACCEPT_PAUSE_S)
                continue  # Else: the peer gave up before we came to it.
            if self._connection_count >= self._max_connections:
                # Better no than never: who waits in the queue of a full server learns nothing.
                self._limited.warning("refused a connection: %d are open already", self._connection_count)
                sock.close()
                await trio.lowlevel.checkpoint()
                continue
            self._connection_count += 1
            nursery.start_soon(self._serve_counted, sock)

    async def _serve_counted(self, sock: socket.socket) -> None:
        try:
            await self._serve(sock)
        finally:
            self._connection_count -= 1

    async def _serve(self, sock: socket.socket) -> None:
        wire = WireSocket(sock, HANDSHAKE_LIMITS)
        try:
            arrival = self._identify(sock)
        except OSError:
            wire.close()  # It left before we could ask who it is.
            return
        try:
            if await self._let_in(wire, arrival):
                await ServerConnection(wire, self._table, arrival.peer).run()
        except Exception:
            # The last line of defence: one connection's bug must not end the daemon.
            _log.exception("the connection of %s failed: a bug", arrival.peer.name)
        finally:
            wire.close()

    async def _let_in(self, wire: WireSocket, arrival: Arrival) -> bool:
        """Do the handshake; False: refused, and the reason is logged."""
        machine = ServerHandshake(
            self._security, self._table.role, uses_secret=arrival.uses_secret, peer_refusal=arrival.refusal
        )
        reason = f"not done within {HANDSHAKE_S:.0f} s, or dropped in favour of newer ones"
        with trio.move_on_after(HANDSHAKE_S) as scope:
            self._admit(scope)
            try:
                reason = await _shake_hands(wire, machine)
            finally:
                del self._handshakes[scope]
        if not machine.is_done and reason:
            self._limited.warning("refused %s: %s", arrival.peer.name, reason)
        return machine.is_done and not wire.is_closed

    def _admit(self, scope: trio.CancelScope) -> None:
        self._handshakes[scope] = None
        waiting = [other for other in self._handshakes if not other.cancel_called]
        if len(waiting) > MAX_HANDSHAKES:
            waiting[0].cancel()


async def _shake_hands(wire: WireSocket, machine: ServerHandshake) -> str:
    """Run the machine to its end; why it failed, or "" (also for a mere knock at the port)."""
    try:
        while True:
            await wire.receive()
            while (frame := wire.next_frame()) is not None:
                answer = machine.receive(frame.header)
                if machine.is_done:
                    wire.set_limits(LIMITS)
                await wire.send([answer])
                if machine.is_done:
                    return ""
                if machine.refusal is not None:
                    return machine.refusal.message
    except ConnectionLost:
        return "it left before it had proved the secret" if machine.has_begun else ""
    except PeerError as exc:
        return exc.message
