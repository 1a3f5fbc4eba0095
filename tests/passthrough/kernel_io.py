"""What tests of passthrough share: seeing that the daemon has no part in it, and plain mappings."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from daemons import Daemon

MIB = 1 << 20
_PROT_READ, _PROT_WRITE = 1, 2
_MAP_SHARED = 1
_FAILED = ctypes.c_void_p(-1).value


def require_passthrough() -> None:
    release = tuple(int(part) for part in platform.release().split(".")[:2] if part.isdigit())
    if os.geteuid() == 0 and release >= (6, 14):
        return
    pytest.skip("passthrough with a brake needs root and Linux 6.14")


def children_of(pid: int) -> list[int]:
    """Of a process that may have ended."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in children.read_text().split()]
    return found


@contextmanager
def frozen(*daemons: Daemon) -> Iterator[None]:
    """They and all that they started do nothing: what works meanwhile, the kernel does by itself."""
    pids = [daemon.pid for daemon in daemons]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            pids += children_of(pid)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def opened(path: Path, flags: int, mode: int = 0o644) -> Iterator[int]:
    descriptor = os.open(path, flags, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class Mapping:
    """A shared mapping and nothing else: Python's own keeps a copy of the descriptor."""

    def __init__(self, descriptor: int, size: int, *, is_writable: bool = False) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        protection = _PROT_READ | (_PROT_WRITE if is_writable else 0)
        self._size = size
        self._at = self._libc.mmap(None, size, protection, _MAP_SHARED, descriptor, 0)
        if self._at in (None, _FAILED):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def read(self, offset: int, length: int) -> bytes:
        return ctypes.string_at(self._at + offset, length)

    def write(self, offset: int, data: bytes) -> None:
        ctypes.memmove(self._at + offset, data, len(data))

    def close(self) -> None:
        if self._at is not None:
            self._libc.munmap(self._at, self._size)
            self._at = None
