"""Writing one container at its home worker, from its first byte to its seal.

The master's part (`BeginWrite`, `CommitContent`) is `content.Content`'s; here is the worker's: the
lock, the descriptor, what may be written, what was changed. Nothing here is shared with other
inodes. A write state goes through

    assigned   the master gave home and container; the worker has not heard of it
    begun      `slab` is set: writes and truncates
    ending     `end` waits for the writes under way; no new one begins
    ended      `result` is set: sealed at the worker (or left to its other writers)
"""

from __future__ import annotations

import errno
import logging
import math
import os
import time
from collections.abc import Callable
from typing import TypeVar

import trio

from alluxiofuse.client.core import Core
from alluxiofuse.client.intents import APPEND, LIFE_SHIFT, REMOTE_APPEND
from alluxiofuse.client.slabs import Slab
from alluxiofuse.errors import (
    AlluxioFuseError,
    ConnectionLost,
    FsError,
    NoSpaceError,
    PeerError,
    StaleError,
    UfsChangedError,
    UfsNotFoundError,
    UnavailableError,
)
from alluxiofuse.ids import MAX_FILE_BYTES, PAGE_BYTES
from alluxiofuse.rpc import interrupt
from alluxiofuse.rpc.base import Buffer, Connection, FileRange
from alluxiofuse.rpc.reconnecting import MAX_ATTEMPTS
from alluxiofuse.wire import master_ops as ops
from alluxiofuse.wire import worker_ops
from alluxiofuse.wire.messages import Request
from alluxiofuse.wire.types import SUPERUSER, Layout
from alluxiofuse.wire.worker_ops import MAX_IO_BYTES, Presence, WriteEnd, WriteGrant

log = logging.getLogger(__name__)
R = TypeVar("R")

INLINE_WRITE_BYTES = 128 << 10
"""Larger writes to a disk tier go to a thread: the kernel may make them wait."""
MAX_ISLANDS = 16
MAX_DIRTY_PAGES = 1 << 20
"""Pages that the bitmap tells apart; beyond (1 TiB) all count as changed."""
LOOK_S = 1.0
"""How long a home may take to tell size and times."""
MAX_SEARCH_BYTES = 16 << 20
"""How far an append is looked for that may have been done before."""
_RETRY_S = 0.1
CONFIRMED_S = 0.25
"""How long the master's word that a container is open is believed, without news: hardly long enough for
others to seal it, and for its upload and eviction."""
MOVED_S = 2.0
"""How long the master is asked where bytes went that are not where it said."""
_WHOLE = Presence(is_complete=True, pages=b"")


class SealedMeanwhile(StaleError):
    """The worker sealed the container by itself while we were away: `result` is set; commit it and
    begin anew. Never leaves the client."""


class Writing:
    """Guarded by its Content's lock: `begin`, `end`, `close`. The rest may run in many tasks."""

    def __init__(self, core: Core, layout: Layout, *, is_empty: bool) -> None:
        """`layout` as the master answered BeginWrite or Create. `is_empty`: it starts without content
        (new or truncated), whatever its base is."""
        self._core = core
        self._layout = layout
        self.is_empty = is_empty
        self.is_joined = layout.is_joined
        self.is_shared = layout.is_joined
        """Other sessions write to it too, as far as this client has heard."""
        self.container = layout.container
        self.worker_id = layout.home
        self.slab: Slab | None = None
        """While begun; its connection and lock id are those to use."""
        self.result: WriteEnd | None = None
        self.is_ending = False
        self.may_pass = False
        """The kernel may be given the slab, to write to it itself."""
        self.is_passing = False
        """It was: what it writes is known from the slab alone, and its bytes are not reserved."""
        self.is_uncommitted = True
        """Size or mtime changed since the master was told."""
        self.told: tuple[int, int] | None = None
        """Size and mtime as the master was told last."""
        self._size = 0 if is_empty else layout.base_size
        """Where there is no descriptor: as the home said last, and our own writes since."""
        self._written_ns = 0
        """Likewise."""
        self._granted_end = 0
        self._islands: list[tuple[int, int]] = []
        """[start, end) beyond the granted end that may be written too, the latest last; some."""
        self._dirty: bytearray | None = bytearray()
        """Bitmap of pages that were changed; None: too many to say."""
        self._busy_count = 0
        """Calls inside `_busy`: `end` waits for them."""
        self._idle = trio.Event()
        self._recovering = trio.Lock()
        self._appending = trio.Lock()
        """One append through the worker at a time."""
        self._append_number = 1 if core.session.intents is None else core.session.intents.life << LIFE_SHIFT
        self.is_unbegun = False
        """Ended without the home having been told that it began."""
        self._may_be_ended = False
        """The worker was asked to end, and its answer was not heard."""
        self._may_be_begun = False
        """The worker was asked to begin, and its answer was not heard."""
        self._confirmed_at_s = trio.current_time()
        """When the master said last that the container is open at this home."""

    @property
    def is_begun(self) -> bool:
        return self.slab is not None

    def is_superseded_by(self, container: int) -> bool:
        """Others have sealed what was to be written here, and the file is `container` by now: the news of
        it is still on its way. (Numbers of containers only grow: a smaller one is an older answer.)"""
        return self.container < container

    @property
    def takes_writes(self) -> bool:
        return self.slab is not None and not self.is_ending

    @property
    def is_over(self) -> bool:
        """Ended at the worker, and the master does not know yet."""
        return self.result is not None

    @property
    def is_durable(self) -> bool:
        return self.slab is not None and self.slab.is_durable

    @property
    def size(self) -> int:
        """Now; other sessions may write to the same slab. Without a descriptor: see `look`."""
        self._look_at_slab()
        return self._size

    @property
    def written_ns(self) -> int:
        """When it was written last, as of `worker_ops.ContainerStat`; see `size`."""
        self._look_at_slab()
        return self._written_ns

    def _look_at_slab(self) -> None:
        slab = self.slab
        # A seal changes the file's time for a moment, where it makes pages of zeros holes.
        if slab is not None and slab.fd >= 0 and not self._may_be_ended:
            found = os.fstat(slab.fd)
            self._size, self._written_ns = found.st_size, found.st_mtime_ns

    async def look(self) -> None:
        """Bring `size` and `written_ns` up to date where there is no descriptor to ask: others may
        write too, and the clock is the home's. Does its best."""
        slab = self.slab
        is_known = not self.is_shared if slab is None else slab.fd >= 0
        if is_known or self.result is not None:
            return
        with trio.move_on_after(LOOK_S):
            try:
                connection = await self._core.workers.connection(self.worker_id)
                stat = await connection.call(worker_ops.StatContainer(self.container))
            except AlluxioFuseError as exc:
                log.debug("container %d is not looked at: %s", self.container, exc)
                return
            if self.slab is slab and self.result is None:
                self._size, self._written_ns = stat.size, stat.mtime_ns

    async def forget_mtime(self) -> int:
        """See `worker_ops.ForgetMtime`. When the home can't be asked, now by this machine's clock: what it
        has was written before."""
        slab = self.slab
        if slab is None:
            return 0
        with trio.move_on_after(LOOK_S):
            try:
                written_ns = await slab.connection.call(worker_ops.ForgetMtime(self.container))
            except AlluxioFuseError as exc:
                log.debug("the times of container %d: %s", self.container, exc)
            else:
                self._written_ns = 0
                return written_ns
        return time.time_ns()

    def has_left(self, slab: Slab | None) -> bool:
        """It ended, or is about to, since `slab` was what it is written by: other tasks do that while bytes
        are read, and the worker may refuse them then."""
        return self.is_ending or self.slab is not slab

    # --- begin and end ------------------------------------------------------------------------------

    async def begin(self, reserve_bytes: int, patience_s: float | None = None) -> None:
        """At the worker. NoSpaceError: certainly nothing was begun. PeerError: not reachable within
        patience (None: the client's); it may have begun, and may be tried again."""
        deadline = trio.current_time() + (self._core.config.patience_s if patience_s is None else patience_s)
        while True:
            await self._confirm()
            try:
                await self._begin_once(reserve_bytes)
                return
            except (UfsNotFoundError, UfsChangedError):
                if not await self._source_has_moved():
                    raise
            except (ConnectionLost, UnavailableError):
                self._core.workers.failed(self.worker_id)
                if trio.current_time() + _RETRY_S > deadline:
                    raise
                await interrupt.pause(_RETRY_S)

    def doubt(self) -> None:
        """Others changed the content."""
        self.is_shared = True
        self._confirmed_at_s = -math.inf

    async def _confirm(self) -> None:
        """StaleError: others have joined and sealed the container. Its worker may have evicted it since, and
        would take us for the first who writes it: into a file that nobody looks for."""
        if trio.current_time() - self._confirmed_at_s < CONFIRMED_S:
            return
        asked_at_s = trio.current_time()
        attr = await self._core.session.call(ops.GetAttr(self._layout.ino), is_idempotent=True)
        if attr.home != self.worker_id or attr.container != self.container:
            raise StaleError(f"container {self.container:x} was sealed: begin a new one at the master")
        self._confirmed_at_s = asked_at_s

    async def _source_has_moved(self) -> bool:
        """Whether the bytes to be changed are elsewhere in the under storage by now: the file was renamed.
        The master knows a moment after it was done there."""
        session, ino, source = self._core.session, self._layout.ino, self._layout.source
        deadline = trio.current_time() + MOVED_S
        while True:
            opened = await session.call(ops.Open(SUPERUSER, session.id, ino, False), is_idempotent=True)
            session.release(ino)
            if opened.layout.container != self.container or opened.layout.source is None:
                return False
            if opened.layout.source != source:
                self._layout = opened.layout
                return True
            if trio.current_time() + _RETRY_S > deadline:
                return False
            await interrupt.pause(_RETRY_S)

    async def _begin_once(self, reserve_bytes: int) -> None:
        connection = await self._core.workers.connection(self.worker_id)
        layout = self._layout
        wants_fd = connection.can_pass_fds and self._core.slabs.may_take_fd()
        emptied = layout.emptied_container
        request = worker_ops.BeginWrite(
            self._core.session.id,
            self.container,
            emptied or layout.base_container,
            0 if emptied else layout.base_size,
            None if emptied else layout.source,
            reserve_bytes,
            wants_fd,
            passes=wants_fd and self._core.passes_writes,
            is_emptying=emptied != 0,
        )
        self._may_be_begun = True
        try:
            try:
                answer = await connection.exchange(request)
            except NoSpaceError:
                if not self._core.slabs.drop_idle(self.worker_id):
                    raise
                await self._core.slabs.send_detaches()
                answer = await connection.exchange(request)
        except PeerError:
            raise
        except AlluxioFuseError:
            self._may_be_begun = False  # It said so.
            raise
        fd = answer.fds.pop() if answer.fds else -1
        answer.close_fds()
        self._take(connection, answer.result, fd)

    def _take(self, connection: Connection, grant: WriteGrant, fd: int) -> None:
        old, known_size = self.slab, self._size
        slab = Slab(
            self.worker_id,
            connection,
            self.container,
            grant.size,
            grant.lock_id,
            fd,
            _WHOLE,
            grant.is_durable,
            grant.passes,
        )
        if old is not None:
            old.drop()
            self._dirty = None  # The worker may have forgotten what was there before us.
            if grant.size < known_size:
                slab.drop()
                self._core.slabs.detach(connection, grant.lock_id)
                raise AlluxioFuseError(
                    f"worker {self.worker_id} lost {known_size - grant.size} bytes that were being written"
                )
        self.slab = slab
        self.may_pass = grant.passes and fd >= 0
        if self.is_passing:
            slab.write_no_more()
        self._size = grant.size
        self._granted_end, self._islands = grant.granted_end, []

    async def _good_slab(self) -> Slab:
        """The slab under a lock that holds: begun again when the connection broke (same container)."""
        slab = self.slab
        assert slab is not None
        if slab.is_good:
            return slab
        async with self._recovering:
            slab = self.slab
            if slab is not None and slab.is_good:
                return slab
            try:
                await self.begin(0)
            except StaleError as exc:
                self.is_ending = True
                self.result = await self._sealed_by_worker()
                raise SealedMeanwhile(exc.message) from None
            log.info("writing of container %d goes on after its worker was away", self.container)
            assert self.slab is not None
            return self.slab

    async def _sealed_by_worker(self) -> WriteEnd:
        """What the worker sealed without us: other sessions may have written to it, and calls of ours
        may have been carried out whose answers were lost."""
        deadline = trio.current_time() + self._core.config.patience_s
        while True:
            try:
                connection = await self._core.workers.connection(self.worker_id)
                stat = await connection.call(worker_ops.StatContainer(self.container))
                return WriteEnd(stat.size, stat.mtime_ns, True)
            except StaleError:
                return WriteEnd(self.size, 0, True)  # In the under storage already: the master knows better.
            except (ConnectionLost, UnavailableError):
                self._core.workers.failed(self.worker_id)
                if trio.current_time() + _RETRY_S > deadline:
                    raise
                await interrupt.pause(_RETRY_S)

    async def _ask(self, build: Callable[[int], Request[R]]) -> R:
        """A call about the lock that may be done twice; again after the worker was away."""
        deadline = trio.current_time() + self._core.config.patience_s
        while True:
            slab = await self._good_slab()
            try:
                return await slab.connection.call(build(slab.lock_id))
            except (ConnectionLost, UnavailableError):
                if trio.current_time() + _RETRY_S > deadline:
                    raise
                slab.drop()
                await interrupt.pause(_RETRY_S)

    async def end(self) -> WriteEnd:
        """Wait for writes under way, then end: `result`. When the worker refuses, it stays begun. When
        its answer was not heard (cancelled, not reachable), it stays ending, as it may be sealed: call
        it again."""
        if self.result is not None:
            return self.result
        self.is_ending = True
        try:
            while self._busy_count:
                self._idle = trio.Event()
                await self._idle.wait()
            if self.slab is None and not self.is_empty:
                await self.begin(0)
            elif self.slab is None and (self._may_be_begun or self.is_shared):
                await self._begin_to_end()
            if self.slab is None:
                self.is_unbegun = True
                self.result = WriteEnd(0, 0, True)
            else:
                self.result = await self._end_at_worker()
                self._size = self.result.size
            return self.result
        finally:
            self.is_ending = self.result is not None or self._may_be_ended

    async def _begin_to_end(self) -> None:
        """Take up the lock that the worker may have given us without our hearing of it. Nothing was
        written, so where it can't be reached nothing is lost: it seals by itself."""
        try:
            await self.begin(0, 0.0)
        except (StaleError, NoSpaceError, ConnectionLost, UnavailableError) as exc:
            log.info("container %d was begun in vain: %s", self.container, exc)

    async def _end_at_worker(self) -> WriteEnd:
        dirty = None if self._dirty is None or self.is_passing else bytes(self._dirty)
        if self.may_pass and self.slab is not None and not self.is_passing:
            self.slab.write_no_more()
        self._look_at_slab()
        self._may_be_ended = True
        may_revert = self.is_passing and not (self.is_empty or self.is_shared)
        try:
            return await self._ask(lambda lock_id: worker_ops.EndWrite(lock_id, dirty, may_revert))
        except SealedMeanwhile:
            assert self.result is not None
            return self.result
        except AlluxioFuseError as exc:
            self._may_be_ended = isinstance(exc, PeerError)
            raise

    async def end_at_home(self) -> WriteEnd:
        """After an end of which the home was not told, and which is not enough: end it there."""
        self.result, self.is_unbegun, self.is_shared = None, False, True
        return await self.end()

    def abandon(self) -> None:
        """Leave it to the worker to end it, and to tell the master if that was not done."""
        slab, self.slab = self.slab, None
        if slab is not None:
            slab.drop()
            if not slab.connection.is_closed:
                self._core.slabs.detach(slab.connection, slab.lock_id, is_uncommitted=True)

    def close(self) -> Slab | None:
        """Leave it: the slab, if its lock holds and it may be read by descriptor, else None."""
        slab, self.slab = self.slab, None
        if slab is None:
            return None
        if slab.fd >= 0 and slab.is_good:
            slab.size = self._size
            return slab
        slab.drop()
        if not slab.connection.is_closed:
            self._core.slabs.detach(slab.connection, slab.lock_id)
        return None

    def pass_on(self) -> int:
        """For the kernel to write to itself: the slab's descriptor, for reading only (the kernel opens the
        file anew for those who write); -1: it may not have it, or it is not begun. OSError."""
        slab = self.slab
        if slab is None or not self.may_pass or not slab.is_good or self.is_ending:
            return -1
        if not self.is_passing:
            if self._busy_count:
                return -1  # A write by this descriptor is under way.
            slab.write_no_more()
            self.is_passing = True
        return slab.fd

    # --- bytes --------------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> Buffer:
        """Short only at the end of the file. StaleError: see `has_left`."""
        lost: ConnectionLost | None = None
        for _ in range(MAX_ATTEMPTS):
            slab = self.slab
            if slab is None:
                raise StaleError("it was sealed meanwhile")
            if not slab.is_good:
                slab = await self._good_slab()
            if slab.fd >= 0:
                return await slab.read(offset, length)
            try:
                return await self._read_remote(slab, offset, min(length, MAX_IO_BYTES))
            except ConnectionLost as exc:
                lost = exc
                slab.drop()
        assert lost is not None
        raise lost

    async def _read_remote(self, slab: Slab, offset: int, length: int) -> Buffer:
        request = worker_ops.Read(self._core.session.id, self.container, self._size, None, offset, length)
        answer = await slab.connection.exchange(request)
        answer.close_fds()
        data = answer.payload
        assert not isinstance(data, FileRange)  # Callers get buffers.
        if len(data) < length and self.has_left(slab):
            # Once sealed it ends where we said, and others may have written behind that.
            raise StaleError("it was sealed while it was read")
        return data

    async def write(self, offset: int, data: Buffer, *, is_append: bool) -> int:
        """Only while `takes_writes`, and without an await since that was looked at. How many bytes;
        fewer than given when the room ends, NoSpaceError when not one fits."""
        length = data.nbytes if isinstance(data, memoryview) else len(data)
        slab = self.slab
        assert slab is not None
        fd = slab.fd
        is_free = not self.is_passing and not (is_append and self._appending.locked())
        if fd >= 0 and slab.is_good and is_free and (length <= INLINE_WRITE_BYTES or not slab.is_durable):
            if is_append:
                offset = os.fstat(fd).st_size
            if self._may_write(offset, offset + length):
                return self._write_now(fd, offset, data, is_append)
        self._busy_count += 1
        try:
            return await self._write_slowly(offset, data, length, is_append)
        finally:
            self._busy_count -= 1
            if not self._busy_count:
                self._idle.set()

    def _write_now(self, fd: int, offset: int, data: Buffer, is_append: bool) -> int:
        try:
            if is_append:
                done = self._note_append(fd, data)
                count = done + os.pwritev(fd, [memoryview(data)[done:]], offset, os.RWF_APPEND)
                self._changed(offset - done, os.fstat(fd).st_size)
            else:
                count = os.pwrite(fd, data, offset)
                self._changed(offset, offset + count)
        except OSError as exc:
            raise _named(exc) from None
        return count

    def _note_append(self, fd: int, data: Buffer) -> int:
        """How many bytes of `data` a predecessor has appended before it died; from now on a successor can
        find that out. Two appends at one time of this client, or of others of this machine, to the same
        file make it search for the whole of `data`."""
        intents = self._core.session.intents
        if intents is None:
            return 0
        done, size = 0, os.fstat(fd).st_size
        former = intents.former(APPEND)
        if former is not None and former[0] == self._layout.ino and size > former[1]:
            done = _found_at(fd, former[1], size, memoryview(data).cast("B"))
        intents.note(APPEND, self._layout.ino, size - done)
        return done

    async def _write_slowly(self, offset: int, data: Buffer, length: int, is_append: bool) -> int:
        slab = await self._good_slab()
        if is_append and slab.fd >= 0 and not self.is_passing:
            async with self._appending:
                slab = await self._good_slab()
                if slab.fd >= 0 and not self.is_passing:
                    return await self._write_by_descriptor(slab, offset, data, length, is_append)
        if slab.fd < 0 or self.is_passing:
            return await self._write_remote(offset, data, length, is_append)
        return await self._write_by_descriptor(slab, offset, data, length, is_append)

    async def _write_by_descriptor(
        self, slab: Slab, offset: int, data: Buffer, length: int, is_append: bool
    ) -> int:
        if is_append:
            offset = os.fstat(slab.fd).st_size
        if not self._may_write(offset, offset + length):
            length = await self._reserve(offset, length)
            data = memoryview(data)[:length]
            slab = await self._good_slab()
            if self.is_passing:
                return await self._write_remote(offset, data, length, is_append)
        if length <= INLINE_WRITE_BYTES or not slab.is_durable:
            return self._write_now(slab.fd, offset, data, is_append)
        slab.reader_count += 1  # The descriptor stays open, whatever happens to the slab.
        try:
            done = self._note_append(slab.fd, data) if is_append else 0
            rest = memoryview(data).cast("B")[done:]
            count = done + await trio.to_thread.run_sync(_write_all, slab.fd, rest, offset, is_append)
            offset -= done
        except OSError as exc:
            raise _named(exc) from None
        finally:
            slab.reader_done()
        self._changed(offset, os.fstat(slab.fd).st_size if is_append and slab.fd >= 0 else offset + count)
        return count

    async def _reserve(self, offset: int, length: int) -> int:
        """How many bytes may be written at `offset`, at least one. NoSpaceError."""
        end = offset + length
        if end > MAX_FILE_BYTES:
            raise FsError(errno.EFBIG)
        try:
            reserved = await self._ask(lambda lock_id: worker_ops.Reserve(lock_id, end, offset))
        except NoSpaceError:
            if self._core.slabs.drop_idle(self.worker_id):
                await self._core.slabs.send_detaches()
                return await self._reserve(offset, length)
            if self._granted_end > offset:
                return min(length, self._granted_end - offset)
            raise
        if reserved.granted_start:
            self._islands = [
                *self._islands[1 - MAX_ISLANDS :],
                (reserved.granted_start, reserved.granted_end),
            ]
        else:
            self._granted_end = max(self._granted_end, reserved.granted_end)
        return length

    def _may_write(self, start: int, end: int) -> bool:
        return end <= self._granted_end or any(one[0] <= start and end <= one[1] for one in self._islands)

    async def _write_remote(self, offset: int, data: Buffer, length: int, is_append: bool) -> int:
        view = memoryview(data).cast("B") if length else memoryview(b"")
        done = 0
        while done < length:
            chunk = view[done : done + MAX_IO_BYTES]
            try:
                if is_append:
                    at = await self._append_remote(chunk)
                else:
                    at = offset + done
                    await self._write_at(at, chunk)
            except NoSpaceError:
                if done:
                    return done
                raise
            done += len(chunk)
            self._changed(at, at + len(chunk))
        return done

    async def _append_remote(self, chunk: Buffer) -> int:
        """Once, and where; one at a time. ConnectionLost: it can't be known whether it was done."""
        async with self._appending:
            self._append_number += 1
            number, lost = self._append_number, None
            intents = self._core.session.intents
            if intents is not None:
                former = intents.former(REMOTE_APPEND)
                if former is not None and former[0] != self.container:
                    raise ConnectionLost("an append may have been done or not: its home has sealed the file")
                if former is not None:
                    number, lost = former[1], ConnectionLost("the process that sent it has ended")
                intents.note(REMOTE_APPEND, self.container, number)
            for _ in range(MAX_ATTEMPTS):
                try:
                    slab = await self._good_slab()
                    request = worker_ops.Write(slab.lock_id, 0, True, number, is_repeat=lost is not None)
                    try:
                        return await slab.connection.call(request, chunk)
                    except ConnectionLost as exc:
                        lost = exc
                        slab.drop()
                except StaleError as exc:
                    if lost is None:
                        raise
                    raise ConnectionLost(f"an append may have been done or not: {exc.message}") from None
            assert lost is not None
            raise lost

    async def _write_at(self, offset: int, chunk: Buffer) -> None:
        """Again when the connection broke."""
        lost: ConnectionLost | None = None
        for _ in range(MAX_ATTEMPTS):
            slab = await self._good_slab()
            try:
                await slab.connection.call(worker_ops.Write(slab.lock_id, offset), chunk)
                return
            except ConnectionLost as exc:
                lost = exc
                slab.drop()
        assert lost is not None
        raise lost

    def _changed(self, start: int, end: int) -> None:
        """[start, end) was written just now."""
        if self.slab is None or self.slab.fd < 0:
            self._written_ns = time.time_ns()  # Until the home says better: `look`.
        self.is_uncommitted = True
        if end > self._size:
            self._size = end
        if end > start:
            self._mark(start // PAGE_BYTES, (end - 1) // PAGE_BYTES)

    def _mark(self, first: int, last: int) -> None:
        dirty = self._dirty
        if dirty is None:
            return
        if last >= MAX_DIRTY_PAGES:
            self._dirty = None
            return
        if last >> 3 >= len(dirty):
            dirty.extend(bytes((last >> 3) + 1 - len(dirty)))
        for page in range(first, last + 1):
            dirty[page >> 3] |= 1 << (page & 7)

    async def truncate(self, size: int) -> None:
        """While begun and under the Content's lock."""
        before = self.size
        await self._ask(lambda lock_id: worker_ops.Truncate(lock_id, size))
        self._size = size
        self._changed(size, size)
        if size:
            self._mark(min(before, size - 1) // PAGE_BYTES, (size - 1) // PAGE_BYTES)

    async def sync(self) -> bool:
        """What was written is on a durable tier; False when there is none."""
        if self.slab is None:
            return True
        return await self._ask(worker_ops.SyncContainer)


def _found_at(fd: int, start: int, size: int, data: memoryview) -> int:
    """How many bytes of `data` were appended where the file ended at `start`; its end is `size` now."""
    length = min(len(data), size - start)
    if os.pread(fd, length, start) == data[:length]:
        return length
    # Somebody else's came first.
    return len(data) if data.tobytes() in os.pread(fd, min(size - start, MAX_SEARCH_BYTES), start) else 0


def _write_all(fd: int, data: Buffer, offset: int, is_append: bool) -> int:
    """How much was written; OSError when nothing was."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        try:
            rest = view[done:]
            done += (
                os.pwritev(fd, [rest], offset, os.RWF_APPEND)
                if is_append
                else os.pwrite(fd, rest, offset + done)
            )
        except OSError:
            if done:
                return done
            raise
    return done


def _named(exc: OSError) -> AlluxioFuseError:
    if exc.errno == errno.ENOSPC:
        return NoSpaceError("the worker's disk is full")
    return FsError(exc.errno or errno.EIO, f"writing the slab failed: {exc.strerror}")
