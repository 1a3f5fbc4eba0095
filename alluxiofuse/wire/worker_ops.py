"""Operations that a worker answers.

A container has at most one slab per worker. A client *attaches* to a container (`Attach`), which
locks the slab (never punched, moved or unlinked) until it detaches; locks end with the connection
that took them. Over a Unix socket, or in one process, an attach also gives the slab's descriptor.

Reading through a descriptor: only pages that the worker said are present (`Presence`) may be read.
Writing through a descriptor: only below the granted end (`Reserve`), only between `BeginWrite` and
`EndWrite`. A worker knows no inodes and no names.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from alluxiofuse.wire.messages import U63, Id, Message, Nothing, Ns, Request, Size, Text
from alluxiofuse.wire.types import Tier, UfsSource

MAX_IO_BYTES = 8 << 20
"""Most bytes of one Read or Write."""


class Presence(Message):
    """Which pages of a container are in its slab, checked, and may be read by descriptor."""

    is_complete: bool
    """All pages of [0, size) are there."""
    pages: Annotated[bytes, Meta(max_length=1 << 24)]
    """Bitmap (bit i of byte i // 8 is page i); b"" when is_complete."""


class Attach(Request["Attached"]):
    """Lock a container's slab for the session; creates an empty slab when there is none and there
    is room. The answer carries the slab's descriptor (read only, or read-write between BeginWrite
    and EndWrite) where `want_fd` and the transport can pass one."""

    OP: ClassVar[str] = "worker.attach"
    session_id: Id
    container: Id
    size: Size
    source: UfsSource | None
    want_fd: bool


class Attached(Message):
    lock_id: Id
    """0: nothing could be attached (no room in any tier): use `Read`, which then goes through to
    the under storage without caching."""
    presence: Presence
    has_fd: bool
    is_durable: bool
    """The tier survives power loss (SSD, HDD; not MEM)."""
    passes: bool = False
    """The kernel may read by the descriptor: the worker finds out who has the slab open, also by mappings
    that outlive all locks, before it takes pages away."""


class Detach(Request[Nothing]):
    OP: ClassVar[str] = "worker.detach"
    lock_ids: Annotated[list[int], Meta(max_length=65536)]
    is_uncommitted: bool = False
    """The client could not tell the master what these locks' EndWrites had sealed: the worker does."""


class Fetch(Request[Presence]):
    """Make the pages that [offset, offset + length) touches present (from the under storage, single
    flight, with read-ahead when the accesses of this lock look sequential) and answer what is
    present then. NoSpaceError: no room to cache them (use `Read`). UfsChangedError: the object is
    another version now."""

    OP: ClassVar[str] = "worker.fetch"
    lock_id: Id
    offset: Size
    length: U63


class Read(Request["ReadResult"]):
    """Bytes of a container as the answer's payload, read through from `source` when not present
    (and cached where there is room). Short only at the end of the content."""

    OP: ClassVar[str] = "worker.read"
    session_id: Id
    container: Id
    size: Size
    source: UfsSource | None
    offset: Size
    length: Annotated[int, Meta(ge=0, le=MAX_IO_BYTES)]


class ReadResult(Message):
    checksum: U63
    """Low 63 bits of the payload's xxh3-64 when the worker read it into memory, 0 when it was sent by
    sendfile."""


class BeginWrite(Request["WriteGrant"]):
    """Make container `container` writable at this worker, its home (see master_ops.BeginWrite).

    `old_container` != 0 and its slab is here: its missing pages below `old_size` are fetched from
    `source` first, then the slab becomes `container`'s (open readers keep seeing the same slab, as
    POSIX wants). Not here: a new slab is filled from `source`. With old_container == 0 the slab
    starts empty. Idempotent; further sessions join (each ends its writing by EndWrite).
    NoSpaceError when there is no room."""

    OP: ClassVar[str] = "worker.begin_write"
    DEADLINE_S: ClassVar[float] = 3600.0
    session_id: Id
    container: Id
    old_container: Id
    old_size: Size
    source: UfsSource | None
    reserve_bytes: U63
    """Room wanted beyond the present size."""
    want_fd: bool
    passes: bool = False
    """The kernel shall write by the descriptor, unknown to anybody, until this lock's EndWrite: see
    docs/adr/0001-passthrough.md. `reserve_bytes` and the grant then mean nothing."""
    is_emptying: bool = False
    """`old_container` is not wanted any more. Where its slab is open (locked), that becomes `container`'s,
    emptied, so that its readers see it; else the slab starts empty, as with old_container == 0."""


class WriteGrant(Message):
    lock_id: Id
    size: Size
    granted_end: Size
    """The client may write below this offset; beyond it: `Reserve`."""
    has_fd: bool
    is_durable: bool
    passes: bool = False
    """The kernel may write by the descriptor. False: not asked for, or the tier can't take it."""


class Reserve(Request["Reserved"]):
    """Room to write up to `end` (evicting, and waiting for persists that make room). NoSpaceError."""

    OP: ClassVar[str] = "worker.reserve"
    lock_id: Id
    end: Size
    start: Size = 0
    """Where the write that needs it begins: what lies between the present end and `start` stays a
    hole and needs no room yet (sparse files are far larger than any tier)."""


class Reserved(Message):
    granted_end: Size
    """>= the end that was asked for; may be generous."""
    granted_start: Size = 0
    """0: everything below `granted_end` may be written; else, besides what was granted before, what
    lies between the two (a write far behind what was granted before, into a sparse file)."""


class Write(Request[Size]):
    """The payload to `offset` of a container being written, or to its end with `append`; answers
    the offset at which it was written."""

    OP: ClassVar[str] = "worker.write"
    lock_id: Id
    offset: Size
    append: bool = False
    number: U63 = 0
    """Of an append: grows by one, from 2. 0: none."""
    is_repeat: bool = False
    """An append with this number was sent before, and its answer was not heard: it is done if it was not.
    StaleError: that can't be told."""


class Truncate(Request[Nothing]):
    """ftruncate of a container being written."""

    OP: ClassVar[str] = "worker.truncate"
    lock_id: Id
    size: Size


class EndWrite(Request["WriteEnd"]):
    """The session's writes (through descriptors too) are done. When it was the last writer, the
    container is sealed: pages in `dirty_pages` (None: all) get their checksums, unused reservation
    is returned, and the container counts as dirty until the master says that it is persisted. The
    lock stays (as a reader's) until Detach. Durable against a kill of the worker when answered."""

    OP: ClassVar[str] = "worker.end_write"
    DEADLINE_S: ClassVar[float] = 3600.0
    lock_id: Id
    dirty_pages: Annotated[bytes, Meta(max_length=1 << 24)] | None
    """Bitmap of pages this session changed."""
    may_revert: bool = False
    """Where nothing was changed since BeginWrite made this container from another one, that one is the
    content again."""


class WriteEnd(Message):
    size: Size
    mtime_ns: Ns
    """As of ContainerStat."""
    is_sealed: bool
    """False: others write to it still, or have it mapped for writing. The worker tells the master when it
    has sealed it after the last of these."""
    is_reverted: bool = False
    """The slab is `old_container`'s again, as if there had been no BeginWrite; not sealed then."""


class StatContainer(Request["ContainerStat"]):
    """Live size and times of a container that is open for writing here. StaleError: not here."""

    OP: ClassVar[str] = "worker.stat_container"
    container: Id


class ContainerStat(Message):
    size: Size
    mtime_ns: Ns
    """Of the last write, by this machine's clock; 0: none since writing began, or since ForgetMtime.
    It is the mtime of the slab's file, which those who have its descriptor may ask themselves."""
    allocated_bytes: U63


class ForgetMtime(Request[Ns]):
    """utimens(2) of a file that is open for writing here: the container counts as not written until
    the next write; answers the mtime so far. So the order of writes and explicit times is the order
    in which they came here, whatever the clocks say. Of one that was sealed meanwhile the mtime is that of
    its last write, too. StaleError: it is not here."""

    OP: ClassVar[str] = "worker.forget_mtime"
    container: Id


class SyncContainer(Request[bool]):
    """fdatasync of the slab. False: its tier is not durable, so this alone means nothing."""

    OP: ClassVar[str] = "worker.sync_container"
    DEADLINE_S: ClassVar[float] = 3600.0
    lock_id: Id


class WorkerReport(Request["WorkerState"]):
    OP: ClassVar[str] = "worker.report"


class WorkerState(Message):
    worker_id: Id
    version: Text
    tiers: list[Tier]
    counters: dict[str, int]
