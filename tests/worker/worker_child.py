"""A worker in a process of its own, to be killed: `worker_child.py ROOT`. It writes, fetches and
changes containers without end and says on stdout what was acknowledged: `dirty ID SEED SIZE`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import trio
import trio.lowlevel
from worker_world import MB, pattern, running

from alluxiofuse.wire.worker_ops import EndWrite


async def main(root: Path) -> None:
    async with running(root, {"SSD": [(root / "ssd", 400 * MB)]}) as world:
        sources = [world.ufs_file(f"f{number}", pattern(5 * MB, number)) for number in range(4)]
        print("ready", flush=True)

        async def write() -> None:
            previous = old_size = 0
            for seed in range(1, 1000):
                size = (seed * 37_777) % (2 * MB) + 1
                if seed % 3 and previous:
                    container = next(world.containers)
                    grant, fd = await world.begin(container, previous, old_size, reserve=size)
                    print(f"gone {previous}", flush=True)
                    os.ftruncate(fd, size)
                    os.pwrite(fd, pattern(size, seed), 0)
                    os.close(fd)
                    await world.client.call(EndWrite(grant.lock_id, None))
                    await world.detach(grant.lock_id)
                else:
                    container, _ = await world.write_new(pattern(size, seed))
                print(f"dirty {container} {seed} {size}", flush=True)
                previous, old_size = container, size
                await trio.lowlevel.checkpoint()

        async def read() -> None:
            for number in range(100_000):
                await world.read_all(10 + number % 40, sources[number % 4])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            nursery.start_soon(read)


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
