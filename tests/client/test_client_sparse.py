"""Sparse files that are larger than any tier."""

from __future__ import annotations

import os
import random

import pytest
from client_world import IN_PROCESS, TCP, UNIX, World, in_world

FAR = 1 << 36
MB = 1 << 20


@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_bytes_in_a_sparse_file(kind: str) -> None:
    async def test(world: World) -> None:
        rng = random.Random(1)
        async with world.client() as client:
            file = await client.create(b"f")
            wanted: dict[int, bytes] = {}
            for round_ in range(3):
                for _ in range(12):
                    offset = rng.choice([0, FAR, FAR // 2 + 12345]) + rng.randrange(3) * 2 * MB
                    data = rng.randbytes(rng.choice([1, 4096, 200_000]))
                    done = 0
                    while done < len(data):
                        done += await file.write(offset + done, data[done:])
                    old = wanted.get(offset, b"")
                    wanted[offset] = data + old[len(data) :]
                    for at, text in wanted.items():
                        assert bytes(await file.read(at, len(text))) == text
                assert bytes(await file.read(FAR // 4, 1000)) == bytes(1000)
                if round_ == 1:
                    await client.close(file)
                    file = await client.open(b"f", os.O_RDWR)
                else:
                    await file.flush()
            end = max(wanted) + len(wanted[max(wanted)])
            assert file.attr.size == end
            await file.truncate(FAR // 2)
            await file.truncate(FAR)
            assert bytes(await file.read(FAR // 2, 300_000)) == bytes(300_000)
            await file.truncate(0)
            await client.close(file)

    in_world(kind, worker={"quota": 48 * MB}, master={"persist_delay_s": 60.0})(test)
