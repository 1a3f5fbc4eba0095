"""One slab and its locks, as plain values; `slabs.Slabs` is the only one that changes them.

Sets of pages are ints used as bitmaps (bit i is page i): presence of a 1 GiB file is 128 bytes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, NamedTuple

from alluxiofuse.ids import DEFAULT_BLOCK_BYTES, PAGE_BYTES, page_count, page_length
from alluxiofuse.wire.types import BlockReport, UfsSource
from alluxiofuse.wire.worker_ops import Presence

if TYPE_CHECKING:
    import trio

    from alluxiofuse.worker.fetcher import Job
    from alluxiofuse.worker.readahead import ReadAhead
    from alluxiofuse.worker.tiers import Directory
    from alluxiofuse.worker.uploads import Upload

CLEAN: Final = 0
"""Every present page can be had from the under storage again: may be evicted."""
DIRTY: Final = 1
"""Sealed, and in no under storage yet: never dropped, except by a Free that says so."""
WRITING: Final = 2
"""Open for writing: the file is the truth about size and bytes, all pages count as present."""

BLOCK_PAGES = DEFAULT_BLOCK_BYTES // PAGE_BYTES
MAX_SLAB_BYTES = (16 << 40) - PAGE_BYTES
"""Largest slab (ext4's largest file is 16 TiB - 4 KiB); larger files are read through."""
MAX_LISTED_PAGES = 1 << 27
"""Most pages a Presence can list."""

FREE_NO, FREE_CLEAN, FREE_ALL = 0, 1, 2

_FULL_BLOCK = (1 << BLOCK_PAGES) - 1


def round_up(size: int) -> int:
    """To whole filesystem blocks of 4 KiB."""
    return (size + 4095) & ~4095


def span(first: int, count: int) -> int:
    """Mask of `count` pages from `first` on."""
    return ((1 << count) - 1) << first


class Base(NamedTuple):
    """What a slab was before it was opened for writing."""

    container: int
    state: int
    is_kept: bool
    is_synced: bool
    source: UfsSource | None
    mtime_ns: int
    writes: int
    """Writers that it had had."""


class Slab:
    """What is known of one container's slab."""

    __slots__ = (
        "base",
        "charged",
        "checksum",
        "container",
        "damaged",
        "directory",
        "dirty_pages",
        "evictable",
        "free_mode",
        "granted_end",
        "inflight",
        "is_gone",
        "is_kept",
        "is_moving",
        "is_synced",
        "is_touched",
        "is_unnamed",
        "islands",
        "jobs",
        "locks",
        "must_empty",
        "passes",
        "pins",
        "present",
        "reserved",
        "sealed_mtime_ns",
        "sends",
        "sent",
        "size",
        "source",
        "state",
        "synced_as",
        "upload",
        "verified",
        "writers",
        "writes",
        "zeros",
    )

    def __init__(self, container: int, size: int, directory: Directory, state: int = CLEAN) -> None:
        self.container = container
        self.size = size
        """Of the content; while WRITING as it was when the writing began (the file knows better)."""
        self.directory = directory
        self.state = state
        self.present = 0
        """Pages in the slab."""
        self.zeros = 0
        """Present pages that are full pages of zeros: holes that cost nothing."""
        self.verified = 0
        """Present pages whose checksum was compared (or computed) in this process."""
        self.damaged = 0
        """Pages, of what is not clean, that were found to be other bytes than were stored."""
        self.checksum = 0
        """Of the only page, for a container of at most one page; others are in the index."""
        self.locks = 0
        """Lock objects that name this slab, and `pins`: short locks by work in progress."""
        self.pins = 0
        self.sends = 0
        """Parts of the file that are on their way to readers, and an event when that gets 0."""
        self.sent: trio.Event | None = None
        self.reserved = 0
        """Bytes charged beyond the present pages: fetches under way; while WRITING, everything."""
        self.charged = 0
        """What the directory's `used` holds for this slab."""
        self.evictable = 0
        """What the directory's `evictable` holds for this slab."""
        self.source: UfsSource | None = None
        self.inflight = 0
        """Pages that `jobs` are fetching or verifying."""
        self.jobs: list[Job] | None = None
        self.upload: Upload | None = None
        self.is_moving = False
        self.is_unnamed = False
        """Its file may have got its name since its folder was last synced."""
        self.is_synced = False
        """Sealed, and its bytes, name and record are known to be on the disk. False where it is not known."""
        self.synced_as: tuple[int, int] | None = None
        """While WRITING: size and ctime of its file when all of it was on the disk at last; None: it is
        not known, or its directory does not tell each write."""
        self.is_kept = True
        """Bytes of it were durable once, here or in the under storage, and may not be lost when the
        power fails: they are synced before a seal says what they are, and the index before they
        change. True also where it is not known, after a restart."""
        self.is_gone = False
        """Dropped: no longer in the table."""
        self.free_mode = FREE_NO
        """What to do when the last lock goes."""
        self.writers = 0
        """Locks that are writing."""
        self.writes = 0
        """Times a writer began: a seal that was prepared before it is void."""
        self.granted_end = 0
        """While WRITING: writers may write below this offset."""
        self.islands = 0
        """While WRITING: pages beyond the granted end that writers may write to; what lies between
        are holes, which cost nothing."""
        self.dirty_pages = 0
        """While WRITING: pages that ended writers changed; -1: any."""
        self.passes = False
        """While WRITING: kernels were allowed to write to it by themselves. It is sealed when nobody has
        it open for writing any more."""
        self.is_touched = False
        """While WRITING: it was changed, which its mtime does not say any more."""
        self.sealed_mtime_ns: int | None = None
        """While its pages of zeros are made holes before a seal: when it was written last, which its file
        does not say then (0: not since writing began)."""
        self.must_empty = ""
        """While WRITING: the file's name while what is in it is of an earlier container, to be cut off."""
        self.base: Base | None = None
        """While WRITING: the container that it was made from, whose content it is while unchanged."""

    @property
    def page_count(self) -> int:
        return page_count(self.size)

    @property
    def all_pages(self) -> int:
        return (1 << page_count(self.size)) - 1

    @property
    def is_idle(self) -> bool:
        return not self.locks and not self.pins

    @property
    def must_sync(self) -> bool:
        """Before it is sealed, unless it `is_synced_as`."""
        return self.is_kept and self.directory.is_durable

    def is_synced_as(self, found: os.stat_result) -> bool:
        """Its file, as it is, was not written to since it was on the disk as a whole."""
        return self.synced_as == (found.st_size, found.st_ctime_ns)

    @property
    def block_count(self) -> int:
        return -(-self.page_count // BLOCK_PAGES)

    def block_pages(self, block: int) -> int:
        """Mask of the pages of a block (as many as the content has)."""
        return span(block * BLOCK_PAGES, BLOCK_PAGES) & self.all_pages

    def cost_of(self, pages: int) -> int:
        """Bytes on disk of a mask of pages."""
        pages &= ~self.zeros
        cost = pages.bit_count() * PAGE_BYTES
        last = self.page_count - 1
        if last >= 0 and pages >> last & 1:
            cost -= PAGE_BYTES - round_up(page_length(last, self.size))
        return cost

    def presence(self) -> Presence:
        """What a client may read by descriptor: verified pages, all of them while WRITING."""
        if self.state == WRITING or self.verified == self.all_pages:
            return Presence(True, b"")
        return Presence(False, self.verified.to_bytes((self.page_count + 7) // 8, "little"))

    def report(self) -> BlockReport:
        """For the master; a slab that holds anything unpersisted names at least its first block."""
        if self.state != CLEAN:
            return BlockReport(self.container, _ones(max(1, self.block_count)), True)
        if self.present == self.all_pages:
            return BlockReport(self.container, _ones(self.block_count), False)
        return BlockReport(self.container, self._complete_blocks(), False)

    def _complete_blocks(self) -> bytes:
        full = b"\xff" * (BLOCK_PAGES // 8)
        raw = self.present.to_bytes(self.block_count * len(full), "little")
        blocks = 0
        for block in range(self.block_count - 1):
            if raw[block * len(full) : (block + 1) * len(full)] == full:
                blocks |= 1 << block
        last = self.block_count - 1
        if last >= 0 and not self.block_pages(last) & ~self.present:
            blocks |= 1 << last
        return blocks.to_bytes((blocks.bit_length() + 7) // 8, "little")


def _ones(count: int) -> bytes:
    return ((1 << count) - 1).to_bytes((count + 7) // 8, "little")


class Lock:
    """A session's hold on a slab, by Attach or BeginWrite. It follows the slab when that gets
    another container id."""

    __slots__ = (
        "ahead",
        "append",
        "busy_count",
        "ended",
        "has_reverted",
        "has_sealed",
        "id",
        "idle",
        "is_writer",
        "orphaned",
        "passes",
        "peer",
        "session_id",
        "slab",
    )

    def __init__(self, id_: int, slab: Slab, session_id: int, is_writer: bool, ahead: ReadAhead) -> None:
        self.id = id_
        self.slab = slab
        self.session_id = session_id
        """0: unknown, of a life before this process's."""
        self.is_writer = is_writer
        self.ahead = ahead
        self.peer = 0
        """Key of the connection in `leases.Leases`; 0: none."""
        self.passes = False
        """Its session's kernel was allowed to write by itself: nobody knows which pages it changed."""
        self.append = (0, 0)
        """Number of the newest append through the worker, and where it went."""
        self.busy_count = 0
        """Writes under way in threads."""
        self.idle: trio.Event | None = None
        """Set when there are none any more, for who waits."""
        self.orphaned = 0
        """A writer whose connection ended: number of that event (its grace period); 0: not."""
        self.ended = 0
        """Container of which it was a writer until its EndWrite; 0: none, or it is one."""
        self.has_sealed = False
        """Its EndWrite sealed the slab; until it detaches the master may not know of it."""
        self.has_reverted = False
        """Its EndWrite found nothing changed, and the container of which it was a writer is no more."""
