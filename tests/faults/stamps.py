"""Bytes that say where they belong: each 64-byte record names its file, the write that made it, and
its own offset. So any byte that is found somewhere can be judged."""

from __future__ import annotations

import re

RECORD_BYTES = 64
_RECORD = re.compile(rb"file ([0-9a-f]{8}) write ([0-9a-f]{8}) offset ([0-9a-f]{12}) ")


def stamped(file_id: int, version: int, offset: int, length: int) -> bytes:
    """`length` bytes for `offset`. A record cut by either end is cut."""
    first = offset // RECORD_BYTES
    last = -(-(offset + length) // RECORD_BYTES)
    record = b"file %08x write %08x offset %%012x ..............\n" % (file_id, version)
    places = tuple(range(first * RECORD_BYTES, last * RECORD_BYTES, RECORD_BYTES))
    start = offset - first * RECORD_BYTES
    return (record * len(places) % places)[start : start + length]


def describe(data: bytes, offset: int) -> str:
    """What the first bytes of `data`, found at `offset`, are."""
    if not data:
        return "nothing"
    if not any(data[:RECORD_BYTES]):
        return f"{len(data) - len(data.lstrip(bytes(1)))} zeros"
    found = _RECORD.search(data)
    if found is None:
        return repr(data[:RECORD_BYTES])
    file_id, version, place = (int(group, 16) for group in found.groups())
    where = "" if place == offset + found.start() else f", which belong at {place - found.start()}"
    return f"bytes of file {file_id:#x}, write {version}{where}"
