"""Moving a FileRange without holding up everybody else.

`sendfile` and `pread` of data that is not in the page cache wait for the disk, and with them would
wait the whole event loop. So each piece is looked at first (`RWF_NOWAIT` answers at once whether a
byte is in memory); what is not is moved in a thread.
"""

from __future__ import annotations

import os

import trio

from alluxiofuse.errors import ConnectionLost
from alluxiofuse.rpc.base import FileRange

CHUNK_BYTES = 1 << 20
"""Moved by one system call; the event loop runs in between."""
PROBE_BYTES = 128 << 10
"""One byte in each stretch of this length is looked at."""


def is_in_memory(fd: int, offset: int, length: int) -> bool:
    """Reading the range will, as far as can be told, not wait for a disk."""
    probe = bytearray(1)
    try:
        for at in (*range(offset, offset + length, PROBE_BYTES), max(offset, offset + length - 1)):
            os.preadv(fd, [probe], at, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True  # This filesystem cannot tell (tmpfs, for one, before Linux 6.6).
    return True


async def read_range(source: FileRange) -> bytearray:
    """All of its bytes. ConnectionLost: the file is shorter than promised, or unreadable."""
    data = bytearray(source.length)
    view = memoryview(data)
    done = 0
    while done < source.length:
        piece = view[done : done + CHUNK_BYTES]
        at = source.offset + done
        try:
            if is_in_memory(source.fd, at, len(piece)):
                count = os.preadv(source.fd, [piece], at)
            else:
                count = await trio.to_thread.run_sync(os.preadv, source.fd, [piece], at)
        except OSError as exc:
            raise ConnectionLost(f"the answer's file could not be read: {exc.strerror}") from None
        if count == 0:
            raise ConnectionLost("the answer's file is shorter than promised")
        done += count
    return data
