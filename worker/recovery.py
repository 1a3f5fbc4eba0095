"""What happens before a worker serves: its directories are checked and claimed, its index read.

Checks come first and change nothing: a directory of somebody else, a quota that is too large, a
directory named twice are UserErrors before anything is written.
"""

from __future__ import annotations

import gc
import logging
import os
from array import array
from dataclasses import dataclass
from pathlib import Path

from alluxiofuse.config import WorkerConfig
from alluxiofuse.errors import UserError
from alluxiofuse.ids import PAGE_BYTES, page_count, page_length
from alluxiofuse.worker import layout, openers
from alluxiofuse.worker.accounts import writing_charge
from alluxiofuse.worker.checksums import is_zero
from alluxiofuse.worker.growth import written_extent
from alluxiofuse.worker.index import Index, SlabRecord
from alluxiofuse.worker.layout import Claims, Marker, slab_path
from alluxiofuse.worker.slab import CLEAN, DIRTY, WRITING, Slab
from alluxiofuse.worker.slabs import Slabs
from alluxiofuse.worker.tiers import Directory, Tiers

log = logging.getLogger(__name__)

FREEZE_FROM = 10_000
"""Slabs, from which on the garbage collector is told not to look at what is there at the start."""


@dataclass
class Opened:
    """An index and the claimed directories."""

    index: Index
    tiers: Tiers
    claims: Claims

    def close(self) -> None:
        """Idempotent."""
        self.claims.close()
        self.index.close()


def open_storage(config: WorkerConfig) -> Opened:
    """UserError (nothing changed), StateError."""
    roots = _checked_roots(config)
    index_path = Path(config.state_dir).absolute() / "index"
    markers = {root: layout.read_marker(root) for root in roots}
    if not (index_path / "CURRENT").exists():
        _refuse_foreign(markers, None)
    index = Index(index_path)
    claims = Claims()
    try:
        _refuse_foreign(markers, index.worker_uuid)
        directories = []
        for tier, tier_config in enumerate(config.tiers):
            for wanted in tier_config.directories:
                root = Path(wanted.path).absolute()
                marker = markers[root] or _new_marker(index, root, is_durable=tier_config.is_durable)
                if markers[root] is None:
                    index.sync()  # What the marker names is known here, whatever happens.
                claims.add(root, marker)
                directory = Directory(
                    str(root), marker.directory_id, wanted.quota_bytes, tier, tier_config.is_durable
                )
                directory.takes_passthrough = _takes_passthrough(root)
                directory.tells_each_write = layout.tells_each_write(root)
                directories.append(directory)
        return Opened(index, Tiers([tier.alias for tier in config.tiers], directories), claims)
    except BaseException:
        Opened(index, Tiers([], []), claims).close()
        raise


def _checked_roots(config: WorkerConfig) -> list[Path]:
    if not config.state_dir:
        raise UserError("a worker needs a state directory")
    roots: list[Path] = []
    for tier in config.tiers:
        for directory in tier.directories:
            root = Path(directory.path).absolute()
            layout.check_quota(root, directory.quota_bytes)
            if any(root.resolve() == other.resolve() for other in roots):
                raise UserError(f"tier directory {root} is named twice")
            roots.append(root)
    if not roots:
        raise UserError("a worker needs at least one tier with a directory: --tier ALIAS:DIR:QUOTA")
    return roots


def _refuse_foreign(markers: dict[Path, Marker | None], worker_uuid: str | None) -> None:
    for root, marker in markers.items():
        if marker is not None and marker.worker_uuid != worker_uuid:
            raise UserError(
                f"{root} belongs to a worker with another state directory: name that one, or empty"
                f" {root} (what was written to it and not persisted is lost then)"
            )


def _new_marker(index: Index, root: Path, *, is_durable: bool) -> Marker:
    """Of a directory that has none: it is new, or was emptied. What a MEM tier held is gone then. The
    dirty records of a durable one are kept under its old id: its disk may just not be mounted."""
    for old, path in index.directories().items():
        if path == str(root) and not is_durable:
            for container, record in list(index.records()):
                if record.directory == old:
                    if record.state != CLEAN:
                        log.error("container %x was lost: %s was emptied", container, root)
                    _forget(index, container, record)
            index.forget_directory(old)
    return Marker(index.worker_uuid, index.new_directory(str(root)))


def _takes_passthrough(root: Path) -> bool:
    trouble = openers.trouble_with(str(root))
    if trouble:
        log.info("tier directory %s takes no passthrough: %s", root, trouble)
    return not trouble


def _forget(index: Index, container: int, record: SlabRecord) -> None:
    batch = index.batch()
    batch.delete(container, page_count(record.size))
    index.commit(batch)


def load(slabs: Slabs) -> None:
    """`_load` without the garbage collector, which would look at a million slabs again and again while
    there come more, and later: they are not garbage and refer to none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        _load(slabs)
        if len(slabs.by_container) > FREEZE_FROM:
            gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


def _load(slabs: Slabs) -> None:
    """Fill an empty table from the index and the files. Blocks for the listing of the slab folders.

    Records of directories that are not configured now stay in the index when they are dirty, and
    are dropped when clean. Slabs that were open for writing get a writer's lock of session 0, which
    `leases` lets expire unless the session comes back."""
    index, counters = slabs.index, slabs.counters
    by_id = {directory.directory_id: directory for directory in slabs.tiers.directories}
    files = {
        directory.directory_id: set(layout.stored_slabs(Path(directory.root)))
        for directory in slabs.tiers.directories
    }
    loaded: list[Slab] = []
    accessed_s = array("q")  # of each; no objects, between which the slabs would lie in memory
    for container, record in index.records():
        directory = by_id.get(record.directory)
        if directory is None:
            counters["records_elsewhere"] += 1
            if record.state == CLEAN:
                _forget(index, container, record)
            continue
        there = files[record.directory]
        if container not in there and record.was in there and index.record(record.was) is None:
            os.rename(slab_path(directory.root, record.was), slab_path(directory.root, container))
            there.discard(record.was)
            there.add(container)
        if container not in there:
            counters["lost_dirty_slabs" if record.state != CLEAN else "lost_clean_slabs"] += 1
            log.log(
                logging.WARNING if record.state == CLEAN else logging.ERROR,
                "the slab of container %x is missing in %s",
                container,
                directory.root,
            )
            _forget(index, container, record)
            continue
        there.discard(container)
        if record.is_emptied:
            os.truncate(slab_path(directory.root, container), 0)
            record.is_emptied = False
            index.put(container, record)
        loaded.append(_slab(index, container, record, directory))
        accessed_s.append(record.accessed_s)
    for directory_id, left in files.items():
        for container in left:
            os.unlink(slab_path(by_id[directory_id].root, container))
            counters["removed_unknown_slabs"] += 1
    for number in sorted(range(len(loaded)), key=accessed_s.__getitem__):
        slabs.adopt(loaded[number])


def _slab(index: Index, container: int, record: SlabRecord, directory: Directory) -> Slab:
    slab = Slab(container, record.size, directory, record.state)
    slab.checksum = record.checksum
    if record.size <= PAGE_BYTES:
        slab.present = slab.all_pages if record.is_present else 0
        slab.zeros = slab.present if slab.present and is_zero(record.checksum, record.size) else 0
        if record.state == CLEAN and not slab.zeros:
            return slab
    else:
        slab.present, slab.zeros = index.presence(container)
        slab.present &= slab.all_pages
        last = slab.page_count - 1
        for value in index.checksums(container, [last]).values():
            if is_zero(value, page_length(last, record.size)):
                slab.zeros |= 1 << last
        slab.zeros &= slab.present
    path = slab_path(directory.root, container)
    if slab.zeros and os.stat(path).st_size == record.size:
        slab.verified = slab.zeros  # holes: there are no bytes that could have changed
    if record.state == WRITING:
        _recover_writing(slab, path, passes=record.passes and directory.takes_passthrough)
    elif record.state == DIRTY and slab.present != slab.all_pages:
        log.error("dirty container %x: pages are missing from the index", container)
    return slab


def _recover_writing(slab: Slab, path: str, *, passes: bool) -> None:
    """The file is the truth: what has data is charged and granted."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        extent = written_extent(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)
    slab.dirty_pages = -1
    slab.passes = passes
    slab.granted_end, slab.islands = extent
    slab.reserved = writing_charge(*extent)
