"""Whether the program that is waiting for us has been told to stop.

A program's system call that is a request to our daemon can't be broken off by the kernel: it waits for
the answer, even with a fatal signal pending (fs/fuse/dev.c, request_wait_answer), and libfuse does not
tell us of the signal in a way that pyfuse3 passes on. So who waits for a peer for long looks now and then
whether the waiting thread has such a signal, and then answers EINTR.

Who serves a program's request names its thread (`serving`); tasks inherit it. What is done on nobody's
behalf, and what must not stop halfway, runs with 0.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import TypeVar

import trio

from alluxiofuse.errors import AlluxioFuseError, FsError

R = TypeVar("R")
LOOK_EVERY_S = 0.5
serving: ContextVar[int] = ContextVar("serving", default=0)
"""Thread id, as this process sees it, of the program on whose behalf a task runs; 0: nobody's."""

_STOPPING = sum(
    1 << number - 1
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGKILL)
)
"""Signals that mean "stop". Others (SIGCHLD, SIGALRM) come in the ordinary life of a program that does
not expect EINTR of stat(2)."""

_FLAGS, _EXIT_CODE = 6, -1
"""Fields of /proc/PID/stat behind the name (proc_pid_stat(5)); the exit code is shown to root only."""
_PF_EXITING = 0x4


def is_told_to_stop(thread: int) -> bool:
    """A stopping signal that is neither blocked nor ignored is pending for the thread."""
    if not thread:
        return False
    try:
        with open(f"/proc/{thread}/status", "rb") as file:
            text = file.read()
        with open(f"/proc/{thread}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return False  # Not of our namespace of processes, or not ours to look at.
    if int(fields[_FLAGS]) & _PF_EXITING and _STOPPING << 1 >> (int(fields[_EXIT_CODE]) & 0x7F) & 1:
        return True  # Killed, and closing its files: no signal is pending any more.
    masks = {}
    for line in text.splitlines():
        name, _, value = line.partition(b":\t")
        if name in (b"SigPnd", b"ShdPnd", b"SigBlk", b"SigIgn"):
            masks[name] = int(value, 16)
    pending = masks.get(b"SigPnd", 0) | masks.get(b"ShdPnd", 0)
    return bool(pending & ~masks.get(b"SigBlk", 0) & ~masks.get(b"SigIgn", 0) & _STOPPING)


def interrupted() -> FsError:
    return FsError(errno.EINTR, "interrupted by a signal")


def check() -> None:
    """EINTR when the program that this task serves has been told to stop."""
    if is_told_to_stop(serving.get()):
        raise interrupted()


async def watched(wait: Callable[[], Awaitable[R]]) -> R:
    """`wait()`, cancelled when the program is told to stop: then EINTR."""
    if not (thread := serving.get()):
        return await wait()
    outcome: list[R | AlluxioFuseError] = []
    async with trio.open_nursery() as nursery:

        async def look() -> None:
            while not is_told_to_stop(thread):  # noqa: ASYNC110 - a signal of another process has no event
                await trio.sleep(LOOK_EVERY_S)
            outcome.append(interrupted())
            nursery.cancel_scope.cancel()

        nursery.start_soon(look)
        try:
            found = await wait()
            outcome.insert(0, found)
        except AlluxioFuseError as exc:
            outcome.insert(0, exc)
        nursery.cancel_scope.cancel()
    if isinstance(outcome[0], AlluxioFuseError):
        raise outcome[0]
    return outcome[0]


async def pause(seconds: float) -> None:
    """Sleep, before something is tried again. EINTR as of `check`."""
    end = trio.current_time() + seconds
    while True:
        check()
        left = end - trio.current_time()
        if left <= 0:
            return
        await trio.sleep(min(left, LOOK_EVERY_S))
