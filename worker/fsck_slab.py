"""What of one slab is really there, and a new index entry for one. For the offline check."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from alluxiofuse.errors import StateError
from alluxiofuse.ids import PAGE_BYTES, page_count, page_length, runs
from alluxiofuse.worker import checksums
from alluxiofuse.worker.checksums import bits, is_zero, mask_of
from alluxiofuse.worker.index import CHUNK_PAGES, Index, SlabRecord, is_chunk, u64
from alluxiofuse.worker.slab import CLEAN, DIRTY, WRITING

_STEP_PAGES = 64


@dataclass(slots=True)
class Looked:
    size: int
    """Of the content; while WRITING, of the file."""
    mtime_ns: int
    bad: list[tuple[int, int]] = field(default_factory=list)
    """Runs of pages that are not what was stored; of one that is not clean also those missing."""
    unsure: int = 0
    """Pages without a readable checksum."""
    is_wrong: bool = False
    """The file is longer or shorter than the content."""


def look(
    index: Index, container: int, record: SlabRecord, path: str, verify: bool, advance: Callable[[int], None]
) -> Looked:
    """OSError when the file can't be read. Holes in place of bytes are seen without reading any."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if record.state == WRITING:
            return Looked(found.st_size, found.st_mtime_ns, unsure=_damaged_tables(index, container))
        sums, unsure = _stored(index, container, record)
        looked = Looked(record.size, found.st_mtime_ns, is_wrong=found.st_size != record.size)
        looked.unsure = unsure.bit_count()
        bad = _bad_pages(fd, found.st_size, record, sums, verify, advance)
        if record.state != CLEAN:
            everything = (1 << page_count(record.size)) - 1
            bad |= everything & ~mask_of(sums) & ~unsure
        looked.bad = list(runs(bits(bad)))
        return looked
    finally:
        os.close(fd)


def _damaged_tables(index: Index, container: int) -> int:
    """The pages that they are for. Of a slab that is written to the record's size is of before."""
    return sum(
        CHUNK_PAGES for key, raw in index.items(b"p" + u64(container)) if len(key) != 8 or not is_chunk(raw)
    )


def _stored(index: Index, container: int, record: SlabRecord) -> tuple[dict[int, int], int]:
    """(page -> checksum of those present, pages whose checksums can't be read)."""
    count = page_count(record.size)
    if count <= 1:
        return ({0: record.checksum} if count and record.is_present else {}), 0
    sums: dict[int, int] = {}
    unsure = 0
    for chunk in range(-(-count // CHUNK_PAGES)):
        first = chunk * CHUNK_PAGES
        try:
            present, values = index.chunk(container, chunk)
        except StateError:
            unsure |= ((1 << min(CHUNK_PAGES, count - first)) - 1) << first
            continue
        for page in bits(present):
            if first + page < count:
                sums[first + page] = values[page]
    return sums, unsure


def _bad_pages(
    fd: int,
    file_size: int,
    record: SlabRecord,
    sums: dict[int, int],
    verify: bool,
    advance: Callable[[int], None],
) -> int:
    size = record.size
    present = mask_of(sorted(sums))
    zeros = mask_of(page for page in sorted(sums) if is_zero(sums[page], page_length(page, size)))
    data = checksums.data_pages(fd, min(size, file_size))
    bad = present & ~zeros & ~data
    if file_size < size:
        bad |= mask_of(
            page for page in sorted(sums) if page * PAGE_BYTES + page_length(page, size) > file_size
        )
    if verify:
        to_read = list(bits(present & data & ~bad))
        for at in range(0, len(to_read), _STEP_PAGES):
            step = to_read[at : at + _STEP_PAGES]
            found = checksums.page_checksums(fd, step, size)
            bad |= mask_of(page for page in step if found[page] != sums[page])
            advance(sum(page_length(page, size) for page in step))
    return bad


def stored_bytes(record: SlabRecord, path: str) -> int:
    """About how many bytes of a slab there are to be read."""
    try:
        return min(record.size, os.stat(path).st_blocks * 512)
    except OSError:
        return 0


def reindex(index: Index, container: int, path: str, directory_id: int) -> None:
    """Enter a file as a dirty slab of the size that it has, with the checksums of its bytes. May be
    repeated; the record comes last. OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        count = page_count(size)
        record = SlabRecord(size, directory_id, DIRTY, int(os.fstat(fd).st_mtime), bool(count))
        for first in range(0, count, CHUNK_PAGES):
            last = min(count, first + CHUNK_PAGES)
            mask = ((1 << (last - first)) - 1) << first
            sums, zeros, filled = checksums.sealed_checksums(fd, mask, size)
            checksums.punch_pages(fd, filled)
            if count == 1:
                record.checksum = checksums.ZERO_PAGE if zeros else sums[0]
                continue
            values = [0] * CHUNK_PAGES
            for page, value in sums.items():
                values[page - first] = value
            for page in bits(zeros):
                values[page - first] = checksums.ZERO_PAGE
            batch = index.batch()
            batch.put_chunk(container, first // CHUNK_PAGES, mask >> first, values)
            index.commit(batch)
        if count > 1:
            record.is_present = False
        batch = index.batch()
        batch.put(container, record)
        index.commit(batch)
    finally:
        os.close(fd)
