"""Is the directory at a path still the one that was there before?"""

from __future__ import annotations

import os

_LASTING = {"ext2", "ext3", "ext4", "btrfs", "f2fs", "tmpfs"}
"""Filesystems whose id (`f_fsid`) was made with them, and not of the device they are on today."""


def place_identity(fd: int) -> str:
    """Of an open directory: its filesystem's id and its inode."""
    return f"{os.fstatvfs(fd).f_fsid:x}-{os.fstat(fd).st_ino:x}"


def is_other_place(fd: int, before: str, now: str) -> bool:
    """`now` is the identity of the open directory `fd`. What can change by itself is not taken for a
    difference: the id of a filesystem on another device name, the inode of a directory that was
    restored or copied within its filesystem (unless it is empty)."""
    old_id, _, old_inode = before.partition("-")
    new_id, _, new_inode = now.partition("-")
    if old_id == new_id:
        return old_inode != new_inode and _is_empty(fd)
    return old_inode != new_inode or _filesystem_type(fd) in _LASTING


def _is_empty(fd: int) -> bool:
    readable = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    try:
        with os.scandir(readable) as names:
            return next(names, None) is None
    finally:
        os.close(readable)


def _filesystem_type(fd: int) -> str:
    """ "" where /proc does not tell."""
    try:
        with open(f"/proc/self/fdinfo/{fd}") as info:
            mount = next(line.split()[1] for line in info if line.startswith("mnt_id:"))
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                if line.partition(" ")[0] == mount:
                    return line.partition(" - ")[2].partition(" ")[0]
    except (OSError, StopIteration, IndexError):
        pass
    return ""
