"""Who has a slab's file open, asked of the kernel: what it opens itself for passthrough, and mappings
whose descriptor is closed, are in nobody's books.

A file lease (fcntl(2), F_SETLEASE) is given only when nobody else is in its way: F_RDLCK while somebody
has the file open for writing, F_WRLCK while somebody has it open at all. It is taken by a descriptor of
its own and given back at once: an open(2) that comes in between waits for that long, or fails with
EAGAIN if it is told not to wait (O_NONBLOCK). Descriptors of this process count as anybody else's.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value


def is_written(path: str) -> bool:
    """Somebody has it open, or mapped, for writing. OSError."""
    return _is_refused(path, fcntl.F_RDLCK)


def is_open(path: str) -> bool:
    """Somebody has it open, or mapped. OSError."""
    return _is_refused(path, fcntl.F_WRLCK)


def _is_refused(path: str, kind: int) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Who opens it meanwhile breaks the lease; the usual signal for that would kill this process.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)  # With it goes the lease.
    return False


def trouble_with(root: str) -> str:
    """Why it can't be told in this directory who has a file open; "" when it can."""
    try:
        fd = os.open(root, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        path, address = f"/proc/self/fd/{fd}", _MAP_FAILED
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            address = _libc.mmap(
                None, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0
            )
            if address == _MAP_FAILED:
                return os.strerror(ctypes.get_errno())
            reader = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            path = f"/proc/self/fd/{reader}"
            os.close(fd)
            fd = reader
            if not is_written(path):
                return "a mapping does not keep leases away"
            _libc.munmap(address, mmap.PAGESIZE)
            address = _MAP_FAILED
            if is_written(path) or not is_open(path):
                return "leases tell nothing"
        finally:
            os.close(fd)
            if address != _MAP_FAILED:
                _libc.munmap(address, mmap.PAGESIZE)
    except OSError as exc:
        if exc.errno == errno.EINVAL:
            return "its filesystem has no leases"
        return exc.strerror or str(exc)
    return ""
