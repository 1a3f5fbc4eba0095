"""Uploads by workers: what happens meanwhile to the file, the worker, and the answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from persist_places import Place
from persist_world import World, until

from alluxiofuse.errors import UfsError
from alluxiofuse.master import persist_waiting
from alluxiofuse.master.containers import forget_container
from alluxiofuse.wire.types import PersistCommand


class Gate:
    """Holds uploads up until it is opened."""

    def __init__(self, world: World) -> None:
        self.arrived, self.open = trio.Event(), trio.Event()
        self.commands: list[PersistCommand] = []
        world.worker.gate = self._hold

    async def _hold(self, command: PersistCommand) -> None:
        self.commands.append(command)
        self.arrived.set()
        await self.open.wait()


def held_up(test: Callable[[World, Gate], Awaitable[Any]], place: Place) -> None:
    """`test` starts while the first upload, of "a", is held up; in the end all has to be equal."""

    async def main() -> None:
        with trio.fail_after(60):
            world = World(place.state, place.open_ufs, place.uri, {})
            try:
                async with world.running():
                    gate = Gate(world)
                    world.write("a", b"first")
                    await gate.arrived.wait()
                    await test(world, gate)
                    world.validate()
                    gate.open.set()
                    await world.settle()
                    world.check_equal()
            finally:
                world.close()

    trio.run(main)


def test_removed(place: Place) -> None:
    async def test(world: World, gate: Gate) -> None:
        world.remove("a")

    held_up(test, place)


def test_removed_and_made_anew(place: Place) -> None:
    async def test(world: World, gate: Gate) -> None:
        world.remove("a")
        world.write("a", b"second")

    held_up(test, place)


def test_renamed(place: Place) -> None:
    """The upload is not wasted: what arrives is moved."""

    async def test(world: World, gate: Gate) -> None:
        world.rename("a", "b")
        world.mkdir("d")
        gate.open.set()
        await world.settle()
        assert world.worker.uploaded == 1

    held_up(test, place)


def test_renamed_and_replaced(place: Place) -> None:
    async def test(world: World, gate: Gate) -> None:
        world.mkdir("d")
        world.rename("a", "d/b")
        world.write("a", b"another")
        world.rename("d", "e")

    held_up(test, place)


def test_directory_renamed(place: Place) -> None:
    async def test(world: World, gate: Gate) -> None:
        gate.open.set()
        await world.settle()
        world.worker.gate = None
        second = Gate(world)
        world.mkdir("d")
        world.write("d/x", b"1")
        await second.arrived.wait()
        world.rename("d", "e")
        world.write("e/y", b"2")
        second.open.set()

    held_up(test, place)


def test_rewritten(place: Place) -> None:
    """The upload is cancelled; its end is waited for before the next begins."""

    async def test(world: World, gate: Gate) -> None:
        world.write("a", b"second")
        await until(lambda: bool(world.worker.cancelled))
        assert len(gate.commands) == 1
        gate.open.set()
        await world.settle()
        assert len(gate.commands) == 2
        assert world.worker.uploaded == 1

    held_up(test, place)


def test_cancelled_before_it_was_fetched(place: Place) -> None:
    async def main() -> None:
        with trio.fail_after(60):
            world = World(place.state, place.open_ufs, place.uri, {})
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(world.persister.run)
                    world.write("a", b"first")
                    await until(lambda: bool(world.workers.pending_commands(world.worker.worker_id)))
                    world.write("a", b"second")
                    await until(lambda: bool(world.workers.pending_commands(world.worker.worker_id)))
                    nursery.start_soon(world.worker.run)
                    await world.settle()
                    assert world.worker.uploaded == 1
                    world.check_equal()
                    nursery.cancel_scope.cancel()
            finally:
                world.close()

    trio.run(main)


def test_worker_comes_back_as_a_new_process(place: Place) -> None:
    """It was told, it restarted, it is told again; the answer of the old one does no harm."""

    async def test(world: World, gate: Gate) -> None:
        world.worker.gate = None
        world.worker.register()
        await until(lambda: bool(world.workers.pending_commands(world.worker.worker_id)))
        commands = await world.workers.commands(_poll(world))
        assert [type(c) for c in commands] == [PersistCommand]
        again = commands[0]
        assert isinstance(again, PersistCommand)
        assert again.task_id != gate.commands[0].task_id
        await world.worker._persist(again)
        await world.settle()

    async def main() -> None:
        with trio.fail_after(60):
            world = World(place.state, place.open_ufs, place.uri, {})
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(world.persister.run)
                    gate = Gate(world)
                    world.write("a", b"first")
                    await until(lambda: bool(world.workers.pending_commands(world.worker.worker_id)))
                    [first] = await world.workers.commands(_poll(world))
                    assert isinstance(first, PersistCommand)
                    gate.commands.append(first)
                    await test(world, gate)
                    gate.open.set()
                    await world.worker._persist(first)  # late: of the process before
                    await world.settle()
                    world.check_equal()
                    nursery.cancel_scope.cancel()
            finally:
                world.close()

    trio.run(main)


def _poll(world: World) -> Any:
    from alluxiofuse.wire.master_ops import WorkerCommands

    return WorkerCommands(world.worker.worker_id, world.worker.epoch, 0.0)


def test_answers_that_nobody_waits_for(place: Place) -> None:
    async def test(world: World, gate: Gate) -> None:
        command = gate.commands[0]
        gate.open.set()
        await world.settle()
        world.worker.say(command, b"wrong")  # a duplicate
        command.task_id += 1000
        world.worker.say(command, b"wrong")  # nobody's
        world.worker.say(command, b"", "ufs_unavailable")
        await world.settle()
        assert world.record("a").fingerprint == world.storage.stat(b"a").fingerprint

    held_up(test, place)


def test_answer_after_a_restart_of_the_master(place: Place) -> None:
    """The worker went on uploading; what it says to the next life counts."""

    async def main() -> None:
        contents: dict[int, bytes] = {}
        with trio.fail_after(60):
            world = World(place.state, place.open_ufs, place.uri, contents)
            async with world.running():
                gate = Gate(world)
                world.write("a", b"first")
                await gate.arrived.wait()
            command = gate.commands[0]
            world.close()
            world = World(place.state, place.open_ufs, place.uri, contents)
            try:
                fingerprint = await trio.to_thread.run_sync(world.worker._put, command)
                world.worker.say(command, fingerprint)
                world.validate()
                assert world.persister.is_idle()
                world.check_equal()
            finally:
                world.close()

    trio.run(main)


def test_stale_waits_for_the_next_commit(place: Place) -> None:
    async def test(world: World, gate: Gate) -> None:
        world.worker.say(gate.commands[0], b"", "stale")
        world.validate()
        world.worker.gate = None
        world.write("a", b"second")
        await world.settle()

    held_up(test, place)


def test_wait(place: Place) -> None:
    async def test(world: World, gate: Gate) -> None:
        ino, container = world.find("a"), world.record("a").container
        assert not await world.persister.wait(ino, container, 0.05)
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                assert await world.persister.wait(ino, container, 30)

            nursery.start_soon(wait)
            gate.open.set()
        assert world.record("a").ufs_container == container
        assert await world.persister.wait(ino, container, 0)
        assert await world.persister.wait(10**6, 1, 0)  # gone

    held_up(test, place)


def test_what_keeps_failing_is_reported(local_place: Place) -> None:
    async def test(world: World, gate: Gate) -> None:
        command = gate.commands[0]
        world.worker.say(command, b"", "ufs_permission")
        assert len(world.persister.failing()) == 1
        assert world.persister.failing()[0].startswith("/a: ")
        with pytest.raises(UfsError):
            await world.persister.wait(world.find("a"), command.container, 5)
        gate.open.set()
        await world.settle()
        assert world.persister.failing() == []

    held_up(test, local_place)


def test_open_for_writing_is_left_alone(local_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World, gate: Gate) -> None:
        gate.open.set()
        await world.settle()
        ino = world.find("a")
        tx = world.store.transaction()
        record = tx.inode(ino)
        assert record is not None
        forget_container(tx, record.container)
        record.home, record.container = 1, 999
        world.log.add(tx, ino, 1)
        tx.put_inode(ino, record)
        tx.commit()
        world.rename("a", "b")
        await until(lambda: world.storage_tree() == {"b": b"first"})
        assert world.worker.uploaded == 1
        assert world.persister.waiting() == []
        monkeypatch.setattr(persist_waiting, "LONG_NS", 0)
        assert world.persister.waiting() == ["/b, for 0 s: open for writing at worker 1"]
        world.write("b", b"sealed")
        tx = world.store.transaction()
        record = tx.inode(ino)
        assert record is not None
        record.home = 0
        world.log.content_committed(tx, ino, record)
        tx.put_inode(ino, record)
        tx.commit()

    held_up(test, local_place)
