"""The brake on slabs that kernels write by themselves: near the end of the room each access to such a
slab, by whichever program, asks here first and may be refused with ENOSPC.

fanotify(7), a group of class FAN_CLASS_PRE_CONTENT: Linux >= 6.14, CAP_SYS_ADMIN, not on every filesystem.
What is marked before a file is opened is asked for each access by that open file, passthrough or not;
while an ignore mark is there as well, none is, and that costs nothing. When this process ends or dies, the
kernel lets everything pass that waits.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import platform
import select
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

# linux/fanotify.h
_CLOEXEC, _NONBLOCK, _CLASS_PRE_CONTENT, _UNLIMITED_MARKS, _REPORT_TID = 0x1, 0x2, 0x8, 0x20, 0x100
_ADD, _REMOVE, _IGNORED_SURV_MODIFY, _IGNORE = 0x1, 0x2, 0x40, 0x400
_PRE_ACCESS = 0x00100000
_INFO_RANGE = 6
_EVENT = struct.Struct("<IBBHQii")  # length, version, reserved, length of this, mask, fd, pid
_INFO = struct.Struct("<BxH")  # type, length
_RANGE = struct.Struct("<QQ")  # offset, count; 8 bytes behind the start of the info
_RESPONSE = struct.Struct("<iI")
_ALLOW, _DENY = 1, 2 | errno.ENOSPC << 24

_READING = {
    # read, pread64, readv, preadv, preadv2, mmap, readahead
    "x86_64": frozenset({0, 17, 19, 295, 327, 9, 187}),
    "aarch64": frozenset({63, 67, 65, 69, 286, 222, 213}),
}.get(platform.machine(), frozenset[int]())

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_mark.argtypes = [
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.c_char_p,
]


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


@dataclass(frozen=True, slots=True)
class Access:
    """A program that waits, to be answered by `Brake.answer` exactly once."""

    fd: int
    inode: tuple[int, int]
    """(st_dev, st_ino)"""
    start: int
    end: int
    """Whole memory pages."""


class Brake:
    """A thread of its own reads what programs ask. All methods but `stop` are quick and may be called
    from any thread."""

    def __init__(self, is_granted: Callable[[Access], bool], ask: Callable[[Access], None]) -> None:
        """OSError: there is none here. Both are called in the thread: `is_granted` says at once that an
        access needs no room; `ask` sees to it that it is answered, once there is room or there is none."""
        self._is_granted = is_granted
        self._ask = ask
        flags = _CLASS_PRE_CONTENT | _CLOEXEC | _NONBLOCK | _UNLIMITED_MARKS | _REPORT_TID
        self._group = _checked(_libc.fanotify_init(flags, os.O_RDONLY | os.O_LARGEFILE))
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="brake", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Who waits goes on."""
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._group)
        os.close(self._wake)

    # --- slabs ------------------------------------------------------------------------------------

    def watch(self, path: str) -> None:
        """From now on it can be asked of those who open this file, but is not. OSError: not here."""
        self._mark(_ADD, path)
        self.release(path)

    def press(self, path: str) -> None:
        """Accesses ask. OSError."""
        self._mark(_REMOVE | _IGNORE, path)

    def release(self, path: str) -> None:
        """They do not. OSError."""
        self._mark(_ADD | _IGNORE | _IGNORED_SURV_MODIFY, path)

    def forget(self, path: str) -> None:
        """As before `watch`. Who waits is answered all the same."""
        for flags in (_REMOVE, _REMOVE | _IGNORE):
            try:
                self._mark(flags, path)
            except OSError as exc:
                if exc.errno != errno.ENOENT:
                    log.warning("a mark on %s can't be taken away: %s", path, exc.strerror)

    def _mark(self, flags: int, path: str) -> None:
        _checked(_libc.fanotify_mark(self._group, flags, _PRE_ACCESS, -1, os.fsencode(path)))

    # --- accesses ---------------------------------------------------------------------------------

    def answer(self, access: Access, *, is_allowed: bool) -> None:
        try:
            os.write(self._group, _RESPONSE.pack(access.fd, _ALLOW if is_allowed else _DENY))
        except OSError as exc:  # The program was killed.
            log.debug("an access was not answered: %s", exc)
        os.close(access.fd)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._group, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._wake in ready:
                return
            try:
                raw = os.read(self._group, 1 << 16)
            except OSError as exc:
                if exc.errno != errno.EAGAIN:
                    log.error("accesses to slabs can't be read: %s", exc.strerror)
                continue
            at = 0
            while at < len(raw):
                length, _, _, header, _, fd, tid = _EVENT.unpack_from(raw, at)
                if fd >= 0:
                    self._look_at(fd, tid, raw[at + header : at + length])
                at += length

    def _look_at(self, fd: int, tid: int, info: bytes) -> None:
        access = Access(fd, (0, 0), 0, 0)
        try:
            found = os.fstat(fd)
            access = Access(fd, (found.st_dev, found.st_ino), *_range_of(info))
            if not (_is_ours(tid) or self._is_granted(access) or _is_reading(tid)):
                self._ask(access)
                return
        except Exception:
            log.exception("an access to a slab is let pass unseen")
        self.answer(access, is_allowed=True)


def _range_of(info: bytes) -> tuple[int, int]:
    """(start, end); nothing when it is not said."""
    at = 0
    while at + _INFO.size <= len(info):
        kind, length = _INFO.unpack_from(info, at)
        if kind == _INFO_RANGE:
            start, count = _RANGE.unpack_from(info, at + 8)
            return start, start + count
        at += max(length, 1)
    return 0, 0


def _is_ours(tid: int) -> bool:
    """Who writes in this process has seen to the room, and may be whom the answer would wait for."""
    return os.path.exists(f"/proc/self/task/{tid}")


def _is_reading(tid: int) -> bool:
    """The event does not tell reads from writes, but the program is inside its system call. What can't be
    told (io_uring, splice) counts as writing."""
    try:
        with open(f"/proc/{tid}/syscall", "rb") as file:
            return int(file.read().split()[0]) in _READING
    except (OSError, ValueError, IndexError):
        return False
