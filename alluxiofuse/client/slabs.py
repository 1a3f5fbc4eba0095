"""Slabs that are attached at workers: a lock, mostly a descriptor, and which pages may be read by it."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import ClassVar

import trio

from alluxiofuse import descriptors
from alluxiofuse.errors import AlluxioFuseError, NoSpaceError
from alluxiofuse.ids import PAGE_BYTES
from alluxiofuse.rpc.base import Buffer, Connection
from alluxiofuse.wire import worker_ops
from alluxiofuse.wire.types import Layout
from alluxiofuse.wire.worker_ops import Presence

log = logging.getLogger(__name__)

INLINE_BYTES = 1 << 20
"""Reads up to this size try the page cache in the trio thread; larger ones go to a thread at once."""
IDLE_S = 3.0
"""How long a slab that nobody has open is kept: its lock keeps the worker from evicting it."""
MAX_IDLE_BYTES = 64 << 20
"""Of content that idle slabs lock, all together; at most a `IDLE_SHARE`th of the smallest tier."""
IDLE_SHARE = 32
MAX_FDS = 100_000
FDS_SHARE = 0.3
"""Of the process's descriptors; slabs beyond are read and written through the worker's socket."""
DETACH_BATCH = 100
DETACH_DELAY_S = 0.05
_NOWAIT_FAILS = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class Slab:
    """One lock on a container's slab at one worker. `fd` -1: no descriptor.

    The descriptor is closed when the slab was dropped and nobody is inside `read`.
    """

    __slots__ = (
        "connection",
        "container",
        "fd",
        "idle_since",
        "is_complete",
        "is_dropped",
        "is_durable",
        "is_unwanted",
        "lock_id",
        "pages",
        "passes",
        "reader_count",
        "size",
        "takes_nowait",
        "tell_at",
        "worker_id",
    )

    fd_count: ClassVar[int] = 0
    """Descriptors that all slabs of this process have."""

    def __init__(
        self,
        worker_id: int,
        connection: Connection,
        container: int,
        size: int,
        lock_id: int,
        fd: int,
        presence: Presence,
        is_durable: bool,
        passes: bool = False,
    ) -> None:
        self.worker_id = worker_id
        self.connection = connection
        self.container = container
        self.size = size
        self.lock_id = lock_id
        self.fd = fd
        Slab.fd_count += fd >= 0
        self.is_complete = presence.is_complete
        self.pages: bytes = presence.pages
        self.is_durable = is_durable
        self.passes = passes
        """The kernel may have it (`passing`)."""
        self.tell_at = 0
        """The worker is told of a reader that gets here (`reading`)."""
        self.takes_nowait = True
        """Its filesystem can say that a read would block (RWF_NOWAIT)."""
        self.idle_since = 0.0
        """trio time since which no open file reads it; means nothing before."""
        self.is_unwanted = False
        """Freed: not kept when its open file is closed."""
        self.is_dropped = False
        self.reader_count = 0

    @property
    def is_good(self) -> bool:
        """The lock still holds, so the bytes stay where they are."""
        return not self.is_dropped and not self.connection.is_closed

    @property
    def is_readable(self) -> bool:
        """Pages that are known to be present may be read by the descriptor, also when the worker died:
        nobody punches holes into what somebody has open (`worker.fds`)."""
        return not self.is_dropped and self.fd >= 0

    def learn(self, presence: Presence) -> None:
        self.is_complete = self.is_complete or presence.is_complete
        if len(presence.pages) >= len(self.pages):
            self.pages = presence.pages

    def has(self, offset: int, length: int) -> bool:
        """All of [offset, offset + length), which is not empty, may be read by descriptor."""
        if self.is_complete:
            return True
        pages = self.pages
        first, last = offset // PAGE_BYTES, (offset + length - 1) // PAGE_BYTES
        if last >> 3 >= len(pages):
            return False
        return all(pages[page >> 3] >> (page & 7) & 1 for page in range(first, last + 1))

    async def read(self, offset: int, length: int) -> Buffer:
        """pread of present pages; short only at the slab's end. ConnectionLost-like checks are the
        caller's: the bytes count only if `is_good` holds afterwards."""
        if length <= INLINE_BYTES:
            if not self.is_durable:
                return os.pread(self.fd, length, offset)
            if self.takes_nowait:
                buffer = bytearray(length)
                try:
                    count = os.preadv(self.fd, [buffer], offset, os.RWF_NOWAIT)
                except BlockingIOError:
                    count = 0
                except OSError as exc:
                    if exc.errno not in _NOWAIT_FAILS:
                        raise
                    self.takes_nowait = False
                    count = 0
                if count == length:
                    return buffer
        self.reader_count += 1
        try:
            return await trio.to_thread.run_sync(_pread, self.fd, offset, length)
        finally:
            self.reader_done()

    def is_hot(self, offset: int, length: int) -> bool:
        """Present bytes that are in memory, as far as a look at their ends can tell."""
        if not self.is_durable:
            return True
        if not self.takes_nowait:
            return False
        probe = bytearray(1)
        try:
            os.preadv(self.fd, [probe], offset, os.RWF_NOWAIT)
            os.preadv(self.fd, [probe], offset + length - 1, os.RWF_NOWAIT)
        except OSError:
            return False
        return True

    async def sync(self) -> bool:
        """fdatasync by the worker; False: its tier is not durable."""
        return await self.connection.call(worker_ops.SyncContainer(self.lock_id))

    def write_no_more(self) -> None:
        """Keep it for reading only: the worker seals nothing that somebody may write to. OSError."""
        if self.fd >= 0:
            readonly = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.dup2(readonly, self.fd, inheritable=False)
            finally:
                os.close(readonly)

    def reader_done(self) -> None:
        """Someone who raised `reader_count` uses the descriptor no longer."""
        self.reader_count -= 1
        self._close_if_unused()

    def drop(self) -> None:
        """Nobody may begin to read any more. Idempotent; the lock is given back by the cache."""
        self.is_dropped = True
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self.is_dropped and not self.reader_count and self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            Slab.fd_count -= 1


def _pread(fd: int, offset: int, length: int) -> Buffer:
    """All of it: one pread gives at most 2 GiB, and may be cut short by a signal."""
    data = os.pread(fd, length, offset)
    if len(data) in (0, length):
        return data
    parts = [data]
    count = len(data)
    while count < length and (data := os.pread(fd, length - count, offset + count)):
        parts.append(data)
        count += len(data)
    return b"".join(parts)


class SlabCache:
    """All slabs of a client. In use: each belongs to one open inode. Idle: kept in least recently
    used order, few and not for long. Owned by the FileSystem's trio thread."""

    def __init__(self, max_idle_count: int, tier_bytes: Callable[[], int] = lambda: 0) -> None:
        """`tier_bytes`: capacity of the smallest tier, 0 when it is not known."""
        self._max_fds = descriptors.share(FDS_SHARE, most=MAX_FDS)
        self._max_idle_count = max_idle_count
        self._tier_bytes = tier_bytes
        self._idle: OrderedDict[int, Slab] = OrderedDict()
        """Container -> slab."""
        self._idle_bytes = 0
        self._used: dict[int, Slab] = {}
        self._detach: list[tuple[Connection, int, bool]] = []
        self._has_detach = trio.Event()
        self.late_count = 0
        """Locks that came when nobody waited for them any more, and were given back."""

    async def attach(
        self, session_id: int, layout: Layout, worker_id: int, connection: Connection
    ) -> Slab | None:
        """The slab of this content at this worker, for the caller's use until `give_back`. None: it
        can't be attached (no room; use `Read`). The caller holds its inode's lock."""
        container = layout.container
        slab = self._idle.pop(container, None)
        if slab is not None:
            self._idle_bytes -= slab.size
            if slab.is_good and slab.worker_id == worker_id:
                self._used[container] = slab
                return slab
            self._drop(slab)
        request = worker_ops.Attach(
            session_id, container, layout.size, layout.source, connection.can_pass_fds and self.may_take_fd()
        )

        def late(attached: worker_ops.Attached) -> None:
            if attached.lock_id:
                self.late_count += 1
                self.detach(connection, attached.lock_id)

        try:
            answer = await connection.exchange(request, on_late=late)
        except NoSpaceError:
            if not self.drop_idle(worker_id):
                return None
            await self.send_detaches()
            answer = await connection.exchange(request, on_late=late)
        attached = answer.result
        fd = answer.fds.pop() if answer.fds else -1
        answer.close_fds()
        if not attached.lock_id:
            if fd >= 0:
                os.close(fd)
            return None
        slab = Slab(
            worker_id,
            connection,
            container,
            layout.size,
            attached.lock_id,
            fd,
            attached.presence,
            attached.is_durable,
            attached.passes,
        )
        if layout.home:
            slab.is_complete = True  # An open container is whole at its home, whatever its size is.
        self._used[container] = slab
        return slab

    def has_idle(self, container: int) -> bool:
        """It was open here a moment ago."""
        return container in self._idle

    def may_take_fd(self) -> bool:
        """There is a descriptor for one more slab, after letting go of one that nobody has open."""
        if Slab.fd_count >= self._max_fds and self._idle:
            self._drop_oldest()
        return Slab.fd_count < self._max_fds

    def adopt(self, slab: Slab) -> None:
        """A slab whose lock came otherwise (its writing ended) is in use from now on."""
        self._used[slab.container] = slab

    def give_back(self, slab: Slab) -> None:
        """Its open file does not need it any more; it stays for a while in case it is opened again."""
        if self._used.get(slab.container) is slab:
            del self._used[slab.container]
        max_bytes = min(MAX_IDLE_BYTES, (self._tier_bytes() or sys.maxsize) // IDLE_SHARE)
        if slab.is_unwanted or not slab.is_good or slab.fd < 0 or slab.size > max_bytes:
            self._drop(slab)
            return
        old = self._idle.pop(slab.container, None)
        if old is not None:
            self._idle_bytes -= old.size
            self._drop(old)
        slab.idle_since = trio.current_time()
        self._idle[slab.container] = slab
        self._idle_bytes += slab.size
        while len(self._idle) > self._max_idle_count or self._idle_bytes > max_bytes:
            self._drop_oldest()

    def discard(self, slab: Slab) -> None:
        """Not to be used again by anybody."""
        if self._used.get(slab.container) is slab:
            del self._used[slab.container]
        self._drop(slab)

    def freed(self, container: int) -> None:
        """Let go of a container unless an open file uses it; then when that is closed."""
        slab = self._idle.pop(container, None)
        if slab is not None:
            self._idle_bytes -= slab.size
            self._drop(slab)
        elif (used := self._used.get(container)) is not None:
            used.is_unwanted = True

    def drop_idle(self, worker_id: int = 0) -> bool:
        """Let go of all that nobody has open (at one worker); whether there was any."""
        found = [slab for slab in self._idle.values() if worker_id in (0, slab.worker_id)]
        for slab in found:
            self.freed(slab.container)
        return bool(found)

    def _drop_oldest(self) -> None:
        _, slab = self._idle.popitem(last=False)
        self._idle_bytes -= slab.size
        self._drop(slab)

    def _drop(self, slab: Slab) -> None:
        if slab.is_dropped:
            return
        slab.drop()
        if not slab.connection.is_closed:
            self.detach(slab.connection, slab.lock_id)

    # --- giving locks back --------------------------------------------------------------------------

    def detach(self, connection: Connection, lock_id: int, *, is_uncommitted: bool = False) -> None:
        """Give a lock back soon, together with others. `is_uncommitted`: see `worker_ops.Detach`."""
        self._detach.append((connection, lock_id, is_uncommitted))
        self._has_detach.set()

    async def send_detaches(self) -> None:
        """Now. A worker that can't be reached has dropped our locks with the connection."""
        batch, self._detach = self._detach, []
        self._has_detach = trio.Event()
        groups: dict[tuple[int, bool], tuple[Connection, list[int]]] = {}
        for connection, lock_id, is_uncommitted in batch:
            groups.setdefault((id(connection), is_uncommitted), (connection, []))[1].append(lock_id)
        for (_, is_uncommitted), (connection, lock_ids) in groups.items():
            try:
                await connection.call(worker_ops.Detach(lock_ids, is_uncommitted))
            except AlluxioFuseError as exc:
                log.debug("detach: %s", exc)

    async def keep(self) -> None:
        """Send detaches in batches and drop what has been idle, for ever."""
        while True:
            with trio.move_on_after(IDLE_S / 2):
                await self._has_detach.wait()
                await trio.sleep(DETACH_DELAY_S)
            self._drop_expired(trio.current_time() - IDLE_S)
            await self.send_detaches()

    def _drop_expired(self, before: float) -> None:
        while self._idle:
            slab = next(iter(self._idle.values()))
            if slab.idle_since > before and slab.is_good:
                return
            self._drop_oldest()

    async def close(self) -> None:
        """Drop everything."""
        for slab in [*self._used.values()]:
            self.discard(slab)
        self.drop_idle()
        await self.send_detaches()
