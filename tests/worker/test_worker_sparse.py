"""Files that are far larger than the tier, and mostly holes."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from worker_world import MB, World, pattern, running, trio_test

from alluxiofuse.errors import NoSpaceError
from alluxiofuse.wire.worker_ops import EndWrite, Reserve, Truncate, Write
from alluxiofuse.worker.accounts import joined, writing_charge
from alluxiofuse.worker.slab import span

FAR = 1 << 37
GIB = 1 << 30
QUOTA = 32 * MB


@given(st.integers(0, 40 * 4096), st.sets(st.integers(0, 12)))
def test_joining_grants(end_blocks: int, pages: set[int]) -> None:
    end = end_blocks * 64
    mask = sum(1 << page for page in pages)
    new_end, rest = joined(end, mask)
    assert new_end >= end
    assert not rest >> (new_end // MB) & 1
    assert not rest & span(0, new_end // MB)
    granted = {*range(new_end // MB), *(page for page in range(13) if rest >> page & 1)}
    assert {page for page in pages if page >= end // MB} <= granted
    assert writing_charge(new_end, rest) <= writing_charge(end, mask)


def check(world: World, container: int) -> None:
    slab = world.slabs.by_container[container]
    found = os.stat(world.slabs.path(slab))
    assert found.st_blocks * 512 <= slab.charged + (64 << 10)
    assert slab.directory.used <= QUOTA


@trio_test
async def test_a_byte_far_behind_the_end(tmp_path: Path) -> None:
    async with running(tmp_path, {"SSD": [(tmp_path / "ssd", QUOTA)]}) as world:
        call = world.client.call
        grant, fd = await world.begin(1)
        os.pwrite(fd, b"start", 0)
        answer = await call(Reserve(grant.lock_id, FAR + 1, FAR))
        assert answer.granted_start <= FAR < answer.granted_end
        os.pwrite(fd, b"x", FAR)
        assert await call(Write(grant.lock_id, 2 * FAR), b"remote") == 2 * FAR
        world.validate()
        check(world, 1)
        end = await call(EndWrite(grant.lock_id, None))
        assert end.size == 2 * FAR + 6
        assert world.slabs.by_container[1].charged <= 3 * MB
        again, other = await world.begin(2, 1, end.size, reserve=100)
        assert world.slabs.by_container[2].charged <= 3 * MB
        joining, third = await world.begin(2, reserve=100)
        assert joining.lock_id == again.lock_id
        await call(Reserve(again.lock_id, FAR // 2 + 10, FAR // 2))
        os.pwrite(other, b"middle", FAR // 2)
        await call(Truncate(again.lock_id, FAR // 2 + 3))
        await call(Truncate(again.lock_id, 3 * FAR))
        world.validate()
        end = await call(EndWrite(again.lock_id, None))
        assert os.pread(fd, 5, 0) == b"start"
        assert os.pread(fd, 10, FAR // 2) == b"mid" + bytes(7)
        assert os.pread(fd, 1, FAR) == b"\0"
        for one in (fd, other, third):
            os.close(one)
        await world.detach(grant.lock_id, again.lock_id)


@trio_test
async def test_sparse_files_are_resumed_after_a_restart(tmp_path: Path) -> None:
    tiers = {"SSD": [(tmp_path / "ssd", QUOTA)]}
    async with running(tmp_path, tiers, check=False) as world:
        grant, fd = await world.begin(1)
        await world.client.call(Reserve(grant.lock_id, FAR + 10, FAR))
        os.pwrite(fd, b"far", FAR)
        os.close(fd)
    async with running(tmp_path, tiers) as world:
        grant, fd = await world.begin(1)
        assert world.slabs.by_container[1].charged <= 2 * MB
        await world.client.call(Reserve(grant.lock_id, FAR + 20, FAR + 10))
        os.pwrite(fd, b"further", FAR + 10)
        end = await world.client.call(EndWrite(grant.lock_id, None))
        assert os.pread(fd, 30, FAR) == b"far" + bytes(7) + b"further"
        os.close(fd)
        assert end.size == FAR + 17
        await world.detach(grant.lock_id)


@pytest.mark.parametrize("seed", range(4))
def test_random_writes_into_sparse_files(tmp_path: Path, seed: int) -> None:
    """Whatever is written within grants, neither the charge nor the quota is exceeded."""
    rng = random.Random(seed)

    async def write(world: World, lock_id: int, fd: int) -> int:
        area = rng.choice([0, 0, 5 * MB, GIB, GIB + 3 * MB, 3 * GIB])
        offset = area + rng.randrange(4 * MB)
        data = pattern(rng.choice([1, 5000, MB + 7]), seed)
        try:
            await world.client.call(Reserve(lock_id, offset + len(data), offset))
        except NoSpaceError:
            return 0
        return os.pwrite(fd, data, offset)

    @trio_test
    async def test() -> None:
        async with running(tmp_path, {"SSD": [(tmp_path / "ssd", QUOTA)]}) as world:
            old = size = 0
            for container in range(1, 6):
                grant, fd = await world.begin(container, old, size, reserve=rng.choice([0, 100, 3 * MB]))
                for _ in range(8):
                    if rng.random() < 0.2:
                        wanted = rng.choice([0, MB + 5, GIB + 5, 4 * GIB, rng.randrange(8 * MB)])
                        await world.client.call(Truncate(grant.lock_id, wanted))
                    await write(world, grant.lock_id, fd)
                    world.validate()
                    check(world, container)
                os.close(fd)
                end = await world.client.call(EndWrite(grant.lock_id, None))
                world.validate()
                check(world, container)
                await world.detach(grant.lock_id)
                old, size = container, end.size

    test()
