"""Reading: by the local worker's descriptors, from another worker, or straight from the under
storage; whatever of these works, within the client's patience."""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar, overload

import msgspec
import trio
import xxhash

from alluxiofuse.client.content import Content
from alluxiofuse.client.slabs import Slab
from alluxiofuse.client.writing import SealedMeanwhile
from alluxiofuse.errors import (
    AlluxioFuseError,
    ChecksumError,
    ConnectionLost,
    FsError,
    NoSpaceError,
    SessionExpiredError,
    StaleError,
    UfsChangedError,
    UfsNotFoundError,
    UnavailableError,
)
from alluxiofuse.rpc import interrupt
from alluxiofuse.rpc.base import Buffer, Connection
from alluxiofuse.wire import worker_ops
from alluxiofuse.wire.types import Layout
from alluxiofuse.wire.worker_ops import MAX_IO_BYTES

if TYPE_CHECKING:
    from alluxiofuse.client.open_file import OpenFile

log = logging.getLogger(__name__)
T = TypeVar("T")
TELL_BYTES = 4 << 20
"""How often a worker hears of a reader that finds all pages there."""

LOAD_BYTES = 32 << 20
_RETRY_S = 0.1
_MAX_STALE = 5
"""Times that an answer may be out of date before it is an error."""


class InSlab(NamedTuple):
    """Bytes that are in a file, most likely in memory. `fd` is good until the next await."""

    fd: int
    offset: int
    length: int

    def __len__(self) -> int:
        return self.length


@overload
async def read(file: OpenFile, content: Content, offset: int, size: int) -> Buffer: ...


@overload
async def read(
    file: OpenFile, content: Content, offset: int, size: int, *, in_place: bool
) -> Buffer | InSlab: ...


async def read(
    file: OpenFile, content: Content, offset: int, size: int, *, in_place: bool = False
) -> Buffer | InSlab:
    """Bytes [offset, offset + size) of the file; fewer only at its end. With `in_place` they may be left
    where they are.

    StaleError: the object in the under storage was replaced after `file` had read from it.
    """
    if size <= 0:
        return b""
    if content.writing is not None:
        return await _read_own(file, content, offset, size)
    if content.is_stale:
        try:
            await content.refresh(is_patient=False)
        except (ConnectionLost, SessionExpiredError):
            if not content.layout.container or content.layout.home:
                await content.refresh()
            # Else the master is away: what was opened stays readable, as it was then.
    layout, slab = content.layout, content.slab
    if content.replaced and file.read_container in content.replaced:
        raise StaleError("the file was replaced in the under storage while it was read")
    if (
        not layout.home
        and slab is not None
        and slab.container == layout.container
        and slab.is_readable
        and (length := min(size, layout.size - offset)) > 0
        and slab.has(offset, length)
    ):
        file.read_container = layout.container
        if not slab.is_complete and offset >= slab.tell_at and slab.is_good:
            await _tell(slab, offset, length)
        if slab.is_readable:  # Still: the telling may have taken time.
            if in_place and slab.is_hot(offset, length):
                return InSlab(slab.fd, offset, length)
            try:
                data = await slab.read(offset, length)
            except OSError:
                data = b""  # Below it is tried again, and elsewhere.
            if len(data) == length:
                return data
    return await _Attempts(file, content, in_place=in_place).read(offset, size)


async def _tell(slab: Slab, offset: int, length: int) -> None:
    """Let the worker know how far a reader has come though it misses nothing, so that reading ahead
    goes on at an even pace. Answered at once, as the pages are there."""
    slab.tell_at = offset + TELL_BYTES
    try:
        slab.learn(await slab.connection.call(worker_ops.Fetch(slab.lock_id, offset, length)))
    except AlluxioFuseError:
        pass  # The next page that is missing says why.


async def _read_own(file: OpenFile, content: Content, offset: int, size: int) -> Buffer:
    """What this client itself is writing."""
    writing = content.writing
    assert writing is not None
    if writing.is_over:
        await content.seal()
        return await read(file, content, offset, size)
    if writing.slab is None:
        if writing.is_empty and not writing.is_shared:
            return b""
        await content.begun(0)
        return await read(file, content, offset, size)
    slab = writing.slab
    try:
        data = await writing.read(offset, size)
    except SealedMeanwhile:
        return await read(file, content, offset, size)
    except StaleError:
        if not writing.has_left(slab):
            raise
        async with content.lock:
            pass  # Until it is known where the bytes are now.
        return await read(file, content, offset, size)
    if 0 < len(data) < size and len(data) == MAX_IO_BYTES:  # Most that a remote worker gives at once.
        rest = await read(file, content, offset + len(data), size - len(data))
        return b"".join((data, rest))
    return data


class _NoHolder(UnavailableError):
    def __init__(self) -> None:
        super().__init__("no worker that has the file's content is running")


class _Attempts:
    """One read that needs more than a pread."""

    def __init__(self, file: OpenFile, content: Content, *, in_place: bool = False) -> None:
        self._file = file
        self._in_place = in_place
        self._content = content
        self._core = content.core
        self._deadline = trio.current_time() + content.core.config.patience_s
        self._excluded: set[int] = set()
        """Workers that failed in this round."""
        self._stale_count = 0
        self._stale_container = 0
        """Which the count is of."""
        self._error: AlluxioFuseError | None = None
        """Why a worker that answers could not give it."""

    async def read(self, offset: int, size: int) -> Buffer | InSlab:
        return await self._until_it_works(self._read_from, offset, size)

    async def load(self, offset: int, length: int) -> None:
        await self._until_it_works(self._load_at, offset, length)

    async def _until_it_works(
        self, attempt: Callable[[int, Layout, int, int], Awaitable[T]], offset: int, length: int
    ) -> T:
        """Ends: every error either excludes a worker, counts, or waits below the deadline."""
        while True:
            layout = self._content.layout
            worker_id = self._core.workers.pick(layout, self._excluded)
            try:
                return await attempt(worker_id, layout, offset, length)
            except (UfsChangedError, UfsNotFoundError):
                await self._source_changed(layout)
            except StaleError as exc:
                if layout.source is None and not layout.home and worker_id not in layout.workers:
                    # Only a guess: those that have it are not known to the master (yet again).
                    await self._failed(worker_id, _NoHolder())
                else:
                    await self._stale(layout, exc)
            except (ConnectionLost, UnavailableError) as exc:
                await self._failed(worker_id, exc)
            except (ChecksumError, FsError) as exc:
                await self._broken(worker_id, exc)
            except OSError as exc:  # of reading by descriptor
                await self._broken(worker_id, FsError(exc.errno or errno.EIO))

    async def _source_changed(self, layout: Layout) -> None:
        is_other = await self._content.source_changed(layout)
        if is_other and self._file.read_container == layout.container:
            raise StaleError("the file was replaced in the under storage while it was read")
        error = StaleError("the file keeps being replaced in the under storage")
        self._content.discard_slab()  # The worker goes by the source with which it was attached.
        if is_other:
            self._count_stale(error)
        elif trio.current_time() + _RETRY_S > self._deadline:
            raise error
        else:
            await interrupt.pause(_RETRY_S)

    async def _stale(self, layout: Layout, exc: StaleError) -> None:
        error: AlluxioFuseError = exc
        if layout.container != self._stale_container and trio.current_time() < self._deadline:
            # Another one each time: clients that write it take turns.
            self._stale_container, self._stale_count = layout.container, 0
        if layout.source is None and not layout.home:
            # Nobody else can have it: a worker that came back without its slabs.
            error = UnavailableError(f"the only copy of the content is gone: {exc.message}")
        self._count_stale(error)
        self._content.discard_slab()
        await self._content.refresh()

    def _count_stale(self, exc: AlluxioFuseError) -> None:
        self._stale_count += 1
        if self._stale_count > _MAX_STALE:
            raise exc

    async def _failed(self, worker_id: int, exc: AlluxioFuseError) -> None:
        """Others next; when there are none, all again with what the master knows by then."""
        log.debug("reading inode %d from worker %d: %s", self._content.ino, worker_id, exc)
        self._content.discard_slab()
        if worker_id and not isinstance(exc, _NoHolder):
            self._core.workers.failed(worker_id)
        if worker_id and worker_id not in self._excluded:
            self._excluded.add(worker_id)
            return
        if self._error is not None:
            raise self._error
        if trio.current_time() + _RETRY_S > self._deadline:
            raise exc
        await interrupt.pause(_RETRY_S)
        self._excluded.clear()
        await self._core.workers.refresh()
        await self._content.refresh()

    async def _broken(self, worker_id: int, exc: AlluxioFuseError) -> None:
        """The worker answers, but its bytes are damaged or can't be read: others, or this error. There is
        nothing to wait for."""
        log.debug("reading inode %d from worker %d: %s", self._content.ino, worker_id, exc)
        self._content.discard_slab()
        if not worker_id or worker_id in self._excluded:
            raise exc
        self._excluded.add(worker_id)
        self._error = exc

    # --- one attempt --------------------------------------------------------------------------------

    async def _read_from(self, worker_id: int, layout: Layout, offset: int, size: int) -> Buffer | InSlab:
        if self._content.writing is not None:  # This client has begun to write it meanwhile.
            return await _read_own(self._file, self._content, offset, size)
        if layout.home:
            return await self._read_home(worker_id, layout, offset, size)
        length = min(size, layout.size - offset)
        if length <= 0:
            return b""
        if not layout.container:
            return bytes(length)
        data = await self._read_sealed(worker_id, layout, offset, length)
        if len(data) != length:
            raise StaleError(f"only {len(data)} of {length} bytes were there")
        self._file.read_container = layout.container
        return data

    async def _read_sealed(self, worker_id: int, layout: Layout, offset: int, length: int) -> Buffer | InSlab:
        if not worker_id:
            if layout.source is None:
                raise _NoHolder()
            return await self._core.direct.read(layout.source, offset, length)
        connection = await self._core.workers.connection(worker_id)
        if connection.can_pass_fds:
            slab = await self._content.attached(layout, worker_id, connection)
            if slab is not None and slab.fd >= 0 and await self._fetched(slab, offset, length):
                if self._in_place and slab.is_good and slab.is_hot(offset, length):
                    return InSlab(slab.fd, offset, length)
                data = await slab.read(offset, length)
                if not slab.is_good:
                    raise ConnectionLost("the worker's lock ended")
                return data
        return await self._read_remote(connection, layout, offset, length)

    async def _load_at(self, worker_id: int, layout: Layout, offset: int, length: int) -> None:
        """Through a lock, with or without a descriptor."""
        if layout.home or layout.source is None or not layout.container or self._content.writing is not None:
            return
        if not worker_id:
            raise UnavailableError("no worker is running: there is no cache to load into")
        connection = await self._core.workers.connection(worker_id)
        slab = await self._content.attached(layout, worker_id, connection)
        if slab is None:
            raise NoSpaceError("no tier of the worker has room for the file")
        if not slab.has(offset, length):
            slab.learn(await slab.connection.call(worker_ops.Fetch(slab.lock_id, offset, length)))

    async def _fetched(self, slab: Slab, offset: int, length: int) -> bool:
        """The pages are there now; False: there is no room for them."""
        if slab.has(offset, length):
            return True
        try:
            slab.learn(await slab.connection.call(worker_ops.Fetch(slab.lock_id, offset, length)))
        except NoSpaceError:
            return False
        return slab.has(offset, length)

    async def _read_remote(self, connection: Connection, layout: Layout, offset: int, length: int) -> Buffer:
        parts: list[Buffer] = []
        done = 0
        while done < length:
            wanted = min(MAX_IO_BYTES, length - done)
            data = await self._read_chunk(connection, layout, offset + done, wanted)
            parts.append(data)
            done += len(data)
            if len(data) < wanted:
                break
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _read_chunk(self, connection: Connection, layout: Layout, offset: int, length: int) -> Buffer:
        source = None if layout.home else layout.source
        request = worker_ops.Read(
            self._core.session.id, layout.container, layout.size, source, offset, length
        )
        answer = await connection.exchange(request)
        answer.close_fds()
        data = answer.payload
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise FsError(errno.EIO, "a worker answered Read without bytes")
        checksum = answer.result.checksum
        if checksum and xxhash.xxh3_64_intdigest(data) & (1 << 63) - 1 != checksum & (1 << 63) - 1:
            raise ChecksumError("the bytes that arrived are not those that the worker sent")
        return data

    # --- written elsewhere --------------------------------------------------------------------------

    async def _read_home(self, worker_id: int, layout: Layout, offset: int, size: int) -> Buffer:
        """Another client writes it: the home has the newest bytes and knows the size."""
        if not worker_id:
            raise UnavailableError("the worker at which the file is being written is not running")
        connection = await self._core.workers.connection(worker_id)
        try:
            stat = await connection.call(worker_ops.StatContainer(layout.container))
        except StaleError:
            return await self._read_base(worker_id, layout, offset, size)
        length = min(size, stat.size - offset)
        if length <= 0:
            return b""
        live = msgspec.structs.replace(layout, size=stat.size, source=None)
        if connection.can_pass_fds:
            slab = await self._content.attached(live, worker_id, connection)
            if slab is not None and slab.fd >= 0:
                data = await slab.read(offset, length)
                if not slab.is_good:
                    raise ConnectionLost("the worker's lock ended")
                return data
        return await self._read_remote(connection, live, offset, length)

    async def _read_base(self, worker_id: int, layout: Layout, offset: int, size: int) -> Buffer:
        """The writer has not begun at the worker yet (or it was sealed a moment ago: look again)."""
        await self._content.refresh()
        if self._content.layout.container != layout.container or not self._content.layout.home:
            raise StaleError("the content was replaced meanwhile")
        length = min(size, layout.base_size - offset)
        if not layout.base_container or length <= 0:
            return b""
        base = msgspec.structs.replace(
            layout, container=layout.base_container, size=layout.base_size, home=0, base_container=0
        )
        connection = await self._core.workers.connection(worker_id)
        return await self._read_remote(connection, base, offset, length)


async def load(file: OpenFile, content: Content, progress: Callable[[int], None] | None) -> None:
    """Make all of the content present at a worker. Nothing to do for what is being written, or is
    only there. NoSpaceError when it does not fit, UnavailableError when no worker is running."""
    if content.is_stale:
        await content.refresh()
    attempts = _Attempts(file, content)
    offset = 0
    while content.writing is None and offset < content.layout.size:
        length = min(LOAD_BYTES, content.layout.size - offset)
        await attempts.load(offset, length)
        offset += length
        if progress is not None:
            progress(length)
