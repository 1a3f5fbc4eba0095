"""Becoming a daemon so that whoever started us learns whether the mount came up.

mount(8) and people wait for the command to end: it ends when the mount answers, or with the reason
why it does not.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import NoReturn

MOUNT_FAILURE = 32
"""Exit code, as mount(8) defines them."""
_READY = b"R"


class ReadyPipe:
    """The daemon's end. Exactly one of `ready` and `failed` is called; the other ones are no-ops."""

    def __init__(self, fd: int, log_file: Path | None) -> None:
        self._fd = fd
        self._log_file = log_file

    def ready(self) -> None:
        """Let the parent exit 0, and let go of its terminal: from here on output goes to the log file,
        or nowhere."""
        if self._fd < 0:
            return
        _redirect_output(self._log_file)
        self._send(_READY)

    def failed(self, text: str, code: int = MOUNT_FAILURE) -> None:
        """Let the parent print `text` (one line, no secrets) and exit with `code` (1 to 255)."""
        if self._fd >= 0:
            self._send(bytes([code]) + text.encode("utf-8", "replace"))

    def _send(self, message: bytes) -> None:
        fd, self._fd = self._fd, -1
        with contextlib.suppress(OSError):  # nobody waits any more
            os.write(fd, message)
        os.close(fd)


def daemonize(log_file: Path | None = None, program: str = "alluxiofuse") -> ReadyPipe:
    """Fork; returns in the daemon only, in a session of its own, with / as working directory. Must be
    called before any thread is started and before trio runs. The parent waits and exits."""
    sys.stdout.flush()
    sys.stderr.flush()
    if log_file is not None:
        log_file = log_file.absolute()
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        _wait(reader, child, program)
    os.close(reader)
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    return ReadyPipe(writer, log_file)


def _wait(reader: int, child: int, program: str) -> NoReturn:
    """The parent: until the daemon has spoken, or has ended without a word."""
    message = b""
    while chunk := os.read(reader, 4096):
        message += chunk
        if message[:1] == _READY:
            os._exit(0)
    if not message:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        print(f"{program}: the daemon ended {how} before the mount was ready", file=sys.stderr)
        sys.stderr.flush()
        os._exit(MOUNT_FAILURE)
    print(f"{program}: {message[1:].decode('utf-8', 'replace')}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(message[0])


def _redirect_output(log_file: Path | None) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if log_file is None:
        target = os.open(os.devnull, os.O_WRONLY)
    else:
        target = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
