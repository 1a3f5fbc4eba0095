"""What fsync(2) costs: what has to become durable, once, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from client_world import IN_PROCESS, ROOT, Client, World, in_world

from alluxiofuse.ids import ROOT_INO
from alluxiofuse.master import master as master_module
from alluxiofuse.wire.master_ops import BeginSync, SyncMetadata
from alluxiofuse.worker.index import Index, SlabRecord


@contextmanager
def counted(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """One item for each call of it."""
    calls: list[None] = []
    real = getattr(owner, name)

    def call(*arguments: Any) -> Any:
        calls.append(None)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        yield calls


def with_one_client(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """No log is synced but for who waits for it, and nothing is uploaded."""
    monkeypatch.setattr(master_module, "SYNC_AFTER_S", 1000.0)

    def run(test: Any) -> None:
        async def with_client(world: World) -> None:
            async with world.client() as client:
                await test(world, client)

        in_world(IN_PROCESS, master={"persist_delay_s": 1000.0})(with_client)

    return run


def test_again_and_again_it_is_one_fdatasync(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World, client: Client) -> None:
        file = await client.create(b"f")
        await file.write(0, b"first")
        await file.fsync()
        worker = world.workers["w1"].worker
        assert worker.slabs is not None
        store = world.master.store
        with (
            counted(store, "sync", monkeypatch) as of_master,
            counted(worker.slabs.index, "sync", monkeypatch) as of_index,
            counted(os, "fdatasync", monkeypatch) as of_slab,
        ):
            for number in range(10):
                await file.write(4096 * number, b"x" * 4096)
                await file.fsync()
                assert (await client.fs.getattr(file.ino)).size == 4096 * (number + 1)
            assert (len(of_master), len(of_index), len(of_slab)) == (0, 0, 10)
            await client.fs.mkdir(ROOT, ROOT_INO, b"d", 0o755)
            await file.fsync()
            assert len(of_master) == 1, "what others changed before is durable too"
            assert store.synced_count >= store.needed_count
        await client.close(file)

    with_one_client(monkeypatch)(test)


def test_the_first_one_makes_name_and_slab_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World, client: Client) -> None:
        worker = world.workers["w1"].worker
        assert worker.slabs is not None
        with counted(worker.slabs.index, "sync", monkeypatch) as of_index:
            file = await client.create(b"f")
            await file.write(0, b"first")
            store = world.master.store
            assert store.synced_count < store.needed_count
            await file.fsync()
            assert store.synced_count >= store.needed_count
            assert len(of_index) == 1
        await client.close(file)
        file = await client.open(b"f", os.O_RDWR)
        await file.write(0, b"again")  # the slab has another name and another record now
        with counted(worker.slabs.index, "sync", monkeypatch) as of_index:
            await file.fsync()
            assert len(of_index) == 1
        await client.close(file)

    with_one_client(monkeypatch)(test)


def test_what_was_sealed_before_is_synced_with_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World, client: Client) -> None:
        await client.put(b"f", b"closed, never synced")
        worker = world.workers["w1"].worker
        assert worker.slabs is not None
        file = await client.open(b"f", os.O_RDWR)
        assert bytes(await file.read(0, 6)) == b"closed"
        with counted(worker.slabs.index, "sync", monkeypatch) as of_index:
            await file.fsync()
            assert len(of_index) == 1
        assert world.master.store.synced_count >= world.master.store.needed_count
        await file.release()

    with_one_client(monkeypatch)(test)


def test_the_log_is_synced_while_the_slab_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """BeginSync alone has it begun; and what an earlier life answered is not waited for forever."""

    async def test(world: World, client: Client) -> None:
        await client.fs.mkdir(ROOT, ROOT_INO, b"d", 0o755)
        store = world.master.store
        begun = await client.master.call(BeginSync())
        assert begun == store.needed_count > store.synced_count
        with trio.fail_after(20):
            while store.synced_count < begun:  # noqa: ASYNC110 - a thread sets it
                await trio.sleep(0.005)
        assert await client.master.call(BeginSync()) == 0
        with trio.fail_after(20):
            await client.master.call(SyncMetadata(begun + 1_000_000))

    with_one_client(monkeypatch)(test)


def test_syncs_of_the_index_are_shared(tmp_path: Path) -> None:
    index = Index(tmp_path / "state" / "index")
    index.sync()
    index.put(1, SlabRecord(0, 1, 1, 0))
    before = index.synced_count
    index.sync()
    assert index.synced_count == before + 1
    flushes: list[bool] = []

    class Flushing:
        def flush_wal(self, is_synced: bool) -> None:
            flushes.append(is_synced)

    real, index._db = index._db, Flushing()  # type: ignore[assignment]
    index.sync()
    index._db = real
    assert not flushes, "nothing was written since"
    index.close()
