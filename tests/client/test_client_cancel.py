"""Calls that are cancelled anywhere: no lock, reservation or descriptor stays behind."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
from client_world import IN_PROCESS, TCP, UNIX, World, in_world, until

from alluxiofuse.worker.slab import WRITING
from alluxiofuse.worker.validation import validate

MB = 1 << 20


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_nothing_stays_behind(kind: str, seed: int) -> None:
    async def test(world: World) -> None:
        rng = random.Random(seed)
        for number in range(3):
            (world.ufs / f"cold{number}").write_bytes(rng.randbytes((number + 1) * MB + 5))
        async with world.client() as client:

            async def use(name: bytes) -> None:
                """Open, a few calls, any of them cancelled at any await; then closed properly."""
                with trio.move_on_after(rng.random() * 0.01):
                    file = (
                        await client.create(name)
                        if rng.random() < 0.2
                        else await client.open(name, os.O_RDWR)
                    )
                    files.append(file)
                    for _ in range(4):
                        data = rng.randbytes(rng.choice([100, 300_000]))
                        write = partial(file.write, rng.randrange(2 * MB), data)
                        calls: list[Callable[[], Awaitable[object]]] = [
                            file.flush,
                            file.fsync,
                            partial(file.read, rng.randrange(MB), 2 * MB),
                            partial(file.truncate, rng.choice([0, 5, MB])),
                            *[write] * 3,
                        ]
                        with trio.move_on_after(rng.random() * 0.004):
                            await rng.choice(calls)()

            for number in range(3):
                await client.put(b"f%d" % number, b"")
            for _ in range(25):
                files: list[object] = []
                async with trio.open_nursery() as nursery:
                    for name in (b"f0", b"f1", b"f2", b"cold0", b"cold1", b"cold2"):
                        nursery.start_soon(use, name)
                for file in files:
                    await client.close(file)  # type: ignore[arg-type]
            for number in range(3):
                await client.get(b"f%d" % number)
            assert not client.fs._contents or all(not one.files for one in client.fs._contents.values())
            part = next(iter(world.workers.values()))
            slabs = part.worker.slabs
            assert slabs is not None

            async def is_idle() -> bool:
                client.fs._core.slabs.drop_idle()
                await client.fs._core.slabs.send_detaches()
                pins = sum(slab.pins for slab in slabs.by_container.values())
                return not pins and not any(slab.state == WRITING for slab in slabs.by_container.values())

            await until(is_idle)
            validate(slabs, with_bytes=True)
            if kind == IN_PROCESS:
                assert not slabs.locks
        await until(lambda: not slabs.locks)

    in_world(kind)(test)
