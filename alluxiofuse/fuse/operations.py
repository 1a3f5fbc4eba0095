"""VFS semantics on the client API. Needs no kernel: a test may call the handlers itself.

Permissions are the kernel's business (`default_permissions`): callers travel without groups, as
uid and gid of what they create. All handlers run in the trio thread, any number at a time.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
from collections.abc import Callable, Sequence

import pyfuse3

from alluxiofuse.client.filesystem import FileSystem, OpenFile
from alluxiofuse.client.reading import InSlab
from alluxiofuse.errors import AlluxioFuseError, FsError
from alluxiofuse.fuse.guard import Troubles, errno_of, guarded, guarded_by_inode
from alluxiofuse.fuse.handles import REOPEN_FLAGS, DirHandle, FileHandle, HandleTable
from alluxiofuse.fuse.invalidation import Kernel
from alluxiofuse.fuse.memory import Memory
from alluxiofuse.fuse.passthrough import NewInfo, Passthrough, plain_info
from alluxiofuse.fuse.view import KernelView
from alluxiofuse.fuse.xattrs import XattrNames, check_name, visible
from alluxiofuse.ids import MAX_NAME_BYTES, ROOT_INO
from alluxiofuse.rpc.base import Buffer
from alluxiofuse.rpc.interrupt import serving
from alluxiofuse.units import clamp_ns
from alluxiofuse.wire.master_ops import RENAME_NOREPLACE
from alluxiofuse.wire.types import SUPERUSER, Attr, Caller

log = logging.getLogger("alluxiofuse.fuse")

STATFS_BLOCK_BYTES = 4096
_FREE_INODES = 1 << 32
_KIND = 0o170000
"""S_IFMT, of which a function call is worth sparing for each entry of a listing."""
_CAPABILITIES = b"security.capability"
_FIRST_ENTRY = 2
"""Directory positions: 0 the start, 1 behind `.`, 2 behind `..`, then one for each entry."""


def _caller(ctx: pyfuse3.RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, None)


ReplyEntry = Callable[[pyfuse3.ReaddirToken, bytes, pyfuse3.EntryAttributes, int], bool]


class Operations(pyfuse3.Operations):
    """`kernel`: how to make the kernel forget attributes from within a handler; None without one.
    `reply_entry`: takes one entry of a listing, False when it has no room. `new_attributes`: see view."""

    supports_dot_lookup = True
    enable_writeback_cache = False  # the kernel would then believe its own sizes only, for ever
    enable_acl = False

    def __init__(
        self,
        fs: FileSystem,
        *,
        root_ino: int = ROOT_INO,
        cache_limit_s: float = 0.0,
        kernel: Kernel | None = None,
        reply_entry: ReplyEntry = pyfuse3.readdir_reply,
        new_attributes: Callable[[], pyfuse3.EntryAttributes] = pyfuse3.EntryAttributes,
        memory: Memory | None = None,
        new_info: NewInfo = plain_info,
    ) -> None:
        super().__init__()
        self.fs = fs
        self.troubles = Troubles()
        self.view = KernelView(root_ino, cache_limit_s, lambda: fs.is_watch_healthy, new_attributes)
        self.view.on_void = self._void
        self.memory = memory
        """Of what the next daemon of the mount must know."""
        self.files: HandleTable[FileHandle] = HandleTable(memory)
        self.dirs: HandleTable[DirHandle] = HandleTable(memory)
        self._xattrs = XattrNames()
        self._parents: dict[int, int] = {}
        """Of directories that were looked up or listed: `..` of a listing, no more."""
        self._kernel = kernel
        self.passthrough = Passthrough()
        self.maps_direct_io = False
        """The kernel lets programs map files that were opened for direct I/O (set by the driver)."""
        self._reply_entry = reply_entry
        self._new_info = new_info

    def _void(self, ino: int | None) -> None:
        self._xattrs.void(ino)
        if ino is not None and not self.view.knows(ino):
            self._parents.pop(ino, None)

    def _changed(self, *keys: int | tuple[int, bytes]) -> None:
        """Changed through the mount itself. The kernel orders its own requests, but listings that
        are being read hold older attributes."""
        if len(self.dirs):
            self.view.changes.note(*keys)

    # --- names ----------------------------------------------------------------------------------------

    @guarded
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent = self._parent_for(parent_inode, name)
        since = self.view.changes.now
        if name in (b".", b".."):
            return await self._lookup_dot(parent, name, since)
        try:
            attr = await self.fs.lookup(_caller(ctx), parent, name)
        except FsError as exc:
            if exc.errno != errno.ENOENT:
                raise
            return self.view.negative(parent, name, since)
        return self._entry(attr, parent, name, since)

    async def _lookup_dot(self, ino: int, name: bytes, since: int) -> pyfuse3.EntryAttributes:
        """Only for handles of a server that exports the mount (open_by_handle_at)."""
        if name == b".." and ino != self.view.root_ino:
            parent = self._parents.get(ino)
            if parent is None:
                raise FsError(errno.ESTALE)
            ino = parent
        return self.view.entry(await self.fs.getattr(ino), ino, name, since)

    def _entry(self, attr: Attr, parent: int, name: bytes, since: int) -> pyfuse3.EntryAttributes:
        if stat.S_ISDIR(attr.mode):
            self._parents[attr.ino] = parent
        return self.view.entry(attr, parent, name, since)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        try:
            for inode, count in inode_list:
                self.view.forget(inode, count)
        except Exception as exc:  # nobody waits for an answer
            errno_of(self.troubles, "forget", exc)

    def _made(self, attr: Attr, parent: int, name: bytes, since: int) -> pyfuse3.EntryAttributes:
        """The answer to a creation."""
        answer = self._entry(attr, parent, name, since)
        self._changed(parent, (parent, name), attr.ino)
        return answer

    @guarded
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent, since = self._parent_for(parent_inode, name), self.view.changes.now
        attr = await self.fs.mknod(_caller(ctx), parent, name, mode, rdev)
        return self._made(attr, parent, name, since)

    @guarded
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent, since = self._parent_for(parent_inode, name), self.view.changes.now
        attr = await self.fs.mkdir(_caller(ctx), parent, name, stat.S_IMODE(mode))
        return self._made(attr, parent, name, since)

    @guarded
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent, since = self._parent_for(parent_inode, name), self.view.changes.now
        attr = await self.fs.symlink(_caller(ctx), parent, name, target)
        return self._made(attr, parent, name, since)

    @guarded
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent, since = self._parent_for(new_parent_inode, new_name), self.view.changes.now
        attr = await self.fs.link(_caller(ctx), self.view.ours(inode), parent, new_name)
        return self._made(attr, parent, new_name, since)

    def _parent_for(self, parent_inode: int, name: bytes) -> int:
        """Our number of the directory; names that are too long for us are not for the kernel."""
        if len(name) > MAX_NAME_BYTES:
            raise FsError(errno.ENAMETOOLONG)
        return self.view.ours(parent_inode)

    @guarded
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        parent = self.view.ours(parent_inode)
        gone = await self.fs.unlink(_caller(ctx), parent, name)
        self._removed(parent, name, gone.ino)

    @guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        parent = self.view.ours(parent_inode)
        await self.fs.rmdir(_caller(ctx), parent, name)
        self._removed(parent, name)

    def _removed(self, parent: int, name: bytes, *inos: int) -> None:
        self._changed(parent, (parent, name), *inos)
        self.view.forget_name(parent, name)

    @guarded
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        if flags & ~RENAME_NOREPLACE:
            raise FsError(errno.EINVAL)  # RENAME_EXCHANGE, RENAME_WHITEOUT
        old = self.view.ours(parent_inode_old)
        new = self._parent_for(parent_inode_new, name_new)
        done = await self.fs.rename(_caller(ctx), old, name_old, new, name_new, flags)
        self._removed(old, name_old, done.ino)
        self._changed(new, (new, name_new), *([done.replaced.ino] if done.replaced else []))
        if done.ino in self._parents:
            self._parents[done.ino] = new

    @guarded_by_inode
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return await self.fs.readlink(self.view.ours(inode))

    # --- attributes -----------------------------------------------------------------------------------

    @guarded_by_inode
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        since = self.view.changes.now
        return self.view.attributes(await self.fs.getattr(self.view.ours(inode)), since)

    @guarded_by_inode
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        ino = self.view.ours(inode)
        since = self.view.changes.now
        handle = None if fh is None else self.files.get(fh)
        result = await self.fs.setattr(
            _caller(ctx),
            ino,
            mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=clamp_ns(attr.st_atime_ns) if fields.update_atime else None,
            mtime_ns=clamp_ns(attr.st_mtime_ns) if fields.update_mtime else None,
            file=handle.file if handle and handle.is_writable else None,
        )
        answer = self.view.attributes(result, since)
        self._changed(ino)
        return answer

    @guarded_by_inode
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        await self.fs.access(_caller(ctx), self.view.ours(inode), mode & 7)
        return True

    @guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """The cache tiers: what can be stored without an under storage being faster than programs."""
        usage = await self.fs.statfs()
        out = pyfuse3.StatvfsData()
        out.f_bsize = out.f_frsize = STATFS_BLOCK_BYTES
        out.f_blocks = usage.capacity_bytes // STATFS_BLOCK_BYTES
        out.f_bfree = out.f_bavail = usage.available_bytes // STATFS_BLOCK_BYTES
        out.f_files = usage.inode_count + _FREE_INODES
        out.f_ffree = out.f_favail = _FREE_INODES
        out.f_namemax = MAX_NAME_BYTES
        return out

    # --- extended attributes --------------------------------------------------------------------------

    @guarded_by_inode
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        check_name(name)
        ino = self.view.ours(inode)
        names = self._xattrs.get(ino)
        if names is None:
            names = await self._xattr_names(ino)
        if name not in names:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return await self.fs.getxattr(_caller(ctx), ino, name)

    async def _xattr_names(self, ino: int) -> frozenset[bytes]:
        since = self.view.changes.now
        names: frozenset[bytes] = frozenset(await self.fs.listxattr(ino))
        if self.fs.is_watch_healthy and self.view.changes.is_current(since, ino):
            self._xattrs.learn(ino, names)
        return names

    @guarded_by_inode
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        check_name(name)
        ino = self.view.ours(inode)
        try:
            await self.fs.setxattr(_caller(ctx), ino, name, value, 0)
        finally:
            self._xattrs_changed(ino)

    @guarded_by_inode
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        check_name(name)
        ino = self.view.ours(inode)
        try:
            await self.fs.removexattr(_caller(ctx), ino, name)
        finally:
            self._xattrs_changed(ino)

    def _xattrs_changed(self, ino: int) -> None:
        self._xattrs.void(ino)
        self.view.changes.note(ino)  # also answers to listxattr that are under way

    @guarded_by_inode
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        ino = self.view.ours(inode)
        names = self._xattrs.get(ino)
        if names is None:
            names = await self._xattr_names(ino)
        return visible(sorted(names), ctx.uid)

    # --- files ----------------------------------------------------------------------------------------

    @guarded
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        parent, since = self._parent_for(parent_inode, name), self.view.changes.now
        attr, file = await self.fs.create(_caller(ctx), parent, name, stat.S_IMODE(mode), flags)
        is_new = attr.size == 0 and attr.btime_ns == attr.mtime_ns == attr.ctime_ns
        if is_new and self.fs.is_watch_healthy:
            self._xattrs.learn(attr.ino, frozenset())  # just made, as nothing has touched it since
        self._warn_kernel(attr, flags)
        answer = self._made(attr, parent, name, since)
        if is_new:
            # Its home makes the attributes of a file void at once, but this one is written through the
            # kernel that caches them; of others that join in, the watch tells.
            answer.attr_timeout = answer.entry_timeout
        return await self._opened(attr.ino, flags, file, ctx), answer

    @guarded_by_inode
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        ino = self.view.ours(inode)
        file = await self.fs.open(_caller(ctx), ino, flags)
        self._warn_kernel(file.attr, flags)
        if flags & os.O_TRUNC:
            self.view.emptied(ino)
            self._changed(ino)
        return await self._opened(ino, flags, file, ctx)

    async def _opened(
        self, ino: int, flags: int, file: OpenFile, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        # Through its page cache the kernel sends what crosses a page that it has not read in two writes,
        # and what another mount appends could come between.
        is_direct = file.is_append and file.is_writer and (not file.is_reader or self.maps_direct_io)
        try:
            mode = await self.passthrough.opened(ino, file.pass_on, is_direct=is_direct)
        except BaseException:
            await file.release()
            raise
        kills_privileges = mode.is_direct and file.is_writer and ctx.uid != 0
        fh = self.files.add(FileHandle(ino, flags & REOPEN_FLAGS, file, ctx.pid, kills_privileges, mode=mode))
        keep_cache = file.keep_cache and not mode.backing_id
        return self._new_info(fh, keep_cache, mode)

    def _warn_kernel(self, attr: Attr, flags: int) -> None:
        """What is opened has other attributes than the kernel was told: it must ask again, even if the
        news of the change is still on its way. Voiding attributes alone waits for nothing in the
        kernel, so it may be done here; with O_TRUNC the kernel knows the size itself."""
        if self._kernel is not None and not flags & os.O_TRUNC and self.view.believes_otherwise(attr):
            self._kernel.invalidate_inode(self.view.kernels(attr.ino), True)

    def _used(self, fh: int) -> FileHandle:
        """Of a request that does not name the program: it is taken for the one that opened the file."""
        handle = self.files.get(fh)
        serving.set(handle.thread)
        return handle

    @guarded
    async def read(self, fh: int, off: int, size: int) -> bytes:
        return await self._used(fh).file.read(off, size)  # type: ignore[return-value]  # a buffer

    @guarded
    async def read_in_place(self, fh: int, off: int, size: int) -> Buffer | InSlab:
        """For sessions that can move bytes from a file to the kernel."""
        return await self._used(fh).file.read_in_place(off, size)

    @guarded
    async def write(self, fh: int, off: int, buf: bytes, is_mapped: bool | None = None) -> int:
        """`is_mapped`: a page of a shared mapping is written back, where it belongs, whatever handle of
        the inode the kernel chose; None: the kernel's word did not reach us."""
        handle = self._used(fh)
        file = handle.file
        is_append = file.is_append
        if is_append and is_mapped is None:
            # A descriptor that can't be read can't have been mapped.
            is_mapped = file.is_reader and self.view.is_mapped_write(handle.ino, off)
        is_append = is_append and not is_mapped
        if handle.kills_privileges:
            await self._kill_privileges(handle)
        count = await file.write(off, buf, is_append=is_append)
        self.view.grown(handle.ino, off + count)
        self._changed(handle.ino)
        return count

    async def _kill_privileges(self, handle: FileHandle) -> None:
        """What file_remove_privs does in the kernel for writes that are not direct: set-user-id, set-group-id
        of what the group may execute, and file capabilities go with the first byte of an ordinary user."""
        ino, mode = handle.ino, handle.file.attr.mode
        if not handle.is_written:
            names = self._xattrs.get(ino)
            if _CAPABILITIES in (await self._xattr_names(ino) if names is None else names):
                await self.fs.removexattr(SUPERUSER, ino, _CAPABILITIES)
                self._xattrs_changed(ino)
        handle.is_written = True
        await self._kill_set_id(ino, mode)

    @guarded_by_inode
    async def kill_set_id(self, inode: int) -> int:
        """The kernel leaves it to us, and says when. The new mode."""
        ino = self.view.ours(inode)
        return await self._kill_set_id(ino, (await self.fs.getattr(ino)).mode)

    async def _kill_set_id(self, ino: int, mode: int) -> int:
        killed = mode & ~(stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0))
        if killed != mode:
            await self.fs.setattr(SUPERUSER, ino, mode=stat.S_IMODE(killed))
            self._changed(ino)
            self._void_attributes(ino)
        return killed

    def _void_attributes(self, ino: int) -> None:
        if self._kernel is not None:
            self._kernel.invalidate_inode(self.view.kernels(ino), True)

    @guarded
    async def flush(self, fh: int) -> None:
        handle = self._used(fh)
        if handle.is_writable:
            await handle.file.flush()

    @guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._used(fh).file.fsync(datasync)

    @guarded
    async def release(self, fh: int) -> None:
        handle = self.files.pop(fh)
        if handle is not None:
            self.passthrough.released(handle.ino, handle.mode)
            await handle.file.release()
        else:
            self.passthrough.lost_released(fh)

    async def drop_unanswered(self, unique: int) -> None:
        """The request comes again: what a former daemon opened for it the kernel has never heard of."""
        fh = 0 if self.memory is None else self.memory.unanswered_handle(unique)
        if fh:
            await self.release(fh)
            directory = self.dirs.pop(fh)
            if directory is not None:
                await directory.close()

    async def flush_all(self) -> None:
        """Before a forced unmount: close(2) for every file that is open for writing. Never raises
        what a single file failed with; that is logged."""
        for handle in self.files.values():
            if handle.is_writable:
                try:
                    await handle.file.flush()
                except AlluxioFuseError as exc:
                    self.troubles.failure("flush", exc)

    # --- directories ----------------------------------------------------------------------------------

    @guarded_by_inode
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return self.dirs.add(self.directory(self.view.ours(inode)))

    def directory(self, ino: int) -> DirHandle:
        fs = self.fs
        return DirHandle(ino, lambda after: fs.readdir(SUPERUSER, ino, after))

    @guarded_by_inode
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        handle = self.dirs.get(fh)
        async with handle.lock:
            if start_id == 0:
                await handle.start()
            elif not handle.is_started and self.memory is not None:
                await self._go_on_listing(self.memory, fh, handle, start_id - _FIRST_ENTRY)
            position = start_id
            while position < _FIRST_ENTRY:
                if not await self._list_dot(handle, position, token):
                    return
                position += 1
            first = position - _FIRST_ENTRY
            names = await self._list_entries(handle, position, token)
            if self.memory is not None and names:
                handle.reply_count += 1
                self.memory.note_listing(fh, handle.reply_count, first, names)

    @staticmethod
    async def _go_on_listing(memory: Memory, fh: int, handle: DirHandle, index: int) -> None:
        """Where a former daemon was when it ended: behind the name before `index`, else by count."""
        before = memory.listed(fh, index - 1) if index > 0 else None
        if before is not None:
            name, handle.reply_count = before
            handle.go_on(index - 1, name)
        else:
            await handle.start()

    async def _list_dot(self, handle: DirHandle, position: int, token: pyfuse3.ReaddirToken) -> bool:
        """`.` and `..`; the kernel takes no reference for them and caches nothing of them."""
        name, ino = (
            (b".", handle.ino) if position == 0 else (b"..", self._parents.get(handle.ino, handle.ino))
        )
        entry = self.view.new_attributes()
        entry.st_ino = self.view.kernels(ino)
        entry.st_mode = stat.S_IFDIR | 0o755
        entry.attr_timeout = entry.entry_timeout = 0
        return self._reply_entry(token, name, entry, position + 1)

    async def _list_entries(
        self, handle: DirHandle, position: int, token: pyfuse3.ReaddirToken
    ) -> list[bytes]:
        """Up to where the kernel has room; the names. Some microseconds for each entry, most of them here, so
        what is the same for all is found out once."""
        reply = self._reply_entry
        names: list[bytes] = []
        while page := await handle.page_at(position - _FIRST_ENTRY, lambda: self.view.changes.now):
            listed = self.view.listing(handle.ino, page.asked_at)
            for found in itertools.islice(page.entries, position - _FIRST_ENTRY - page.start, None):
                attr = found.attr
                if not reply(token, found.name, listed.entry(attr, found.name), position + 1):
                    return names
                listed.taken(attr)
                names.append(found.name)
                if attr.mode & _KIND == stat.S_IFDIR:
                    self._parents[attr.ino] = handle.ino
                position += 1
        return names

    @guarded
    async def releasedir(self, fh: int) -> None:
        handle = self.dirs.pop(fh)
        if handle is not None:
            await handle.close()

    @guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self.fs.sync_names()
