"""The disk below a RocksDB of ours: why it can't be written, and whether it can be again. Layer 0.

RocksDB writes no more once its log could not be written, until it is opened again: `StateDb.heal`.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from abc import ABC, abstractmethod
from pathlib import Path

from alluxiofuse.errors import StateError, UserError

log = logging.getLogger(__name__)

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


class StateDb(ABC):
    """What the master's store and the worker's index have in common: they fail with their disk, and are
    opened again when it is well."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._trouble: StateError | None = None
        """Why nothing can be written at present."""
        self._sync_lock = threading.Lock()
        """Held by the thread that syncs, so that it is not closed under it."""

    def _not_opened(self, exc: Exception, what: str) -> Exception:
        """What to raise when RocksDB could not be opened as `what`."""
        if "/LOCK: " in str(exc):
            return UserError(
                f"{self.directory} is in use by another process: stop it or name another state directory"
            )
        return StateError(f"{self.directory} can't be opened as {what}: {exc}")

    @property
    def is_failed(self) -> bool:
        """Nothing can be written until `heal` succeeds."""
        return self._trouble is not None

    def _failed(self, exc: Exception) -> Exception:
        """What to raise when writing failed."""
        if type(exc) is not Exception:
            return exc  # not of RocksDB, so a bug of ours
        if self._trouble is None:
            self._trouble = trouble(self.directory, exc)
            log.error("%s", self._trouble.message)
        return self._copy_of(self._trouble)

    @staticmethod
    def _copy_of(trouble: StateError) -> StateError:
        return StateError(trouble.message, errno=trouble.errno)

    def heal(self) -> bool:
        """Try to open it again when it has failed; True when it can be written now. To be called now and
        then; blocks for the time that opening takes. Await-free, in the thread that owns it."""
        if self._trouble is None:
            return True
        if not self._may_reopen() or not self._sync_lock.acquire(blocking=False):
            return False
        try:
            self._reopen()
        except Exception as exc:  # rocksdict raises bare Exception
            log.error("%s can't be opened again yet: %s", self.directory, exc)
            return False
        finally:
            self._sync_lock.release()
        self._trouble = None
        log.warning("the state directory %s can be written again", self.directory)
        return True

    def _may_reopen(self) -> bool:
        """Nothing that runs needs it open."""
        return True

    @abstractmethod
    def _reopen(self) -> None:
        """Close and open; any exception: not yet."""
