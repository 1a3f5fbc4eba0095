"""Quotas, eviction, tiers, demotion, and directories that are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from worker_world import MB, World, eventually, make_config, pattern, running, trio_test

from alluxiofuse.errors import NoSpaceError, UserError
from alluxiofuse.wire.types import CleanCommand
from alluxiofuse.worker.eviction import Punch
from alluxiofuse.worker.recovery import open_storage
from alluxiofuse.worker.room import Room
from alluxiofuse.worker.slab import CLEAN


def used(world: World) -> list[int]:
    return [directory.used for directory in world.slabs.tiers.directories]


@trio_test
async def test_least_recently_used_gives_way_and_never_what_is_locked(tmp_path: Path) -> None:
    async with running(tmp_path, {"SSD": [(tmp_path / "ssd", 10 * MB)]}, high_watermark=1.0) as world:
        sources = {n: world.ufs_file(f"f{n}", pattern(2 * MB, n)) for n in range(1, 8)}
        attached, fd = await world.attach(1, sources[1])
        await world.fetch(attached.lock_id, 0, 2 * MB)
        for number in (2, 3, 4, 5):
            await world.read_all(number, sources[number])
        await world.read_all(2, sources[2])
        for number in (6, 7):
            await world.read_all(number, sources[number])
        assert set(world.slabs.by_container) == {1, 2, 5, 6, 7}
        assert os.pread(fd, 2 * MB, 0) == pattern(2 * MB, 1)
        os.close(fd)
        for number, source in sources.items():
            assert await world.read_all(number, source) == pattern(2 * MB, number)
            world.validate()


@trio_test
async def test_dirty_is_never_dropped(tmp_path: Path) -> None:
    async with running(tmp_path, {"SSD": [(tmp_path / "ssd", 6 * MB)]}) as world:
        dirty, _ = await world.write_new(pattern(3 * MB))
        for number in range(1, 6):
            source = world.ufs_file(f"f{number}", pattern(2 * MB, number))
            assert await world.read_all(number, source) == pattern(2 * MB, number)
            world.validate()
        assert await world.read_all(dirty, None, 3 * MB) == pattern(3 * MB)


@trio_test
async def test_victims_cascade_to_the_next_tier(tmp_path: Path) -> None:
    tiers = {
        "MEM": [(tmp_path / "mem", 4 * MB)],
        "SSD": [(tmp_path / "ssd", 8 * MB)],
        "HDD": [(tmp_path / "hdd", 12 * MB)],
    }
    async with running(tmp_path, tiers, high_watermark=1.0) as world:
        sources = {n: world.ufs_file(f"f{n}", pattern(2 * MB, n)) for n in range(1, 13)}
        for number, source in sources.items():
            assert await world.read_all(number, source) == pattern(2 * MB, number)
            await world.settled()
            world.validate()
        assert used(world) == [4 * MB, 8 * MB, 12 * MB]
        before = world.slabs.counters["ufs_read_bytes"]
        for number, source in sources.items():
            assert await world.read_all(number, source) == pattern(2 * MB, number)
        assert world.slabs.counters["ufs_read_bytes"] == before
        assert world.slabs.counters["demoted_slabs"] >= 10
        extra = world.ufs_file("extra", pattern(2 * MB, 99))
        await world.read_all(99, extra)
        assert len(world.slabs.by_container) == 12


@trio_test
async def test_dirty_moves_down_when_nothing_else_helps(tmp_path: Path) -> None:
    tiers = {"MEM": [(tmp_path / "mem", 4 * MB)], "SSD": [(tmp_path / "ssd", 8 * MB)]}
    async with running(tmp_path, tiers, high_watermark=1.0) as world:
        source = world.ufs_file("a", pattern(3 * MB))
        attached, fd = await world.attach(1, source)
        await world.fetch(attached.lock_id, 0, 3 * MB)
        grant, fd2 = await world.begin(2, 1, 3 * MB, source)
        assert not grant.is_durable
        os.pwrite(fd2, b"dirty", 0)
        from alluxiofuse.wire.worker_ops import EndWrite

        await world.client.call(EndWrite(grant.lock_id, b"\1"))
        os.close(fd)
        os.close(fd2)
        await world.detach(attached.lock_id, grant.lock_id)
        other = world.ufs_file("b", pattern(4 * MB, 2))
        attached, fd = await world.attach(3, other)
        os.close(fd)
        if world.slabs.by_container[3].directory.tier == 0:
            await world.fetch(attached.lock_id, 0, 4 * MB)
            assert world.slabs.by_container[2].directory.is_durable
        assert await world.read_all(2, None, 3 * MB) == b"dirty" + pattern(3 * MB)[5:]


@trio_test
async def test_watermarks_in_the_background(tmp_path: Path) -> None:
    tiers = {"SSD": [(tmp_path / "ssd", 10 * MB)]}
    async with running(tmp_path, tiers, high_watermark=0.9, low_watermark=0.5) as world:
        for number in range(1, 11):
            await world.read_all(number, world.ufs_file(f"f{number}", pattern(MB, number)))
        await eventually(lambda: used(world)[0] <= 5 * MB, "down to the low watermark")
        assert 10 in world.slabs.by_container
        assert 1 not in world.slabs.by_container


@trio_test
async def test_big_container_loses_its_least_recent_blocks(tmp_path: Path) -> None:
    size = 130 * MB
    async with running(tmp_path, {"SSD": [(tmp_path / "ssd", 170 * MB)]}, high_watermark=1.0) as world:
        path = world.master.ufs / "big"
        with open(path, "wb") as file:  # noqa: ASYNC230
            for number in range(130):
                file.write(number.to_bytes(4, "big") * (MB // 4))
        source = world.ufs_file("other", pattern(50 * MB))
        entry = path.stat()
        from alluxiofuse.ufs import registry
        from alluxiofuse.wire.types import UfsSource

        storage = registry.open_ufs(f"file://{world.master.ufs}", {"fsync": "false"})
        big = UfsSource(1, b"big", entry.st_size, storage.stat(b"big").fingerprint)
        storage.close()
        attached, fd = await world.attach(1, big)
        await world.fetch(attached.lock_id, 0, size)
        for offset in (128 * MB, 0):
            await world.fetch(attached.lock_id, offset, MB)
        await world.detach(attached.lock_id)
        os.close(fd)
        await world.settled()
        await world.read_all(2, source)
        slab = world.slabs.by_container[1]
        assert slab.present == slab.block_pages(0) | slab.block_pages(2)
        await eventually(lambda: world.master.blocks[1].blocks == b"\x05", "the master knows")
        with open(world.slabs.path(slab), "rb") as kept:  # noqa: ASYNC230
            assert os.pread(kept.fileno(), 4, 5 * MB) == (5).to_bytes(4, "big")


@trio_test
async def test_open_files_leave_room_for_new_ones(tmp_path: Path) -> None:
    async with running(tmp_path, {"SSD": [(tmp_path / "ssd", 40 * MB)]}) as world:
        source = world.ufs_file("big", pattern(38 * MB))
        attached, fd = await world.attach(1, source)
        await world.fetch(attached.lock_id, 0, 20 * MB)
        with pytest.raises(NoSpaceError):
            await world.fetch(attached.lock_id, 20 * MB, 18 * MB)
        assert os.pread(fd, MB, 3 * MB) == pattern(38 * MB)[3 * MB : 4 * MB]
        await world.write_new(pattern(7 * MB, 1))
        os.close(fd)


@trio_test
async def test_max_free_allocation_over_directories(tmp_path: Path) -> None:
    tiers = {"SSD": [(tmp_path / "a", 20 * MB), (tmp_path / "b", 30 * MB)]}
    async with running(tmp_path, tiers) as world:
        for number in range(1, 8):
            await world.write_new(pattern(4 * MB, number))
        assert sorted(used(world)) == [8 * MB, 20 * MB] or sorted(used(world)) == [12 * MB, 16 * MB]
        world.master.send(CleanCommand(list(world.slabs.by_container)))
        slabs = world.slabs.by_container
        await eventually(lambda: all(slab.state == CLEAN for slab in slabs.values()), "clean")


def test_foreign_and_shared_directories_are_refused(tmp_path: Path) -> None:
    def config(state: str, ssd: str, quota: int = MB) -> object:
        return make_config(tmp_path / state, {"SSD": [(tmp_path / ssd, quota)]})

    opened = open_storage(config("one", "ssd"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="another state directory"):
        open_storage(config("two", "ssd"))  # type: ignore[arg-type]
    assert not (tmp_path / "two").exists()
    with pytest.raises(UserError, match="in use"):
        open_storage(config("one", "other"))  # type: ignore[arg-type]
    assert not (tmp_path / "other").exists()
    opened.close()
    open_storage(config("one", "ssd")).close()  # type: ignore[arg-type]
    (tmp_path / "theirs" / "slabs").mkdir(parents=True)
    with pytest.raises(UserError, match="not of a worker"):
        open_storage(config("three", "theirs"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="larger than its filesystem"):
        open_storage(config("three", "new", 1 << 60))  # type: ignore[arg-type]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError):
        open_storage(config("three", "file"))  # type: ignore[arg-type]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "alluxiofuse.json").write_text("{")
    with pytest.raises(UserError, match="not readable"):
        open_storage(config("three", "bad"))  # type: ignore[arg-type]
    twice = make_config(tmp_path / "three", {"SSD": [(tmp_path / "x", MB), (tmp_path / "x", MB)]})
    with pytest.raises(UserError, match="twice"):
        open_storage(twice)
    with pytest.raises(UserError, match="at least one tier"):
        open_storage(make_config(tmp_path / "three", {}))
    assert not (tmp_path / "three").exists()


@trio_test
async def test_memory_tier_that_is_empty_after_a_reboot(tmp_path: Path) -> None:
    import shutil

    tiers = {"MEM": [(tmp_path / "mem", 8 * MB)]}
    async with running(tmp_path, tiers) as world:
        source = world.ufs_file("a", pattern(MB))
        await world.read_all(1, source)
        dirty, _ = await world.write_new(pattern(MB, 2))
    shutil.rmtree(tmp_path / "mem")
    async with running(tmp_path, tiers) as world:
        await world.worker.wait_registered()
        assert not world.slabs.by_container
        assert not world.master.blocks
        assert dirty
        assert await world.read_all(1, source) == pattern(MB)


@trio_test
async def test_directory_taken_out_and_put_back_keeps_what_is_dirty(tmp_path: Path) -> None:
    a, b = (tmp_path / "a", 40 * MB), (tmp_path / "b", 8 * MB)
    async with running(tmp_path, {"SSD": [a, b]}) as world:
        dirty, _ = await world.write_new(pattern(MB))
        assert world.slabs.by_container[dirty].directory.root == str(tmp_path / "a")
    async with running(tmp_path, {"SSD": [b]}) as world:
        assert not world.slabs.by_container
    async with running(tmp_path, {"SSD": [a, b]}) as world:
        assert await world.read_all(dirty, None, MB) == pattern(MB)
        await trio.lowlevel.checkpoint()


@trio_test
async def test_no_hole_is_punched_into_what_a_stranger_has_open(tmp_path: Path) -> None:
    """A client whose connection broke, or of a worker that died, has no lock any more, but a descriptor."""
    async with running(tmp_path, {"SSD": [(tmp_path / "ssd", 100 * MB)]}, high_watermark=1.0) as world:
        large = pattern(66 * MB, 1)
        source = world.ufs_file("large", large)
        attached, fd = await world.attach(1, source)
        for offset in range(0, 66 * MB, 22 * MB):
            await world.fetch(attached.lock_id, offset, 22 * MB)
        await world.detach(attached.lock_id)
        slab = world.slabs.by_container[1]
        step = Punch(slab, slab.block_pages(0))
        room = Room(world.slabs, high_watermark=1.0, low_watermark=1.0)
        room._execute_now(step)
        assert os.pread(fd, 66 * MB, 0) == large
        assert world.slabs.counters["held_by_strangers"] == 1
        os.close(fd)
        room._execute_now(step)
        assert world.slabs.counters["evicted_blocks"] == 1
        assert await world.read_all(1, source) == large
        world.validate()
