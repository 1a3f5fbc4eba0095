"""Storage directories that fail: seen, taken out of use, looked at again, taken back. No restart.

A directory becomes suspect by a failed file operation (`room.storage_error`); a probe decides:

* it works (one bad sector, one missing file): nothing changes;
* it is read-only: what is there is served and uploaded, nothing new goes there;
* it fails (EIO, another or no filesystem, no answer): out of use. Its clean slabs are forgotten, so that
  they are fetched again, to other directories. What is dirty or open for writing stays known: reading
  and writing it is EIO until the directory is back. Its descriptors are closed, so that it can be
  unmounted and repaired.

A directory in trouble is probed now and then; when it works again, files that nobody knows are removed.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from alluxiofuse.errors import UserError
from alluxiofuse.worker import layout
from alluxiofuse.worker.layout import Marker

FULL = (errno.ENOSPC, errno.EDQUOT)
_PROBE = "probe"


def probe(root: Path, marker: Marker) -> tuple[str, bool]:
    """What is wrong with a directory, "" when nothing; whether it can be read. Blocks. A full one is not
    wrong."""
    try:
        if layout.read_marker(root) != marker:
            return "it is not there: is its filesystem mounted?", False
    except UserError as exc:
        return exc.message, False
    path = root / _PROBE
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, bytes(4096), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
            os.unlink(path)
        os.listdir(root / "slabs" / "00")
    except OSError as exc:
        if exc.errno in FULL:
            return "", True
        return exc.strerror or str(exc), exc.errno == errno.EROFS
    return "", True
