"""Copying the bytes of one open file into another as cheaply as the kernel can, holes kept."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

from alluxiofuse.errors import UfsError

CHUNK_BYTES = 16 << 20
"""How much is copied between two questions whether to go on."""
_NOT_HERE = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF, errno.EIO}
"""A copying call that can't serve this pair of files; the next one is tried, and the plainest tells
the truth about the medium."""


def segments(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the data in [0, size) of `fd`, whose file offset is moved."""
    offset = 0
    while offset < size:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: nothing but a hole from here on
                yield offset, size - offset
            return
        if start >= size:
            return
        yield start, min(end, size) - start
        offset = end


def _by_range(source: int, target: int, offset: int, length: int) -> int:
    return os.copy_file_range(source, target, length, offset, offset)


def _by_sendfile(source: int, target: int, offset: int, length: int) -> int:
    os.lseek(target, offset, os.SEEK_SET)
    return os.sendfile(target, source, offset, length)


def _by_buffer(source: int, target: int, offset: int, length: int) -> int:
    data = os.pread(source, min(length, 1 << 20), offset)
    return os.pwrite(target, data, offset)


def copy_range(source: int, target: int, size: int, go_on: Callable[[], None]) -> None:
    """Make [0, size) of `target` (empty, ours alone, its offset is moved) equal to `source`'s.

    `go_on` is called between chunks and may raise to stop. The offset of `source` is left alone
    where /proc is there. UfsError when `source` is shorter than `size`, OSError of the medium."""
    if os.fstat(source).st_size < size:
        raise UfsError("the file to be stored is shorter than announced")
    os.ftruncate(target, size)
    try:
        # A description of its own: SEEK_DATA moves the offset, and the caller's may be shared.
        own = os.open(f"/proc/self/fd/{source}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        _copy_all(source, target, iter([(0, size)]), go_on)
        return
    try:
        _copy_all(own, target, segments(own, size), go_on)
    finally:
        os.close(own)


def _copy_all(source: int, target: int, spans: Iterator[tuple[int, int]], go_on: Callable[[], None]) -> None:
    ways = [_by_range, _by_sendfile, _by_buffer]
    for offset, length in spans:
        end = offset + length
        while offset < end:
            go_on()
            try:
                done = ways[0](source, target, offset, min(CHUNK_BYTES, end - offset))
            except OSError as error:
                if len(ways) == 1 or error.errno not in _NOT_HERE:
                    raise
                del ways[0]
                continue
            if done == 0:
                if len(ways) > 1:  # some filesystems answer 0 where they can't
                    del ways[0]
                    continue
                raise UfsError("the file to be stored became shorter while it was read")
            offset += done
