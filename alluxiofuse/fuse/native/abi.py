"""The kernel's FUSE protocol as numbers and layouts: linux/fuse.h, version 7.45. Little-endian
machines only differ in nothing here: `=` is the machine's own order without padding.

One table, `REQUESTS`, says for each opcode what its body is made of; `messages` decodes by it.
`LAYOUTS` names each struct as the header does, so that a test can compare the sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct

VERSION = 7
MINOR = 45
"""Highest that we know; the kernel takes the lower of both sides."""
INC_EPOCH_MINOR = 44
"""From this on there is `Notify.INC_EPOCH`."""
MIN_MINOR = 31
"""Linux 5.4 and newer. Older ones have other layouts."""

IN_HEADER = Struct("=IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen (in 8 bytes), padding"""
OUT_HEADER = Struct("=IiQ")
"""len, error (0 or a negative errno; of a notification its code), unique (0: a notification)"""
RESENT = 1 << 63
"""Bit of `unique`: the request was sent before, to a daemon that is gone."""


class Op(IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52


ATTR = Struct("=QQQqqqIIIIIIIIII")
"""ino, size, blocks, atime, mtime, ctime (s), atimensec, mtimensec, ctimensec, mode, nlink, uid, gid,
rdev, blksize, flags"""
ENTRY_OUT = Struct("=QQQQII")
"""nodeid, generation, entry_valid, attr_valid (s), entry_valid_nsec, attr_valid_nsec; ATTR follows"""
ATTR_OUT = Struct("=QII")
"""attr_valid (s), attr_valid_nsec, dummy; ATTR follows"""
OPEN_OUT = Struct("=QIi")
"""fh, open_flags (`Fopen`), backing_id"""
WRITE_OUT = Struct("=II")
STATFS_OUT = Struct("=QQQQQIIII24x")
"""blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, padding, spare"""
GETXATTR_OUT = Struct("=II")
LK_OUT = Struct("=QQII")
"""start, end, type, pid"""
LSEEK_OUT = Struct("=Q")
INIT_OUT = Struct("=IIIIHHIIHHIIH22x")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran,
max_pages, map_alignment, flags2, max_stack_depth, request_timeout, unused"""
INIT_IN = Struct("=IIIII44x")
"""major, minor, max_readahead, flags, flags2, unused"""
INIT_IN_SHORT = Struct("=IIII")
"""Before `Init.INIT_EXT` (Linux 5.17)."""
DIRENT = Struct("=QQII")
"""ino, off, namelen, type; the name follows, padded to 8 bytes; in READDIRPLUS an entry_out precedes"""
FORGET_ONE = Struct("=QQ")
"""nodeid, nlookup"""
NOTIFY_INVAL_INODE = Struct("=Qqq")
"""ino, off, len; off < 0: only attributes, len <= 0: to the end"""
NOTIFY_INVAL_ENTRY = Struct("=QII")
"""parent, namelen, flags; the name and a zero byte follow"""


class Notify(IntEnum):
    INVAL_INODE = 2
    INVAL_ENTRY = 3
    RESEND = 7
    INC_EPOCH = 8


class Init(IntFlag):
    """What can be negotiated; bits from 32 on travel in flags2."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    FLOCK_LOCKS = 1 << 10
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    EXPLICIT_INVAL_DATA = 1 << 25
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    HAS_EXPIRE_ONLY = 1 << 35
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39


class Fopen(IntFlag):
    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NONSEEKABLE = 1 << 2
    CACHE_DIR = 1 << 3
    NOFLUSH = 1 << 5
    PARALLEL_DIRECT_WRITES = 1 << 6
    PASSTHROUGH = 1 << 7


class Fattr(IntFlag):
    """Of SETATTR's `valid`."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    LOCKOWNER = 1 << 9
    CTIME = 1 << 10
    KILL_SUIDGID = 1 << 11


WRITE_CACHE = 1 << 0
"""Of WRITE's write_flags: a page of the cache is written back; `fh` is a guess."""
WRITE_KILL_SUIDGID = 1 << 2
OPEN_KILL_SUIDGID = 1 << 0
GETATTR_FH = 1 << 0
FSYNC_FDATASYNC = 1 << 0
RELEASE_FLUSH = 1 << 0
RELEASE_FLOCK_UNLOCK = 1 << 1

MAX_WRITE = 1 << 20
MAX_PAGES = MAX_WRITE >> 12
BUFFER_BYTES = MAX_WRITE + (16 << 10)
"""One request: a write of the largest size, or names and xattr values (64 KiB). The kernel refuses to
hand a request to a smaller buffer."""

BACKING_MAP = Struct("=iIQ")
"""fd, flags, padding"""
IOC_BACKING_OPEN = 0x4010E501
IOC_BACKING_CLOSE = 0x4004E502
"""FUSE_DEV_IOC_*, of a u32 backing id."""


@dataclass(frozen=True, slots=True)
class Body:
    """What follows the header of a request: a struct, then names that end in a zero byte, then data
    of any length (of which the struct says how much there must be)."""

    struct: Struct
    names: int = 0
    has_data: bool = False


_NONE = Struct("=")
_RDWR = Struct("=QQIIQI4x")
"""fh, offset, size, read_flags or write_flags, lock_owner, flags"""
_FSYNC = Struct("=QI4x")
_RELEASE = Struct("=QIIQ")
_LK = Struct("=QQQQIII4x")
"""fh, owner, start, end, type, pid, lk_flags"""

REQUESTS: dict[Op, Body] = {
    Op.LOOKUP: Body(_NONE, names=1),
    Op.FORGET: Body(Struct("=Q")),  # nlookup
    Op.GETATTR: Body(Struct("=I4xQ")),  # getattr_flags, fh
    # valid, fh, size, lock_owner, atime, mtime, ctime, their ns, mode, uid, gid
    Op.SETATTR: Body(Struct("=I4xQQQqqqIIII4xII4x")),
    Op.READLINK: Body(_NONE),
    Op.SYMLINK: Body(_NONE, names=2),  # the new name, the target
    Op.MKNOD: Body(Struct("=III4x"), names=1),  # mode, rdev, umask
    Op.MKDIR: Body(Struct("=II"), names=1),  # mode, umask
    Op.UNLINK: Body(_NONE, names=1),
    Op.RMDIR: Body(_NONE, names=1),
    Op.RENAME: Body(Struct("=Q"), names=2),  # newdir
    Op.LINK: Body(Struct("=Q"), names=1),  # oldnodeid
    Op.OPEN: Body(Struct("=II")),  # flags, open_flags
    Op.READ: Body(_RDWR),
    Op.WRITE: Body(_RDWR, has_data=True),
    Op.STATFS: Body(_NONE),
    Op.RELEASE: Body(_RELEASE),  # fh, flags, release_flags, lock_owner
    Op.FSYNC: Body(_FSYNC),  # fh, fsync_flags
    Op.SETXATTR: Body(Struct("=II"), names=1, has_data=True),  # size, flags
    Op.GETXATTR: Body(Struct("=I4x"), names=1),  # size
    Op.LISTXATTR: Body(Struct("=I4x")),
    Op.REMOVEXATTR: Body(_NONE, names=1),
    Op.FLUSH: Body(Struct("=Q8xQ")),  # fh, lock_owner
    Op.OPENDIR: Body(Struct("=II")),
    Op.READDIR: Body(_RDWR),
    Op.RELEASEDIR: Body(_RELEASE),
    Op.FSYNCDIR: Body(_FSYNC),
    Op.GETLK: Body(_LK),
    Op.SETLK: Body(_LK),
    Op.SETLKW: Body(_LK),
    Op.ACCESS: Body(Struct("=I4x")),  # mask
    Op.CREATE: Body(Struct("=IIII"), names=1),  # flags, mode, umask, open_flags
    Op.INTERRUPT: Body(Struct("=Q")),  # unique
    Op.DESTROY: Body(_NONE),
    Op.BATCH_FORGET: Body(Struct("=I4x"), has_data=True),  # count; FORGET_ONE each
    Op.FALLOCATE: Body(Struct("=QQQI4x")),  # fh, offset, length, mode
    Op.READDIRPLUS: Body(_RDWR),
    Op.RENAME2: Body(Struct("=QI4x"), names=2),  # newdir, flags
    Op.LSEEK: Body(Struct("=QQI4x")),  # fh, offset, whence
    Op.COPY_FILE_RANGE: Body(Struct("=QQQQQQQ")),  # fh_in, off_in, nodeid_out, fh_out, off_out, len, flags
    Op.SYNCFS: Body(Struct("=8x")),
    Op.TMPFILE: Body(Struct("=IIII"), names=1),
}

LAYOUTS: dict[str, int] = {
    "fuse_in_header": IN_HEADER.size,
    "fuse_out_header": OUT_HEADER.size,
    "fuse_attr": ATTR.size,
    "fuse_entry_out": ENTRY_OUT.size + ATTR.size,
    "fuse_attr_out": ATTR_OUT.size + ATTR.size,
    "fuse_open_out": OPEN_OUT.size,
    "fuse_write_out": WRITE_OUT.size,
    "fuse_statfs_out": STATFS_OUT.size,
    "fuse_getxattr_out": GETXATTR_OUT.size,
    "fuse_lk_out": LK_OUT.size,
    "fuse_lseek_out": LSEEK_OUT.size,
    "fuse_init_out": INIT_OUT.size,
    "fuse_init_in": INIT_IN.size,
    "fuse_dirent": DIRENT.size,
    "fuse_forget_one": FORGET_ONE.size,
    "fuse_notify_inval_inode_out": NOTIFY_INVAL_INODE.size,
    "fuse_notify_inval_entry_out": NOTIFY_INVAL_ENTRY.size,
    "fuse_forget_in": REQUESTS[Op.FORGET].struct.size,
    "fuse_getattr_in": REQUESTS[Op.GETATTR].struct.size,
    "fuse_setattr_in": REQUESTS[Op.SETATTR].struct.size,
    "fuse_mknod_in": REQUESTS[Op.MKNOD].struct.size,
    "fuse_mkdir_in": REQUESTS[Op.MKDIR].struct.size,
    "fuse_rename_in": REQUESTS[Op.RENAME].struct.size,
    "fuse_rename2_in": REQUESTS[Op.RENAME2].struct.size,
    "fuse_link_in": REQUESTS[Op.LINK].struct.size,
    "fuse_open_in": REQUESTS[Op.OPEN].struct.size,
    "fuse_create_in": REQUESTS[Op.CREATE].struct.size,
    "fuse_read_in": REQUESTS[Op.READ].struct.size,
    "fuse_write_in": REQUESTS[Op.WRITE].struct.size,
    "fuse_release_in": REQUESTS[Op.RELEASE].struct.size,
    "fuse_fsync_in": REQUESTS[Op.FSYNC].struct.size,
    "fuse_flush_in": REQUESTS[Op.FLUSH].struct.size,
    "fuse_getxattr_in": REQUESTS[Op.GETXATTR].struct.size,
    "fuse_lk_in": REQUESTS[Op.GETLK].struct.size,
    "fuse_access_in": REQUESTS[Op.ACCESS].struct.size,
    "fuse_interrupt_in": REQUESTS[Op.INTERRUPT].struct.size,
    "fuse_batch_forget_in": REQUESTS[Op.BATCH_FORGET].struct.size,
    "fuse_fallocate_in": REQUESTS[Op.FALLOCATE].struct.size,
    "fuse_lseek_in": REQUESTS[Op.LSEEK].struct.size,
    "fuse_copy_file_range_in": REQUESTS[Op.COPY_FILE_RANGE].struct.size,
    "fuse_syncfs_in": REQUESTS[Op.SYNCFS].struct.size,
}
