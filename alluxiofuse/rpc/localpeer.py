"""Which user is at the other end of a TCP connection on this machine. The kernel knows it, as it does
for Unix sockets, and no peer can claim anything else."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys

from alluxiofuse import descriptors

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_ESTABLISHED = 1
_NO_COOKIE = 0xFFFF_FFFF
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI")
_IDS = struct.Struct("=III")
_ANSWER_HEAD = struct.Struct("=BBBB")
_ANSWER_TAIL = struct.Struct("=IIIII")
_TAIL_AT = _HEADER.size + _ANSWER_HEAD.size + 48
_TABLES = {socket.AF_INET: "/proc/net/tcp", socket.AF_INET6: "/proc/net/tcp6"}


def uid_of_local_peer(sock: socket.socket) -> int | None:
    """The uid that owns the other end of an accepted TCP connection; None when that is not a living
    socket of this machine (an end that was closed belongs to nobody, and the kernel then says 0).
    OSError: it can't be asked now, for want of descriptors."""
    try:
        return _ask_kernel(sock)
    except OSError as exc:
        if exc.errno in descriptors.EXHAUSTED:
            raise
        return _read_table(sock)


def _ask_kernel(sock: socket.socket) -> int | None:
    """By sock_diag(7). OSError: this kernel has it not."""
    theirs, ours = sock.getpeername(), sock.getsockname()
    place = struct.pack("!HH", theirs[1], ours[1]) + _padded(sock, theirs[0]) + _padded(sock, ours[0])
    wanted = _REQUEST.pack(sock.family, socket.IPPROTO_TCP, 0, 0, _NO_COOKIE)
    wanted += place + _IDS.pack(0, _NO_COOKIE, _NO_COOKIE)
    head = _HEADER.pack(_HEADER.size + len(wanted), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as diag:
        diag.setblocking(False)  # It answers within the call that asks.
        diag.send(head + wanted)
        answer = diag.recv(8192)
    if _HEADER.unpack_from(answer)[1] == _NLMSG_ERROR:
        code = -int(struct.unpack_from("=i", answer, _HEADER.size)[0])
        if code == errno.ENOENT:
            return None
        raise OSError(code, os.strerror(code))
    state = _ANSWER_HEAD.unpack_from(answer, _HEADER.size)[1]
    _, _, _, uid, inode = _ANSWER_TAIL.unpack_from(answer, _TAIL_AT)
    return int(uid) if state == _ESTABLISHED and inode else None


def _padded(sock: socket.socket, address: str) -> bytes:
    return socket.inet_pton(sock.family, address.partition("%")[0]).ljust(16, b"\0")


def _read_table(sock: socket.socket) -> int | None:
    """By proc_net(5), for kernels without sock_diag."""
    wanted = [_shown(sock, sock.getpeername()), _shown(sock, sock.getsockname())]
    try:
        with open(_TABLES[sock.family], encoding="ascii") as table:
            for line in table:
                words = line.split()
                if words[1:3] == wanted:
                    return int(words[7]) if int(words[3], 16) == _ESTABLISHED and words[9] != "0" else None
    except (OSError, ValueError, IndexError, KeyError):
        pass
    return None


def _shown(sock: socket.socket, place: tuple[str, int]) -> str:
    """An address as it is written there: 32-bit words in the machine's byte order."""
    raw = socket.inet_pton(sock.family, place[0].partition("%")[0])
    words = (int.from_bytes(raw[at : at + 4], sys.byteorder) for at in range(0, len(raw), 4))
    return "".join(f"{word:08X}" for word in words) + f":{place[1]:04X}"
