"""Making listening sockets, with errors that a person understands, and socket options."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
import struct

import trio

from alluxiofuse.errors import UserError
from alluxiofuse.rpc.address import MAX_UNIX_PATH_BYTES, TcpAddress

BACKLOG = 512
_UCRED = struct.Struct("3i")
KEEPALIVE_IDLE_S = 10
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_COUNT = 4
UNACKNOWLEDGED_MS = 30_000
"""A peer that takes nothing of what we sent for this long is gone (TCP_USER_TIMEOUT)."""


def tune_tcp(sock: socket.socket) -> None:
    """No waiting for more to send; notice a peer whose machine is gone within half a minute."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)


def peer_credentials(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process at the other end of a Unix socket, as the kernel knows them from
    when it connected or listened: SO_PEERCRED, unix(7)."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(data)
    return pid, uid


async def listen_tcp(host: str, port: int, *, has_secret: bool) -> list[socket.socket]:
    """Listening, non-blocking sockets, all on one port, one for each address of `host`.
    UserError: see `server.serve_tcp`; then nothing is left open."""
    shown = TcpAddress(host, port)
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as exc:
        raise UserError(f"cannot listen on {shown}: the host name is not known ({exc})") from None
    for family, _, _, _, place in found:
        if not has_secret and not _is_loopback(family, str(place[0])):
            raise UserError(
                f"refusing to listen on {shown} without a secret, everybody could read and change all files: "
                "give --secret-file, or listen on 127.0.0.1"
            )
    sockets: list[socket.socket] = []
    failures: list[OSError] = []
    try:
        for family, kind, protocol, _, place in dict.fromkeys(found):
            chosen = sockets[0].getsockname()[1] if sockets else port
            try:
                sockets.append(_listen(family, kind, protocol, (place[0], chosen, *place[2:])))
            except OSError as exc:
                if exc.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                failures.append(exc)  # "localhost" has an IPv6 address also where IPv6 is off.
        if not sockets:
            raise failures[0]
    except OSError as exc:
        for listener in sockets:
            listener.close()
        raise UserError(f"cannot listen on {shown}: {_reason(exc)}") from None
    return sockets


def _is_loopback(family: int, address: str) -> bool:
    if family not in (socket.AF_INET, socket.AF_INET6):
        return False
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _listen(family: int, kind: int, protocol: int, place: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(place)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _reason(exc: OSError) -> str:
    if exc.errno == errno.EADDRINUSE:
        return "the port is in use by another program, stop it or choose another port"
    if exc.errno == errno.EADDRNOTAVAIL:
        return "this machine does not have that address"
    if exc.errno == errno.EACCES:
        return "ports below 1024 are for root"
    return exc.strerror or str(exc)


def listen_unix(path: str, mode: int) -> tuple[socket.socket, os.stat_result]:
    """A listening, non-blocking Unix socket, and its file, for `remove_unix`. UserError: see
    `server.serve_unix`."""
    if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
        raise UserError(
            f"cannot listen on {path}: a socket's path may have at most {MAX_UNIX_PATH_BYTES} bytes"
        )
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # On Linux the file takes its mode from the socket, so it never exists with a wider one.
        os.fchmod(sock.fileno(), mode)
        sock.bind(path)
        os.chmod(path, mode)  # The umask may have narrowed it.
        made = os.lstat(path)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as exc:
        sock.close()
        raise UserError(f"cannot listen on {path}: {exc.strerror}") from None
    return sock, made


def _remove_stale(path: str) -> None:
    try:
        found = os.lstat(path)
    except OSError:
        return  # Not there; or bind will say what is wrong.
    if not stat.S_ISSOCK(found.st_mode):
        raise UserError(f"cannot listen on {path}: there is a file in its place, remove it or choose another")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            remove_unix(path, found)
        except OSError:
            return  # A full queue (it lives, so bind fails), or bind will say what is wrong.
        else:
            raise UserError(f"cannot listen on {path}: a running daemon serves there, stop it first")


def remove_unix(path: str, ours: os.stat_result) -> None:
    """Remove a socket file unless somebody put another in its place."""
    try:
        found = os.lstat(path)
        if (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino):
            os.unlink(path)
    except OSError:
        pass  # Gone already, or its directory is.
