"""Opening files below one directory, never following a symlink. Linux only.

`openat2(2)` with RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS lets the kernel refuse in one call what
would leave the directory, races included. Where the kernel (< 5.6) or a seccomp filter lacks it, the
path is walked component by component with O_NOFOLLOW, which is as safe and a few times slower.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

_SYS_OPENAT2 = 437  # the same number on every architecture of Linux
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_PATH_MAX = 4096  # the kernel takes no longer path at once
_EAGAIN_TRIES = 32
"""openat2 answers EAGAIN when a rename elsewhere raced with a RESOLVE_BENEATH lookup."""

O_DIR = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
"""A directory as a place to start from: needs search permission only."""
O_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
"""A thing of any kind, a symlink itself included, without opening it (no device is touched)."""


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


_HOW_BYTES = ctypes.sizeof(_OpenHow)
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
_hows: dict[int, _OpenHow] = {}
"""One constant argument block per flags value: the kernel only reads it, so threads share it."""


def _how(flags: int) -> _OpenHow:
    found = _hows.get(flags)
    if found is None:
        resolve = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS
        found = _hows.setdefault(flags, _OpenHow(flags, 0, resolve))
    return found


def _openat2(dir_fd: int, path: bytes, flags: int) -> int:
    how = ctypes.byref(_how(flags))
    for _ in range(_EAGAIN_TRIES):
        fd = int(_syscall(_SYS_OPENAT2, dir_fd, path, how, _HOW_BYTES))
        if fd >= 0:
            return fd
        code = ctypes.get_errno()
        if code not in (errno.EAGAIN, errno.EINTR):
            raise OSError(code, os.strerror(code))
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _walk(dir_fd: int, path: bytes, flags: int) -> int:
    if path == b".":
        return os.open(path, flags, dir_fd=dir_fd)
    *parents, last = path.split(b"/")
    if last in (b"", b".", b"..") or any(name in (b"", b".", b"..") for name in parents):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    here = dir_fd
    try:
        for name in parents:
            below = os.open(name, O_DIR | os.O_NOFOLLOW, dir_fd=here)
            if here != dir_fd:
                os.close(here)
            here = below
        return os.open(last, flags | os.O_NOFOLLOW, dir_fd=here)
    finally:
        if here != dir_fd:
            os.close(here)


def _has_openat2() -> bool:
    try:
        os.close(_openat2(-100, b".", O_DIR))  # -100: AT_FDCWD
    except OSError:
        return False
    return True


_IS_QUICK = _has_openat2()


def open_beneath(dir_fd: int, path: bytes, flags: int) -> int:
    """An existing thing at `path` below the directory `dir_fd`, itself for b".".

    OSError: ELOOP or ENOTDIR where a component is a symlink (the last one may be, with O_LOOK), EXDEV
    where the path would leave the directory, else as open(2)."""
    quickly = _IS_QUICK and len(path) < _PATH_MAX
    return _openat2(dir_fd, path, flags) if quickly else _walk(dir_fd, path, flags)


@contextmanager
def opened(fd: int) -> Iterator[int]:
    """Closes `fd` at the end."""
    try:
        yield fd
    finally:
        os.close(fd)
