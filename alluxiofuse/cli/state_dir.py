"""A daemon's state directory: made, recognised, and owned by one process at a time.

lock                         locked (flock) while its daemon lives, holds the daemon's pid, and marks
                             the directory as ours
master.sock, worker.sock     Unix sockets, while the daemon lives
master/                      the master's metadata
worker/                      the worker's index
cache/, default-tiers.json   of `local` without --tier
erasing                      `format` has begun to erase it: what is left is good for nothing
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from alluxiofuse.errors import StateError, UserError

LOCK_NAME = "lock"
ERASING_NAME = "erasing"
MASTER_SOCKET = "master.sock"
WORKER_SOCKET = "worker.sock"


class StateDir:
    """`with StateDir(path) as state:` - ours until the block ends; made if need be.

    UserError: another process uses it. StateError: it is no directory, not ours to write, or holds
    other files and no lock file of ours. A directory that was made here is removed again, unless the
    block sets `is_started`: a start that failed leaves nothing.
    """

    def __init__(self, path: str | Path, *, is_formatting: bool = False) -> None:
        """`is_formatting`: also when it was erased in part."""
        self._is_formatting = is_formatting
        self.path = Path(os.path.abspath(path))
        self._fd = -1
        self._was_made = False
        self.is_started = False

    @property
    def master_socket(self) -> Path:
        return self.path / MASTER_SOCKET

    @property
    def master_directory(self) -> Path:
        return self.path / "master"

    @property
    def worker_directory(self) -> Path:
        return self.path / "worker"

    @property
    def worker_socket(self) -> Path:
        return self.path / WORKER_SOCKET

    def __enter__(self) -> StateDir:
        self._was_made = _make(self.path)
        try:
            _check_is_ours(self.path)
            self._fd = _lock(self.path)
            if not self._is_formatting and (self.path / ERASING_NAME).exists():
                raise StateError(
                    f"state directory {self.path} was being erased when that was interrupted: run"
                    f" `alluxiofuse format --state {self.path}` again, which ends it"
                )
        except BaseException:
            self._remove_if_new()
            self._unlock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove_if_new()
        self._unlock()

    def _unlock(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _remove_if_new(self) -> None:
        # A worker's directories elsewhere carry its identity, which is in here from then on.
        if self._was_made and not self.is_started and not (self.worker_directory / "index").exists():
            shutil.rmtree(self.path, ignore_errors=True)


def _make(path: Path) -> bool:
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
    except FileExistsError:
        return False
    except OSError as exc:
        raise StateError(f"state directory {path} can't be made: {exc.strerror}: name another") from None
    return True


def _check_is_ours(path: Path) -> None:
    try:
        names = os.listdir(path)
    except OSError as exc:
        raise StateError(f"state directory {path} can't be used: {exc.strerror}: name another") from None
    if names and LOCK_NAME not in names:
        raise StateError(
            f"state directory {path} holds other files ({sorted(names)[0]}): name an empty or new one"
        )
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise StateError(
            f"state directory {path} can't be written by this user: mend its mode or name another"
        )


def _lock(path: Path) -> int:
    file = path / LOCK_NAME
    try:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise StateError(f"{file} can't be opened: {exc.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
        os.close(fd)
        raise UserError(
            f"state directory {path} is in use by another alluxiofuse (pid {pid or 'unknown'}): "
            "stop that one or name another directory"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
