"""Answers that are lost with their connection, or with the master's life: what was asked happens once."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from client_world import ROOT, TCP, UNIX, Client, World, in_world, until

from alluxiofuse.ids import ROOT_INO
from alluxiofuse.wire import worker_ops

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
