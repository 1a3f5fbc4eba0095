"""A worker in a process of its own, to be killed: `passing_child.py ROOT FIRST`. One content, for ever opened
for writing as kernels do it: in vain, changed, and emptied under a reader. It says on stdout what it is
about to do, `next KIND NEW SEED SIZE`, and what the content is: `is CONTAINER SEED SIZE`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import trio
import trio.lowlevel
from worker_world import MB, World, pattern, running

from alluxiofuse.wire.worker_ops import EndWrite

KINDS = ("vain", "change", "empty")


async def step(world: World, kind: str, old: int, old_size: int, new: int, data: bytes) -> None:
    """`data` takes the place of the `old_size` bytes of `old`, unless it is in vain."""
    reader, locks = -1, []
    if kind == "empty":
        attached, reader = await world.attach(old, None, old_size)
        locks.append(attached.lock_id)
    grant, fd = await world.begin(new, old, old_size, passes=True, is_emptying=kind == "empty")
    assert grant.passes
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    os.close(fd)
    if kind != "vain":
        os.pwrite(own, data, 0)
        os.ftruncate(own, len(data))
    os.close(own)
    end = await world.client.call(EndWrite(grant.lock_id, None, True))
    assert (end.is_reverted, end.is_sealed) == (kind == "vain", kind != "vain")
    if reader >= 0:
        os.close(reader)
    await world.detach(grant.lock_id, *locks)


async def main(root: Path, first: int) -> None:
    async with running(root, {"SSD": [(root / "ssd", 4 << 30)]}) as world:
        container, seed, size = first, first, 5000
        await world.write_new(pattern(size, seed), container)
        print(f"is {container} {seed} {size}", flush=True)
        for number in range(first + 1, first + 5000):
            kind = KINDS[number % 3]
            new_size = (number * 37_777) % (2 * MB) + 1
            print(f"next {kind} {number} {number} {new_size}", flush=True)
            await step(world, kind, container, size, number, pattern(new_size, number))
            if kind != "vain":
                container, seed, size = number, number, new_size
            print(f"is {container} {seed} {size}", flush=True)
            await trio.lowlevel.checkpoint()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), int(sys.argv[2]))
