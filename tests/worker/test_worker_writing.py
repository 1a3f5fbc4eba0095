"""BeginWrite to the seal, uploads, and what happens to writers that vanish."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import trio
from worker_world import MB, World, eventually, pattern, payload_of, running, trio_test

from alluxiofuse.errors import BadRequestError, FsError, NoSpaceError, StaleError
from alluxiofuse.rpc.inprocess import InProcess
from alluxiofuse.ufs import registry
from alluxiofuse.ufs.base import UnderStorage
from alluxiofuse.wire.types import CancelPersistCommand, CleanCommand, FreeCommand
from alluxiofuse.wire.worker_ops import (
    BeginWrite,
    Detach,
    EndWrite,
    Read,
    Reserve,
    StatContainer,
    SyncContainer,
    Truncate,
    Write,
    WriteEnd,
)
from alluxiofuse.worker import checksums


def bitmap(*pages: int) -> bytes:
    mask = sum(1 << page for page in pages)
    return mask.to_bytes(max(1, (mask.bit_length() + 7) // 8), "little")


@trio_test
async def test_write_by_descriptor_seal_and_read_back(tmp_path: Path) -> None:
    data = pattern(2 * MB + 77)
    async with running(tmp_path) as world:
        container, end = await world.write_new(data)
        assert end.size == len(data)
        assert end.is_sealed
        assert await world.read_all(container, None, len(data)) == data
        await eventually(lambda: container in world.master.blocks, "it is reported")
        assert world.master.blocks[container].is_dirty
        slab = world.slabs.by_container[container]
        assert slab.charged == 2 * MB + 4096


@trio_test
async def test_write_through_the_worker_with_append(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        grant, fd = await world.begin(50)
        os.close(fd)
        call = world.client.call
        assert await call(Write(grant.lock_id, 10), b"hello") == 10
        assert await call(Write(grant.lock_id, 0, True), b" world") == 15
        big = pattern(3 * MB)
        assert await call(Write(grant.lock_id, 0, True), big) == 21
        read = await world.client.exchange(Read(5, 50, 0, None, 10, 11))
        assert payload_of(read) == b"hello world"
        assert (await call(StatContainer(50))).size == 21 + 3 * MB
        await call(Truncate(grant.lock_id, MB))
        await call(Truncate(grant.lock_id, 2 * MB))
        end = await call(EndWrite(grant.lock_id, bitmap()))
        assert end.size == 2 * MB
        wanted = bytes(10) + b"hello world" + big[: MB - 21] + bytes(MB)
        assert await world.read_all(50, None, 2 * MB) == wanted
        again = await call(EndWrite(grant.lock_id, bitmap()))
        assert again == end


def test_who_ends_last_is_told_that_it_is_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when that was done by the seal of what others, who ended before, had left."""
    slow = threading.Event()
    really = checksums.sealed_checksums

    def slowly(fd: int, mask: int, size: int) -> tuple[dict[int, int], int, int]:
        slow.wait(0.2)
        return really(fd, mask, size)

    monkeypatch.setattr(checksums, "sealed_checksums", slowly)

    @trio_test
    async def run() -> None:
        async with running(tmp_path) as world:
            ends: dict[int, WriteEnd] = {}

            async def write(session_id: int) -> None:
                request = BeginWrite(session_id, 50, 0, 0, None, 0, True)
                granted = await world.client.exchange(request)
                granted.close_fds()
                lock_id = granted.result.lock_id
                await world.client.call(Write(lock_id, session_id * MB), b"x")
                ends[session_id] = await world.client.call(EndWrite(lock_id, None))

            async with trio.open_nursery() as nursery:
                for session_id in range(2, 6):
                    nursery.start_soon(write, session_id)
                    await trio.sleep(0.1)
            assert (ends[5].is_sealed, ends[5].size) == (True, 5 * MB + 1)
            world.validate()

    run()


def test_what_was_durable_is_on_the_disk_before_it_changes_and_before_it_is_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power failure would leave a slab that counts as changed, with holes in it. The worker was
    not told yet that its content was uploaded; the writer was."""
    synced: list[tuple[int, list[int]]] = []
    really = os.fdatasync

    @trio_test
    async def run() -> None:
        async with running(tmp_path) as world:
            data = pattern(2 * MB)
            container, _ = await world.write_new(data)
            assert synced == [], "a new file costs no sync"

            def noted(fd: int) -> None:
                synced.append((os.fstat(fd).st_size, sorted(world.slabs.by_container)))
                really(fd)

            monkeypatch.setattr(os, "fdatasync", noted)
            grant, fd = await world.begin(12, container, len(data), world.ufs_file("a", data))
            assert synced == [(len(data), [container])]
            os.pwrite(fd, b"changed", 0)
            os.close(fd)
            await world.client.call(EndWrite(grant.lock_id, bitmap(0)))
            assert synced[1:] == [(len(data), [12])]
            await world.detach(grant.lock_id)
            world.validate()

    run()


@pytest.mark.parametrize("tells", [True, False], ids=["multigrain", "coarse"])
def test_what_was_synced_and_not_written_to_since_is_not_synced_by_its_seal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tells: bool
) -> None:
    """A journal that is synced, closed and removed. Only where no write can have gone unnoticed."""
    synced: list[int] = []
    really = os.fdatasync

    def noted(fd: int) -> None:
        synced.append(os.fstat(fd).st_size)
        really(fd)

    monkeypatch.setattr(os, "fdatasync", noted)

    @trio_test
    async def run() -> None:
        async with running(tmp_path) as world:
            (directory,) = world.slabs.tiers.directories
            directory.tells_each_write = directory.tells_each_write and tells
            for container, late in ((50, b""), (51, b"late"), (52, b"")):
                grant, fd = await world.begin(container)
                os.pwrite(fd, b"bytes", 0)
                os.utime(fd, ns=(0, 0))  # As setting the file's times does: it must tell nothing.
                assert await world.client.call(SyncContainer(grant.lock_id))
                assert synced == [5]
                synced.clear()
                if late:
                    os.pwrite(fd, late, 0)
                    os.utime(fd, ns=(0, 0))
                os.close(fd)
                end = await world.client.call(EndWrite(grant.lock_id, bitmap(0)))
                assert end.is_sealed
                assert synced == ([] if directory.tells_each_write and not late else [5])
                synced.clear()
                await world.detach(grant.lock_id)
            world.validate()

    run()


@trio_test
async def test_changing_a_cached_file_keeps_the_slab_for_its_readers(tmp_path: Path) -> None:
    data = pattern(5 * MB)
    async with running(tmp_path) as world:
        source = world.ufs_file("a", data)
        attached, reader = await world.attach(11, source)
        await world.fetch(attached.lock_id, 0, 10)
        grant, fd = await world.begin(12, 11, len(data), source, reserve=100)
        assert grant.size == len(data)
        assert grant.granted_end >= len(data) + 100
        os.pwrite(fd, b"changed", 2 * MB)
        assert os.pread(reader, 7, 2 * MB) == b"changed"
        assert 11 not in world.slabs.by_container
        end = await world.client.call(EndWrite(grant.lock_id, bitmap(2)))
        assert end.is_sealed
        wanted = data[: 2 * MB] + b"changed" + data[2 * MB + 7 :]
        assert await world.read_all(12, None, len(data)) == wanted
        world.validate()
        os.close(fd)
        os.close(reader)
        await world.detach(attached.lock_id, grant.lock_id)
        # The old content is still to be had, from the under storage.
        assert await world.read_all(11, source) == data


@trio_test
async def test_old_content_from_elsewhere_is_fetched_first(tmp_path: Path) -> None:
    data = pattern(3 * MB + 3)
    tiers = {"MEM": [(tmp_path / "mem", 64 * MB)], "SSD": [(tmp_path / "ssd", 64 * MB)]}
    async with running(tmp_path, tiers) as world:
        source = world.ufs_file("a", data)
        grant, fd = await world.begin(12, 11, len(data), source)
        assert grant.is_durable
        os.pwrite(fd, b"!", len(data))
        os.close(fd)
        end = await world.client.call(EndWrite(grant.lock_id, bitmap(3)))
        assert end.size == len(data) + 1
        assert await world.read_all(12, None, end.size) == data + b"!"
        # In MEM, and nobody has it open: it moves to the durable tier before it gets dirty.
        other = world.ufs_file("b", data)
        await world.read_all(21, other)
        await world.settled()
        assert not world.slabs.by_container[21].directory.is_durable
        grant, fd = await world.begin(22, 21, len(data), other)
        os.close(fd)
        assert grant.is_durable
        assert (await world.client.call(EndWrite(grant.lock_id, bitmap()))).size == len(data)


@trio_test
async def test_two_sessions_write_and_the_last_one_seals(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        first, fd = await world.begin(50)
        os.pwrite(fd, pattern(MB), 0)
        second = await world.client.call(BeginWrite(6, 50, 0, 0, None, 0, False))
        assert second.lock_id != first.lock_id
        assert second.size == MB
        repeated = await world.client.call(BeginWrite(6, 50, 0, 0, None, 0, False))
        assert repeated.lock_id == second.lock_id
        assert not (await world.client.call(EndWrite(first.lock_id, bitmap(0)))).is_sealed
        os.close(fd)
        with pytest.raises(StaleError):
            await world.client.call(Write(first.lock_id, 0), b"x")
        await world.client.call(Write(second.lock_id, 100), b"second")
        assert (await world.client.call(EndWrite(second.lock_id, bitmap()))).is_sealed
        data = await world.read_all(50, None, MB)
        assert data[100:106] == b"second"
        with pytest.raises(StaleError):
            await world.begin(50)


@trio_test
async def test_reserve_is_generous_and_bounded_by_the_quota(tmp_path: Path) -> None:
    async with running(tmp_path, {"SSD": [(tmp_path / "ssd", 8 * MB)]}) as world:
        grant, fd = await world.begin(50)
        os.close(fd)
        assert grant.granted_end == MB
        reserved = await world.client.call(Reserve(grant.lock_id, 3 * MB))
        assert reserved.granted_end == 6 * MB
        reserved = await world.client.call(Reserve(grant.lock_id, 7 * MB))
        assert reserved.granted_end == 8 * MB
        with pytest.raises(NoSpaceError):
            await world.client.call(Reserve(grant.lock_id, 9 * MB))
        with pytest.raises(NoSpaceError):
            await world.client.call(BeginWrite(5, 51, 0, 0, None, 0, False))
        with pytest.raises(FsError, match="too large"):
            await world.client.call(Truncate(grant.lock_id, 1 << 60))
        await world.client.call(Truncate(grant.lock_id, 1 << 40))
        end = await world.client.call(EndWrite(grant.lock_id, None))
        assert end.size == 1 << 40
        assert world.slabs.by_container[50].charged == 0
        with pytest.raises(BadRequestError):
            await world.client.call(BeginWrite(5, 0, 0, 0, None, 0, False))


@trio_test
async def test_writer_waits_for_room_that_persisting_makes(tmp_path: Path) -> None:
    async with running(tmp_path, {"SSD": [(tmp_path / "ssd", 4 * MB)]}) as world:
        first, _ = await world.write_new(pattern(3 * MB))
        done: list[int] = []

        async def write() -> None:
            second, _ = await world.write_new(pattern(2 * MB, 2))
            done.append(second)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await world.heartbeats()
            assert not done
            world.master.send(CleanCommand([first]))
        assert first not in world.slabs.by_container
        assert await world.read_all(done[0], None, 2 * MB) == pattern(2 * MB, 2)


@trio_test
async def test_persist_then_clean(tmp_path: Path) -> None:
    data = pattern(3 * MB + 9)
    async with running(tmp_path) as world:
        container, _ = await world.write_new(data)
        world.persist(container, len(data), b"dir/out")
        await eventually(lambda: bool(world.master.done), "the outcome arrives")
        done = world.master.done[0]
        assert done.error_code == ""
        assert done.fingerprint
        assert (world.master.ufs / "dir/out").read_bytes() == data
        assert world.slabs.dirty_bytes
        world.master.send(CleanCommand([container]))
        await eventually(lambda: not world.slabs.dirty_bytes, "it is clean")
        world.validate()
        world.persist(container, len(data) + 1, b"dir/out", 2)
        await eventually(lambda: len(world.master.done) == 2, "the second outcome")
        assert world.master.done[1].error_code == "stale"


class Gated:
    """A local directory whose puts wait for `gate` first."""

    gate = threading.Event()
    entered = threading.Event()

    def __init__(self, uri: str, options: dict[str, str]) -> None:
        self._real = registry.open_ufs(uri, options)

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    def put(self, *arguments: object) -> object:
        self.entered.set()
        assert self.gate.wait(20)
        return self._real.put(*arguments)  # type: ignore[arg-type]


def open_gated(uri: str, options: dict[str, str]) -> UnderStorage:
    return Gated(uri, options)  # type: ignore[return-value]


async def persist_held_up(world: World, container: int, size: int) -> threading.Event:
    """The worker is told to upload it, has begun, and goes on when the event that this gives is set."""
    Gated.gate.clear()
    Gated.entered.clear()
    world.persist(container, size, b"out")
    await eventually(Gated.entered.is_set, "it began")
    return Gated.gate


@trio_test
async def test_outcome_is_delivered_after_the_master_was_away(tmp_path: Path) -> None:
    data = pattern(1000)
    async with running(tmp_path, open_ufs=open_gated) as world:
        container, _ = await world.write_new(data)
        gate = await persist_held_up(world, container, len(data))
        world.master.is_down = True
        gate.set()
        await eventually(lambda: world.slabs.by_container[container].upload is None, "it ended")
        world.master.expire()
        world.master.is_down = False
        await eventually(lambda: bool(world.master.done), "the outcome arrives")
        assert container in world.master.blocks


@trio_test
async def test_writing_again_stops_the_upload_and_never_mixes(tmp_path: Path) -> None:
    data = pattern(2 * MB)
    async with running(tmp_path, open_ufs=open_gated) as world:
        container, _ = await world.write_new(data)
        gate = await persist_held_up(world, container, len(data))
        grants = []

        async def begin_again() -> None:
            grants.append(await world.begin(900, container, len(data)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(begin_again)
            await world.heartbeats()
            assert not grants
            gate.set()
        grant, fd = grants[0]
        os.close(fd)
        await eventually(lambda: bool(world.master.done), "the outcome arrives")
        assert world.master.done[0].error_code == "stale"
        assert not (world.master.ufs / "out").exists()
        await world.client.call(EndWrite(grant.lock_id, bitmap()))
        assert await world.read_all(900, None, len(data)) == data


@trio_test
async def test_upload_is_cancelled_by_command_and_by_free(tmp_path: Path) -> None:
    async with running(tmp_path, open_ufs=open_gated) as world:
        container = 0
        for number in range(2):
            container, _ = await world.write_new(pattern(100))
            gate = await persist_held_up(world, container, 100)
            slab = world.slabs.by_container[container]
            upload = slab.upload
            assert upload is not None
            world.master.send(FreeCommand([container], False) if number else CancelPersistCommand(1))
            while not upload.is_cancelled:
                await world.heartbeats(1)
            gate.set()
            while len(world.master.done) <= number:
                await world.heartbeats(1)
            assert world.master.done[-1].error_code == "stale"
        assert container not in world.slabs.by_container
        assert not (world.master.ufs / "out").exists()


@trio_test
async def test_free_keeps_dirty_when_told_so(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        container, _ = await world.write_new(pattern(100))
        world.master.send(FreeCommand([container], True))
        await eventually(lambda: world.master.beats > 5, "heartbeats")
        assert container in world.slabs.by_container
        world.master.send(FreeCommand([container], False))
        await eventually(lambda: container not in world.slabs.by_container, "it is freed")


@trio_test
async def test_what_lost_its_seal_is_not_taken_for_what_was_uploaded(tmp_path: Path) -> None:
    """The master says of a container that is open here that its bytes are in the under storage."""
    async with running(tmp_path, session_grace_s=0.01) as world:
        grant, fd = await world.begin(77)
        os.write(fd, b"perhaps torn")
        os.close(fd)
        world.master.send(CleanCommand([77]))
        await world.client.call(Detach([grant.lock_id]))
        await eventually(lambda: world.slabs.get(77) is None, "it is dropped")


@trio_test
async def test_writer_that_vanishes_is_sealed_as_an_orphan(tmp_path: Path) -> None:
    data = pattern(MB + 5)
    async with running(tmp_path, session_grace_s=0.05) as world:
        other = InProcess(world.worker.service)
        grant = await other.call(BeginWrite(9, 50, 0, 0, None, 2 * MB, False))
        await other.call(Write(grant.lock_id, 0), data)
        await other.aclose()
        await eventually(lambda: bool(world.master.seals), "the seal is reported")
        seal = world.master.seals[0]
        assert (seal.container, seal.size) == (50, len(data))
        assert await world.read_all(50, None, len(data)) == data
        assert not world.slabs.locks


@trio_test
async def test_writer_that_reconnects_goes_on(tmp_path: Path) -> None:
    async with running(tmp_path, session_grace_s=0.2) as world:
        other = InProcess(world.worker.service)
        grant = await other.call(BeginWrite(9, 50, 0, 0, None, 0, False))
        await other.call(Write(grant.lock_id, 0), b"one")
        await other.aclose()
        again = InProcess(world.worker.service)
        grant = await again.call(BeginWrite(9, 50, 0, 0, None, 0, False))
        assert grant.size == 3
        await trio.sleep(0.4)
        await again.call(Write(grant.lock_id, 0, True), b"two")
        end = await again.call(EndWrite(grant.lock_id, None))
        assert (end.size, end.is_sealed) == (6, True)
        await again.aclose()
        await eventually(lambda: bool(world.master.seals), "a seal without a detach is reported")
        assert world.master.seals[0].size == 6


@trio_test
async def test_restart_while_writing(tmp_path: Path) -> None:
    data = pattern(2 * MB + 5)
    async with running(tmp_path, session_grace_s=30) as world:
        sealed, _ = await world.write_new(data)
        for container in (50, 51):
            _, fd = await world.begin(container)
            os.pwrite(fd, data[:1000], 0)
            os.close(fd)
        old, _ = await world.write_new(data)
        grant, fd = await world.begin(60, old, len(data))
        os.pwrite(fd, b"new", MB)
        os.close(fd)
    async with running(tmp_path, session_grace_s=1) as world:
        assert world.slabs.counters["lost_dirty_slabs"] == 0
        assert await world.read_all(sealed, None, len(data)) == data
        grant, fd = await world.begin(50)
        os.pwrite(fd, b"more", 1000)
        os.close(fd)
        assert (await world.client.call(EndWrite(grant.lock_id, bitmap(0)))).size == 1004
        await eventually(lambda: {51, 60} <= {seal.container for seal in world.master.seals}, "orphans")
        assert old not in world.slabs.by_container
        assert await world.read_all(51, None, 1000) == data[:1000]
        wanted = data[:MB] + b"new" + data[MB + 3 :]
        assert await world.read_all(60, None, len(data)) == wanted
        assert await world.read_all(50, None, 1004) == data[:1000] + b"more"


@trio_test
async def test_damaged_dirty_page_is_kept_and_reported(tmp_path: Path) -> None:
    from alluxiofuse.errors import ChecksumError

    async with running(tmp_path) as world:
        container, _ = await world.write_new(pattern(2 * MB))
        path = world.slabs.path(world.slabs.by_container[container])
    with open(path, "r+b") as file:  # noqa: ASYNC230
        file.write(b"damage")
    async with running(tmp_path) as world:
        with pytest.raises(ChecksumError):
            await world.read_all(container, None, 2 * MB)
        world.persist(container, 2 * MB, b"out")
        await eventually(lambda: bool(world.master.done), "the outcome arrives")
        assert world.master.done[0].error_code == "checksum"
        assert container in world.slabs.by_container
        assert not (world.master.ufs / "out").exists()


@trio_test
async def test_sync_says_whether_the_tier_is_durable(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        grant, fd = await world.begin(50)
        os.close(fd)
        assert await world.client.call(SyncContainer(grant.lock_id))
    mem = {"MEM": [(tmp_path / "mem", 64 * MB)]}
    async with running(tmp_path / "other", mem) as world:
        grant, fd = await world.begin(50)
        os.close(fd)
        assert not grant.is_durable
        assert not await world.client.call(SyncContainer(grant.lock_id))
