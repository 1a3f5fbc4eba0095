"""Random namespace operations over failing under storages and dying masters: in the end the under
storage is what the namespace says."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
from persist_places import Place
from persist_world import Flaky, Killed, World, until

from alluxiofuse.ufs.base import UnderStorage

OPERATIONS = 120
NAMES = ["a", "b", "c", "d"]


class Player:
    """Does random operations on a world, always possible ones."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.done: list[str] = []

    def step(self, world: World) -> None:
        tree = self._tree(world)
        files = [p for p, is_dir in tree.items() if not is_dir]
        dirs = ["", *(p for p, is_dir in tree.items() if is_dir)]
        operation = self.random.choice(
            ["write", "write", "write", "mkdir", "remove", "remove", "rename", "rename"]
        )
        getattr(self, "_" + operation)(world, tree, files, dirs)

    def _tree(self, world: World) -> dict[str, bool]:
        found: dict[str, bool] = {}
        todo = [""]
        while todo:
            base = todo.pop()
            for name in world.names(base):
                path = f"{base}/{name}" if base else name
                found[path] = world.record(path).is_loaded
                if found[path]:
                    todo.append(path)
        return found

    def _target(self, dirs: list[str]) -> str:
        base = self.random.choice([d for d in dirs if d.count("/") < 3])
        name = self.random.choice(NAMES)
        return f"{base}/{name}" if base else name

    def _note(self, *words: str) -> None:
        self.done.append(" ".join(words))

    def _write(self, world: World, tree: dict[str, bool], files: list[str], dirs: list[str]) -> None:
        path = self._target(dirs)
        if not tree.get(path, False):
            self._note("write", path)
            world.write(path, self.random.randbytes(self.random.choice([0, 10, 1000])))

    def _mkdir(self, world: World, tree: dict[str, bool], files: list[str], dirs: list[str]) -> None:
        path = self._target(dirs)
        if path not in tree:
            self._note("mkdir", path)
            world.mkdir(path)

    def _remove(self, world: World, tree: dict[str, bool], files: list[str], dirs: list[str]) -> None:
        empty = [d for d in dirs if d and not world.names(d)]
        if files or empty:
            path = self.random.choice(files + empty)
            self._note("remove", path)
            world.remove(path)

    def _rename(self, world: World, tree: dict[str, bool], files: list[str], dirs: list[str]) -> None:
        if not tree:
            return
        old, new = self.random.choice(list(tree)), self._target(dirs)
        if new == old or new.startswith(old + "/"):
            return
        if new in tree and (tree[new] != tree[old] or (tree[new] and world.names(new))):
            return
        self._note("rename", old, new)
        world.rename(old, new)


def flaky(place: Place, seed: int, rate: float) -> list[Flaky]:
    """Make the place open failing connectors; the list fills with them."""
    made: list[Flaky] = []
    inner = place.open_ufs

    def open_flaky(uri: str, options: dict[str, str]) -> UnderStorage:
        made.append(Flaky(inner(uri, options), seed, rate))
        return made[-1]

    place.open_ufs = open_flaky
    return made


@contextmanager
def ended(world: World, player: Player) -> Iterator[None]:
    """The world is closed at the end; when something went wrong, what was done is told."""
    try:
        yield
    except BaseException:
        print("\n".join(player.done))
        raise
    finally:
        world.close()


@pytest.mark.parametrize("seed", range(int(os.environ.get("SEEDS", "6"))))
def test_failing_under_storage(place: Place, seed: int) -> None:
    async def main() -> None:
        made = flaky(place, seed, 0.1)
        player = Player(seed)
        world = World(place.state, place.open_ufs, place.uri, {})
        with ended(world, player), trio.fail_after(100):
            async with world.running():
                for _ in range(OPERATIONS if not place.is_s3 else OPERATIONS // 2):
                    player.step(world)
                    if player.random.random() < 0.5:
                        await trio.sleep(player.random.random() * 0.01)
                world.validate()
                await world.settle(25)
            made[0].rate = 0.0
            world.check_equal()

    trio.run(main)


@pytest.mark.parametrize("seed", range(int(os.environ.get("SEEDS", "6"))))
def test_dying_master(place: Place, seed: int) -> None:
    """Killed between intent, I/O and commit, again and again; each life goes on from the store."""

    async def main() -> None:
        player = Player(seed)
        contents: dict[int, bytes] = {}
        for _life in range(8):
            countdown = player.random.randrange(1, 40)

            def at(point: str) -> None:
                nonlocal countdown
                countdown -= 1
                if countdown == 0:
                    raise Killed(point)

            world = World(place.state, place.open_ufs, place.uri, contents, at=at)
            try:
                with trio.fail_after(60):
                    async with world.running():
                        for _ in range(25):
                            player.step(world)
                            await trio.sleep(player.random.random() * 0.01)
                        await until(world.persister.is_idle)
            except* Killed:
                player.done.append("killed")
            finally:
                try:
                    world.validate()
                except BaseException:
                    print("\n".join(player.done))
                    raise
                world.close()
        world = World(place.state, place.open_ufs, place.uri, contents)
        with ended(world, player), trio.fail_after(60):
            async with world.running():
                await world.settle(35)
            world.check_equal()

    trio.run(main)
