"""Requests from bytes, answers to bytes. Knows nothing of the filesystem and holds no descriptor."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from alluxiofuse.fuse.native.abi import (
    ATTR,
    ATTR_OUT,
    DIRENT,
    ENTRY_OUT,
    FORGET_ONE,
    IN_HEADER,
    INIT_IN,
    INIT_IN_SHORT,
    NOTIFY_INVAL_ENTRY,
    NOTIFY_INVAL_INODE,
    OUT_HEADER,
    REQUESTS,
    Body,
    Notify,
    Op,
)

_BILLION = 10**9
_MAX_TIMEOUT_S = 1 << 32


class Malformed(Exception):
    """These bytes are no request. `unique` says which to answer with an error; 0: none can be."""

    def __init__(self, unique: int, opcode: int, reason: str) -> None:
        super().__init__(f"opcode {opcode}: {reason}")
        self.unique = unique
        self.opcode = opcode


class Request:
    """One request. `fields`, `names`, `data` as `abi.REQUESTS` says; `data` is a view of the buffer that
    it was read into, and ends with that."""

    __slots__ = ("data", "fields", "gid", "names", "nodeid", "opcode", "pid", "uid", "unique")

    def __init__(
        self,
        opcode: int,
        unique: int,
        nodeid: int,
        uid: int,
        gid: int,
        pid: int,
        fields: tuple[Any, ...],
        names: tuple[bytes, ...],
        data: memoryview | None,
    ) -> None:
        self.opcode = opcode
        self.unique = unique
        self.nodeid = nodeid
        self.uid = uid
        self.gid = gid
        self.pid = pid
        self.fields = fields
        self.names = names
        self.data = data


_BODIES: list[Body | None] = [None] * 64
for _op, _body in REQUESTS.items():
    _BODIES[_op] = _body
_HEADER_BYTES = IN_HEADER.size


def decode(view: memoryview) -> Request:
    """The request in `view`, which is all that one read gave. Of an opcode that the table does not
    have: without fields. Malformed."""
    if len(view) < _HEADER_BYTES:
        raise Malformed(0, 0, f"{len(view)} bytes are no header")
    length, opcode, unique, nodeid, uid, gid, pid, extra, _ = IN_HEADER.unpack_from(view)
    if length != len(view):
        raise Malformed(unique, opcode, f"{len(view)} bytes came, the header says {length}")
    body = _BODIES[opcode] if opcode < 64 else None
    if body is None:
        return Request(opcode, unique, nodeid, uid, gid, pid, (), (), view[_HEADER_BYTES:])
    end = length - 8 * extra
    at = _HEADER_BYTES + body.struct.size
    if end < at:
        raise Malformed(unique, opcode, "too short")
    fields = body.struct.unpack_from(view, _HEADER_BYTES)
    names: tuple[bytes, ...] = ()
    if body.names:
        if body.has_data:
            names, at = _first_name(view, at, end, unique, opcode)
        else:
            parts = bytes(view[at:end]).split(b"\0")
            if len(parts) <= body.names:
                raise Malformed(unique, opcode, "a name does not end")
            names = tuple(parts[: body.names])
    data = None
    if body.has_data:
        data = view[at:end]
        if len(data) < _data_length(opcode, fields):
            raise Malformed(unique, opcode, "its data is cut short")
    return Request(opcode, unique, nodeid, uid, gid, pid, fields, names, data)


def _first_name(
    view: memoryview, at: int, end: int, unique: int, opcode: int
) -> tuple[tuple[bytes, ...], int]:
    head = bytes(view[at : min(end, at + 4097)])
    stop = head.find(b"\0")
    if stop < 0:
        raise Malformed(unique, opcode, "a name does not end")
    return (head[:stop],), at + stop + 1


def _data_length(opcode: int, fields: tuple[Any, ...]) -> int:
    if opcode == Op.WRITE:
        return int(fields[2])
    if opcode == Op.BATCH_FORGET:
        return int(fields[0]) * FORGET_ONE.size
    return int(fields[0])  # SETXATTR


def forgets(request: Request) -> Iterator[tuple[int, int]]:
    """(nodeid, count) of FORGET or BATCH_FORGET."""
    if request.opcode == Op.FORGET:
        yield request.nodeid, request.fields[0]
        return
    assert request.data is not None
    count = request.fields[0]
    yield from FORGET_ONE.iter_unpack(request.data[: count * FORGET_ONE.size])


def init_fields(request: Request) -> tuple[int, int, int, int]:
    """(major, minor, max_readahead, flags of 64 bits) of INIT. Malformed."""
    assert request.data is not None
    if len(request.data) >= INIT_IN.size:
        major, minor, readahead, flags, more = INIT_IN.unpack_from(request.data)
        return major, minor, readahead, flags | more << 32
    if len(request.data) >= INIT_IN_SHORT.size:
        major, minor, readahead, flags = INIT_IN_SHORT.unpack_from(request.data)
        return major, minor, readahead, flags
    raise Malformed(request.unique, request.opcode, "too short")


# --- answers ------------------------------------------------------------------------------------------


class Attributes:
    """What pyfuse3.EntryAttributes has, and is quicker to fill and to read in Python."""

    __slots__ = (
        "attr_timeout",
        "entry_timeout",
        "st_atime_ns",
        "st_blksize",
        "st_blocks",
        "st_ctime_ns",
        "st_gid",
        "st_ino",
        "st_mode",
        "st_mtime_ns",
        "st_nlink",
        "st_rdev",
        "st_size",
        "st_uid",
    )

    def __init__(self) -> None:
        self.st_ino = self.st_mode = self.st_nlink = self.st_uid = self.st_gid = self.st_rdev = 0
        self.st_size = self.st_blocks = self.st_blksize = 0
        self.st_atime_ns = self.st_mtime_ns = self.st_ctime_ns = 0
        self.entry_timeout = self.attr_timeout = 0.0


def header(unique: int, payload_bytes: int) -> bytes:
    """Of an answer without error."""
    return OUT_HEADER.pack(16 + payload_bytes, 0, unique)


def failure(unique: int, errno: int) -> bytes:
    """A whole answer: an error."""
    return OUT_HEADER.pack(16, -errno, unique)


def attributes(entry: Attributes) -> bytes:
    atime, mtime, ctime = entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns
    atime_s, mtime_s, ctime_s = atime // _BILLION, mtime // _BILLION, ctime // _BILLION
    return ATTR.pack(
        entry.st_ino,
        entry.st_size,
        entry.st_blocks,
        atime_s,
        mtime_s,
        ctime_s,
        atime - atime_s * _BILLION,
        mtime - mtime_s * _BILLION,
        ctime - ctime_s * _BILLION,
        entry.st_mode,
        entry.st_nlink,
        entry.st_uid,
        entry.st_gid,
        entry.st_rdev & 0xFFFFFFFF,
        entry.st_blksize,
        0,
    )


@lru_cache(maxsize=256)
def _timeout(seconds: float) -> tuple[int, int]:
    whole = int(seconds)
    return min(whole, _MAX_TIMEOUT_S), int((seconds - whole) * _BILLION)


def entry_out(entry: Attributes) -> bytes:
    """Of LOOKUP, CREATE, ...; `st_ino` 0 says that the name does not exist."""
    entry_s, entry_ns = _timeout(entry.entry_timeout)
    attr_s, attr_ns = _timeout(entry.attr_timeout)
    return ENTRY_OUT.pack(entry.st_ino, 0, entry_s, attr_s, entry_ns, attr_ns) + attributes(entry)


def attr_out(entry: Attributes) -> bytes:
    seconds, ns = _timeout(entry.attr_timeout)
    return ATTR_OUT.pack(seconds, ns, 0) + attributes(entry)


_DIRENT_BYTES = DIRENT.size
_ENTRY_BYTES = ENTRY_OUT.size + ATTR.size
_NO_REFERENCE = bytes(_ENTRY_BYTES)
_PADDING = [bytes(-length % 8) for length in range(8)]


class Listing:
    """The answer to READDIR or READDIRPLUS, filled up to `size` bytes."""

    __slots__ = ("_is_plus", "_parts", "_size", "unreferenced")

    def __init__(self, size: int, *, is_plus: bool) -> None:
        self._size = size
        self._is_plus = is_plus
        self._parts: list[bytes] = []
        self.unreferenced: list[tuple[int, int]] = []
        """(inode, 1) of each entry of a READDIR: of these the kernel takes no reference."""

    def add(self, name: bytes, entry: Attributes, next_position: int, *, has_reference: bool = True) -> bool:
        """False: no room. Without `has_reference` the kernel caches nothing of it (`.` and `..`)."""
        length = len(name)
        total = _DIRENT_BYTES + (length + 7 & ~7) + (_ENTRY_BYTES if self._is_plus else 0)
        if total > self._size:
            return False
        self._size -= total
        ino = entry.st_ino
        tail = DIRENT.pack(ino, next_position, length, entry.st_mode >> 12 & 15) + name + _PADDING[length & 7]
        if not self._is_plus:
            if has_reference:
                self.unreferenced.append((ino, 1))
            self._parts.append(tail)
        elif has_reference:
            self._parts.append(entry_out(entry) + tail)
        else:
            self._parts.append(_NO_REFERENCE + tail)
        return True

    def payload(self) -> bytes:
        return b"".join(self._parts)


# --- notifications ------------------------------------------------------------------------------------


def invalidate_inode(ino: int, *, attr_only: bool) -> bytes:
    size = OUT_HEADER.size + NOTIFY_INVAL_INODE.size
    return OUT_HEADER.pack(size, Notify.INVAL_INODE, 0) + NOTIFY_INVAL_INODE.pack(
        ino, -1 if attr_only else 0, 0
    )


def invalidate_entry(parent: int, name: bytes) -> bytes:
    size = OUT_HEADER.size + NOTIFY_INVAL_ENTRY.size + len(name) + 1
    return (
        OUT_HEADER.pack(size, Notify.INVAL_ENTRY, 0)
        + NOTIFY_INVAL_ENTRY.pack(parent, len(name), 0)
        + name
        + b"\0"
    )


def resend() -> bytes:
    """Ask for all requests that a former daemon left unanswered (Init.HAS_RESEND)."""
    return OUT_HEADER.pack(OUT_HEADER.size, Notify.RESEND, 0)


def void_names() -> bytes:
    """Each name that the kernel has is to be looked up again before it is used (Linux 6.16)."""
    return OUT_HEADER.pack(OUT_HEADER.size, Notify.INC_EPOCH, 0)
