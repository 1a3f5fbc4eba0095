"""Who has a slab open, as the kernel knows it, and holes in what somebody reads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mappings import mapped
from worker_world import MB, World, pattern, running, trio_test

from alluxiofuse.worker import openers
from alluxiofuse.worker.eviction import Punch
from alluxiofuse.worker.room import Room


def _require_leases(path: Path) -> None:
    """Of a disk's own filesystem it is expected everywhere."""
    trouble = openers.trouble_with(str(path))
    if trouble and os.environ.get("CI") != "true":
        pytest.skip(f"{path}: {trouble}")
    assert not trouble


def test_descriptors_and_mappings_are_seen(tmp_path: Path) -> None:
    _require_leases(tmp_path)
    path = tmp_path / "file"
    path.write_bytes(pattern(MB))
    assert not openers.is_open(str(path))
    fd = os.open(path, os.O_RDONLY)
    assert not openers.is_written(str(path))
    assert openers.is_open(str(path))
    with mapped(fd, MB, for_writing=False):
        assert not openers.is_written(str(path))
        assert openers.is_open(str(path))
    assert not openers.is_open(str(path))
    with mapped(os.open(path, os.O_RDWR), MB):
        assert openers.is_written(str(path))
    assert not openers.is_open(str(path))


def test_another_process_is_seen(tmp_path: Path) -> None:
    _require_leases(tmp_path)
    path = tmp_path / "file"
    path.write_bytes(b"x")
    command = [sys.executable, "-c", f"f = open({str(path)!r}, 'r+b'); print('open', flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert openers.is_written(str(path))
        child.kill()
        child.wait()
        assert not openers.is_open(str(path))


def test_who_opens_it_while_it_is_asked_waits_for_moments_only(tmp_path: Path) -> None:
    """And nobody is killed by the signal that a broken lease sends."""
    _require_leases(tmp_path)
    path = tmp_path / "file"
    path.write_bytes(b"x")
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            openers.is_written(str(path))
            openers.is_open(str(path))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for _ in range(2000):
            os.close(os.open(path, os.O_RDWR))
    finally:
        is_over.set()
        thread.join()


def test_filesystems_without_leases_take_no_passthrough() -> None:
    assert openers.trouble_with("/proc")


async def _large(world: World) -> tuple[Punch, int, bytes]:
    """One block of a clean slab that nobody has a lock on, a descriptor of it, and its bytes."""
    large = pattern(66 * MB, 1)
    source = world.ufs_file("large", large)
    attached, fd = await world.attach(1, source)
    for offset in range(0, 66 * MB, 22 * MB):
        await world.fetch(attached.lock_id, offset, 22 * MB)
    await world.detach(attached.lock_id)
    slab = world.slabs.by_container[1]
    return Punch(slab, slab.block_pages(0)), fd, large


@trio_test
async def test_no_hole_is_punched_into_what_a_stranger_has_mapped(tmp_path: Path) -> None:
    _require_leases(tmp_path)
    async with running(tmp_path, {"SSD": [(tmp_path / "ssd", 100 * MB)]}, high_watermark=1.0) as world:
        step, fd, large = await _large(world)
        room = Room(world.slabs, high_watermark=1.0, low_watermark=1.0)
        with mapped(fd, 66 * MB, for_writing=False) as mapping:
            room._execute_now(step)
            assert mapping.read(0, 66 * MB) == large
            assert world.slabs.counters["held_by_strangers"] == 1
        room._execute_now(step)
        assert world.slabs.counters["evicted_blocks"] == 1


@trio_test
async def test_an_attach_says_whether_the_kernel_may_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _require_leases(tmp_path)
    async with running(tmp_path) as world:
        attached, fd = await world.attach(1, world.ufs_file("a", b"bytes"))
        assert attached.passes
        os.close(fd)
        await world.detach(attached.lock_id)
    monkeypatch.setattr(openers, "trouble_with", lambda _: "for this test")
    async with running(tmp_path, {"SSD": [(tmp_path / "ssd", 100 * MB)]}, high_watermark=1.0) as world:
        step, fd, large = await _large(world)
        attached, other = await world.attach(1, None, 66 * MB)
        assert not attached.passes
        os.close(other)
        await world.detach(attached.lock_id)
        room = Room(world.slabs, high_watermark=1.0, low_watermark=1.0)
        room._execute_now(step)
        assert os.pread(fd, 66 * MB, 0) == large
        os.close(fd)
        room._execute_now(step)
        assert world.slabs.counters["evicted_blocks"] == 1
