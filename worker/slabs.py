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

import itertools
import os
from collections.abc import Iterable

from alluxiofuse.ids import PAGE_BYTES, page_length
from alluxiofuse.wire.types import BlockReport
from alluxiofuse.worker import checksums
from alluxiofuse.worker.accounts import order_key
from alluxiofuse.worker.checksums import bits, is_zero, mask_runs
from alluxiofuse.worker.open_slabs import OpenSlabs
from alluxiofuse.worker.readahead import ReadAhead
from alluxiofuse.worker.slab import (
    BLOCK_PAGES,
    CLEAN,
    DIRTY,
    FREE_ALL,
    WRITING,
    Lock,
    Slab,
    round_up,
)
from alluxiofuse.worker.tiers import Directory


class Slabs(OpenSlabs):
    """All slabs of a worker."""

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
            if slab.passes:
                self.passing[slab] = None
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
        self._stop_passing(slab)
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
