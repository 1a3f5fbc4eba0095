"""kill -9 in the middle of writing and fetching; then every acknowledged byte is there."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from worker_world import MB, eventually, pattern, running, trio_test

from alluxiofuse.wire.types import UfsSource


def kill_while_working(root: Path, lines: int) -> list[str]:
    """What the child acknowledged before it was killed, after it had said `lines` things."""
    script = Path(__file__).with_name("worker_child.py")
    command = [sys.executable, str(script), str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=script.parent) as child:
        assert child.stdout is not None
        said = []
        try:
            for line in child.stdout:
                said.append(line.strip())
                if len(said) >= lines:
                    break
        finally:
            child.kill()
        said += [line.strip() for line in child.stdout if line.endswith("\n")]
        child.wait()
    return said


@pytest.mark.parametrize("seed", range(2))
def test_kill_and_restart(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(2):
        said = kill_while_working(tmp_path, chance.randrange(5, 60))
        assert said[0] == "ready"
        check_all(tmp_path, said)


def check_all(root: Path, said: list[str]) -> None:
    dirty: dict[int, tuple[int, int]] = {}
    last_begun = 0
    for line in said[1:]:
        word, container, *rest = line.split()
        if word == "gone":
            dirty.pop(int(container), None)
            last_begun = int(container)
        else:
            dirty[int(container)] = (int(rest[0]), int(rest[1]))

    @trio_test
    async def run() -> None:
        tiers = {"SSD": [(root / "ssd", 400 * MB)]}
        async with running(root, tiers, session_grace_s=0.05) as world:
            newest = max(dirty, default=0)
            for container, (number, size) in dirty.items():
                if container == newest and container not in world.slabs.by_container:
                    continue  # it had just become another one, and the child had no time to say so
                assert await world.read_all(container, None, size) == pattern(size, number)
            for container, slab in list(world.slabs.by_container.items()):
                if 10 <= container < 50 and slab.size:
                    source = UfsSource(1, b"gone-now", slab.size, b"x")
                    if slab.present == slab.all_pages:
                        found = await world.read_all(container, source)
                        assert found == pattern(5 * MB, (container - 10) % 4)
            assert world.slabs.counters["checksum_mismatches"] == 0
            assert world.slabs.counters["lost_dirty_slabs"] == 0
            await eventually(lambda: all(s.state != 2 for s in world.slabs.by_container.values()), "sealed")
            assert last_begun not in world.slabs.by_container
            for slab in list(world.slabs.by_container.values()):
                world.slabs.free(slab, keep_dirty=False)

    run()
