"""The plain parts: read-ahead, page masks, the index, reports, registration."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from worker_world import MB, eventually, pattern, running, trio_test

from alluxiofuse.errors import UnavailableError, UserError
from alluxiofuse.rpc.inprocess import InProcess
from alluxiofuse.wire.types import FreeCommand
from alluxiofuse.wire.worker_ops import WorkerReport
from alluxiofuse.worker import checksums, reporting
from alluxiofuse.worker.checksums import ZERO_PAGE
from alluxiofuse.worker.index import Index, SlabRecord
from alluxiofuse.worker.readahead import GROWTH, ReadAhead
from alluxiofuse.worker.slab import CLEAN, Slab
from alluxiofuse.worker.tiers import Directory
from alluxiofuse.worker.worker import Worker


def test_window_grows_for_a_sequential_reader_and_stays_bounded() -> None:
    ahead = ReadAhead()
    windows = []
    fetched = 0
    for page in range(200):
        begin, end = ahead.advance(page, page + 1, MB, 64)
        assert begin >= fetched or begin == end
        fetched = max(fetched, end)
        assert fetched >= page + 1 or begin == end
        windows.append(ahead.window)
    assert windows[0] == 8
    assert max(windows) == 64
    assert windows == sorted(windows)
    assert fetched <= 200 + 64 + 32


def test_random_reader_gets_nothing_ahead() -> None:
    ahead = ReadAhead()
    chance = random.Random(3)
    for _ in range(100):
        page = chance.randrange(0, 10**6) * 3
        begin, end = ahead.advance(page, page + 1, 4096, 64)
        assert begin == end


def test_a_jump_shrinks_the_window() -> None:
    ahead = ReadAhead()
    for page in range(50):
        ahead.advance(page, page + 1, MB, 64)
    before = ahead.window
    begin, end = ahead.advance(9000, 9001, MB, 64)
    assert begin == end
    assert ahead.window == before // GROWTH


@given(st.sets(st.integers(0, 3000)))
def test_masks(pages: set[int]) -> None:
    mask = checksums.mask_of(pages)
    assert mask == sum(1 << page for page in pages)
    assert list(checksums.bits(mask)) == sorted(pages)
    found = [page for first, count in checksums.mask_runs(mask) for page in range(first, first + count)]
    assert found == sorted(pages)


def test_zero_pages_are_left_out(tmp_path: Path) -> None:
    data = bytes(MB) + b"x" * MB + bytes(100)
    with open(tmp_path / "slab", "w+b", buffering=0) as file:
        file.truncate(len(data))
        sums = checksums.store_pages(file.fileno(), 0, data)
        assert (tmp_path / "slab").read_bytes() == data
        assert sums[0] == ZERO_PAGE
        assert checksums.data_pages(file.fileno(), len(data)) == 0b010
        found = checksums.page_checksums(file.fileno(), range(3), len(data))
        assert list(found.values()) == sums
        _, sum1, sum2 = sums
        assert checksums.sealed_checksums(file.fileno(), 0b111, len(data)) == ({1: sum1, 2: sum2}, 0b001, 0)
        checksums.pwrite_all(file.fileno(), data, 0)
        sealed = checksums.sealed_checksums(file.fileno(), 0b111, len(data))
        assert sealed == ({1: sum1, 2: sum2}, 0b001, 0b101)
        checksums.punch_pages(file.fileno(), 0b101)
        assert checksums.data_pages(file.fileno(), len(data)) == 0b010


def test_data_pages_of_a_file_that_is_truncated_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between finding data and finding its end: ENXIO, which says nothing against the disk."""
    with open(tmp_path / "slab", "w+b", buffering=0) as file:
        file.write(b"x" * MB)
        real = os.lseek

        def lseek(fd: int, at: int, whence: int) -> int:
            if whence == os.SEEK_HOLE:
                file.truncate(0)
            return real(fd, at, whence)

        monkeypatch.setattr(os, "lseek", lseek)
        assert checksums.data_pages(file.fileno(), MB) == 0


def test_index_keeps_pages_of_big_containers_in_chunks(tmp_path: Path) -> None:
    index = Index(tmp_path / "index")
    uuid = index.worker_uuid
    batch = index.batch()
    batch.put(7, SlabRecord(200 * MB, 1, CLEAN, 0))
    batch.put_pages(7, {0: 11, 63: 12, 64: 13, 199: 14}, zeros=0b110)
    index.commit(batch)
    batch = index.batch()
    batch.remove_pages(7, 1 << 63)
    batch.move_chunks(7, 8, 200)
    index.commit(batch)
    index.close()
    index = Index(tmp_path / "index")
    assert index.worker_uuid == uuid
    assert index.record(7) is None
    assert index.presence(7) == (0, 0)
    # `move_chunks` copies what was there before its batch; removals of the same batch are not seen.
    present, zeros = index.presence(8)
    assert present | 1 << 63 == checksums.mask_of([0, 1, 2, 63, 64, 199])
    assert zeros == 0b110
    assert index.checksums(8, [0, 1, 64, 100]) == {0: 11, 1: ZERO_PAGE, 64: 13}
    with pytest.raises(UserError, match="in use"):
        Index(tmp_path / "index")
    index.close()


def test_report_of_complete_blocks() -> None:
    slab = Slab(1, 129 * MB, Directory("", 1, 0, 0, True))
    assert slab.report().blocks == b""
    slab.present = slab.all_pages & ~(1 << 70)
    assert slab.report().blocks == b"\x05"
    assert not slab.report().is_dirty
    slab.present = slab.all_pages
    assert slab.report().blocks == b"\x07"


@trio_test
async def test_registers_again_when_the_master_forgot_it(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        container, _ = await world.write_new(pattern(100))
        await eventually(lambda: container in world.master.blocks, "it is reported")
        world.master.expire()
        await eventually(lambda: container in world.master.blocks, "it is reported again")
        world.master.is_down = True
        source = world.ufs_file("a", pattern(1000))
        with pytest.raises(UnavailableError):
            await world.read_all(11, source)
        assert await world.read_all(container, None, 100) == pattern(100)
        world.master.is_down = False
        assert await world.read_all(11, source) == pattern(1000)
        await eventually(lambda: 11 in world.master.blocks, "changes of the dark time are reported")


@trio_test
async def test_unknown_and_clean_containers_at_registration(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        one, _ = await world.write_new(pattern(100))
        two, _ = await world.write_new(pattern(100))
        master = world.master
    master.unknown, master.clean = [one], [two]
    async with running(tmp_path, master=master) as world:
        await world.worker.wait_registered()
        assert one not in world.slabs.by_container
        assert world.slabs.by_container[two].state == CLEAN


@trio_test
async def test_what_only_this_worker_has_is_reported_first(tmp_path: Path) -> None:
    """A million cached files take seconds to report; a worker is registered before."""
    async with running(tmp_path) as world:
        for number in range(7):
            await world.read_all(100 + number, world.ufs_file(f"f{number}", pattern(10)))
        dirty, _ = await world.write_new(pattern(100))
        await world.begin(999, 0)
        master = world.master
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "REPORTS_PER_CALL", 3)
        async with running(tmp_path, master=master) as world:
            await world.worker.wait_registered()
            first = master.reports[0]
            assert {report.container for report in first.reports} == {dirty, 999}
            assert all(report.is_dirty for report in first.reports)
            assert (first.is_last, first.has_more) == (True, True)
            await eventually(lambda: not master.reports[-1].has_more, "the rest is reported")
            assert [len(request.reports) for request in master.reports] == [2, 3, 3, 1]
            assert set(master.blocks) == {dirty, 999, *range(100, 107)}


@trio_test
async def test_a_tree_that_is_removed_does_not_keep_others_waiting(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        containers = [(await world.write_new(pattern(10)))[0] for _ in range(60)]
        turns: list[int] = []
        turn = 0
        drop = world.slabs.drop

        def noting(slab: Slab) -> None:
            turns.append(turn)
            drop(slab)

        world.slabs.drop = noting  # type: ignore[method-assign, assignment]
        world.master.send(FreeCommand(containers, keep_dirty=False))
        while world.slabs.by_container:
            turn += 1
            await trio.lowlevel.checkpoint()
        assert len(turns) == len(containers)
        # Tasks take their turns in any order: one may come last in a round and first in the next.
        assert max(Counter(turns).values()) <= 2 * reporting.FREES_PER_STEP


@trio_test
async def test_not_ready_before_and_after_run(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        worker = Worker(world.config, InProcess(world.master), hostname="here")
        client = InProcess(worker.service)
        with pytest.raises(UnavailableError):
            await client.call(WorkerReport())
        with pytest.raises(UserError):
            await worker.run()
