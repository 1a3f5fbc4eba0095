"""Attach, Fetch, Read: from the under storage into slabs and out again."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import trio
from worker_world import MB, eventually, pattern, payload_of, running, trio_test

from alluxiofuse.errors import NoSpaceError, StaleError, UfsChangedError, UfsUnavailableError
from alluxiofuse.rpc.inprocess import InProcess
from alluxiofuse.ufs import registry
from alluxiofuse.ufs.base import UnderStorage
from alluxiofuse.ufs.local import LocalUnderStorage
from alluxiofuse.wire.types import FreeCommand
from alluxiofuse.wire.worker_ops import Attach, Read, WorkerReport


@trio_test
async def test_where_the_store_has_a_checksum_of_the_whole_a_page_brings_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is not too long for that, and of which nothing is here yet."""
    known = dataclasses.replace(LocalUnderStorage.capabilities, whole_read_bytes=4 * MB)
    monkeypatch.setattr(LocalUnderStorage, "capabilities", known)
    async with running(tmp_path) as world:
        small, _ = await world.attach(11, world.ufs_file("a", pattern(4 * MB)))
        assert (await world.fetch(small.lock_id, 3 * MB + 5, 10)).is_complete
        long, _ = await world.attach(12, world.ufs_file("b", pattern(4 * MB + 1)))
        assert (await world.fetch(long.lock_id, 3 * MB + 5, 10)).pages == b"\x08"


@trio_test
async def test_attach_fetch_read_by_descriptor(tmp_path: Path) -> None:
    data = pattern(5 * MB + 123)
    async with running(tmp_path) as world:
        source = world.ufs_file("a", data)
        attached, fd = await world.attach(11, source)
        assert attached.lock_id
        assert attached.is_durable
        assert attached.presence.pages == b"\0"
        presence = await world.fetch(attached.lock_id, 3 * MB + 5, 10)
        assert presence.pages == b"\x08"
        assert os.pread(fd, 100, 3 * MB) == data[3 * MB : 3 * MB + 100]
        presence = await world.fetch(attached.lock_id, 0, len(data))
        assert presence.is_complete
        assert os.pread(fd, len(data) + 10, 0) == data
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
        os.close(fd)
        await world.detach(attached.lock_id)
        assert world.slabs.counters["ufs_read_bytes"] == len(data)


@trio_test
async def test_small_random_read_fetches_one_page(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        source = world.ufs_file("a", pattern(40 * MB))
        attached, fd = await world.attach(11, source)
        os.close(fd)
        for offset in (0, 17 * MB, 5 * MB + 4096, 33 * MB):
            await world.fetch(attached.lock_id, offset, 4096)
        await world.settled()
        assert world.slabs.counters["ufs_read_bytes"] == 4 * MB


@trio_test
async def test_sequential_reader_is_read_ahead_of(tmp_path: Path) -> None:
    async with running(tmp_path, read_ahead_bytes=16 * MB) as world:
        source = world.ufs_file("a", pattern(64 * MB))
        attached, fd = await world.attach(11, source)
        os.close(fd)
        for page in range(8):
            await world.fetch(attached.lock_id, page * MB, MB)
        await world.settled()
        assert 12 * MB <= world.slabs.counters["ufs_read_bytes"] <= 24 * MB


@trio_test
async def test_read_is_cached_and_survives_loss_of_the_source(tmp_path: Path) -> None:
    data = pattern(7 * MB + 1)
    async with running(tmp_path) as world:
        source = world.ufs_file("a", data)
        assert await world.read_all(11, source) == data
        (world.master.ufs / "a").unlink()
        assert await world.read_all(11, source) == data
        answer = await world.client.exchange(Read(5, 11, source.size, source, source.size - 3, 100))
        assert payload_of(answer) == data[-3:]
        answer = await world.client.exchange(Read(5, 11, source.size, source, source.size, 100))
        assert payload_of(answer) == b""


@trio_test
async def test_many_readers_fetch_each_page_once(tmp_path: Path) -> None:
    data = pattern(12 * MB)
    async with running(tmp_path) as world:
        source = world.ufs_file("a", data)
        results: list[bytes] = []

        async def reader() -> None:
            results.append(await world.read_all(11, source))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(reader)
        assert all(found == data for found in results)
        assert world.slabs.counters["ufs_read_bytes"] == len(data)


@trio_test
async def test_changed_object_is_told_and_what_is_cached_stays(tmp_path: Path) -> None:
    data = pattern(4 * MB)
    async with running(tmp_path) as world:
        source = world.ufs_file("a", data)
        attached, fd = await world.attach(11, source)
        await world.fetch(attached.lock_id, 0, 10)
        world.ufs_file("a", pattern(4 * MB, 2))
        with pytest.raises(UfsChangedError):
            await world.fetch(attached.lock_id, 2 * MB, 10)
        assert os.pread(fd, MB, 0) == data[:MB]
        os.close(fd)


@trio_test
async def test_unknown_container_without_source_is_stale(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        with pytest.raises(StaleError):
            await world.attach(11, None, 100)
        with pytest.raises(StaleError):
            await world.client.call(Read(5, 11, 100, None, 0, 100))


@trio_test
async def test_too_large_for_every_tier_is_read_through(tmp_path: Path) -> None:
    data = pattern(9 * MB)
    async with running(tmp_path, {"SSD": [(tmp_path / "ssd", 2 * MB)]}) as world:
        source = world.ufs_file("a", data)
        assert await world.read_all(11, source) == data
        attached, fd = await world.attach(12, source)
        os.close(fd)
        with pytest.raises(NoSpaceError):
            await world.fetch(attached.lock_id, 0, 8 * MB)
        assert world.slabs.counters["uncached_reads"] > 0
        world.validate()


@trio_test
async def test_holes_of_a_sparse_object_cost_nothing(tmp_path: Path) -> None:
    data = bytes(20 * MB) + b"end"
    async with running(tmp_path) as world:
        source = world.ufs_file("a", data)
        assert await world.read_all(11, source) == data
        await world.settled()
        slab = world.slabs.by_container[11]
        assert slab.present == slab.all_pages
        assert slab.charged == 4096


@trio_test
async def test_locks_end_with_their_connection(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        source = world.ufs_file("a", pattern(MB))
        other = InProcess(world.worker.service)
        attached = await other.call(Attach(9, 11, MB, source, False))
        assert attached.lock_id
        assert world.slabs.by_container[11].locks == 1
        await other.aclose()
        assert not world.slabs.locks
        with pytest.raises(StaleError):
            await world.fetch(attached.lock_id, 0, 10)


@trio_test
async def test_free_waits_for_the_last_lock(tmp_path: Path) -> None:
    data = pattern(MB)
    async with running(tmp_path) as world:
        source = world.ufs_file("a", data)
        attached, fd = await world.attach(11, source)
        await world.fetch(attached.lock_id, 0, MB)
        await eventually(lambda: 11 in world.master.blocks, "the block is reported")
        world.master.send(FreeCommand([11], False))
        await eventually(lambda: bool(world.slabs.by_container[11].free_mode), "the command arrived")
        assert os.pread(fd, MB, 0) == data
        os.close(fd)
        await world.detach(attached.lock_id)
        assert 11 not in world.slabs.by_container
        assert not list((tmp_path / "ssd" / "slabs").glob("*/*"))
        await eventually(lambda: 11 not in world.master.blocks, "the master knows")


@trio_test
async def test_flipped_byte_is_fetched_again_after_restart(tmp_path: Path) -> None:
    data = pattern(3 * MB + 5)
    async with running(tmp_path) as world:
        source = world.ufs_file("a", data)
        small = world.ufs_file("b", data[:1000])
        assert await world.read_all(11, source) == data
        assert await world.read_all(12, small) == data[:1000]
    for path in (tmp_path / "ssd" / "slabs").glob("*/*"):
        with open(path, "r+b") as file:  # noqa: ASYNC230
            file.seek(500)
            byte = file.read(1)
            file.seek(500)
            file.write(bytes([byte[0] ^ 1]))
    async with running(tmp_path) as world:
        attached, fd = await world.attach(11, source)
        assert attached.presence.pages == b"\x0e"
        assert (await world.fetch(attached.lock_id, 0, 10)).is_complete
        assert os.pread(fd, len(data), 0) == data
        os.close(fd)
        assert await world.read_all(12, small) == data[:1000]
        assert world.slabs.counters["checksum_mismatches"] == 2


@trio_test
async def test_restart_serves_without_source_or_master(tmp_path: Path) -> None:
    data = pattern(9 * MB + 5)
    async with running(tmp_path) as world:
        source = world.ufs_file("a", data)
        assert await world.read_all(11, source) == data
        master = world.master
    (master.ufs / "a").unlink()
    master.is_down = True
    async with running(tmp_path, master=master) as world:
        assert await world.read_all(11, source) == data
        report = await world.client.call(WorkerReport())
        assert report.tiers[0].used_bytes == 9 * MB + 4096
        master.is_down = False
        await world.worker.wait_registered()
        assert master.blocks[11].blocks == b"\x01"


class Flaky:
    """A local directory whose reads fail the first times, or come short."""

    def __init__(self, uri: str, options: dict[str, str]) -> None:
        self._real = registry.open_ufs(uri, options)
        self.failures = 2

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    def read(self, path: bytes, offset: int, length: int, fingerprint: bytes | None = None) -> object:
        if self.failures:
            self.failures -= 1
            if self.failures:
                raise UfsUnavailableError("slow down")
            return self._real.read(path, offset, length - 1, fingerprint)
        return self._real.read(path, offset, length, fingerprint)


@trio_test
async def test_failing_and_short_reads_are_retried(tmp_path: Path) -> None:
    def open_flaky(uri: str, options: dict[str, str]) -> UnderStorage:
        return Flaky(uri, options)  # type: ignore[return-value]

    data = pattern(MB)
    async with running(tmp_path, open_ufs=open_flaky) as world:
        source = world.ufs_file("a", data)
        assert await world.read_all(11, source) == data
        assert world.slabs.counters["fetch_retries"] == 2


@trio_test
async def test_wrong_size_of_a_known_container_is_stale(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        source = world.ufs_file("a", pattern(MB))
        await world.read_all(11, source)
        with pytest.raises(StaleError):
            await world.client.call(Attach(5, 11, MB + 1, source, False))
