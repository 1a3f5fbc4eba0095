"""Seals that meet other writers, other seals and failing disks."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from worker_world import MB, World, eventually, pattern, running, trio_test

from alluxiofuse.errors import ConnectionLost, FsError
from alluxiofuse.rpc.base import Answer, FileRange, Peer
from alluxiofuse.rpc.filerange import read_range
from alluxiofuse.rpc.inprocess import InProcess
from alluxiofuse.wire.worker_ops import (
    BeginWrite,
    Detach,
    EndWrite,
    Read,
    Truncate,
    Write,
    WriteEnd,
    WriteGrant,
)
from alluxiofuse.worker import checksums, sealing


class Pause:
    """Holds the first thread that computes checksums, after it has read the pages."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            found = function(*args)
            is_main = threading.current_thread() is threading.main_thread()
            if not is_main and not self.reached.is_set():
                self.reached.set()
                assert self.go_on.wait(20)
            return found

        return run


@pytest.fixture
def pause(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pause]:
    found = Pause()
    monkeypatch.setattr(checksums, "page_checksums", found.wrap(checksums.page_checksums))
    yield found
    found.go_on.set()


async def _begin_as(world: World, session_id: int, container: int, old: int = 0, size: int = 0) -> WriteGrant:
    request = BeginWrite(session_id, container, old, size, None, 0, False)
    return (await world.client.exchange(request)).result


@trio_test
async def test_what_a_writer_puts_where_zeros_were_survives_a_seal_under_way(
    tmp_path: Path, pause: Pause
) -> None:
    async with running(tmp_path) as world:
        grant, fd = await world.begin(70, reserve=3 * MB)
        os.pwrite(fd, bytes(2 * MB) + b"end", 0)
        first: list[WriteEnd] = []
        async with trio.open_nursery() as nursery:

            async def end() -> None:
                first.append(await world.client.call(EndWrite(grant.lock_id, None)))

            nursery.start_soon(end)
            await trio.to_thread.run_sync(pause.reached.wait)
            other = await _begin_as(world, 6, 70)
            os.pwrite(fd, b"x" * MB, 0)
            pause.go_on.set()
        assert not first[0].is_sealed
        assert os.pread(fd, MB, 0) == b"x" * MB
        last = await world.client.call(EndWrite(other.lock_id, None))
        assert last.is_sealed
        os.close(fd)
        assert await world.read_all(70, None, last.size) == b"x" * MB + bytes(MB) + b"end"
        await world.detach(grant.lock_id, other.lock_id)


@trio_test
async def test_a_seal_that_was_overtaken_by_a_seal_and_the_next_writer(tmp_path: Path, pause: Pause) -> None:
    data = pattern(2 * MB)
    async with running(tmp_path) as world:
        grant, fd = await world.begin(71, reserve=2 * MB)
        os.pwrite(fd, data, 0)
        ends: list[WriteEnd] = []
        second = trio.Event()
        async with trio.open_nursery() as nursery:

            async def end(lock_id: int) -> None:
                ends.append(await world.client.call(EndWrite(lock_id, None)))
                second.set()

            nursery.start_soon(end, grant.lock_id)
            await trio.to_thread.run_sync(pause.reached.wait)
            other = await _begin_as(world, 6, 71)
            nursery.start_soon(end, other.lock_id)
            with trio.move_on_after(0.3):  # It may go first, or wait for its turn.
                await second.wait()
            if second.is_set():
                await _begin_as(world, 6, 72, 71, len(data))
            pause.go_on.set()
        assert sorted(end.is_sealed for end in ends) == [False, True]
        again = await _begin_as(world, 6, 72, 71, len(data))
        os.pwrite(fd, b"new", 0)
        os.close(fd)
        assert (await world.client.call(EndWrite(again.lock_id, None))).is_sealed
        assert await world.read_all(72, None, len(data)) == b"new" + data[3:]
        await world.detach(grant.lock_id, other.lock_id, again.lock_id)


@trio_test
async def test_a_vanished_client_does_not_seal_what_the_next_one_writes(tmp_path: Path) -> None:
    data = pattern(5000)
    async with running(tmp_path) as world:
        other = InProcess(world.worker.service)
        first = (await other.exchange(BeginWrite(6, 73, 0, 0, None, 0, False))).result
        await other.call(Write(first.lock_id, 0), data)
        assert (await other.call(EndWrite(first.lock_id, None))).is_sealed
        grant, fd = await world.begin(74, 73, len(data))
        os.close(fd)
        await other.aclose()
        await world.heartbeats()
        assert [seal for seal in world.master.seals if seal.container == 74] == []
        await world.client.call(EndWrite(grant.lock_id, None))
        await world.detach(grant.lock_id)


@trio_test
async def test_a_seal_that_the_client_could_not_commit_is_reported(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        grant, fd = await world.begin(75)
        os.write(fd, b"committed by nobody")
        os.close(fd)
        await world.client.call(EndWrite(grant.lock_id, None))
        await world.client.call(Detach([grant.lock_id], True))
        await eventually(lambda: bool(world.master.seals), "the seal is reported")
        assert (world.master.seals[0].container, world.master.seals[0].size) == (75, 19)


@trio_test
async def test_a_seal_whose_client_goes_meanwhile_is_reported(tmp_path: Path, pause: Pause) -> None:
    async with running(tmp_path) as world, trio.open_nursery() as nursery:
        other = InProcess(world.worker.service)
        grant = (await other.exchange(BeginWrite(6, 76, 0, 0, None, 3 * MB, False))).result
        await other.call(Write(grant.lock_id, 0), pattern(3 * MB))

        async def end() -> None:
            with contextlib.suppress(ConnectionLost):
                await other.call(EndWrite(grant.lock_id, None))

        nursery.start_soon(end)
        await trio.to_thread.run_sync(pause.reached.wait, 20)
        await other.aclose()
        pause.go_on.set()
        await eventually(lambda: bool(world.master.seals), "the seal is reported")
        assert (world.master.seals[0].container, world.master.seals[0].size) == (76, 3 * MB)


@trio_test
async def test_a_seal_that_a_failing_disk_refused_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "failing disk")

    async with running(tmp_path, session_grace_s=0.01) as world:
        for size in (100, 3 * MB):  # Sealed at once, and in a thread.
            grant, fd = await world.begin(80 + size, reserve=size)
            os.pwrite(fd, pattern(size), 0)
            os.close(fd)
            with monkeypatch.context() as patch:
                patch.setattr(checksums, "page_checksums", fail)
                for _ in range(2):
                    with pytest.raises(FsError, match="failing disk"):
                        await world.client.call(EndWrite(grant.lock_id, None))
            assert (await world.client.call(EndWrite(grant.lock_id, None))).is_sealed
            await world.detach(grant.lock_id)
            assert await world.read_all(80 + size, None, size) == pattern(size)


@trio_test
async def test_who_gives_up_a_seal_that_fails_leaves_it_to_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "failing disk")

    monkeypatch.setattr(sealing, "RESEAL_S", 0.01)
    async with running(tmp_path, session_grace_s=0.01) as world:
        grant, fd = await world.begin(90, reserve=3 * MB)
        os.pwrite(fd, pattern(3 * MB), 0)
        os.close(fd)
        with monkeypatch.context() as patch:
            patch.setattr(checksums, "page_checksums", fail)
            with pytest.raises(FsError):
                await world.client.call(EndWrite(grant.lock_id, None))
            await world.detach(grant.lock_id)
            await eventually(lambda: world.slabs.counters["storage_errors"] > 2, "it is tried again")
        await eventually(lambda: bool(world.master.seals), "it is sealed")
        assert world.master.seals[0].size == 3 * MB
        assert await world.read_all(90, None, 3 * MB) == pattern(3 * MB)


@trio_test
async def test_making_shorter_what_is_being_sent(tmp_path: Path) -> None:
    """The reader gets all that it was promised, whatever the writer does to the slab."""
    size = 6 * MB
    async with running(tmp_path) as world:
        container, _ = await world.write_new(pattern(size))
        reading = world.worker.service._running().reading
        answer = reading.read(
            Peer("slow", is_trusted=True, is_authenticated=True, can_pass_fds=False),
            Read(6, container, size, None, 0, size),
        )
        assert isinstance(answer, Answer)
        assert isinstance(answer.payload, FileRange)
        grant, fd = await world.begin(3, container, size)
        os.close(fd)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.client.call, Truncate(grant.lock_id, 10))
            await trio.testing.wait_all_tasks_blocked()
            assert await read_range(answer.payload) == pattern(size)
            assert answer.payload.on_sent is not None
            answer.payload.on_sent()
        assert await world.read_all(3, None, 10) == pattern(size)[:10]
        await world.client.call(EndWrite(grant.lock_id, None))
        await world.detach(grant.lock_id)


@trio_test
async def test_a_slab_file_that_became_shorter_breaks_no_connection(tmp_path: Path) -> None:
    async with running(tmp_path, check=False) as world:
        container, end = await world.write_new(pattern(2 * MB))
        os.truncate(world.slabs.path(world.slabs.by_container[container]), MB)
        with pytest.raises(FsError, match="shorter"):
            await world.client.exchange(Read(6, container, end.size, None, 0, end.size))
        assert not world.client.is_closed


@trio_test
async def test_a_smaller_quota_than_before(tmp_path: Path) -> None:
    path = tmp_path / "ssd"
    async with running(tmp_path, {"SSD": [(path, 64 * MB)]}) as world:
        sources = [world.ufs_file(f"f{n}", pattern(4 * MB, n)) for n in range(12)]
        for number, source in enumerate(sources):
            await world.read_all(number + 1, source)
        dirty, _ = await world.write_new(pattern(3 * MB))
    async with running(tmp_path, {"SSD": [(path, 20 * MB)]}) as world:
        directory = world.slabs.tiers.directories[0]
        await eventually(lambda: directory.used <= 20 * MB, "the rest is evicted")
        assert await world.read_all(dirty, None, 3 * MB) == pattern(3 * MB)
        for number, source in enumerate(sources):
            assert await world.read_all(number + 1, source) == pattern(4 * MB, number)
