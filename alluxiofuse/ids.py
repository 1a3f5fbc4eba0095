"""Identifiers and the arithmetic of pages and blocks. Layer 0.

inode number   64 bit, root = 1, never reused.
container id   64 bit, > 0, new whenever a file's content is replaced; 0 means "no content"
               (an empty file, or an inode that is no regular file).
block          `block_size_bytes` of a container (64 MiB by default, a multiple of the page size).
page           1 MiB of a container: the unit of presence and of checksums in a worker.
worker id      > 0, given by the master at first registration, kept in the worker's state.
session id     > 0, given by the master to a client; it owns open files, locks and watches.
mount id       > 0, a mount point in the mount table (1 = the root mount); never reused.
"""

from __future__ import annotations

from collections.abc import Iterator

ROOT_INO = 1
ROOT_MOUNT_ID = 1
PAGE_BYTES = 1 << 20
DEFAULT_BLOCK_BYTES = 64 << 20
MAX_FILE_BYTES = (1 << 63) - 1
MAX_NAME_BYTES = 255
MAX_SYMLINK_BYTES = 4095
MAX_PATH_BYTES = 64 << 10


def page_count(size_bytes: int) -> int:
    """How many pages hold `size_bytes`."""
    return (size_bytes + PAGE_BYTES - 1) // PAGE_BYTES


def pages_of(offset: int, length: int) -> range:
    """The page indices that [offset, offset + length) touches; empty for length 0."""
    if length <= 0:
        return range(0)
    return range(offset // PAGE_BYTES, (offset + length - 1) // PAGE_BYTES + 1)


def page_length(page: int, size_bytes: int) -> int:
    """How many bytes of a file of `size_bytes` lie in `page` (0 .. PAGE_BYTES)."""
    return max(0, min(PAGE_BYTES, size_bytes - page * PAGE_BYTES))


def runs(pages: Iterator[int] | list[int] | range) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of consecutive numbers in an ascending sequence."""
    first = previous = None
    for page in pages:
        if first is None or previous is None:
            first = page
        elif page != previous + 1:
            yield first, previous - first + 1
            first = page
        previous = page
    if first is not None and previous is not None:
        yield first, previous - first + 1
