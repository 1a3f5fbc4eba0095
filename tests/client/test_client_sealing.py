"""Seals and commits that meet other clients, restarts and a master that is away."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from client_world import HERE, IN_PROCESS, ROOT, TCP, UNIX, Client, World, in_world, until

from alluxiofuse.errors import AlluxioFuseError
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.wire.master_ops import CommitContent
from alluxiofuse.wire.types import Attr


def hold_commits(client: Client) -> tuple[trio.Event, trio.Event]:
    """The next CommitContent of this client waits: (it does, it may go on)."""
    session: Any = client.fs._session
    call: Callable[..., Awaitable[Any]] = session.call
    waits, may_go = trio.Event(), trio.Event()

    async def held(request: Any, **options: Any) -> Any:
        if isinstance(request, CommitContent):
            waits.set()
            await may_go.wait()
        return await call(request, **options)

    session.call = held
    return waits, may_go


@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_a_commit_that_others_overtook(kind: str) -> None:
    """Who was not the last writer commits when the file has been sealed and begun again."""

    async def test(world: World) -> None:
        async with world.client("one") as one, world.client("two") as two:
            first = await one.create(b"f")
            second = await two.open(b"f", os.O_RDWR)
            await first.write(0, b"one")
            await second.write(3, b"two")
            waits, may_go = hold_commits(one)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(first.flush)
                await waits.wait()
                await second.flush()
                await second.write(6, b"again")
                may_go.set()
            assert bytes(await first.read(0, 20)) == b"onetwoagain"
            for client, file in ((one, first), (two, second)):
                await client.close(file)
            assert await one.get(b"f") == b"onetwoagain"

    in_world(kind)(test)


@pytest.mark.parametrize("kind", [UNIX, TCP])
def test_a_restarted_worker_seals_what_several_clients_wrote(kind: str) -> None:
    """The master hears of it from the client that knows least."""

    async def test(world: World) -> None:
        await world.stop_worker()
        await world.start_worker(session_grace_s=0.01)
        async with world.client("one") as one, world.client("two") as two:
            first = await one.create(b"f")
            second = await two.open(b"f", os.O_RDWR)
            await first.write(0, b"one")
            await second.write(3, b"two" * 1000)
            await world.stop_worker()
            part = await world.start_worker(session_grace_s=0.01)
            await until(lambda: part.worker.slabs and not part.worker.slabs.locks)
            await first.flush()
            assert (await one.fs.lookup(ROOT, ROOT_INO, b"f")).size == 3003
            for client, file in ((one, first), (two, second)):
                await client.close(file)
            for client in (one, two):
                assert await client.get(b"f") == b"one" + b"two" * 1000

    in_world(kind, master={"worker_heartbeat_s": 3.0})(test)


@pytest.mark.parametrize("kind", [UNIX, TCP])
def test_a_master_that_is_away_at_the_close_hears_of_the_seal(kind: str) -> None:
    async def test(world: World) -> None:
        async with world.client(patience_s=2.0) as client:
            file = await client.create(b"f")
            await file.write(0, b"written")
            await world.stop_master()
            with pytest.raises(AlluxioFuseError):
                await file.flush()
            await file.release()
            await world.start_master()
            await until(lambda: (world.ufs / "f").exists() and (world.ufs / "f").read_bytes() == b"written")
            attr = await client.fs.lookup(ROOT, ROOT_INO, b"f")
            assert (attr.home, attr.size) == (0, 7)
            await client.put(b"f", b"and again")
            assert await client.get(b"f") == b"and again"

    in_world(kind)(test)


@pytest.mark.parametrize("flags", [os.O_RDONLY | os.O_TRUNC, os.O_RDWR | os.O_TRUNC])
def test_emptying_by_open_alone(flags: int) -> None:
    async def test(world: World) -> None:
        async with world.client() as client:
            await client.put(b"f", b"content")
            file = await client.open(b"f", flags)
            await client.close(file)
            _, made = await client.fs.create(ROOT, ROOT_INO, b"new", 0o644, flags)
            await client.close(made)
            for name in (b"f", b"new"):
                attr = await client.fs.lookup(ROOT, ROOT_INO, name)
                assert (attr.home, attr.size) == (0, 0)
            there = [world.ufs / "f", world.ufs / "new"]
            await until(lambda: all(one.exists() and not one.read_bytes() for one in there))

    in_world(IN_PROCESS)(test)


@pytest.mark.parametrize("kind", [IN_PROCESS, TCP])
def test_closing_what_was_never_written_and_the_master_gave_up_meanwhile(kind: str) -> None:
    """Its session had ended during a cut, and the home had never heard of the new file."""

    async def test(world: World) -> None:
        async with world.client() as client:
            attr, file = await client.fs.create(ROOT, ROOT_INO, b"f", 0o644, os.O_RDWR)
            session_id = client.fs._session.id
            given_up = CommitContent(session_id, attr.ino, attr.container, 0, 0, False, is_abandoned=True)
            assert (await client.master.call(given_up)).container == 0
            await file.flush()
            await file.release()
            await client.put(b"f", b"written later")
            assert await client.get(b"f") == b"written later"

    in_world(kind)(test)


@pytest.mark.parametrize("kind", [UNIX, TCP])
def test_who_joins_and_can_not_begin_does_not_empty_the_file(kind: str) -> None:
    """The writer died, its worker is away, and somebody else opens the file, writes in vain, closes."""

    async def test(world: World) -> None:
        async with world.client("two", patience_s=0.3) as two:
            async with world.client("one") as one:
                file = await one.create(b"f")
                await file.write(0, b"fsynced by a client that died")
                await file.fsync()
                other = await two.open(b"f", os.O_RDWR)
                await world.stop_worker()
                with pytest.raises(AlluxioFuseError):
                    await other.write(0, b"X")
                one.fs._contents.clear()  # It vanishes without sealing.
            await other.release()
            await world.start_worker(session_grace_s=0.05)
            attr = await until_sealed(two)
            assert attr.size == 29
            assert await two.get(b"f") == b"fsynced by a client that died"

    in_world(kind)(test)


async def until_sealed(client: Client) -> Attr:
    while True:
        attr = await client.fs.lookup(ROOT, ROOT_INO, b"f")
        if not attr.home:
            return attr
        await trio.sleep(0.01)


@pytest.mark.parametrize("kind", [UNIX, TCP])
def test_an_empty_file_whose_home_died_finds_another(kind: str) -> None:
    async def test(world: World) -> None:
        await world.start_worker("w2", hostname="elsewhere" if kind == TCP else HERE)
        async with world.client(patience_s=10.0) as client:
            file = await client.create(b"f")
            name = next(n for n, part in world.workers.items() if part.worker_id == file.attr.home)
            await world.stop_worker(name)
            await file.write(0, b"at the other worker")
            await client.close(file)
            assert await client.get(b"f") == b"at the other worker"
            await until(lambda: (world.ufs / "f").exists() and (world.ufs / "f").stat().st_size == 19)

    in_world(kind)(test)


def test_a_time_that_is_set_after_the_seal_and_before_the_master_hears_of_it() -> None:
    """Its writer did not come back in time, the worker has sealed it by itself and tells the master by the
    next heartbeat."""

    async def test(world: World) -> None:
        async with world.client("one") as one, world.client("two") as two:
            file = await one.create(b"f")
            await file.write(0, b"written, not closed")
            await world.stop_worker()
            part = await world.start_worker(session_grace_s=0.01)
            await until(lambda: part.worker.slabs is not None and part.worker.slabs.orphans)
            two.rejoin(part)
            await two.fs.setattr(ROOT, file.ino, mtime_ns=12345)
            assert (await two.fs.getattr(file.ino)).home, "not heard of yet"
            await until(lambda: part.worker.slabs is not None and not part.worker.slabs.orphans)
            attr = await two.fs.getattr(file.ino)
            assert (attr.home, attr.mtime_ns) == (0, 12345)

    in_world(UNIX, master={"worker_heartbeat_s": 3.0})(test)


def test_a_time_that_is_set_while_the_home_is_away() -> None:
    """What the home has was written before, though nobody could tell it."""

    async def test(world: World) -> None:
        async with world.client("one") as one, world.client("two") as two:
            file = await one.create(b"f")
            await file.write(0, b"written, not closed")
            await world.stop_worker()
            await two.fs.setattr(ROOT, file.ino, mtime_ns=12345)
            part = await world.start_worker(session_grace_s=20.0)
            for client in (one, two):
                client.rejoin(part)
                assert (await client.fs.getattr(file.ino)).mtime_ns == 12345
            await one.close(file)
            assert (await two.fs.getattr(file.ino)).mtime_ns == 12345

    in_world(UNIX)(test)
