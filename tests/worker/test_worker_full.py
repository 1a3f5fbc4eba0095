"""A filesystem that others fill, and one that fails."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from worker_world import MB, eventually, pattern, running, trio_test

from alluxiofuse.errors import FsError, NoSpaceError


@pytest.fixture
def small_filesystem(tmp_path: Path) -> Iterator[Path]:
    """16 MiB of tmpfs."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_full_below_the_quota(tmp_path: Path, small_filesystem: Path) -> None:
    @trio_test
    async def run() -> None:
        data = pattern(8 * MB)
        async with running(tmp_path, {"SSD": [(small_filesystem / "t", 14 * MB)]}) as world:
            (small_filesystem / "other").write_bytes(bytes(12 * MB))
            source = world.ufs_file("a", data)
            assert await world.read_all(11, source) == data
            assert world.slabs.counters["uncached_reads"]
            with pytest.raises(NoSpaceError):
                await world.write_new(data)
            world.validate()
            (small_filesystem / "other").unlink()
            directory = world.slabs.tiers.directories[0]
            await eventually(lambda: directory.limit_bytes == directory.quota_bytes, "room is seen")
            for lock in list(world.slabs.locks):
                world.slabs.stop_writing(world.slabs.locks[lock], 0)
                world.slabs.unlock(world.slabs.locks[lock])
            for slab in list(world.slabs.by_container.values()):
                world.slabs.free(slab, keep_dirty=False)
            assert await world.read_all(12, source) == data
            assert world.slabs.by_container[12].present == 0xFF

    run()


@trio_test
async def test_missing_slab_file_is_an_error_of_one_container(tmp_path: Path) -> None:
    async with running(tmp_path, check=False) as world:
        source = world.ufs_file("a", pattern(MB))
        await world.read_all(11, source)
        slab = world.slabs.by_container[11]
        os.unlink(world.slabs.path(slab))
        world.slabs.fds.forget(slab)
        with pytest.raises(FsError):
            await world.read_all(11, source)
        assert await world.read_all(12, source) == pattern(MB)
        assert world.slabs.counters["storage_errors"] == 1
