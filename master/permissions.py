"""Who may do what: POSIX mode bits, ownership, the sticky bit. Pure functions on records.

`Caller.groups` None means that the kernel of a trusted peer has checked already: everything here
then says yes. The rules follow Linux: path_resolution(7), chmod(2), chown(2), utimensat(2).
"""

from __future__ import annotations

import errno
import stat

from alluxiofuse.errors import FsError
from alluxiofuse.master.records import InodeRecord
from alluxiofuse.wire.types import Caller

READ = 4
WRITE = 2
EXECUTE = 1


def is_checked(who: Caller) -> bool:
    """The master has to check; else the kernel did."""
    return who.groups is not None


def in_group(who: Caller, gid: int) -> bool:
    return gid == who.gid or (who.groups is not None and gid in who.groups)


def owns(who: Caller, record: InodeRecord) -> bool:
    """Owner or root, or checked elsewhere."""
    return who.groups is None or who.uid in (0, record.uid)


def may(who: Caller, record: InodeRecord, mask: int) -> bool:
    """Whether mode, owner and groups allow all of `mask` (READ, WRITE, EXECUTE)."""
    if who.groups is None:
        return True
    mode = record.mode
    if who.uid == 0:
        return not mask & EXECUTE or stat.S_ISDIR(mode) or bool(mode & 0o111)
    if who.uid == record.uid:
        bits = mode >> 6
    elif in_group(who, record.gid):
        bits = mode >> 3
    else:
        bits = mode
    return bits & mask == mask


def require(who: Caller, record: InodeRecord, mask: int) -> None:
    """EACCES unless `may`."""
    if who.groups is not None and not may(who, record, mask):
        raise FsError(errno.EACCES)


def require_removable(who: Caller, parent: InodeRecord, record: InodeRecord) -> None:
    """A name of `record` may be taken out of `parent`: EACCES, or EPERM by the sticky bit."""
    require(who, parent, WRITE | EXECUTE)
    if who.groups is None or not parent.mode & stat.S_ISVTX:
        return
    if who.uid not in (0, parent.uid, record.uid):
        raise FsError(errno.EPERM)


def creation_owner(who: Caller, parent: InodeRecord, mode: int) -> tuple[int, int, int]:
    """(mode, uid, gid) of what `who` creates in `parent`: a setgid directory hands down its group,
    and to directories the bit; a setgid program of a group that is not the caller's loses it."""
    if not parent.mode & stat.S_ISGID:
        return mode, who.uid, who.gid
    if stat.S_ISDIR(mode):
        mode |= stat.S_ISGID
    elif (
        is_checked(who)
        and mode & (stat.S_ISGID | stat.S_IXGRP) == stat.S_ISGID | stat.S_IXGRP
        and who.uid != 0
        and not in_group(who, parent.gid)
    ):
        mode &= ~stat.S_ISGID
    return mode, who.uid, parent.gid


def changed_mode(who: Caller, record: InodeRecord, mode: int) -> int:
    """The whole new mode after chmod to `mode`. EPERM."""
    if not owns(who, record):
        raise FsError(errno.EPERM)
    mode &= 0o7777
    if is_checked(who) and who.uid != 0 and not in_group(who, record.gid):
        mode &= ~stat.S_ISGID
    return stat.S_IFMT(record.mode) | mode


def require_chown(who: Caller, record: InodeRecord, uid: int | None, gid: int | None) -> None:
    """EPERM unless root; an owner may change the group to one of the own groups."""
    if who.groups is None or who.uid == 0:
        return
    if who.uid != record.uid or (uid is not None and uid != record.uid):
        raise FsError(errno.EPERM)
    if gid is not None and gid != record.gid and not in_group(who, gid):
        raise FsError(errno.EPERM)


def mode_after_chown(mode: int) -> int:
    """chown takes setuid and, of a group-executable file, setgid away; directories keep theirs."""
    if stat.S_ISDIR(mode):
        return mode
    mode &= ~stat.S_ISUID
    return mode & ~stat.S_ISGID if mode & stat.S_IXGRP else mode


def require_utimens(who: Caller, record: InodeRecord, only_now: bool) -> None:
    """EPERM unless owner or root; setting to now also by write permission (else EACCES)."""
    if owns(who, record):
        return
    if not only_now:
        raise FsError(errno.EPERM)
    require(who, record, WRITE)
