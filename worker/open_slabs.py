"""Slabs that are open for writing: how they begin, what they may take, how they end."""

from __future__ import annotations

import contextlib
import os

from alluxiofuse.errors import StateError
from alluxiofuse.ids import PAGE_BYTES, page_count, page_length
from alluxiofuse.wire.types import OrphanSeal
from alluxiofuse.worker import checksums
from alluxiofuse.worker.accounts import joined, writing_charge
from alluxiofuse.worker.checksums import ZERO_PAGE, bits, is_zero
from alluxiofuse.worker.index import SlabRecord
from alluxiofuse.worker.layout import slab_path
from alluxiofuse.worker.slab import CLEAN, DIRTY, FREE_NO, WRITING, Base, Lock, Slab
from alluxiofuse.worker.table import Table
from alluxiofuse.worker.tiers import Directory

NOT_WRITTEN = (0, 0)
"""Access and modification time of a slab's file when writing begins: a write sets the latter
(`worker_ops.ContainerStat`)."""


class OpenSlabs(Table):
    """The part of `slabs.Slabs` that writers use."""

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
        was = os.stat(old_path)
        base = Base(old, slab.state, slab.is_kept, slab.is_synced, slab.source, was.st_mtime_ns, slab.writes)
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
        self._become(slab, container, granted_end, islands)
        slab.base = base

    def begin_emptied(self, slab: Slab, container: int, granted_end: int) -> None:
        """A sealed slab becomes container `container`, open for writing and empty. A crash leaves the
        old container whole, or the new one empty. OSError, StateError: as it was, or to be finished by
        `finish_emptying`."""
        assert slab.state != WRITING
        assert not slab.jobs
        must_sync = slab.state == DIRTY and slab.must_sync
        record = SlabRecord(0, slab.directory.directory_id, WRITING, int(self._wall_s()))
        record.was, record.is_emptied = slab.container, True
        batch = self.index.batch()
        batch.delete(slab.container, slab.page_count)
        batch.put(container, record)
        self.index.commit(batch)
        slab.must_empty = self.path(slab)
        self._become(slab, container, granted_end, 0)
        slab.is_kept = must_sync
        slab.size = slab.present = slab.verified = slab.zeros = slab.damaged = slab.checksum = 0
        self.finish_emptying(slab)

    def finish_emptying(self, slab: Slab) -> None:
        """In this order: after a power failure a file that has the new name is empty, and one that a
        record without the mark claims has that name. OSError, StateError: it is still to be done."""
        path = self.path(slab)
        if slab.is_kept:
            self.index.sync()  # Blocks, for a file that was synced, is open here, and is emptied: rare.
        if not os.path.exists(path) or path in self.old_names:
            os.truncate(slab.must_empty, 0)
            os.utime(slab.must_empty, NOT_WRITTEN)
            self._give_name(slab.must_empty, path)
        self.index.put(slab.container, self._record(slab))
        slab.must_empty, slab.is_kept = "", False

    def _become(self, slab: Slab, container: int, granted_end: int, islands: int) -> None:
        """Open for writing, as another container."""
        old = slab.container
        self.delist(slab)
        del self.by_container[old]
        self.orphans.pop(old, None)
        self.count_dirty(slab, WRITING)
        slab.container, slab.state = container, WRITING
        self.writing.add(slab)
        slab.is_unnamed, slab.is_synced, slab.synced_as = True, False, None
        slab.is_kept = slab.is_kept and slab.size > 0
        slab.source = None
        slab.free_mode = FREE_NO
        slab.dirty_pages = 0
        slab.granted_end, slab.islands = granted_end, islands
        slab.reserved = writing_charge(granted_end, islands)
        self.by_container[container] = slab
        self.account(slab)
        self.changed[old] = self.changed[container] = None

    def let_pass(self, slab: Slab) -> bool:
        """Kernels may write to it from now on, unknown to anybody, until nobody has it open for writing.
        False: no, as that can't be written down for a later life of the worker."""
        if not slab.passes:
            record = self.index.record(slab.container) or self._record(slab)
            record.passes = True
            try:
                self.index.put(slab.container, record)
            except StateError:
                return False
            slab.passes = True
            self.passing[slab] = None
        return True

    def charge_written(self, slab: Slab, end: int, islands: int) -> None:
        """What was written below `end` and in `islands` without asking, whether or not there is room."""
        if slab.islands or islands:
            end = -(-end // PAGE_BYTES) * PAGE_BYTES
        granted_end, islands = joined(max(end, slab.granted_end), slab.islands | islands)
        extra = writing_charge(granted_end, islands) - slab.reserved
        slab.granted_end, slab.islands = granted_end, islands
        self.unreserve(slab, -extra)

    def is_unchanged(self, slab: Slab, found: os.stat_result) -> bool:
        """It is, byte for byte, what it was when writing began. On a filesystem in memory, stores through
        mappings leave no trace."""
        return (
            found.st_mtime_ns == NOT_WRITTEN[1]
            and found.st_size == slab.size
            and not slab.is_touched
            and not slab.dirty_pages
            and (slab.directory.is_durable or not slab.passes)
        )

    def may_revert(self, slab: Slab, found: os.stat_result) -> bool:
        """`revert` is possible, for its only writer, who has ended."""
        base = slab.base
        return (
            base is not None
            and slab.state == WRITING
            and not slab.writers
            and slab.writes == base.writes + 1
            and not slab.free_mode
            and base.container not in self.by_container
            and self.is_unchanged(slab, found)
        )

    def revert(self, slab: Slab) -> None:
        """It is the container that it was before `begin_writing` again, as that was. A crash leaves
        either. OSError, StateError: nothing has changed."""
        base = slab.base
        assert base is not None
        container = slab.container
        path = self.path(slab)
        old_path = slab_path(slab.directory.root, base.container)
        record = self._record(slab)
        record.state, record.was, record.passes = base.state, container, False
        has_record = bool(slab.present) or base.state != CLEAN
        batch = self.index.batch()
        batch.move_chunks(container, base.container, slab.page_count)
        if has_record:
            batch.put(base.container, record)
        if old_path in self.old_names:  # It has that name still.
            self.index.commit(batch)
            del self.old_names[old_path]
            self.old_names[path] = None
        else:
            os.link(path, old_path)
            try:
                self.index.commit(batch)
            except StateError:
                self._unlink(old_path)
                raise
            self.old_names[path] = None
        with contextlib.suppress(OSError):
            os.utime(old_path, ns=(base.mtime_ns, base.mtime_ns))
        del self.by_container[container]
        self.writing.discard(slab)
        slab.container, slab.state = base.container, base.state
        slab.is_kept, slab.is_synced, slab.source = base.is_kept, base.is_synced, base.source
        slab.is_unnamed = True
        slab.reserved = slab.granted_end = slab.islands = 0
        self._settle_writing(slab)
        self.by_container[base.container] = slab
        self.account(slab)
        if slab.state == DIRTY:
            self.dirty_bytes += slab.charged
            slab.directory.dirty[slab] = None
        else:
            self.enlist(slab, slab.present)
        self.changed[container] = self.changed[base.container] = None

    def _settle_writing(self, slab: Slab) -> None:
        """What is only known of a slab that is open for writing."""
        slab.dirty_pages, slab.base = 0, None
        slab.is_touched = False
        self._stop_passing(slab)

    def _stop_passing(self, slab: Slab) -> None:
        if slab.passes:
            slab.passes = False
            del self.passing[slab]
            self.passing_ended(slab)

    def grant(self, slab: Slab, end: int, pages: int = 0) -> bool:
        """Room to write below `end` and in `pages`, when it is there; nothing is evicted."""
        granted_end, islands = joined(max(end, slab.granted_end), slab.islands | pages)
        extra = writing_charge(granted_end, islands) - slab.reserved
        if extra > max(0, slab.directory.available):
            return False
        slab.granted_end, slab.islands = granted_end, islands
        self.unreserve(slab, -extra)
        return True

    def pages_to_seal(self, slab: Slab, found: os.stat_result) -> int:
        """Pages whose checksum must be computed before a seal: those changed, and those whose length is
        another than before."""
        size = found.st_size
        if slab.passes and not self.is_unchanged(slab, found):
            slab.dirty_pages = -1
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
        slab.reserved = slab.granted_end = slab.islands = 0
        self._settle_writing(slab)
        self.account(slab)
        self.dirty_bytes += slab.charged
        slab.directory.dirty[slab] = None
        self.changed[slab.container] = None

    # --- writers ---

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

    # --- seals that no client asked for ---

    def report_orphan(self, slab: Slab) -> None:
        """Tell the master what a sealed container is, in case its writer could not."""
        try:
            mtime_ns = os.stat(self.path(slab)).st_mtime_ns
        except OSError:
            return  # The master will not hear of a size that can't be had.
        self.orphans[slab.container] = OrphanSeal(slab.container, slab.size, mtime_ns)
