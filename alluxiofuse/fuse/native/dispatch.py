"""Which handler of `Operations` a request is for, and its answer in bytes."""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from alluxiofuse.client.reading import InSlab
from alluxiofuse.fuse.memory import MAX_LISTED_BYTES
from alluxiofuse.fuse.native import abi, messages
from alluxiofuse.fuse.native.abi import Fattr, Fopen, Op
from alluxiofuse.fuse.native.messages import Listing, Request
from alluxiofuse.fuse.operations import Operations
from alluxiofuse.fuse.passthrough import BackingDevice, Mode

log = logging.getLogger("alluxiofuse.fuse")

Buffer = bytes | bytearray | memoryview
Payload = Buffer | InSlab | None
"""None: no answer at all."""
_CHANGES = Fattr.MODE | Fattr.UID | Fattr.GID | Fattr.SIZE | Fattr.CTIME
_CHANGES |= Fattr.ATIME | Fattr.MTIME | Fattr.ATIME_NOW | Fattr.MTIME_NOW
"""Of SETATTR."""
SPLICE_BYTES = 64 << 10
"""Smaller reads are copied: that is cheaper than three system calls."""
Handler = Callable[[Request], Awaitable[Payload]]


class Context:
    """Who asks; in place of pyfuse3.RequestContext."""

    __slots__ = ("gid", "pid", "uid", "umask")

    def __init__(self, request: Request) -> None:
        self.uid = request.uid
        self.gid = request.gid
        self.pid = request.pid
        self.umask = 0


class Wanted:
    """The attributes of SETATTR and which of them count; in place of pyfuse3's EntryAttributes and
    SetattrFields."""

    __slots__ = (
        "st_atime_ns",
        "st_ctime_ns",
        "st_gid",
        "st_mode",
        "st_mtime_ns",
        "st_size",
        "st_uid",
        "update_atime",
        "update_ctime",
        "update_gid",
        "update_mode",
        "update_mtime",
        "update_size",
        "update_uid",
    )

    def __init__(self, fields: tuple[Any, ...]) -> None:
        (valid, _, size, _, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode, uid, gid) = fields
        now = time.time_ns() if valid & (Fattr.ATIME_NOW | Fattr.MTIME_NOW) else 0
        self.st_mode, self.st_uid, self.st_gid, self.st_size = mode, uid, gid, size
        self.st_atime_ns = now if valid & Fattr.ATIME_NOW else atime * 10**9 + atime_ns
        self.st_mtime_ns = now if valid & Fattr.MTIME_NOW else mtime * 10**9 + mtime_ns
        self.st_ctime_ns = ctime * 10**9 + ctime_ns
        self.update_mode = bool(valid & Fattr.MODE)
        self.update_uid = bool(valid & Fattr.UID)
        self.update_gid = bool(valid & Fattr.GID)
        self.update_size = bool(valid & Fattr.SIZE)
        self.update_atime = bool(valid & (Fattr.ATIME | Fattr.ATIME_NOW))
        self.update_mtime = bool(valid & (Fattr.MTIME | Fattr.MTIME_NOW))
        self.update_ctime = bool(valid & Fattr.CTIME)


class Info(NamedTuple):
    """The answer to an open; in place of pyfuse3.FileInfo."""

    fh: int
    keep_cache: bool
    mode: Mode


def reply_entry(token: Any, name: bytes, entry: Any, position: int) -> bool:
    """In place of pyfuse3.readdir_reply; `token` is a Listing."""
    return bool(token.add(name, entry, position, has_reference=name not in (b".", b"..")))


class Dispatcher:
    """Trio thread only. Errors of handlers are pyfuse3.FUSEErrors, as the guard makes them."""

    def __init__(self, operations: Operations) -> None:
        self._ops: Any = operations  # its handlers take our Context and Wanted for pyfuse3's
        self._unknown: set[int] = set()
        self._handlers: list[Handler | None] = [None] * 64
        for op, handler in {
            Op.LOOKUP: self._lookup,
            Op.FORGET: self._forget,
            Op.BATCH_FORGET: self._forget,
            Op.GETATTR: self._getattr,
            Op.SETATTR: self._setattr,
            Op.READLINK: self._readlink,
            Op.SYMLINK: self._symlink,
            Op.MKNOD: self._mknod,
            Op.MKDIR: self._mkdir,
            Op.UNLINK: self._unlink,
            Op.RMDIR: self._rmdir,
            Op.RENAME: self._rename,
            Op.RENAME2: self._rename2,
            Op.LINK: self._link,
            Op.OPEN: self._open,
            Op.READ: self._read,
            Op.WRITE: self._write,
            Op.STATFS: self._statfs,
            Op.RELEASE: self._release,
            Op.FSYNC: self._fsync,
            Op.SETXATTR: self._setxattr,
            Op.GETXATTR: self._getxattr,
            Op.LISTXATTR: self._listxattr,
            Op.REMOVEXATTR: self._removexattr,
            Op.FLUSH: self._flush,
            Op.OPENDIR: self._opendir,
            Op.READDIR: self._readdir,
            Op.READDIRPLUS: self._readdir,
            Op.RELEASEDIR: self._releasedir,
            Op.FSYNCDIR: self._fsyncdir,
            Op.ACCESS: self._access,
            Op.CREATE: self._create,
            Op.DESTROY: self._destroy,
        }.items():
            self._handlers[op] = handler

    def handler_of(self, request: Request) -> Handler | None:
        """None: not implemented; logged once for each opcode."""
        handler = self._handlers[request.opcode] if request.opcode < 64 else None
        if handler is None and request.opcode not in self._unknown and len(self._unknown) < 1000:
            self._unknown.add(request.opcode)
            log.debug("FUSE opcode %d is not implemented", request.opcode)
        return handler

    def negotiated(self, flags: int) -> None:
        """What both sides of this session can do (`abi.Init`)."""
        self._ops.maps_direct_io = bool(flags & abi.Init.DIRECT_IO_ALLOW_MMAP)

    async def drop_unanswered(self, unique: int) -> None:
        await self._ops.drop_unanswered(unique)

    def pass_by(self, device: BackingDevice) -> None:
        """The kernel takes slabs through this."""
        self._ops.passthrough.enable(device)
        self._ops.fs.take_slabs()

    # --- names ------------------------------------------------------------------------------------------

    async def _lookup(self, r: Request) -> Payload:
        return messages.entry_out(await self._ops.lookup(r.nodeid, r.names[0], Context(r)))

    async def _forget(self, r: Request) -> Payload:
        await self._ops.forget(list(messages.forgets(r)))
        return None

    async def _mknod(self, r: Request) -> Payload:
        mode, rdev, _ = r.fields
        return messages.entry_out(await self._ops.mknod(r.nodeid, r.names[0], mode, rdev, Context(r)))

    async def _mkdir(self, r: Request) -> Payload:
        return messages.entry_out(await self._ops.mkdir(r.nodeid, r.names[0], r.fields[0], Context(r)))

    async def _symlink(self, r: Request) -> Payload:
        return messages.entry_out(await self._ops.symlink(r.nodeid, r.names[0], r.names[1], Context(r)))

    async def _link(self, r: Request) -> Payload:
        return messages.entry_out(await self._ops.link(r.fields[0], r.nodeid, r.names[0], Context(r)))

    async def _unlink(self, r: Request) -> Payload:
        await self._ops.unlink(r.nodeid, r.names[0], Context(r))
        return b""

    async def _rmdir(self, r: Request) -> Payload:
        await self._ops.rmdir(r.nodeid, r.names[0], Context(r))
        return b""

    async def _rename(self, r: Request) -> Payload:
        await self._ops.rename(r.nodeid, r.names[0], r.fields[0], r.names[1], 0, Context(r))
        return b""

    async def _rename2(self, r: Request) -> Payload:
        await self._ops.rename(r.nodeid, r.names[0], r.fields[0], r.names[1], r.fields[1], Context(r))
        return b""

    async def _readlink(self, r: Request) -> Payload:
        target: bytes = await self._ops.readlink(r.nodeid, Context(r))
        return target

    # --- attributes -------------------------------------------------------------------------------------

    async def _getattr(self, r: Request) -> Payload:
        return messages.attr_out(await self._ops.getattr(r.nodeid, Context(r)))

    async def _setattr(self, r: Request) -> Payload:
        valid = r.fields[0]
        is_chown = valid & (Fattr.UID | Fattr.GID) and not valid & Fattr.MODE  # which takes them by itself
        if (valid & Fattr.KILL_SUIDGID and not is_chown) or not valid & _CHANGES:
            # Nothing to change: a write of somebody who may not keep them is about to come.
            await self._ops.kill_set_id(r.nodeid)
            if not valid & _CHANGES:
                return messages.attr_out(await self._ops.getattr(r.nodeid, Context(r)))
        wanted = Wanted(r.fields)
        fh = r.fields[1] if valid & Fattr.FH else None
        return messages.attr_out(await self._ops.setattr(r.nodeid, wanted, wanted, fh, Context(r)))

    async def _access(self, r: Request) -> Payload:
        await self._ops.access(r.nodeid, r.fields[0], Context(r))
        return b""

    async def _statfs(self, r: Request) -> Payload:
        s = await self._ops.statfs(Context(r))
        return abi.STATFS_OUT.pack(
            s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, s.f_bsize, s.f_namemax, s.f_frsize, 0
        )

    async def _setxattr(self, r: Request) -> Payload:
        assert r.data is not None
        size, flags = r.fields
        if flags and not self._was_begun(r):
            await self._check_xattr(r, flags)
        await self._ops.setxattr(r.nodeid, r.names[0], bytes(r.data[:size]), Context(r))
        return b""

    def _was_begun(self, r: Request) -> bool:
        """By a former daemon, which had found nothing wrong with it."""
        memory = self._ops.memory
        return memory is not None and memory.was_begun(r.unique & ~abi.RESENT)

    async def _check_xattr(self, r: Request, flags: int) -> None:
        """XATTR_CREATE, XATTR_REPLACE."""
        names = await self._ops.listxattr(r.nodeid, Context(r))
        if flags == os.XATTR_CREATE and r.names[0] in names:
            raise OSError(errno.EEXIST, "")
        if flags == os.XATTR_REPLACE and r.names[0] not in names:
            raise OSError(errno.ENODATA, "")

    async def _getxattr(self, r: Request) -> Payload:
        return self._sized(await self._ops.getxattr(r.nodeid, r.names[0], Context(r)), r.fields[0])

    async def _listxattr(self, r: Request) -> Payload:
        names = await self._ops.listxattr(r.nodeid, Context(r))
        return self._sized(b"".join(name + b"\0" for name in names), r.fields[0])

    @staticmethod
    def _sized(value: bytes, size: int) -> bytes:
        """`size` 0 asks for the length only."""
        if not size:
            return abi.GETXATTR_OUT.pack(len(value), 0)
        if len(value) > size:
            raise OSError(errno.ERANGE, "")
        return value

    async def _removexattr(self, r: Request) -> Payload:
        await self._ops.removexattr(r.nodeid, r.names[0], Context(r))
        return b""

    # --- files ------------------------------------------------------------------------------------------

    async def _create(self, r: Request) -> Payload:
        flags, mode, _, _ = r.fields
        info, entry = await self._ops.create(r.nodeid, r.names[0], mode, flags, Context(r))
        if r.fields[3] & abi.OPEN_KILL_SUIDGID and entry.st_mode & (stat.S_ISUID | stat.S_ISGID):
            entry.st_mode = await self._ops.kill_set_id(entry.st_ino)
        return messages.entry_out(entry) + self._opened(info, flags)

    async def _open(self, r: Request) -> Payload:
        flags, open_flags = r.fields
        info = await self._ops.open(r.nodeid, flags, Context(r))
        if open_flags & abi.OPEN_KILL_SUIDGID:
            await self._ops.kill_set_id(r.nodeid)
        return self._opened(info, flags)

    @staticmethod
    def _opened(info: Any, flags: int) -> bytes:
        answer = Fopen.KEEP_CACHE if info.keep_cache else 0
        if info.mode.is_direct:
            answer |= Fopen.DIRECT_IO
        if info.mode.backing_id:
            answer |= Fopen.PASSTHROUGH
        if flags & os.O_ACCMODE == os.O_RDONLY and not flags & os.O_TRUNC:
            answer |= Fopen.NOFLUSH
        return abi.OPEN_OUT.pack(info.fh, answer, info.mode.backing_id)

    async def _read(self, r: Request) -> Payload:
        fh, offset, size = r.fields[:3]
        read = self._ops.read_in_place if size >= SPLICE_BYTES else self._ops.read
        data: Buffer | InSlab = await read(fh, offset, size)
        return data

    async def _write(self, r: Request) -> Payload:
        assert r.data is not None
        fh, offset, size, write_flags = r.fields[:4]
        is_mapped = bool(write_flags & abi.WRITE_CACHE)
        return abi.WRITE_OUT.pack(await self._ops.write(fh, offset, r.data[:size], is_mapped), 0)

    async def _flush(self, r: Request) -> Payload:
        await self._ops.flush(r.fields[0])
        return b""

    async def _fsync(self, r: Request) -> Payload:
        await self._ops.fsync(r.fields[0], bool(r.fields[1] & abi.FSYNC_FDATASYNC))
        return b""

    async def _release(self, r: Request) -> Payload:
        await self._ops.release(r.fields[0])
        return b""

    # --- directories ------------------------------------------------------------------------------------

    async def _opendir(self, r: Request) -> Payload:
        return abi.OPEN_OUT.pack(await self._ops.opendir(r.nodeid, Context(r)), 0, 0)

    async def _readdir(self, r: Request) -> Payload:
        fh, position, size = r.fields[:3]
        most = abi.MAX_WRITE if self._ops.memory is None else MAX_LISTED_BYTES
        listing = Listing(min(size, most), is_plus=r.opcode == Op.READDIRPLUS)
        await self._ops.readdir(fh, position, listing)
        if listing.unreferenced:
            await self._ops.forget(listing.unreferenced)
        return listing.payload()

    async def _releasedir(self, r: Request) -> Payload:
        await self._ops.releasedir(r.fields[0])
        return b""

    async def _fsyncdir(self, r: Request) -> Payload:
        await self._ops.fsyncdir(r.fields[0], bool(r.fields[1] & abi.FSYNC_FDATASYNC))
        return b""

    async def _destroy(self, r: Request) -> Payload:
        return None
