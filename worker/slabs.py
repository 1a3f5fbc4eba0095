"""The table of slabs: the one place that changes slabs, their files, their index records and the
accounting of the directories. Synchronous; no method awaits, so each is one step to everybody else.

Invariants, besides those of `accounts` (`validation.validate` checks all):
* the index has a record for each slab that has present pages or is not CLEAN, and no others of
  configured directories.

Order of effects on disk: bytes, then index. A file without a record is removed at the next start.
File operations here are small (open, punch, unlink, rename); OSErrors go to the caller with nothing
changed unless said otherwise.
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable

from alluxiofuse.errors import StaleError
from alluxiofuse.ids import PAGE_BYTES, page_count, page_length
from alluxiofuse.wire.types import BlockReport, OrphanSeal
from alluxiofuse.worker import checksums
from alluxiofuse.worker.accounts import Accounts, joined, order_key, writing_charge
from alluxiofuse.worker.checksums import ZERO_PAGE, bits, is_zero, mask_runs
from alluxiofuse.worker.fds import Descriptors
from alluxiofuse.worker.index import Index, SlabRecord
from alluxiofuse.worker.layout import slab_path
from alluxiofuse.worker.readahead import ReadAhead
from alluxiofuse.worker.slab import (
    BLOCK_PAGES,
    CLEAN,
    DIRTY,
    FREE_ALL,
    FREE_NO,
    WRITING,
    Lock,
    Slab,
    round_up,
)
from alluxiofuse.worker.tiers import Directory, Tiers

NOT_WRITTEN = (0, 0)
"""Access and modification time of a slab's file when writing begins: a write sets the latter
(`worker_ops.ContainerStat`)."""
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Of a filesystem that has no hard links."""


class Slabs(Accounts):
    """All slabs of a worker."""

    def __init__(
        self,
        tiers: Tiers,
        index: Index,
        *,
        high_watermark: float = 0.95,
        wall_s: Callable[[], float] = time.time,
        max_open_slabs: int | None = None,
    ) -> None:
        super().__init__(tiers, high_watermark)
        self.index = index
        self.fds = Descriptors(max_open_slabs)
        self.by_container: dict[int, Slab] = {}
        self.locks: dict[int, Lock] = {}
        self.changed: dict[int, None] = {}
        """Containers whose report to the master is out of date, oldest change first."""
        self.writing: set[Slab] = set()
        """Those open for writing."""
        self.orphans: dict[int, OrphanSeal] = {}
        """Seals that no client asked for, to be told to the master."""
        self.counters: Counter[str] = Counter()
        self.old_names: dict[str, None] = {}
        """Paths of files that have another name or place in the index by now; they are removed once
        that is durable, so that a slab is found whatever of the index is lost with the power."""
        self._wall_s = wall_s
        self._lock_ids = itertools.count(1)

    # --- finding ----------------------------------------------------------------------------------

    def get(self, container: int) -> Slab | None:
        return self.by_container.get(container)

    def lock_of(self, lock_id: int) -> Lock:
        """StaleError when the lock ended."""
        found = self.locks.get(lock_id)
        if found is None:
            raise StaleError(f"lock {lock_id} has ended: attach again")
        return found

    def path(self, slab: Slab) -> str:
        return slab_path(slab.directory.root, slab.container)

    # --- locks ------------------------------------------------------------------------------------

    def lock(self, slab: Slab, session_id: int, *, is_writer: bool = False) -> Lock:
        lock = Lock(next(self._lock_ids), slab, session_id, is_writer, ReadAhead())
        self.locks[lock.id] = lock
        slab.locks += 1
        if is_writer:
            slab.writers += 1
            slab.writes += 1
        self.account(slab)
        return lock

    def unlock(self, lock: Lock) -> None:
        """End a lock that is not writing. Idempotent."""
        if self.locks.pop(lock.id, None) is not None:
            assert not lock.is_writer
            lock.slab.locks -= 1
            self._settle(lock.slab)

    def stop_writing(self, lock: Lock, dirty_pages: int) -> None:
        """The lock becomes a reader's; `dirty_pages` (-1: all) are what its session changed."""
        slab = lock.slab
        lock.is_writer = False
        lock.ended = slab.container
        lock.orphaned = 0
        slab.writers -= 1
        slab.dirty_pages |= dirty_pages

    def write_again(self, lock: Lock, dirty_pages: int) -> None:
        """Its seal failed, and nobody else writes: it is a writer's lock again, to be ended again."""
        slab = lock.slab
        if lock.id in self.locks and slab.container == lock.ended and slab.state == WRITING:
            lock.is_writer, lock.ended = True, 0
            slab.writers += 1
            slab.writes += 1
            slab.dirty_pages |= dirty_pages

    def pin(self, slab: Slab) -> None:
        """Like a lock, for work in progress."""
        slab.pins += 1
        self.account(slab)

    def unpin(self, slab: Slab) -> None:
        slab.pins -= 1
        self._settle(slab)

    def _settle(self, slab: Slab) -> None:
        """After a lock or pin went."""
        self.account(slab)
        if slab.is_gone or not slab.is_idle:
            return
        if slab.free_mode:
            self.free(slab, keep_dirty=slab.free_mode != FREE_ALL)
        elif slab.state == CLEAN and not slab.present:
            self.drop(slab)

    def free(self, slab: Slab, *, keep_dirty: bool) -> bool:
        """Drop it now, or when its last lock goes. False: it stays because it is dirty."""
        if keep_dirty and slab.state != CLEAN:
            return False
        if slab.is_idle:
            self.drop(slab)
        else:
            slab.free_mode = max(slab.free_mode, 1 if keep_dirty else FREE_ALL)
        return True

    def adopt(self, slab: Slab) -> None:
        """A slab that the index knows from an earlier life of the worker; the most recently used of
        those adopted so far."""
        self.by_container[slab.container] = slab
        slab.is_unnamed = True  # Perhaps.
        if slab.state == CLEAN and slab.present == 1 and not slab.zeros:
            # Most of a million; the same as below, in a fifth of the time.
            directory = slab.directory
            slab.charged = slab.evictable = min(PAGE_BYTES, round_up(slab.size))
            directory.used += slab.charged
            directory.evictable += slab.charged
            directory.order[order_key(slab, 0)] = None
            return
        if slab.state == CLEAN:
            self.enlist(slab, slab.present)
        elif slab.state == DIRTY:
            slab.directory.dirty[slab] = None
        self.account(slab)
        if slab.state == DIRTY:
            self.dirty_bytes += slab.charged
            self.report_orphan(slab)
        elif slab.state == WRITING:
            self.writing.add(slab)
            self.lock(slab, 0, is_writer=True).orphaned = -1

    # --- clean slabs ------------------------------------------------------------------------------

    def create(self, container: int, size: int, directory: Directory) -> Slab:
        """An empty clean slab of `size` bytes. Has no index record until a page is in it."""
        slab = Slab(container, size, directory)
        fd = self._new_file(self.path(slab))
        try:
            if size:
                os.ftruncate(fd, size)
        except OSError:
            os.close(fd)
            os.unlink(self.path(slab))
            raise
        self.fds.adopt(slab, fd)
        self.by_container[container] = slab
        return slab

    def add_pages(self, slab: Slab, first: int, sums: list[int], reserved_bytes: int) -> None:
        """Pages whose bytes were stored: present and verified. `reserved_bytes` were reserved for
        them. StateError: nothing has changed."""
        known = dict(enumerate(sums, first))
        mask = ((1 << len(sums)) - 1) << first
        batch = self.index.batch()
        if slab.page_count <= 1:
            record = self._record(slab)
            record.checksum, record.is_present = sums[0], True
            batch.put(slab.container, record)
        else:
            if not slab.present:
                batch.put(slab.container, self._record(slab))
            batch.put_pages(slab.container, known)
        self.index.commit(batch)
        for page, value in known.items():
            if is_zero(value, page_length(page, slab.size)):
                slab.zeros |= 1 << page
        slab.present |= mask
        slab.verified |= mask
        slab.is_synced = False
        slab.reserved -= reserved_bytes
        if slab.page_count <= 1:
            slab.checksum = sums[0]
        self.enlist(slab, mask)
        self.account(slab)
        for block in {page // BLOCK_PAGES for page in known}:
            if not slab.block_pages(block) & ~slab.present:
                self.changed[slab.container] = None
                break

    def drop_pages(self, slab: Slab, pages: int) -> None:
        """Punch present pages of a clean slab out. Nobody may be reading them; `verified` pages of a
        locked slab may be read at any time."""
        assert slab.state == CLEAN
        pages &= slab.present
        fd = self.fds.for_writing(slab)
        batch = self.index.batch()
        slab.present &= ~pages
        slab.verified &= ~pages
        slab.zeros &= ~pages
        if slab.present:
            batch.remove_pages(slab.container, pages)
        else:
            batch.delete(slab.container, slab.page_count)
        self.index.owe(batch)
        for first, count in mask_runs(pages):
            checksums.punch_hole(fd, first * PAGE_BYTES, count * PAGE_BYTES)
        for block in {page // BLOCK_PAGES for page in bits(pages)}:
            if not slab.block_pages(block) & slab.present:
                slab.directory.order.pop(order_key(slab, block), None)
        self.changed[slab.container] = None
        self.account(slab)

    def forget_clean(self, slab: Slab) -> None:
        """Its directory can't be read: those who have it open get it elsewhere."""
        for lock in [lock for lock in self.locks.values() if lock.slab is slab] if slab.locks else ():
            del self.locks[lock.id]
            slab.locks -= 1
        self.drop(slab, is_file_kept=True)

    def drop(self, slab: Slab, *, is_file_kept: bool = False) -> None:
        """Remove the slab with its file and record. Nobody uses it."""
        assert slab.is_idle
        had_record = bool(slab.present) or slab.state != CLEAN
        self.delist(slab)
        self.fds.forget(slab)
        self.writing.discard(slab)
        del self.by_container[slab.container]
        slab.is_gone = True
        self.count_dirty(slab, CLEAN)
        self.account(slab)
        self.orphans.pop(slab.container, None)
        if had_record:
            self.changed[slab.container] = None
            batch = self.index.batch()
            batch.delete(slab.container, slab.page_count)
            self.index.owe(batch)
        if not is_file_kept:
            self._unlink(self.path(slab))

    # --- verification -----------------------------------------------------------------------------

    def stored_checksums(self, slab: Slab, pages: Iterable[int]) -> dict[int, int]:
        """What the index says of present pages."""
        if slab.page_count <= 1:
            return dict.fromkeys(pages, slab.checksum)
        return self.index.checksums(slab.container, pages)

    def settle_verification(self, slab: Slab, found: dict[int, int], stored: dict[int, int]) -> list[int]:
        """Compare checksums of pages as read with those stored: good ones are verified, bad ones of
        a clean slab dropped. Answers the bad pages of a slab that is not clean."""
        bad = [page for page, value in found.items() if stored.get(page) != value]
        slab.verified |= checksums.mask_of(found.keys() - set(bad))
        if not bad:
            return []
        if slab.state != CLEAN:
            fresh = checksums.mask_of(bad) & ~slab.damaged
            slab.damaged |= fresh
            self.counters["damaged_dirty_pages"] += fresh.bit_count()
            return bad
        self.counters["checksum_mismatches"] += len(bad)
        self.drop_pages(slab, checksums.mask_of(bad))
        return []

    # --- writing ----------------------------------------------------------------------------------

    def create_writing(self, container: int, directory: Directory, charge_bytes: int) -> Slab:
        """An empty slab open for writing, with `charge_bytes` of room. One open, one index put. OSError,
        StateError: there is none."""
        slab = Slab(container, 0, directory, WRITING)
        slab.is_unnamed, slab.is_kept = True, False
        fd = self._new_file(self.path(slab))
        try:
            os.utime(fd, NOT_WRITTEN)
            self.index.put(container, self._record(slab))
        except BaseException:
            os.close(fd)
            self._unlink(self.path(slab))
            raise
        self.fds.adopt(slab, fd)
        self.by_container[container] = slab
        self.writing.add(slab)
        slab.reserved = slab.granted_end = charge_bytes
        self.account(slab)
        self.changed[container] = None
        return slab

    def begin_writing(self, slab: Slab, container: int, granted_end: int, islands: int) -> None:
        """A sealed slab of which all pages are present becomes container `container`, open for
        writing below `granted_end` and in `islands`, for which there is room. A crash at any point
        leaves the old container or the new one: the file has both names until the index is synced."""
        assert slab.state != WRITING
        assert slab.present == slab.all_pages
        assert not slab.jobs
        old = slab.container
        old_path = self.path(slab)
        os.utime(old_path, NOT_WRITTEN)
        record = self._record(slab)
        record.state, record.was = WRITING, old
        batch = self.index.batch()
        batch.move_chunks(old, container, slab.page_count)
        batch.put(container, record)
        self.index.commit(batch)
        try:
            self._give_name(old_path, slab_path(slab.directory.root, container))
        except OSError:
            back = self.index.batch()
            back.move_chunks(container, old, slab.page_count)
            back.put(old, self._record(slab))
            self.index.commit(back)
            raise
        self.delist(slab)
        del self.by_container[old]
        self.orphans.pop(old, None)
        self.count_dirty(slab, WRITING)
        slab.container, slab.state = container, WRITING
        self.writing.add(slab)
        slab.is_unnamed, slab.is_synced = True, False
        slab.is_kept = slab.is_kept and slab.size > 0
        slab.source = None
        slab.free_mode = FREE_NO
        slab.dirty_pages = 0
        slab.granted_end, slab.islands = granted_end, islands
        slab.reserved = writing_charge(granted_end, islands)
        self.by_container[container] = slab
        self.account(slab)
        self.changed[old] = self.changed[container] = None

    def _new_file(self, path: str) -> int:
        """A read-write descriptor of a new, empty file."""
        if path in self.old_names:
            os.unlink(path)  # It may be another slab's file too.
            del self.old_names[path]
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def _give_name(self, old_path: str, path: str) -> None:
        try:
            os.link(old_path, path)
        except OSError as exc:
            if exc.errno not in _NO_LINKS:
                raise
            self.index.sync()
            os.rename(old_path, path)
        else:
            self.old_names[old_path] = None

    def remove_old_names(self, paths: Iterable[str]) -> None:
        """The index was synced since these became old names."""
        for path in paths:
            if path in self.old_names:
                del self.old_names[path]
                self._unlink(path)

    def _unlink(self, path: str) -> None:
        try:
            os.unlink(path)
        except OSError:
            self.counters["unlink_failed"] += 1

    def grant(self, slab: Slab, end: int, pages: int = 0) -> bool:
        """Room to write below `end` and in `pages`, when it is there; nothing is evicted."""
        granted_end, islands = joined(max(end, slab.granted_end), slab.islands | pages)
        extra = writing_charge(granted_end, islands) - slab.reserved
        if extra > max(0, slab.directory.available):
            return False
        slab.granted_end, slab.islands = granted_end, islands
        self.unreserve(slab, -extra)
        return True

    def pages_to_seal(self, slab: Slab, size: int) -> int:
        """Pages whose checksum must be computed before a seal at `size`: those changed, and those
        whose length is another than before."""
        pages = slab.dirty_pages
        if size != slab.size:
            for end in (slab.size, size):
                if end:
                    pages |= 1 << (end - 1) // PAGE_BYTES
            before = slab.page_count
            pages |= -1 << before if page_count(size) > before else 0
        return pages & ((1 << page_count(size)) - 1)

    def seal(self, slab: Slab, size: int, sums: dict[int, int], zeros: int = 0) -> None:
        """End the writing. `sums` are the checksums of `pages_to_seal`, but for those in the mask
        `zeros`, which are full pages of zeros. Dirty, and durable against a kill of this process
        when this returns. StateError: it is still open."""
        assert slab.state == WRITING
        assert not slab.writers
        before, after = slab.page_count, page_count(size)
        changed = checksums.mask_of(sums)
        kept = slab.all_pages & ((1 << after) - 1) & ~changed & ~zeros
        if (before <= 1) != (after <= 1):
            sums = self.stored_checksums(slab, bits(kept)) | sums
        batch = self.index.batch()
        if after > 1:
            batch.put_pages(slab.container, sums, zeros)
            batch.delete_chunks(slab.container, after, before)
        else:
            batch.delete_chunks(slab.container, 0, before)
            checksum = ZERO_PAGE if zeros else sums.get(0, slab.checksum)
        record = SlabRecord(size, slab.directory.directory_id, DIRTY, int(self._wall_s()))
        if after <= 1:
            record.is_present, record.checksum = after == 1, checksum
        batch.put(slab.container, record)
        self.index.commit(batch)
        if after <= 1:
            slab.checksum = checksum
        slab.size, slab.state = size, DIRTY
        self.writing.discard(slab)
        slab.is_synced = slab.must_sync
        slab.present = slab.verified = slab.all_pages
        slab.zeros = (slab.zeros & kept) | zeros
        last = after - 1
        if last in sums and is_zero(sums[last], page_length(last, size)):
            slab.zeros |= 1 << last
        slab.dirty_pages = slab.reserved = slab.granted_end = slab.islands = 0
        self.account(slab)
        self.dirty_bytes += slab.charged
        slab.directory.dirty[slab] = None
        self.changed[slab.container] = None

    def mark_clean(self, slab: Slab) -> None:
        """Its bytes are in the under storage now. Nothing happens unless it is sealed and dirty."""
        if slab.state != DIRTY:
            return
        self.delist(slab)
        self.count_dirty(slab, CLEAN)
        slab.state, slab.is_kept = CLEAN, True
        self.orphans.pop(slab.container, None)
        batch = self.index.batch()
        if slab.present:
            batch.put(slab.container, self._record(slab))
        else:
            batch.delete(slab.container, slab.page_count)
        self.index.owe(batch)
        self.enlist(slab, slab.present)
        self.changed[slab.container] = None
        self._settle(slab)

    def report_orphan(self, slab: Slab) -> None:
        """Tell the master what a sealed container is, in case its writer could not."""
        try:
            mtime_ns = os.stat(self.path(slab)).st_mtime_ns
        except OSError:
            return  # The master will not hear of a size that can't be had.
        self.orphans[slab.container] = OrphanSeal(slab.container, slab.size, mtime_ns)

    # --- moving -----------------------------------------------------------------------------------

    def relocate(self, slab: Slab, directory: Directory, held_bytes: int) -> None:
        """Its file was copied to `directory`, durably where that matters. The old one goes when the
        index says so durably. The slab is idle; `held_bytes` are held for it. StateError: nothing
        has changed."""
        old_path = self.path(slab)
        is_dirty = slab.state == DIRTY
        record = self._record(slab)
        record.directory = directory.directory_id
        self.index.put(slab.container, record)
        self.delist(slab)
        self.fds.forget(slab)
        source = slab.directory
        source.used -= slab.charged
        source.evictable -= slab.evictable
        charged, slab.charged, slab.evictable = slab.charged, 0, 0
        slab.directory = directory
        slab.is_unnamed = not is_dirty
        self.release(directory, held_bytes)
        self.account(slab)
        assert slab.charged == charged
        if is_dirty:
            directory.dirty[slab] = None
        else:
            self.enlist(slab, slab.present)
        self.room_changed()
        self.old_names.pop(self.path(slab), None)
        self.old_names[old_path] = None

    # --- reports ----------------------------------------------------------------------------------

    def report(self, container: int) -> BlockReport:
        slab = self.by_container.get(container)
        return BlockReport(container, b"", False) if slab is None else slab.report()

    def take_changed(self, limit: int) -> list[int]:
        """The oldest changed containers; give them back with `put_back` when they were not heard."""
        taken = list(itertools.islice(self.changed, limit))
        for container in taken:
            del self.changed[container]
        return taken

    def put_back(self, containers: Iterable[int]) -> None:
        self.changed.update(dict.fromkeys(containers))

    def _record(self, slab: Slab) -> SlabRecord:
        return SlabRecord(
            slab.size,
            slab.directory.directory_id,
            slab.state,
            int(self._wall_s()),
            slab.page_count <= 1 and bool(slab.present),
            slab.checksum if slab.page_count <= 1 else 0,
        )
