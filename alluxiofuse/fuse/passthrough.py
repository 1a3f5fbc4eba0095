"""How each inode is open in the kernel, and which slabs it reads and writes itself.

The kernel's rules (docs/adr/0001-passthrough.md): while an inode is open through the page cache, nobody may
open it for passthrough; while it is open for passthrough, every other open must be too, with the same
backing file, and may be served by the daemon all the same if it also says direct I/O. An open counts
here from before it is answered until after the kernel has told of its release: a superset of the
kernel's own count, so what is decided by it fits.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import pyfuse3

from alluxiofuse.descriptors import EXHAUSTED

log = logging.getLogger("alluxiofuse.fuse")


class BackingDevice(Protocol):
    def open_backing(self, fd: int) -> int:
        """The number by which the kernel knows the file from now on. OSError."""

    def close_backing(self, backing_id: int) -> None:
        """Nobody is told to use it any more; who uses it goes on. OSError."""


@dataclass(slots=True)
class _Inode:
    cached_count: int = 0
    """Opens through the page cache. Direct ones that name no backing are among them, as a shared mapping of
    such a file is: from then on the kernel refuses (EIO) an open for passthrough."""
    passing_count: int = 0
    """Opens that name the backing, served by the daemon or not."""
    backing_id: int = 0
    identity: tuple[int, int] = (0, 0)
    """st_dev, st_ino of the backing file."""


@dataclass(slots=True, frozen=True)
class Mode:
    """How one open is answered."""

    backing_id: int = 0
    """0: ordinary."""
    is_direct: bool = False
    """Not through the page cache; with a backing: served by the daemon."""
    identity: tuple[int, int] = field(default=(0, 0), compare=False)
    """st_dev, st_ino of the backing file, for the next daemon."""

    @property
    def is_passing(self) -> bool:
        """The kernel reads and writes by itself."""
        return bool(self.backing_id) and not self.is_direct


ORDINARY = Mode()
NewInfo = Callable[[int, bool, Mode], pyfuse3.FileInfo]


def plain_info(fh: int, keep_cache: bool, mode: Mode) -> pyfuse3.FileInfo:
    """The answer to an open, of a session without passthrough."""
    return pyfuse3.FileInfo(fh=fh, keep_cache=keep_cache, direct_io=mode.is_direct)


class Passthrough:
    """Trio thread only."""

    def __init__(self) -> None:
        self._device: BackingDevice | None = None
        self._inodes: dict[int, _Inode] = {}
        self._is_refused = False
        """The kernel did not take a slab: told once."""
        self._lost: dict[int, tuple[int, Mode]] = {}
        """Handle -> inode and how it was opened, of what a former daemon had open and is gone."""

    def enable(self, device: BackingDevice) -> None:
        self._device = device

    async def opened(self, ino: int, pass_on: Callable[[], Awaitable[int]], *, is_direct: bool) -> Mode:
        """How to answer an open; `released` must follow. `pass_on`: see `OpenFile.pass_on`. `is_direct`: how
        it would be opened without passthrough."""
        inode = self._inodes.get(ino)
        if self._device is not None and (inode is None or not inode.cached_count):
            fd = await pass_on()
            # No await from here on.
            inode = self._inodes.get(ino)
            if inode is not None and inode.backing_id:
                inode.passing_count += 1
                is_same = fd >= 0 and _identity(fd) == inode.identity
                return Mode(inode.backing_id, is_direct=not is_same, identity=inode.identity)
            if fd >= 0 and (inode is None or not inode.cached_count):
                backing_id = self._register(fd)
                if backing_id:
                    inode = self._inodes[ino] = _Inode(0, 1, backing_id, _identity(fd))
                    return Mode(backing_id, identity=inode.identity)
        if self._device is not None:
            inode = self._inodes.setdefault(ino, _Inode())
            inode.cached_count += 1
        return Mode(is_direct=True) if is_direct else ORDINARY

    def restore(self, ino: int, mode: Mode) -> None:
        """An open that a former daemon answered with `mode`: the kernel has it, and the backing, still."""
        if self._device is None:
            return
        inode = self._inodes.setdefault(ino, _Inode())
        if mode.backing_id:
            inode.passing_count += 1
            inode.backing_id, inode.identity = mode.backing_id, mode.identity
        else:
            inode.cached_count += 1

    def lost(self, fh: int, ino: int, mode: Mode) -> None:
        """Such an open, of a file that can't be opened again: it counts until `lost_released`."""
        self._lost[fh] = ino, mode

    def lost_released(self, fh: int) -> None:
        if (found := self._lost.pop(fh, None)) is not None:
            self.released(*found)

    def _register(self, fd: int) -> int:
        assert self._device is not None
        try:
            return self._device.open_backing(fd)
        except OSError as exc:
            if not self._is_refused and exc.errno not in EXHAUSTED:
                self._is_refused = True
                log.warning(
                    "the kernel can't read and write the files of this tier itself (%s): the daemon does",
                    exc.strerror,
                )
            return 0

    def released(self, ino: int, mode: Mode) -> None:
        """An open that was answered with `mode` is over, for the kernel too."""
        inode = self._inodes.get(ino)
        if inode is None:
            return
        if mode.backing_id:
            inode.passing_count -= 1
            if not inode.passing_count:
                self._close(inode)
        else:
            inode.cached_count -= 1
        if not inode.passing_count and not inode.cached_count:
            del self._inodes[ino]

    def _close(self, inode: _Inode) -> None:
        backing_id, inode.backing_id = inode.backing_id, 0
        if self._device is not None:
            try:
                self._device.close_backing(backing_id)
            except OSError as exc:
                log.debug("backing %d: %s", backing_id, exc.strerror)


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino
