"""Checks that accounting, index and disk say the same. For tests; it reads everything."""

from __future__ import annotations

import os
from pathlib import Path

from alluxiofuse.errors import StateError
from alluxiofuse.ids import page_length
from alluxiofuse.worker.accounts import order_key, writing_charge
from alluxiofuse.worker.checksums import bits, is_zero, mask_of, page_checksums
from alluxiofuse.worker.layout import slab_path, stored_slabs
from alluxiofuse.worker.slab import BLOCK_PAGES, CLEAN, DIRTY, WRITING, Slab
from alluxiofuse.worker.slabs import Slabs

_METADATA_BYTES = 64 << 10
"""What a filesystem may add to st_blocks of a file for its own tables."""


def validate(slabs: Slabs, *, with_bytes: bool = False) -> None:
    """StateError that names the first contradiction. Await-free; call it while no thread works on a
    slab file. `with_bytes`: also compare every verified page with its checksum."""
    _check_locks(slabs)
    _check_directories(slabs)
    _check_index(slabs)
    for slab in slabs.by_container.values():
        _check_slab(slabs, slab, with_bytes)
    wanted = sum(slab.charged for slab in slabs.by_container.values() if slab.state == DIRTY)
    _same("dirty_bytes", slabs.dirty_bytes, wanted)


def _same(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise StateError(f"{what} is {found!r}, should be {wanted!r}")


def _check_locks(slabs: Slabs) -> None:
    locks: dict[Slab, int] = {}
    writers: dict[Slab, int] = {}
    for lock in slabs.locks.values():
        locks[lock.slab] = locks.get(lock.slab, 0) + 1
        writers[lock.slab] = writers.get(lock.slab, 0) + lock.is_writer
        _same(f"slab of lock {lock.id}", slabs.by_container.get(lock.slab.container), lock.slab)
    for slab in slabs.by_container.values():
        _same(f"locks of {slab.container:x}", slab.locks, locks.get(slab, 0))
        _same(f"writers of {slab.container:x}", slab.writers, writers.get(slab, 0))


def _check_directories(slabs: Slabs) -> None:
    for directory in slabs.tiers.directories:
        mine = [slab for slab in slabs.by_container.values() if slab.directory is directory]
        charged = sum(slab.charged for slab in mine)
        _same(f"used of {directory.root}", directory.used, charged + directory.held)
        _same(f"evictable of {directory.root}", directory.evictable, sum(slab.evictable for slab in mine))
        if directory.used > directory.quota_bytes:
            raise StateError(f"{directory.root}: {directory.used} of {directory.quota_bytes} used")
        blocks = {
            order_key(slab, page // BLOCK_PAGES)
            for slab in mine
            if slab.state == CLEAN
            for page in bits(slab.present)
        }
        _same(f"order of {directory.root}", set(directory.order), blocks)
        _same(f"dirty of {directory.root}", set(directory.dirty), {s for s in mine if s.state == DIRTY})
        moving = {slab.container for slab in slabs.by_container.values() if slab.is_moving}
        found = set() if moving else set(stored_slabs(Path(directory.root)))
        if not moving:
            old = {name for name in found if slab_path(directory.root, name) in slabs.old_names}
            _same(f"files of {directory.root}", found - old, {slab.container for slab in mine} - old)


def _check_index(slabs: Slabs) -> None:
    ids = {directory.directory_id for directory in slabs.tiers.directories}
    indexed = {container for container, record in slabs.index.records() if record.directory in ids}
    wanted = {slab.container for slab in slabs.by_container.values() if slab.present or slab.state != CLEAN}
    _same("records of the index", indexed, wanted)


def _check_slab(slabs: Slabs, slab: Slab, with_bytes: bool) -> None:
    name = f"{slab.container:x}"
    cost = 0 if slab.state == WRITING else slab.cost_of(slab.present)
    _same(f"charge of {name}", slab.charged, slab.reserved + cost)
    if slab.state == WRITING:
        _same(f"grants of {name}", slab.reserved, writing_charge(slab.granted_end, slab.islands))
    if slab.pins == 0 and slab.state != WRITING:
        _same(f"reservation of {name}", slab.reserved, 0)
    is_evictable = slab.state == CLEAN and slab.is_idle and not slab.is_moving
    _same(f"evictable of {name}", slab.evictable, slab.charged if is_evictable else 0)
    if slab.verified & ~slab.present or slab.zeros & ~slab.present or slab.present & ~slab.all_pages:
        raise StateError(f"pages of {name} are beyond those present")
    found = os.stat(slabs.path(slab))
    if slab.state == WRITING:
        return
    _same(f"size of {name}", found.st_size, slab.size)
    if found.st_blocks * 512 > slab.charged + _METADATA_BYTES:
        raise StateError(f"{name} has {found.st_blocks * 512} bytes on disk, {slab.charged} charged")
    record = slabs.index.record(slab.container)
    if record is not None:
        _same(f"record of {name}", (record.size, record.state), (slab.size, slab.state))
        _same(f"directory of {name}", record.directory, slab.directory.directory_id)
        _check_pages(slabs, slab, with_bytes)


def _check_pages(slabs: Slabs, slab: Slab, with_bytes: bool) -> None:
    name = f"{slab.container:x}"
    stored = slabs.stored_checksums(slab, bits(slab.present))
    _same(f"indexed pages of {name}", set(stored), set(bits(slab.present)))
    zeros = mask_of(page for page, value in stored.items() if is_zero(value, page_length(page, slab.size)))
    _same(f"pages of zeros of {name}", slab.zeros, zeros)
    if with_bytes:
        fd = slabs.fds.for_reading(slab)
        for page, value in page_checksums(fd, bits(slab.verified & ~slab.zeros), slab.size).items():
            _same(f"page {page} of {name}", value, stored[page])
