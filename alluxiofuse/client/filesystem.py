"""The virtual filesystem of one client: addressed by inode, ignorant of kernels.

The FUSE layer, the path helpers (`paths`) and the blocking facade stand on it. All methods are
called in the trio thread of `run`, from any number of tasks. Errors are AlluxioFuseErrors whose
`errno` is that of the system call of the same name; an inode that is gone is ESTALE.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TypeVar

import msgspec
import trio

from alluxiofuse.client.content import Content
from alluxiofuse.client.core import Core, KernelPages
from alluxiofuse.client.direct import DirectReader
from alluxiofuse.client.intents import IntentLog
from alluxiofuse.client.open_file import OpenFile
from alluxiofuse.client.parallel import unwrapped
from alluxiofuse.client.session import CacheListener, Session
from alluxiofuse.client.slabs import SlabCache
from alluxiofuse.client.workers import WorkerPool
from alluxiofuse.client.writing import LOOK_S, Writing
from alluxiofuse.config import ClientConfig
from alluxiofuse.errors import AlluxioFuseError, StaleError
from alluxiofuse.rpc.base import Connection
from alluxiofuse.wire import master_ops as ops
from alluxiofuse.wire import worker_ops
from alluxiofuse.wire.messages import Request
from alluxiofuse.wire.types import (
    EVENT_ATTR,
    EVENT_DATA,
    EVENT_ENTRY,
    EVENT_FREED,
    SUPERUSER,
    Attr,
    Caller,
    DirEntry,
    Event,
    FsUsage,
    Layout,
)

__all__ = ["CacheListener", "FileSystem", "OpenFile"]

log = logging.getLogger(__name__)
R = TypeVar("R")

DIR_PAGE_ENTRIES = 2000
TAKE_UP_S = 1.5
"""How long the home of a file that the predecessor was writing is waited for."""
CLOSING_S = 5.0
"""How long a cancelled `run` may take to commit what is being written."""


class FileSystem:
    def __init__(
        self,
        master: Connection,
        workers: WorkerPool,
        config: ClientConfig | None = None,
        *,
        name: str = "client",
        hostname: str = "",
        intents: IntentLog | None = None,
    ) -> None:
        """`name` is for people ("fuse /mnt/a"). `hostname` "": this machine's. `workers` is run by
        this FileSystem and belongs to it; `master` is the caller's, and must live until `run` ended.
        `intents`: it may take over from a client that died, and be followed by another."""
        config = config or ClientConfig()
        self._session = Session(master, self, name, hostname or socket.gethostname(), intents)
        self._workers = workers
        self._core = Core(
            self._session,
            workers,
            SlabCache(config.max_cached_slabs, lambda: workers.smallest_tier_bytes),
            DirectReader(master),
            config,
            KernelPages(),
        )
        self._contents = self._core.contents
        self._is_left = False

    # --- life ---------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Open the session (then `task_status.started()`), keep it, until cancelled. Cancelled, it
        first commits what is being written, best effort, within a few seconds."""
        pool_scope = trio.CancelScope(shield=True)  # Connections outlive the cancellation.
        await self._session.open()
        with unwrapped():
            await self._run_tasks(pool_scope, task_status)

    async def _run_tasks(self, pool_scope: trio.CancelScope, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as outer:
            try:
                await outer.start(self._run_workers, pool_scope)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._session.watch)
                    nursery.start_soon(self._session.keep_releasing)
                    nursery.start_soon(self._core.slabs.keep)
                    task_status.started()
            finally:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSING_S):
                    await self._close()
                pool_scope.cancel()

    async def _run_workers(
        self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with scope:
            await self._workers.run(task_status=task_status)

    async def _close(self) -> None:
        if self._is_left:
            return
        for content in list(self._contents.values()):
            if content.writing is not None:
                await content.last_writer_left()
            content.drop_slab()
            content.unpin()
        await self._core.slabs.close()
        await self._core.direct.close()
        if self._session.id:
            try:
                await self._session.close()
            except AlluxioFuseError as exc:
                log.info("the session could not be closed: %s", exc)

    async def resume(self, connection: Connection) -> None:
        """To be called as `Reconnecting.on_connected` of the master's connection."""
        await self._session.resume(connection)

    def set_listener(self, listener: CacheListener | None) -> None:
        """Who is told what became void. Before `run`, or at any time in its thread."""
        self._session.listener = listener

    @property
    def session_id(self) -> int:
        return self._session.id

    @property
    def workers(self) -> WorkerPool:
        return self._workers

    @property
    def config(self) -> ClientConfig:
        return self._core.config

    def take_slabs(self) -> None:
        """The kernel may be given slabs from now on: `OpenFile.pass_on`."""
        self._core.passes = True

    @property
    def is_watch_healthy(self) -> bool:
        """False: the master has not been heard of for a lease; then cache nothing (timeouts of 0)."""
        return self._session.is_watch_healthy

    async def ask_master(self, request: Request[R], *, is_idempotent: bool = False) -> R:
        """Any operation of the master (management commands); a `session_id` in it is this one's."""
        return await self._session.call(request, is_idempotent=is_idempotent)

    # --- SessionHooks -------------------------------------------------------------------------------

    def open_inos(self) -> list[int]:
        return [content.ino for content in self._contents.values() for _ in content.files]

    def changed(self, event: Event) -> None:
        if event.kind == EVENT_FREED:
            self._core.slabs.freed(event.container)
            self._core.kernel_pages.forget(event.ino)
        elif event.kind == EVENT_ENTRY:
            return
        elif event.kind == EVENT_DATA:
            self._core.kernel_pages.forget(event.ino)
        self._core.recent.forget(event.ino)
        if event.kind in (EVENT_ATTR, EVENT_DATA):
            self._core.changes.note(event.ino)
        content = self._contents.get(event.ino)
        if content is not None and event.kind == EVENT_DATA:
            content.data_event_count += 1
            if content.writing is not None:
                content.writing.doubt()

    def all_changed(self) -> None:
        self._core.kernel_pages.clear()
        self._core.recent.clear()
        self._core.changes.note_all()
        for content in self._contents.values():
            if content.writing is not None:
                content.writing.doubt()

    async def settle(self) -> None:
        await self._core.slabs.send_detaches()

    # --- names and attributes -----------------------------------------------------------------------

    async def _ask(self, request: Request[R]) -> R:
        return await self._session.call(request, is_idempotent=True)

    async def lookup(self, who: Caller, parent: int, name: bytes) -> Attr:
        return await self._live(await self._ask(ops.Lookup(who, parent, name)))

    async def getattr(self, ino: int) -> Attr:
        content = self._contents.get(ino)
        if content is not None and not self._session.is_connected and content.is_sealed:
            # Of an open file; the kernel wants them before it reads. Names are looked up elsewhere.
            return content.attr
        if content is None and (known := self._known_alone(ino)) is not None:
            return known[0]
        return await self._live(await self._ask(ops.GetAttr(ino)))

    async def _live(self, attr: Attr) -> Attr:
        """With size and mtime of what is being written, here or elsewhere."""
        if not attr.home:
            return attr
        content = self._contents.get(attr.ino)
        writing = None if content is None else content.writing
        if content is not None and writing is not None and not writing.is_superseded_by(attr.container):
            return await content.looked_at(attr)
        try:
            stat = await self._ask_home(attr, worker_ops.StatContainer(attr.container))
        except StaleError:
            return await self._as_before(attr) if attr.size else attr
        if stat is None:
            return attr
        return msgspec.structs.replace(
            attr,
            size=stat.size,
            mtime_ns=stat.mtime_ns if stat.mtime_ns > attr.mtime_set_at_ns else attr.mtime_ns,
            ctime_ns=max(attr.ctime_ns, stat.mtime_ns),
        )

    async def _as_before(self, attr: Attr) -> Attr:
        """Its home has nothing of it: not yet, or not any more after a power failure. What is read then is
        what it was before, so that is what it looks like too."""
        opened = await self._session.call(
            ops.Open(SUPERUSER, self._session.id, attr.ino, False),
            is_idempotent=True,
            on_late=self._opened_late,
        )
        self._session.release(attr.ino)
        layout = opened.layout
        if not layout.home:
            return opened.attr
        return msgspec.structs.replace(opened.attr, size=layout.base_size)

    async def _ask_home(self, attr: Attr, request: Request[R]) -> R | None:
        """None when it does not answer soon. StaleError: it has nothing of the container."""
        with trio.move_on_after(LOOK_S):
            try:
                connection = await self._workers.connection(attr.home)
                return await connection.call(request)
            except StaleError:
                raise
            except AlluxioFuseError as exc:
                log.debug("inode %d at its home: %s", attr.ino, exc)
        return None

    async def setattr(
        self,
        who: Caller,
        ino: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        atime_now: bool = False,
        mtime_now: bool = False,
        file: OpenFile | None = None,
    ) -> Attr:
        """chmod, chown, utimens and truncate in one. `file`: the handle of ftruncate(2)."""
        attr: Attr | None = None
        if size is not None:
            attr = await self._truncate(who, ino, size, file)
        changes = (mode, uid, gid, atime_ns, mtime_ns)
        if attr is not None and not (atime_now or mtime_now) and all(change is None for change in changes):
            return attr
        # An mtime that is set after the last write wins over it, a later write wins over this.
        sets_mtime = mtime_ns is not None or mtime_now
        written_ns = 0
        content = self._contents.get(ino)
        writing = None if content is None else content.writing
        if sets_mtime and writing is not None:
            written_ns = await writing.forget_mtime()
        request = ops.SetAttr(who, self._session.id, ino, *changes, atime_now, mtime_now, written_ns)
        attr = await self._session.call(request)
        if sets_mtime and writing is None and attr.home:
            written = None
            with suppress(StaleError):
                written = await self._ask_home(attr, worker_ops.ForgetMtime(attr.container))
            if written is None:  # As in Writing.forget_mtime.
                written = time.time_ns()
            if written:
                attr = await self._session.call(msgspec.structs.replace(request, written_ns=written))
        self._core.recent.forget(ino)
        content = self._contents.get(ino)
        if content is not None:
            content.attr = attr
        return await self._live(attr)

    async def _truncate(self, who: Caller, ino: int, size: int, file: OpenFile | None) -> Attr:
        if file is not None and file.is_writer and not file.is_released:
            await file.truncate(size)
            return file.attr
        file = await self.open(who, ino, os.O_WRONLY | (0 if size else os.O_TRUNC))
        try:
            if size:
                await file.truncate(size)
            await file.flush()
            return file.attr
        finally:
            await file.release()

    async def resolve(self, who: Caller, path: bytes, follow: bool = True) -> list[Attr]:
        """Attributes of every directory on an absolute path and, last, of what it names."""
        attrs = await self._ask(ops.Resolve(who, path, follow))
        if attrs and attrs[-1].home:
            attrs = [*attrs[:-1], await self._live(attrs[-1])]
        return attrs

    async def readdir(self, who: Caller, ino: int, after: bytes = b"") -> AsyncIterator[list[DirEntry]]:
        """Pages of entries in byte order of their names, from behind `after`; without . and .."""
        while True:
            page = await self._ask(ops.ReadDir(who, ino, after, DIR_PAGE_ENTRIES))
            if page.entries:
                after = page.entries[-1].name
                yield self._overlaid(page.entries)
            if page.is_last or not page.entries:
                return

    def _overlaid(self, entries: list[DirEntry]) -> list[DirEntry]:
        """With the sizes of what this client is writing."""
        contents = self._contents
        if not contents:
            return entries
        return [
            DirEntry(entry.name, content.overlay(entry.attr))
            if (content := contents.get(entry.attr.ino)) is not None and content.writing is not None
            else entry
            for entry in entries
        ]

    async def list_dir(self, who: Caller, ino: int) -> list[DirEntry]:
        """The whole directory."""
        found: list[DirEntry] = []
        async for page in self.readdir(who, ino):
            found += page
        return found

    async def mkdir(self, who: Caller, parent: int, name: bytes, mode: int) -> Attr:
        return await self._session.call(ops.Mkdir(who, self._session.id, parent, name, mode))

    async def mknod(self, who: Caller, parent: int, name: bytes, mode: int, rdev: int = 0) -> Attr:
        """`mode` with its S_IFMT bits: a regular file (0 means that too), FIFO, socket or device."""
        return await self._session.call(ops.Mknod(who, self._session.id, parent, name, mode, rdev))

    async def symlink(self, who: Caller, parent: int, name: bytes, target: bytes) -> Attr:
        return await self._session.call(ops.Symlink(who, self._session.id, parent, name, target))

    async def readlink(self, ino: int) -> bytes:
        return await self._ask(ops.ReadLink(ino))

    async def link(self, who: Caller, ino: int, parent: int, name: bytes) -> Attr:
        return await self._live(await self._session.call(ops.Link(who, self._session.id, ino, parent, name)))

    async def unlink(self, who: Caller, parent: int, name: bytes) -> ops.Unlinked:
        unlinked = await self._session.call(ops.Unlink(who, self._session.id, parent, name))
        self._let_go(unlinked)
        return unlinked

    def _let_go(self, unlinked: ops.Unlinked | None) -> None:
        """The worker can drop what nobody has open and no name leads to."""
        if unlinked is not None:
            self._core.recent.forget(unlinked.ino)
        if unlinked is not None and not unlinked.nlink:
            self._core.slabs.freed(unlinked.container)
            self._core.kernel_pages.forget(unlinked.ino)

    async def rmdir(self, who: Caller, parent: int, name: bytes) -> None:
        await self._session.call(ops.Rmdir(who, self._session.id, parent, name))

    async def rename(
        self, who: Caller, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> ops.Renamed:
        """`flags`: RENAME_NOREPLACE (1) or 0."""
        renamed = await self._session.call(
            ops.Rename(who, self._session.id, parent, name, new_parent, new_name, flags)
        )
        self._let_go(renamed.replaced)
        return renamed

    async def access(self, who: Caller, ino: int, mask: int) -> None:
        """EACCES unless `mask` (4 read, 2 write, 1 execute) is allowed."""
        await self._ask(ops.Access(who, ino, mask))

    async def statfs(self) -> FsUsage:
        return await self._ask(ops.StatFs())

    async def getxattr(self, who: Caller, ino: int, name: bytes) -> bytes:
        return await self._ask(ops.GetXattr(who, ino, name))

    async def setxattr(self, who: Caller, ino: int, name: bytes, value: bytes, flags: int = 0) -> None:
        await self._session.call(ops.SetXattr(who, self._session.id, ino, name, value, flags))

    async def listxattr(self, ino: int) -> list[bytes]:
        return await self._ask(ops.ListXattr(ino))

    async def removexattr(self, who: Caller, ino: int, name: bytes) -> None:
        await self._session.call(ops.RemoveXattr(who, self._session.id, ino, name))

    async def sync_names(self) -> None:
        """fsync(2) of a directory: names, modes, links and attributes, of whatever was changed before by
        anybody, survive the master's machine. Bytes of files are not waited for."""
        begun = await self._ask(ops.BeginSync())
        if begun:
            await self._ask(ops.SyncMetadata(begun))

    # --- content ------------------------------------------------------------------------------------

    async def create(
        self, who: Caller, parent: int, name: bytes, mode: int, flags: int = os.O_RDWR
    ) -> tuple[Attr, OpenFile]:
        """open(2) with O_CREAT; EEXIST with O_EXCL. `mode`: permission bits after umask.
        UnavailableError (EIO): it shall be written and no worker is running."""

        async def ask(home: int) -> ops.Created:
            request = ops.Create(who, self._session.id, parent, name, mode, bool(flags & os.O_EXCL), home)
            return await self._session.call(request, on_late=self._opened_late)

        is_writer = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        asked_at = self._core.changes.now
        created = await (self._core.with_home(ask) if is_writer else ask(0))
        content = self._opened(created.attr, created.layout, asked_at)
        if not created.is_new:
            file = await self._finish_open(content, created.layout, flags)
            try:
                return await content.looked_at(content.attr), file
            except BaseException:
                await file.release()
                raise
        if created.layout.home and content.writing is None:
            content.start(Writing(self._core, created.layout, is_empty=True))
        self._core.kernel_pages.opened(content.ino, created.layout.container)
        return content.live_attr, OpenFile(content, flags, keep_cache=False)

    async def open(self, who: Caller, ino: int, flags: int = os.O_RDONLY) -> OpenFile:
        """open(2) of an inode; O_TRUNC is done here, O_APPEND is kept in the file."""
        is_writer = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        asked_at = self._core.changes.now
        known = None if is_writer else self._known_alone(ino)
        if known is not None:
            # The master hears of it when it is back, from the list of what is open.
            content = self._opened(*known, asked_at)
            return await self._finish_open(content, known[1], flags)
        passes_at = self._workers.local_worker_id if self._core.passes else 0
        request = ops.Open(who, self._session.id, ino, is_writer, passes_at)
        opened = await self._session.call(request, is_idempotent=True, on_late=self._opened_late)
        content = self._opened(opened.attr, opened.layout, asked_at)
        return await self._finish_open(content, opened.layout, flags)

    async def reopen(self, ino: int, flags: int, *, is_passing: bool = False) -> OpenFile:
        """A file that the predecessor had open. StaleError and the like: it is gone. `is_passing`: the kernel
        reads, and perhaps writes, the slab itself. Where that can't be taken up now, the worker does not seal
        it while it is open for writing all the same."""
        try:
            file = await self.open(SUPERUSER, ino, flags)
        except AlluxioFuseError:
            self._session.reopened(ino)
            raise
        self._session.reopened(ino)
        if file.is_writer and file.attr.home:
            # Our lock at its home is in its grace period, and nobody else may end what we have written.
            with trio.move_on_after(TAKE_UP_S):
                try:
                    await self._contents[ino].begun(0)
                except AlluxioFuseError as exc:
                    log.warning("writing of inode %d is not taken up: %s", ino, exc)
        if is_passing:
            with trio.move_on_after(TAKE_UP_S):
                await file.pass_on()
        return file

    def leave(self) -> None:
        """Another process takes over: `run` then ends without a word to anybody."""
        self._is_left = True

    def _known_alone(self, ino: int) -> tuple[Attr, Layout] | None:
        """While the master is away, and what was heard from it may still be believed: what is known of an
        inode that is, or was lately, open for reading here."""
        if self._session.is_connected or not self._session.is_watch_healthy:
            return None
        content = self._contents.get(ino)
        if content is None:
            return self._core.recent.get(ino)
        if content.is_stale or not content.is_sealed:
            return None
        return content.attr, content.layout

    def _opened_late(self, answer: ops.Opened | ops.Created) -> None:
        """Whoever asked for it has gone away."""
        self._session.release(answer.attr.ino)

    def _opened(self, attr: Attr, layout: Layout, asked_at: int) -> Content:
        """The master has counted an open: an OpenFile must follow without an await. `asked_at`: on the clock
        of `Core.changes`."""
        content = self._contents.get(attr.ino)
        if content is None:
            content = self._contents[attr.ino] = Content(self._core, attr, layout, asked_at)
        elif not content.heard(attr, layout, asked_at):
            content.doubt()
        writing = content.writing
        if writing is not None and writing.is_superseded_by(layout.container):
            writing.doubt()
        elif writing is not None and layout.is_shared:
            writing.is_shared = True
        return content

    async def _finish_open(self, content: Content, layout: Layout, flags: int) -> OpenFile:
        file = OpenFile(content, flags, keep_cache=self._keeps_cache(content, layout))
        if flags & os.O_TRUNC:
            try:
                await content.truncate(0)
                if not content.is_written:
                    await content.seal()  # O_RDONLY: nobody will flush it.
            except BaseException:
                await file.release()
                raise
        return file

    def _keeps_cache(self, content: Content, layout: Layout) -> bool:
        writing, pages = content.writing, self._core.kernel_pages
        if writing is None and not layout.home:
            return pages.opened(content.ino, layout.container, is_shared=layout.is_shared)
        if writing is not None and writing.container == layout.container and not layout.is_shared:
            return pages.opened(content.ino, writing.container)
        pages.forget(content.ino)  # Others write to it.
        return False
