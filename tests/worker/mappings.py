"""Mappings that live on when their descriptor is closed: Python's mmap keeps a descriptor of its own."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

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


class Mapping:
    """Of the first `size` bytes of a file, shared; `fd` may be closed right away."""

    def __init__(self, fd: int, size: int, *, for_writing: bool = True) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if for_writing else 0)
        found = _libc.mmap(None, size, protection, mmap.MAP_SHARED, fd, 0)
        if found in (None, ctypes.c_void_p(-1).value):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._address: int = found
        self._size = size

    def read(self, offset: int, length: int) -> bytes:
        return ctypes.string_at(self._address + offset, length)

    def write(self, offset: int, data: bytes) -> None:
        assert offset + len(data) <= self._size
        ctypes.memmove(self._address + offset, data, len(data))

    def close(self) -> None:
        """Idempotent."""
        if self._size:
            _libc.munmap(self._address, self._size)
            self._size = 0


@contextmanager
def mapped(fd: int, size: int, *, for_writing: bool = True) -> Iterator[Mapping]:
    """Closes `fd`."""
    try:
        mapping = Mapping(fd, size, for_writing=for_writing)
    finally:
        os.close(fd)
    try:
        yield mapping
    finally:
        mapping.close()
