"""Many tasks on one file and on many files at the same time."""

from __future__ import annotations

import os
import random

import pytest
import trio
import trio.lowlevel
from client_world import IN_PROCESS, ROOT, TCP, UNIX, Client, World, in_world

from alluxiofuse.ids import ROOT_INO

TASKS = 6
REGION_BYTES = 700_000


async def _own_region(client: Client, number: int, expected: bytearray, rng: random.Random) -> None:
    """Write, read back, flush and reopen within one region of a shared file."""
    file = await client.open(b"shared", os.O_RDWR)
    base = number * REGION_BYTES
    for _ in range(25):
        offset = rng.randrange(REGION_BYTES)
        data = rng.randbytes(min(rng.choice([10, 5000, 300_000]), REGION_BYTES - offset))
        done = 0
        while done < len(data):
            done += await file.write(base + offset + done, data[done:])
        expected[base + offset : base + offset + len(data)] = data
        found = await file.read(base, REGION_BYTES)
        assert bytes(found).ljust(REGION_BYTES, b"\0") == expected[base : base + REGION_BYTES]
        action = rng.random()
        if action < 0.2:
            await file.flush()
        elif action < 0.3:
            await file.fsync()
        elif action < 0.5:
            await client.close(file)
            file = await client.open(b"shared", os.O_RDWR)
        await trio.lowlevel.checkpoint()
    await client.close(file)


@pytest.mark.parametrize("client_count", [1, 2])
@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_one_file_shared_by_many_writers(kind: str, client_count: int) -> None:
    async def test(world: World) -> None:
        async with world.client("one") as one, world.client("two") as two:
            clients = [one, two][:client_count]
            await one.put(b"shared", b"")
            expected = bytearray(TASKS * REGION_BYTES)
            async with trio.open_nursery() as nursery:
                for number in range(TASKS):
                    client = clients[number % client_count]
                    nursery.start_soon(_own_region, client, number, expected, random.Random(number))
            attr = await one.fs.lookup(ROOT, ROOT_INO, b"shared")
            assert attr.home == 0
            for client in clients:
                assert (await client.get(b"shared")).ljust(len(expected), b"\0") == expected

    in_world(kind)(test)


@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_many_files_at_once(kind: str) -> None:
    async def test(world: World) -> None:
        async with world.client(max_cached_slabs=8) as client:

            async def one(number: int) -> None:
                name, data = b"%d" % number, os.urandom(number * 997)
                for _ in range(3):
                    await client.put(name, data)
                    assert await client.get(name) == data
                await client.fs.rename(ROOT, ROOT_INO, name, ROOT_INO, b"r" + name)
                assert await client.get(b"r" + name) == data

            async with trio.open_nursery() as nursery:
                for number in range(60):
                    nursery.start_soon(one, number)

    in_world(kind)(test)


def test_cancelled_calls_leave_a_usable_file() -> None:
    async def test(world: World) -> None:
        rng = random.Random(7)
        async with world.client() as client:
            file = await client.create(b"f")
            expected = bytearray()
            for _ in range(200):
                data = rng.randbytes(rng.choice([100, 200_000]))
                with trio.CancelScope() as scope:
                    scope.deadline = trio.current_time() + rng.random() * 0.003
                    await rng.choice([file.flush, file.fsync])()
                assert await file.write(0, data) == len(data)
                expected[: len(data)] = data
                with trio.move_on_after(rng.random() * 0.003):
                    await file.read(0, 200_000)
                assert bytes(await file.read(0, 1 << 20)) == expected
            await client.close(file)
            assert await client.get(b"f") == expected

    in_world(UNIX)(test)
