"""What a worker and its upload process say to each other, one msgpack message a packet.

The pair of sockets is private to the two, so there is no handshake; secrets in mount options pass
only here, never on a command line."""

from __future__ import annotations

import msgspec

MAX_PACKET_BYTES = 192 << 10
"""Below what a Unix packet socket takes at once; paths are at most 64 KiB."""


class OpenMount(msgspec.Struct, array_like=True, tag="open"):
    """Before the first put to a mount."""

    mount_id: int
    uri: str
    options: dict[str, str]
    notes: str = ""
    """The file for `UnderStorage.resume`; "": none."""


class Put(msgspec.Struct, array_like=True, tag="put"):
    """With the descriptor of the open file."""

    put_id: int
    mount_id: int
    path: bytes
    size: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int


class Cancel(msgspec.Struct, array_like=True, tag="cancel"):
    put_id: int


Order = OpenMount | Put | Cancel


class PutResult(msgspec.Struct, array_like=True):
    """`error` is (code, errno, message) of an AlluxioFuseError, `is_cancelled` a PutCancelled."""

    put_id: int
    fingerprint: bytes = b""
    error: tuple[str, int, str] | None = None
    is_cancelled: bool = False
    counts: dict[str, int] = {}
    """Of all connectors in the process, since it started."""
