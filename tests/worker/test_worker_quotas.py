"""Quotas while kernels write by themselves: other processes, of which the worker knows nothing, write to
the slab's file as they do by passthrough."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from mappings import mapped
from worker_world import MB, World, eventually, pattern, running, trio_test

from alluxiofuse.wire.types import CleanCommand
from alluxiofuse.wire.worker_ops import EndWrite, Truncate
from alluxiofuse.worker import growth, openers, passing
from alluxiofuse.worker.brake import Access, Brake

WRITER = """
import os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
start, total, step, pause_ms = map(int, (*sys.argv[2:], 0)[:4])
done = 0
try:
    while done < total:
        time.sleep(pause_ms / 1000)
        done += os.pwrite(fd, b"x" * min(step, total - done), start + done)
    print(done, "all")
except OSError as exc:
    print(done, exc.strerror)
"""
READER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print(len(os.pread(fd, 1 << 20, 0)), len(os.pread(fd, 4096, 1 << 40)))
"""


def brake_trouble(where: Path) -> str:
    """Why there is no brake in a directory; "" when there is."""
    path = where / "brake-probe"
    path.write_bytes(b"")
    try:
        brake = Brake(lambda _: True, lambda _: None)
        try:
            brake.watch(str(path))
        finally:
            brake.stop()
    except OSError as exc:
        return exc.strerror or str(exc)
    finally:
        path.unlink()
    return ""


@pytest.fixture(autouse=True)
def _needs_leases(tmp_path: Path) -> None:
    trouble = openers.trouble_with(str(tmp_path))
    if trouble and os.environ.get("CI") != "true":
        pytest.skip(trouble)


@pytest.fixture
def brake(tmp_path: Path) -> None:
    """Root on Linux >= 6.14, with a filesystem that has it: elsewhere these tests say nothing."""
    trouble = brake_trouble(tmp_path)
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    can = os.geteuid() == 0 and release >= (6, 14)
    if trouble and not (can and os.environ.get("CI") == "true"):
        pytest.skip(f"no brake: {trouble}")
    assert not trouble


@asynccontextmanager
async def small(root: Path, quota_bytes: int, **more: Any) -> AsyncIterator[World]:
    async with running(root, {"SSD": [(root / "ssd", quota_bytes)]}, **more) as world:
        yield world


async def program(script: str, path: str, *args: int) -> list[str]:
    """What it said."""
    command = [sys.executable, "-c", script, path, *map(str, args)]
    done = await trio.run_process(command, capture_stdout=True)
    return done.stdout.decode().strip().split(maxsplit=1)


def _writer(path: str, size: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITER, path, "0", str(size), str(MB)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


async def _begun(world: World, container: int = 50) -> tuple[int, str]:
    grant, fd = await world.begin(container, passes=True)
    assert grant.passes
    os.close(fd)
    return grant.lock_id, world.slabs.path(world.slabs.by_container[container])


async def _ended(world: World, lock_id: int) -> int:
    """Its size."""
    end = await world.client.call(EndWrite(lock_id, None))
    assert end.is_sealed
    world.validate()
    await world.detach(lock_id)
    return end.size


@trio_test
async def test_a_tier_that_is_full_refuses_and_goes_on(tmp_path: Path, brake: None) -> None:
    async with small(tmp_path, 32 * MB) as world:
        lock_id, path = await _begun(world)
        done, why = await program(WRITER, path, 0, 100 * MB, 64 << 10)
        assert why == "No space left on device"
        assert int(done) == 32 * MB
        directory = world.slabs.tiers.directories[0]
        assert directory.used == 32 * MB
        assert world.slabs.counters["writes_refused"] == 1
        # What is there may be read, also at its end, and written again.
        assert await program(READER, path) == [str(MB), "0"]
        assert (await program(WRITER, path, 5, 1000, 100))[1] == "all"
        assert await _ended(world, lock_id) == 32 * MB
        world.master.send(CleanCommand([50]))
        await eventually(lambda: directory.evictable == 32 * MB, "it is clean")
        lock_id, path = await _begun(world, 51)
        assert (await program(WRITER, path, 0, 20 * MB, MB))[1] == "all"
        assert await _ended(world, lock_id) == 20 * MB
        assert 50 not in world.slabs.by_container, "it gave way"


@trio_test
async def test_a_program_waits_for_room_that_uploads_make(tmp_path: Path, brake: None) -> None:
    async with small(tmp_path, 32 * MB) as world:
        first, _ = await world.write_new(pattern(20 * MB))
        lock_id, path = await _begun(world)
        found: list[list[str]] = []
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                found.append(await program(WRITER, path, 0, 30 * MB, MB))

            nursery.start_soon(write)
            await eventually(lambda: world.slabs.tiers.directories[0].used > 31 * MB, "it is full")
            await world.heartbeats()
            assert not found
            world.master.send(CleanCommand([first]))
        assert found == [[str(30 * MB), "all"]]
        assert await _ended(world, lock_id) == 30 * MB


@trio_test
async def test_a_sparse_file_is_charged_where_it_is_written(tmp_path: Path, brake: None) -> None:
    async with small(tmp_path, 32 * MB) as world:
        lock_id, path = await _begun(world)
        await world.client.call(Truncate(lock_id, 1 << 34))
        for number in range(5):
            assert (await program(WRITER, path, number << 31, 4096, 4096))[1] == "all"
        assert (await program(WRITER, path, 3 << 32, 60 * MB, MB))[1] == "No space left on device"
        assert world.slabs.tiers.directories[0].used <= 32 * MB
        assert await _ended(world, lock_id) == 1 << 34


@trio_test
async def test_a_program_that_is_killed_while_it_waits(
    tmp_path: Path, brake: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with small(tmp_path, 16 * MB) as world:
        dirty, _ = await world.write_new(pattern(14 * MB))
        lock_id, path = await _begun(world)
        with _writer(path, 8 * MB) as child:
            await eventually(lambda: world.slabs.tiers.directories[0].used > 15 * MB, "it is full")
            await world.heartbeats()
            child.kill()
            await trio.to_thread.run_sync(child.wait)
        world.master.send(CleanCommand([dirty]))
        await eventually(lambda: not world.slabs.by_container[50].pins, "its question is over")
        await _ended(world, lock_id)


@trio_test
async def test_the_brake_is_off_with_room_enough_and_comes_on_in_time(
    tmp_path: Path, brake: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passing, "HEADROOM_BYTES", 192 * MB)
    asked: list[Access] = []
    really = passing.Passing._on_access

    def on_access(self: passing.Passing, access: Access) -> None:
        asked.append(access)
        really(self, access)

    monkeypatch.setattr(passing.Passing, "_on_access", on_access)
    async with small(tmp_path, 512 * MB) as world:
        lock_id, path = await _begun(world)
        assert (await program(WRITER, path, 0, 100 * MB, MB))[1] == "all"
        assert not asked
        slab = world.slabs.by_container[50]
        await eventually(lambda: slab.charged >= 100 * MB, "what was written is charged")
        done, why = await program(WRITER, path, 100 * MB, 1000 * MB, 64 << 10)
        assert (int(done), why) == (412 * MB, "No space left on device")
        assert asked
        await _ended(world, lock_id)


@trio_test
async def test_the_brake_comes_on_for_all_when_one_more_begins_with_little_room(
    tmp_path: Path, brake: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passing, "HEADROOM_BYTES", 24 * MB)
    monkeypatch.setattr(passing, "MIN_PAUSE_S", 30.0)  # No look in between.
    async with small(tmp_path, 40 * MB) as world:
        first, path = await _begun(world, 50)
        await world.heartbeats()
        await world.write_new(pattern(20 * MB))
        second, _ = await _begun(world, 51)
        monkeypatch.setattr(growth, "PATIENCE_S", 0.1)
        assert (await program(WRITER, path, 0, 100 * MB, MB))[1] == "No space left on device"
        assert world.slabs.tiers.directories[0].used <= 40 * MB
        await _ended(world, first)
        await _ended(world, second)


@trio_test
async def test_room_is_made_ahead_of_what_kernels_write(
    tmp_path: Path, brake: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passing, "HEADROOM_BYTES", 8 * MB)
    async with small(tmp_path, 96 * MB, high_watermark=1.0) as world:
        for number in range(11):
            await world.read_all(number + 1, world.ufs_file(f"f{number}", pattern(8 * MB, number)))
        lock_id, path = await _begun(world)
        # No faster, for a headroom of milliseconds only.
        assert (await program(WRITER, path, 0, 40 * MB, 64 << 10, 1))[1] == "all"
        await eventually(lambda: world.slabs.tiers.directories[0].available >= 8 * MB, "it is kept free")
        assert await _ended(world, lock_id) == 40 * MB


@trio_test
async def test_stores_through_a_mapping_are_charged_when_they_are_seen(tmp_path: Path, brake: None) -> None:
    async with small(tmp_path, 64 * MB) as world:
        lock_id, path = await _begun(world)
        await world.client.call(Truncate(lock_id, 20 * MB))
        slab = world.slabs.by_container[50]
        with mapped(os.open(path, os.O_RDWR), 20 * MB) as mapping:
            for page in range(10):
                mapping.write(2 * page * MB, b"stored")
            await eventually(lambda: slab.charged >= 10 * MB, "it is charged")
        assert await _ended(world, lock_id) == 20 * MB
        assert slab.charged == 10 * MB


@trio_test
async def test_a_worker_that_ends_lets_programs_pass(tmp_path: Path, brake: None) -> None:
    async with small(tmp_path, 16 * MB) as world:
        await world.write_new(pattern(14 * MB))
        _, path = await _begun(world)
        child = _writer(path, 8 * MB)
        await eventually(lambda: world.slabs.tiers.directories[0].used > 15 * MB, "it is full")
        await world.heartbeats()
        assert child.poll() is None
        world.validate()
    assert child.communicate(timeout=20)[0].decode().split() == [str(8 * MB), "all"]


def _without_brake(*_: Callable[..., object]) -> Brake:
    raise OSError(1, "for this test")


@trio_test
async def test_without_a_brake_there_must_be_room_to_spare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passing, "Brake", _without_brake)
    async with small(tmp_path, 4 << 30) as world:
        lock_id, path = await _begun(world)
        slab = world.slabs.by_container[50]
        assert (await program(WRITER, path, 0, 50 * MB, MB))[1] == "all"
        await eventually(lambda: slab.charged >= 50 * MB, "it is charged")
        await _ended(world, lock_id)
    monkeypatch.setattr(passing, "MIN_ROOM_BYTES", 8 << 30)
    async with small(tmp_path, 4 << 30) as world:
        grant, fd = await world.begin(51, passes=True)
        assert not grant.passes
        assert not world.slabs.passing
        os.close(fd)
        await world.client.call(EndWrite(grant.lock_id, None))


@trio_test
async def test_memory_has_no_brake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "PATIENCE_S", 0.1)
    with tempfile.TemporaryDirectory(prefix="af-passing-", dir="/dev/shm") as where:
        async with running(tmp_path, {"MEM": [(Path(where), 64 * MB)]}) as world:
            grant, fd = await world.begin(50, passes=True)
            assert not grant.passes
            os.pwrite(fd, b"data", 0)
            os.close(fd)
            assert (await world.client.call(EndWrite(grant.lock_id, None))).is_sealed
            await world.detach(grant.lock_id)
