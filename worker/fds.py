"""Open descriptors of slabs: a bounded cache, least recently used closed first.

Who hands a descriptor to another thread, or to the transport beyond a handler's return, dups it.

A client that lost its connection, or a worker that died, leaves descriptors to those who still read. What
is about to punch holes asks the kernel whether somebody does, whom no lock of ours names (`openers`). On
a filesystem that can't tell, each is opened with a shared flock(2): that belongs to the open file, and so
to whoever was passed the descriptor too.
"""

from __future__ import annotations

import fcntl
import os
from collections import OrderedDict

from alluxiofuse import descriptors
from alluxiofuse.worker import openers
from alluxiofuse.worker.layout import slab_path
from alluxiofuse.worker.slab import Slab

MOST = 512
SHARE = 0.1
"""Of the process's descriptors; each slab may have two."""


class Descriptors:
    """At most `limit` slabs have descriptors open here (up to two each)."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = descriptors.share(SHARE, most=MOST) if limit is None else limit
        self._open: OrderedDict[Slab, list[int]] = OrderedDict()

    def for_reading(self, slab: Slab) -> int:
        """A read-only descriptor, valid until the caller's next await. OSError."""
        return self._get(slab, 0, os.O_RDONLY)

    def for_writing(self, slab: Slab) -> int:
        """A read-write descriptor, valid until the caller's next await. OSError."""
        return self._get(slab, 1, os.O_RDWR)

    def adopt(self, slab: Slab, fd: int) -> None:
        """`fd` is the read-write descriptor of a new slab; closed here later."""
        _share(slab, fd)
        self._open[slab] = [-1, fd]
        self._trim()

    def forget(self, slab: Slab) -> None:
        """Close those of a slab (its file was replaced or removed)."""
        for fd in self._open.pop(slab, ()):
            if fd >= 0:
                os.close(fd)

    def close(self) -> None:
        while self._open:
            self.forget(next(iter(self._open)))

    def _get(self, slab: Slab, kind: int, flags: int) -> int:
        pair = self._open.get(slab)
        if pair is None:
            pair = self._open[slab] = [-1, -1]
            self._trim()
        else:
            self._open.move_to_end(slab)
        if pair[kind] < 0:
            path = slab_path(slab.directory.root, slab.container)
            try:
                pair[kind] = os.open(path, flags | os.O_CLOEXEC)
            except OSError as exc:
                if exc.errno not in descriptors.EXHAUSTED:
                    raise
                self._give_up_half(slab)
                pair[kind] = os.open(path, flags | os.O_CLOEXEC)
            _share(slab, pair[kind])
        return pair[kind]

    def is_held_elsewhere(self, slab: Slab) -> bool:
        """Somebody else has it open, though it has neither locks nor pins. OSError."""
        self.forget(slab)
        path = slab_path(slab.directory.root, slab.container)
        if slab.directory.takes_passthrough:
            return openers.is_open(path)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def is_written_elsewhere(self, slab: Slab) -> bool:
        """Somebody else has it open, or mapped, for writing; where it takes passthrough. OSError."""
        self.forget(slab)
        return openers.is_written(slab_path(slab.directory.root, slab.container))

    def _give_up_half(self, kept: Slab) -> None:
        """There are no descriptors left: others may need them more."""
        for slab in list(self._open)[: len(self._open) // 2 + 1]:
            if slab is not kept:
                self.forget(slab)

    def _trim(self) -> None:
        while len(self._open) > self._limit:
            self.forget(next(iter(self._open)))


def _share(slab: Slab, fd: int) -> None:
    if not slab.directory.takes_passthrough:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
