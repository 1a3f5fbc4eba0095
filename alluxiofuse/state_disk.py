"""The disk below a RocksDB of ours: why it can't be written, and whether it can be again. Layer 0.

RocksDB writes no more once its log could not be written, until it is opened again; `master.store` and
`worker.index` do that as soon as `can_be_written` says that it makes sense.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from alluxiofuse.errors import StateError

_ROOM_BYTES = 16 << 20
"""Free room, beyond twice the write-ahead logs, at which a store that failed is opened again."""
_PROBE = "probe"
_REASONS = {
    "no space left": (errno.ENOSPC, "make room there"),
    "read-only file system": (errno.EROFS, "make it writable"),
}


def trouble(directory: Path, exc: Exception) -> StateError:
    """What a failed write of RocksDB's in `directory` means, with ENOSPC, EROFS or EIO."""
    number, way_out, reason = errno.EIO, "look at that disk", str(exc)
    for text, known in _REASONS.items():
        if text in str(exc).lower():
            number, way_out = known
            reason = os.strerror(number)
    message = f"the state directory {directory} can't be written: {reason}: {way_out}; nothing can be changed"
    return StateError(f"{message} until then", errno=number)


def can_be_written(directory: Path) -> bool:
    """There is room, and a small file can be made there and lasts. Blocks for an fsync."""
    probe = directory / _PROBE
    try:
        free = os.statvfs(directory)
        logs = sum(file.stat().st_size for file in directory.glob("*.log"))
        if free.f_bavail * free.f_frsize < _ROOM_BYTES + 2 * logs:
            return False
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, bytes(4096))
            os.fsync(fd)
        finally:
            os.close(fd)
            os.unlink(probe)
    except OSError:
        return False
    return True
