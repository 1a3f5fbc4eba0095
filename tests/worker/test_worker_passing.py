"""Slabs that a kernel writes to by itself: descriptors and mappings that the worker knows nothing of
stand for it here, as they do where passthrough is used."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from mappings import Mapping, mapped
from worker_world import MB, World, eventually, pattern, running, trio_test

from alluxiofuse.errors import StaleError
from alluxiofuse.rpc.inprocess import InProcess
from alluxiofuse.wire.types import CleanCommand
from alluxiofuse.wire.worker_ops import (
    BeginWrite,
    EndWrite,
    ForgetMtime,
    StatContainer,
    SyncContainer,
    Truncate,
    Write,
    WriteEnd,
)
from alluxiofuse.worker import checksums, openers
from alluxiofuse.worker.slab import CLEAN, DIRTY, WRITING

QUOTA = 4 << 30
"""Enough to be let pass."""


@asynccontextmanager
async def passing(
    root: Path, where: Path | None = None, alias: str = "SSD", **more: Any
) -> AsyncIterator[World]:
    trouble = openers.trouble_with(str(where or root))
    if trouble and os.environ.get("CI") != "true":
        pytest.skip(trouble)
    async with running(root, {alias: [(where or root / "ssd", QUOTA)]}, **more) as world:
        yield world


async def _open(world: World, container: int, *args: Any, **more: Any) -> tuple[int, int]:
    """Lock id and a descriptor as the kernel would have one: of its own, known to nobody."""
    grant, fd = await world.begin(container, *args, passes=True, **more)
    assert grant.passes
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    os.close(fd)
    return grant.lock_id, own


async def _end(world: World, lock_id: int, *, may_revert: bool = False) -> WriteEnd:
    return await world.client.call(EndWrite(lock_id, None, may_revert))


@trio_test
async def test_what_the_kernel_wrote_is_sealed_at_once_when_it_has_let_go(tmp_path: Path) -> None:
    async with passing(tmp_path) as world:
        for container, size in ((50, 0), (51, 4096), (52, 3 * MB + 5)):
            lock_id, fd = await _open(world, container)
            os.pwrite(fd, pattern(size), 0)
            os.close(fd)
            began = time.perf_counter()
            end = await _end(world, lock_id)
            assert (end.size, end.is_sealed, end.is_reverted) == (size, True, False)
            assert time.perf_counter() - began < 1
            assert await _end(world, lock_id) == end
            await world.detach(lock_id)
            assert await world.read_all(container, None, size) == pattern(size)
            assert world.slabs.by_container[container].state == DIRTY
        assert world.master.seals == []


@trio_test
async def test_a_kernel_that_lets_go_a_moment_late_is_waited_for(tmp_path: Path) -> None:
    async with passing(tmp_path) as world, trio.open_nursery() as nursery:
        lock_id, fd = await _open(world, 50)
        os.pwrite(fd, b"data", 0)

        async def let_go() -> None:
            await trio.sleep(0.01)
            os.close(fd)

        nursery.start_soon(let_go)
        assert (await _end(world, lock_id)).is_sealed


@trio_test
async def test_a_mapping_keeps_it_open_and_the_worker_seals_it_when_that_ends(tmp_path: Path) -> None:
    async with passing(tmp_path) as world:
        lock_id, fd = await _open(world, 50)
        os.pwrite(fd, pattern(3 * MB), 0)
        mapping = Mapping(fd, 3 * MB)
        os.close(fd)
        end = await _end(world, lock_id)
        assert (end.size, end.is_sealed) == (3 * MB, False)
        await world.detach(lock_id)
        mapping.write(MB + 7, b"stored later")
        assert world.slabs.by_container[50].state == WRITING
        assert (await world.client.call(StatContainer(50))).size == 3 * MB
        mapping.close()
        await eventually(lambda: bool(world.master.seals), "the master is told")
        assert (world.master.seals[0].container, world.master.seals[0].size) == (50, 3 * MB)
        found = await world.read_all(50, None, 3 * MB)
        assert found[MB + 7 :][:12] == b"stored later"
        world.validate()


@trio_test
async def test_who_begins_meanwhile_joins_and_ends_it(tmp_path: Path) -> None:
    async with passing(tmp_path) as world:
        lock_id, fd = await _open(world, 50)
        os.pwrite(fd, pattern(MB), 0)
        mapping = Mapping(fd, MB)
        os.close(fd)
        assert not (await _end(world, lock_id)).is_sealed
        other = await world.client.call(BeginWrite(6, 50, 0, 0, None, 0, False))
        assert other.size == MB
        assert not other.passes
        await world.client.call(Write(other.lock_id, 10), b"other")
        mapping.write(0, b"kernel")
        end = await world.client.call(EndWrite(other.lock_id, b"\x01"))
        assert not end.is_sealed  # It is mapped still.
        mapping.close()
        await eventually(lambda: bool(world.master.seals), "it is sealed")
        found = await world.read_all(50, None, MB)
        assert found[:15] == b"kernel" + pattern(MB)[6:10] + b"other"
        assert len(world.master.seals) == 1


@trio_test
async def test_others_write_on_when_a_passing_writer_ends(tmp_path: Path) -> None:
    async with passing(tmp_path) as world:
        lock_id, fd = await _open(world, 50)
        other = await world.client.call(BeginWrite(6, 50, 0, 0, None, 0, False, True))
        assert other.passes
        os.pwrite(fd, pattern(2 * MB), 0)
        os.close(fd)
        assert not (await _end(world, lock_id)).is_sealed
        end = await world.client.call(EndWrite(other.lock_id, b""))
        assert end.is_sealed
        assert await world.read_all(50, None, 2 * MB) == pattern(2 * MB)


@trio_test
async def test_a_client_that_dies_leaves_programs_that_write_on(tmp_path: Path) -> None:
    async with passing(tmp_path, session_grace_s=0.01) as world:
        client = InProcess(world.worker.service)
        answer = await client.exchange(BeginWrite(6, 50, 0, 0, None, 0, True, True))
        fd = os.open(f"/proc/self/fd/{answer.fds[0]}", os.O_RDWR)
        answer.close_fds()
        await client.aclose()
        await eventually(lambda: world.slabs.counters["orphaned_writers"] == 1, "its grace is over")
        await world.heartbeats()
        os.pwrite(fd, pattern(2 * MB), 0)
        assert world.slabs.by_container[50].state == WRITING
        os.close(fd)
        await eventually(lambda: bool(world.master.seals), "it is sealed")
        assert await world.read_all(50, None, 2 * MB) == pattern(2 * MB)


def test_the_next_life_of_the_worker_waits_for_the_kernel_too(tmp_path: Path) -> None:
    @trio_test
    async def run() -> None:
        async with passing(tmp_path, check=False) as world:
            _, fd = await _open(world, 50)
            _, left = await _open(world, 51)
            os.pwrite(fd, pattern(MB), 0)
        os.close(left)
        async with passing(tmp_path, session_grace_s=0.01) as world:
            await eventually(lambda: world.slabs.counters["orphaned_writers"] == 2, "grace is over")
            await eventually(lambda: bool(world.master.seals), "what nobody has open is sealed")
            await world.heartbeats()
            assert world.slabs.by_container[50].state == WRITING
            with mapped(fd, MB) as mapping:
                await trio.sleep(0.3)
                mapping.write(5, b"late")
                assert world.slabs.by_container[50].state == WRITING
            await eventually(lambda: len(world.master.seals) == 2, "it is sealed")
            found = await world.read_all(50, None, MB)
            assert found == pattern(MB)[:5] + b"late" + pattern(MB)[9:]

    run()


@trio_test
async def test_zeros_become_holes_and_cost_nothing(tmp_path: Path) -> None:
    async with passing(tmp_path) as world:
        lock_id, fd = await _open(world, 50)
        os.pwrite(fd, bytes(2 * MB) + b"end", 0)
        os.close(fd)
        end = await _end(world, lock_id)
        assert end.is_sealed
        assert world.slabs.by_container[50].charged == 4096
        assert await world.read_all(50, None, end.size) == bytes(2 * MB) + b"end"


# --- nothing changed --------------------------------------------------------------------------------


@trio_test
async def test_what_was_not_changed_is_its_base_again(tmp_path: Path) -> None:
    data = pattern(3 * MB + 3)
    async with passing(tmp_path) as world:
        source = world.ufs_file("a", data)
        await world.read_all(11, source)
        await world.settled()
        slab = world.slabs.by_container[11]
        for state in (CLEAN, DIRTY):
            container, before = slab.container, os.stat(world.slabs.path(slab))
            lock_id, fd = await _open(world, 100 + state, container, len(data), source)
            assert os.pread(fd, len(data), 0) == data
            os.close(fd)
            end = await _end(world, lock_id, may_revert=True)
            assert (end.size, end.is_sealed, end.is_reverted) == (len(data), False, True)
            assert await _end(world, lock_id, may_revert=True) == end
            await world.detach(lock_id)
            assert (slab.container, slab.state, slab.writers) == (container, state, 0)
            assert os.stat(world.slabs.path(slab)).st_mtime_ns == before.st_mtime_ns
            await world.heartbeats()
            assert container in world.master.blocks
            assert 100 + state not in world.master.blocks
            world.validate()
            assert await world.read_all(container, None, len(data)) == data
            if state == CLEAN:  # And now something that was changed.
                lock_id, fd = await _open(world, 99, container, len(data), source)
                os.pwrite(fd, data[:1], 0)
                os.close(fd)
                end = await _end(world, lock_id, may_revert=True)
                assert (end.is_sealed, end.is_reverted) == (True, False)
                await world.detach(lock_id)
        world.master.send(CleanCommand([slab.container]))
        await eventually(lambda: slab.state == CLEAN, "it is clean")


@trio_test
async def test_what_was_synced_is_durably_its_base_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pattern(MB)
    async with passing(tmp_path) as world:
        grant, fd = await world.begin(11)
        os.pwrite(fd, data, 0)
        os.close(fd)
        await world.client.call(SyncContainer(grant.lock_id))
        await world.client.call(EndWrite(grant.lock_id, None))
        await world.detach(grant.lock_id)
        lock_id, fd = await _open(world, 12, 11, MB)
        os.close(fd)
        synced: list[set[int]] = []
        really = world.slabs.index.sync

        def sync() -> None:
            synced.append(set(world.slabs.by_container))
            really()

        with monkeypatch.context() as patch:
            patch.setattr(world.slabs.index, "sync", sync)
            assert (await _end(world, lock_id, may_revert=True)).is_reverted
            assert {11} in synced
        assert await world.read_all(11, None, MB) == data


@trio_test
async def test_the_same_container_may_begin_again_after_it_was_reverted(tmp_path: Path) -> None:
    """Its client heard nothing of that, or another one joined at the master before the word came there."""
    data = pattern(2 * MB)
    async with passing(tmp_path) as world:
        container, _ = await world.write_new(data)
        for _ in range(3):
            lock_id, fd = await _open(world, 12, container, len(data))
            os.close(fd)
            assert (await _end(world, lock_id, may_revert=True)).is_reverted
            await world.detach(lock_id)
        lock_id, fd = await _open(world, 12, container, len(data))
        os.pwrite(fd, b"new", 0)
        os.close(fd)
        assert (await _end(world, lock_id, may_revert=True)).is_sealed
        assert await world.read_all(12, None, len(data)) == b"new" + data[3:]
        assert container not in world.slabs.by_container


@trio_test
async def test_what_does_not_revert(tmp_path: Path) -> None:
    data = pattern(MB)
    async with passing(tmp_path) as world:

        async def begun() -> tuple[int, int, int]:
            container, _ = await world.write_new(data)
            new = next(world.containers)
            return (new, *(await _open(world, new, container, len(data))))

        new, lock_id, fd = await begun()  # A new writer came and went in between.
        other = await world.client.call(BeginWrite(6, new, 0, 0, None, 0, False))
        await world.client.call(EndWrite(other.lock_id, b"", True))
        os.close(fd)
        assert (await _end(world, lock_id, may_revert=True)).is_sealed
        new, lock_id, fd = await begun()  # Its time was set by hand after it had been changed.
        os.pwrite(fd, b"x", 0)
        await world.client.call(ForgetMtime(new))
        os.close(fd)
        assert (await _end(world, lock_id, may_revert=True)).is_sealed
        assert (await world.read_all(new, None, MB))[:1] == b"x"
        new, lock_id, fd = await begun()  # It is as long as before, but was not all the time.
        await world.client.call(Truncate(lock_id, 5))
        await world.client.call(Truncate(lock_id, MB))
        await world.client.call(ForgetMtime(new))
        os.close(fd)
        assert (await _end(world, lock_id, may_revert=True)).is_sealed
        assert await world.read_all(new, None, MB) == data[:5] + bytes(MB - 5)
        new, lock_id, fd = await begun()  # It is mapped.
        with mapped(fd, MB) as mapping:
            end = await _end(world, lock_id, may_revert=True)
            assert (end.is_sealed, end.is_reverted) == (False, False)
            mapping.write(0, b"stored")
        await eventually(lambda: bool(world.master.seals), "it is sealed")
        assert (await world.read_all(new, None, MB))[:6] == b"stored"
        lock_id, fd = await _open(world, 90)  # It was made from nothing.
        os.close(fd)
        assert (await _end(world, lock_id, may_revert=True)).is_sealed


@trio_test
async def test_only_what_was_not_changed_costs_no_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with passing(tmp_path) as world:
        container, _ = await world.write_new(pattern(5 * MB))
        lock_id, fd = await _open(world, 12, container, 5 * MB)
        os.close(fd)
        with monkeypatch.context() as patch:
            patch.setattr(checksums, "checksum", lambda _: pytest.fail("a page is read"))
            assert (await _end(world, lock_id)).is_sealed


@trio_test
async def test_in_memory_nothing_reverts_as_stores_leave_no_trace(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="af-passing-", dir="/dev/shm") as where:
        async with passing(tmp_path, Path(where), "MEM") as world:
            container, _ = await world.write_new(pattern(2 * MB))
            lock_id, fd = await _open(world, 12, container, 2 * MB)
            with mapped(fd, 2 * MB) as mapping:
                mapping.write(MB, b"stored")
            end = await _end(world, lock_id, may_revert=True)
            assert (end.is_sealed, end.is_reverted) == (True, False)
            assert (await world.read_all(12, None, 2 * MB))[MB : MB + 6] == b"stored"
            await world.detach(lock_id)


# --- emptying -----------------------------------------------------------------------------------------


@trio_test
async def test_emptying_what_is_open_is_seen_by_its_readers(tmp_path: Path) -> None:
    data = pattern(3 * MB)
    async with passing(tmp_path) as world:
        source = world.ufs_file("a", data)
        attached, reader = await world.attach(11, source)
        await world.fetch(attached.lock_id, MB, 10)  # Most of it was never here.
        lock_id, fd = await _open(world, 12, 11, len(data), source, is_emptying=True)
        assert os.fstat(reader).st_size == 0
        assert os.fstat(reader).st_ino == os.fstat(fd).st_ino
        assert 11 not in world.slabs.by_container
        world.validate()
        os.pwrite(fd, b"new content", 0)
        os.close(fd)
        assert (await _end(world, lock_id)).size == 11
        assert os.pread(reader, 100, 0) == b"new content"
        os.close(reader)
        await world.detach(attached.lock_id, lock_id)
        assert await world.read_all(12, None, 11) == b"new content"
        assert await world.read_all(11, source) == data
        # Dirty, and nobody has it open: a new slab.
        lock_id, fd = await _open(world, 13, 12, 11, is_emptying=True)
        assert world.slabs.by_container[12].state == DIRTY
        os.close(fd)
        end = await _end(world, lock_id, may_revert=True)
        assert (end.size, end.is_sealed) == (0, True)


@trio_test
async def test_emptying_stops_the_upload_of_what_was_there(tmp_path: Path) -> None:
    data = pattern(3 * MB)
    async with passing(tmp_path) as world:
        container, _ = await world.write_new(data)
        attached, reader = await world.attach(container, None, len(data))
        world.persist(container, len(data), b"out")
        lock_id, fd = await _open(world, 12, container, len(data), is_emptying=True)
        os.close(fd)
        await eventually(lambda: bool(world.master.done), "the outcome arrives")
        assert world.master.done[0].error_code in ("stale", "")
        assert os.fstat(reader).st_size == 0
        os.close(reader)
        await _end(world, lock_id)
        await world.detach(attached.lock_id, lock_id)


@pytest.mark.parametrize("is_dirty", [False, True])
@pytest.mark.parametrize("stop_at", ["truncate", "utime", "link", "put", "none"])
def test_a_kill_while_emptying_leaves_the_old_or_an_empty_one(
    tmp_path: Path, stop_at: str, is_dirty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the disk at each step, as a kill there leaves it: nothing is done after it."""
    data = pattern(2 * MB)

    @trio_test
    async def run() -> None:
        async with passing(tmp_path, check=False) as world:
            source = world.ufs_file("a", data)
            if is_dirty:
                container, _ = await world.write_new(data)
            else:
                container = 11
                await world.read_all(container, source)
            _, reader = await world.attach(container, None if is_dirty else source, len(data))

            def fail(*_: object, **__: object) -> None:
                raise OSError(5, "killed here")

            with monkeypatch.context() as patch:
                if stop_at == "put":
                    real, count = world.slabs.index.put, iter(range(9))
                    patch.setattr(
                        world.slabs.index, "put", lambda *a: fail() if next(count) == 0 else real(*a)
                    )
                elif stop_at != "none":
                    patch.setattr(os, stop_at, fail)
                with (
                    pytest.raises(Exception, match="killed here") if stop_at != "none" else trio.CancelScope()
                ):
                    os.close((await _open(world, 12, container, len(data), is_emptying=True))[1])
            if is_dirty and stop_at != "none":  # Asked again it is finished.
                _, fd = await _open(world, 12, container, len(data), is_emptying=True)
                assert os.fstat(fd).st_size == 0
                os.close(fd)
                assert os.fstat(reader).st_size == 0
            os.close(reader)
        async with passing(tmp_path, session_grace_s=0.01) as world:
            assert container not in world.slabs.by_container
            await eventually(lambda: bool(world.master.seals), "what was left is sealed")
            assert (world.master.seals[0].container, world.master.seals[0].size) == (12, 0)

    run()


def test_a_kill_after_reverting_leaves_what_it_was(tmp_path: Path) -> None:
    data = pattern(2 * MB)

    @trio_test
    async def run() -> None:
        async with passing(tmp_path) as world:
            container, _ = await world.write_new(data)
            lock_id, fd = await _open(world, 12, container, len(data))
            os.close(fd)
            assert (await _end(world, lock_id, may_revert=True)).is_reverted
        async with passing(tmp_path) as world:
            assert await world.read_all(container, None, len(data)) == data
            assert set(world.slabs.by_container) == {container}
            with pytest.raises(StaleError):
                await world.attach(12, None, len(data))

    run()
