"""Answers that are lost with their connection, or with the master's life: what was asked happens once."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from client_world import ROOT, TCP, UNIX, Client, World, in_world, until

from alluxiofuse.errors import ConnectionLost, StaleError
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.rpc.inprocess import InProcess
from alluxiofuse.wire import worker_ops
from alluxiofuse.wire.messages import Request

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from tcp_proxy import CUT, RESET, SWALLOW, TO_CLIENT, TO_SERVER, Fault, TcpProxy

Change = Callable[[Client, int, Callable[[], None]], Awaitable[object]]
"""(client, inode of `file`, to be called just before the request that matters)."""


async def _create(client: Client, ino: int, arm: Callable[[], None]) -> None:
    arm()
    file = await client.create(b"new", os.O_RDWR | os.O_EXCL)
    await file.write(0, b"bytes")
    await client.close(file)


async def _begin(client: Client, ino: int, arm: Callable[[], None]) -> None:
    file = await client.fs.open(ROOT, ino, os.O_WRONLY)
    arm()
    await file.write(0, b"again")
    await client.close(file)


async def _commit(client: Client, ino: int, arm: Callable[[], None]) -> None:
    file = await client.fs.open(ROOT, ino, os.O_WRONLY)
    await file.write(0, b"again")
    arm()
    await client.close(file)


def _plainly(ask: Callable[[Client, int], Awaitable[object]]) -> Change:
    def change(client: Client, ino: int, arm: Callable[[], None]) -> Awaitable[object]:
        arm()
        return ask(client, ino)

    return change


CHANGES: dict[str, Change] = {
    "create": _create,
    "begin": _begin,
    "commit": _commit,
    "mkdir": _plainly(lambda c, _: c.fs.mkdir(ROOT, ROOT_INO, b"new", 0o755)),
    "mknod": _plainly(lambda c, _: c.fs.mknod(ROOT, ROOT_INO, b"new", 0o644)),
    "symlink": _plainly(lambda c, _: c.fs.symlink(ROOT, ROOT_INO, b"new", b"to")),
    "unlink": _plainly(lambda c, _: c.fs.unlink(ROOT, ROOT_INO, b"file")),
    "rmdir": _plainly(lambda c, _: c.fs.rmdir(ROOT, ROOT_INO, b"dir")),
    "rename": _plainly(lambda c, _: c.fs.rename(ROOT, ROOT_INO, b"file", ROOT_INO, b"new")),
    "link": _plainly(lambda c, ino: c.fs.link(ROOT, ino, ROOT_INO, b"new")),
    "setxattr": _plainly(lambda c, ino: c.fs.setxattr(ROOT, ino, b"user.new", b"1", 1)),
    "removexattr": _plainly(lambda c, ino: c.fs.removexattr(ROOT, ino, b"user.old")),
    "chmod": _plainly(lambda c, ino: c.fs.setattr(ROOT, ino, mode=0o600)),
}


async def _names(client: Client) -> set[bytes]:
    return {entry.name for entry in await client.fs.list_dir(ROOT, ROOT_INO)}


async def _reset(client: Client) -> int:
    """`file` (with an attribute) and `dir`, nothing else; the file's inode."""
    for entry in await client.fs.list_dir(ROOT, ROOT_INO):
        if entry.name == b"dir" or (entry.name == b"new" and entry.attr.mode & 0o40000):
            await client.fs.rmdir(ROOT, ROOT_INO, entry.name)
        else:
            await client.fs.unlink(ROOT, ROOT_INO, entry.name)
    await client.put(b"file", b"bytes")
    await client.fs.mkdir(ROOT, ROOT_INO, b"dir", 0o755)
    ino = (await client.fs.lookup(ROOT, ROOT_INO, b"file")).ino
    await client.fs.setxattr(ROOT, ino, b"user.old", b"1")
    return ino


async def _check(client: Client, name: str, ino: int) -> None:
    names = await _names(client)
    if name in ("create", "mkdir", "mknod", "symlink", "link"):
        assert names == {b"file", b"dir", b"new"}
    elif name == "unlink":
        assert names == {b"dir"}
    elif name == "rmdir":
        assert names == {b"file"}
    elif name == "rename":
        assert names == {b"dir", b"new"}
    elif name in ("begin", "commit"):
        assert await client.get(b"file") == b"again"
    elif name == "chmod":
        assert (await client.fs.getattr(ino)).mode & 0o777 == 0o600
    else:
        expected = [b"user.new", b"user.old"] if name == "setxattr" else []
        assert await client.fs.listxattr(ino) == expected
    if name == "create":
        assert await client.get(b"new") == b"bytes"


@pytest.mark.parametrize("kind", [CUT, RESET])
def test_a_change_whose_answer_is_cut_off_happens_once(kind: str) -> None:
    async def test(world: World) -> None:
        with TcpProxy(("127.0.0.1", world.master_port)) as proxy:
            world.relayed[world.master_port] = proxy.port
            async with world.client() as client:
                replies = world.master.replies
                for name, change in CHANGES.items():
                    before = replies.repeated_count
                    while replies.repeated_count == before:  # The watch's answer may be what was hit.
                        ino = await _reset(client)
                        await change(client, ino, lambda: proxy.arm(Fault(kind, TO_CLIENT)))
                        proxy.arm(None)
                        await _check(client, name, ino)

    in_world(TCP, master={"session_lease_s": 20.0})(test)


def test_so_does_one_whose_request_is_cut_in_the_middle() -> None:
    async def test(world: World) -> None:
        with TcpProxy(("127.0.0.1", world.master_port)) as proxy:
            world.relayed[world.master_port] = proxy.port
            async with world.client() as client:
                for number, (name, change) in enumerate(CHANGES.items()):
                    ino = await _reset(client)
                    fault = Fault(RESET, TO_SERVER, 3 * number)
                    await change(client, ino, lambda: proxy.arm(fault))  # noqa: B023
                    await _check(client, name, ino)
                    await until(lambda: not proxy.is_armed)

    in_world(TCP, master={"session_lease_s": 20.0})(test)


def test_a_change_whose_answer_dies_with_the_master_happens_once() -> None:
    """The next life of the master knows it from its store."""

    async def test(world: World) -> None:
        with TcpProxy(("127.0.0.1", world.master_port)) as proxy:
            async with world.client() as client:
                for name, change in CHANGES.items():
                    ino = await _reset(client)
                    world.relayed[world.master_port] = proxy.port
                    await _reconnect(client)
                    async with trio.open_nursery() as nursery:
                        before: dict[bytes, bytes] = {}

                        def arm() -> None:
                            before.update(_kept(world))  # noqa: B023
                            before[b"armed"] = b""  # noqa: B023
                            proxy.arm(Fault(SWALLOW, TO_CLIENT))

                        nursery.start_soon(change, client, ino, arm)
                        await until(lambda: before and {**_kept(world), b"armed": b""} != before)  # noqa: B023
                        world.relayed.clear()
                        await world.stop_master()
                        await world.start_master(session_lease_s=20.0)
                        proxy.arm(None)
                        proxy.now(CUT)
                    await _check(client, name, ino)
                    assert world.master.replies.repeated_count == 1, name

    in_world(TCP, master={"session_lease_s": 20.0})(test)


def _kept(world: World) -> dict[bytes, bytes]:
    """The answers that the master keeps."""
    return dict(world.master.store.scan("meta", b"reply"))


async def _reconnect(client: Client) -> None:
    """By the way that `relayed` says."""
    link = client.master
    before = link.connected_count
    assert link.current is not None
    await link.current.aclose()
    await client.fs.statfs()
    assert link.connected_count > before


@pytest.mark.parametrize("direction", [TO_CLIENT, TO_SERVER])
def test_appends_through_a_worker_happen_once(direction: str) -> None:
    """Where the worker is on another machine: the answers, or parts of the requests, are cut off."""

    async def test(world: World) -> None:
        with TcpProxy(("127.0.0.1", world.workers["w1"].port)) as proxy:
            await world.stop_worker("w1")
            await world.start_worker("w2", hostname="elsewhere", relay=lambda port: _aim(proxy, port))
            async with world.client() as client:
                file = await client.create(b"file", os.O_RDWR | os.O_APPEND)
                expected = b""
                for number in range(12):
                    data = bytes([number]) * (1000 if number % 3 else 2_000_000)
                    after = (700 if direction == TO_SERVER else 7) * (number % 4)
                    proxy.arm(Fault((CUT, RESET)[number % 2], direction, after))
                    assert await file.write(0, data) == len(data)
                    expected += data
                proxy.arm(None)
                assert proxy.fault_count > 3
                await client.close(file)
                assert await client.get(b"file") == expected
            await world.stop_worker("w2")

    in_world(TCP, master={"session_lease_s": 20.0})(test)


def _aim(proxy: TcpProxy, port: int) -> int:
    proxy.target = ("127.0.0.1", port)
    return proxy.port


def test_a_worker_refuses_what_comes_by_an_earlier_connection() -> None:
    """A write that was on its way for long must not undo what was written after its repetition."""

    async def test(world: World) -> None:
        part = world.workers["w1"]
        async with world.client() as client:
            file = await client.create(b"file")
            await file.write(0, b"new")
            writing = client.fs._contents[file.ino].writing
            assert writing is not None
            assert writing.slab is not None
            lock_id = writing.slab.lock_id
            earlier = InProcess(part.worker.service, "earlier")
            all_late: list[Request[Any]] = [
                worker_ops.Write(lock_id, 0),
                worker_ops.Truncate(lock_id, 0),
                worker_ops.EndWrite(lock_id, None),
            ]
            for late in all_late:
                with pytest.raises(StaleError, match="another connection"):
                    await earlier.call(late, b"old")
            await earlier.call(worker_ops.Detach([lock_id]))
            await file.write(3, b"er")
            await client.close(file)
            assert await client.get(b"file") == b"newer"
            state = await part.connection.call(worker_ops.WorkerReport())
            assert state.counters["requests_refused"] == 3
            await earlier.aclose()

    in_world(UNIX)(test)


def test_when_the_session_is_lost_too_it_is_said_that_nothing_is_known() -> None:
    async def test(world: World) -> None:
        with TcpProxy(("127.0.0.1", world.master_port)) as proxy:
            world.relayed[world.master_port] = proxy.port
            async with world.client(patience_s=30.0) as client:
                proxy.arm(Fault(SWALLOW, TO_CLIENT))
                async with trio.open_nursery() as nursery:

                    async def make() -> None:
                        with pytest.raises(ConnectionLost, match="may have been done"):
                            await client.fs.mkdir(ROOT, ROOT_INO, b"d", 0o755)

                    nursery.start_soon(make)
                    await until(lambda: _kept(world))
                    proxy.is_refusing = True
                    proxy.now(CUT)
                    await until(lambda: not world.master.sessions.names())
                    proxy.is_refusing = False
                await client.fs.mkdir(ROOT, ROOT_INO, b"e", 0o755)
                assert await _names(client) == {b"d", b"e"}

    in_world(TCP, master={"session_lease_s": 1.0})(test)


def test_kept_answers_end_with_their_session() -> None:
    async def test(world: World) -> None:
        def kept() -> int:
            return len(_kept(world))

        async with world.client() as client:
            async with trio.open_nursery() as nursery:
                for number in range(200):
                    nursery.start_soon(client.fs.mkdir, ROOT, ROOT_INO, b"%d" % number, 0o755)
            at_once = kept()
            assert 0 < at_once <= 200
            for number in range(200):
                await client.fs.rmdir(ROOT, ROOT_INO, b"%d" % number)
            assert kept() == at_once, "slots are used again"
        await until(lambda: kept() == 0)
        async with world.client() as client:
            await client.fs.mkdir(ROOT, ROOT_INO, b"last", 0o755)
            await world.stop_master()
        await world.start_master(session_lease_s=0.5)
        assert kept() == 1, "it might have come back"
        await until(lambda: kept() == 0)

    in_world(TCP)(test)


def test_a_cancelled_attach_leaves_no_lock() -> None:
    """Its answer, with a lock, comes when nobody waits for it any more."""

    async def test(world: World) -> None:
        async def locks() -> int:
            state = await world.workers["w1"].connection.call(worker_ops.WorkerReport())
            return state.counters["locks"]

        async with world.client() as client:
            await client.put(b"file", os.urandom(1000))
            file = await client.open(b"file")
            await until(lambda: client.fs._core.slabs.drop_idle() or True)
            connection = await client.pool.connection(world.workers["w1"].worker_id)
            slabs, layout = client.fs._core.slabs, client.fs._contents[file.ino].layout

            async def has_no_lock() -> bool:
                return await locks() == 0

            await until(has_no_lock)
            with trio.CancelScope() as scope:
                scope.cancel()  # Sending does not wait, waiting for the answer does.
                await slabs.attach(client.fs.session_id, layout, world.workers["w1"].worker_id, connection)
            assert scope.cancelled_caught

            async def was_locked() -> bool:
                return slabs.late_count == 1

            await until(was_locked)
            await until(has_no_lock)
            assert len(await file.read(0, 1000)) == 1000
            await file.release()

    in_world(UNIX)(test)
