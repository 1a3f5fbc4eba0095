"""What the tests of two mounts look with, from both sides.

"At once" is meant: nothing is waited for where an open follows a close. What travels as news (names,
attributes, what is open already) is waited for.
"""

from __future__ import annotations

import mmap
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

from servers import wait_until

KIB = 1 << 10


def has_mode(path: Path, mode: int) -> bool:
    return stat.S_IMODE(path.stat().st_mode) == mode


def times(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_ctime_ns


def in_parallel(*functions: Callable[[], None]) -> None:
    wrong: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as exc:
            wrong.append(exc)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]


def see(path: Path, data: bytes) -> None:
    """Opened now it holds this, with that size."""
    with open(path, "rb") as file:
        assert os.fstat(file.fileno()).st_size == len(data)
        assert file.read() == data


def follows(fd: int, data: bytes) -> None:
    """What was opened before shows this soon."""
    wait_until(lambda: os.pread(fd, 1 << 30, 0) == data, "what is open follows")


def shows(memory: mmap.mmap, offset: int, data: bytes) -> None:
    wait_until(lambda: memory[offset : offset + len(data)] == data, "a mapping follows")
