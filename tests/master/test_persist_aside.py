"""Files that are removed or replaced while they are open: their bytes stay in the under storage, out of
the way of what belongs at their place, until they are closed. On real under storages."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import trio
from persist_places import Place
from persist_world import Killed, World, until
from test_persist_random import Player, flaky

from alluxiofuse.master.persist_aside import is_held
from alluxiofuse.master.records import RemoveEntry
from alluxiofuse.master.store import decode_record

Script = Callable[[World], object]


def _replaced(world: World) -> None:
    world.write("new", b"new content")
    world.rename("new", "d/f")


def _replaced_twice(world: World) -> None:
    _replaced(world)
    world.write("newer", b"newer")
    world.rename("newer", "d/f")


def _removed_and_made_anew(world: World) -> None:
    world.remove("d/f")
    world.write("d/f", b"another")


def _a_directory_in_its_place(world: World) -> None:
    world.remove("d/f")
    world.mkdir("d/f")
    world.write("d/f/g", b"below")


def _its_directory_removed(world: World) -> None:
    world.remove("d/f")
    world.remove("d/other")
    world.remove("d")


def _another_tree_in_its_place(world: World) -> None:
    _its_directory_removed(world)
    world.rename("e", "d")


def _its_tree_moved(world: World) -> None:
    world.remove("d/f")
    world.rename("d", "e/d")
    world.write("e/d/f", b"another")


def _moved_and_removed(world: World) -> None:
    world.rename("d/f", "e/f")
    world.remove("e/f")
    world.write("e/f", b"another")


CHANGES: list[Script] = [
    _replaced,
    _replaced_twice,
    _removed_and_made_anew,
    _a_directory_in_its_place,
    _its_directory_removed,
    _another_tree_in_its_place,
    _its_tree_moved,
    _moved_and_removed,
]


def _begin(world: World) -> int:
    world.mkdir("d")
    world.mkdir("e")
    world.write("e/f2", b"something else")
    world.write("d/other", b"other")
    return world.write("d/f", b"old content")


def is_all_done_but_held(world: World) -> bool:
    """What is left in the log waits for files to be closed."""
    for prefix in (b"s", b"i"):
        for _ in world.store.scan("persist", prefix):
            return False
    for key, raw in world.store.scan("persist", b"r"):
        if not is_held(world.store, key[8:], decode_record(raw, RemoveEntry, "entry")):
            return False
    return True


def bytes_of_orphan(world: World, ino: int) -> bytes:
    """As a reader gets them that goes by what the master says."""
    record = world.store.inode(ino)
    assert record is not None
    assert record.location is not None
    return bytes(world.storage.read(record.location, 0, record.size, record.fingerprint))


def close(world: World, ino: int) -> None:
    world.open_inos.discard(ino)
    world.tree.released(ino)


@pytest.mark.parametrize("is_at_once", [False, True], ids=["later", "at once"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_open_stays(place: Place, change: Script, is_at_once: bool) -> None:
    """ "at once": the persister is at work while the namespace changes."""

    async def main() -> None:
        world = World(place.state, place.open_ufs, place.uri, {})
        try:
            with trio.fail_after(60):
                async with world.running():
                    ino = _begin(world)
                    await world.settle()
                    world.open_inos.add(ino)
                    change(world)
                    if is_at_once:
                        await trio.sleep(0.02)
                    await until(lambda: is_all_done_but_held(world))
                    assert bytes_of_orphan(world, ino) == b"old content"
                    wanted, there = world.namespace_tree(), world.storage_tree()
                    assert {path: there[path] for path in wanted} == wanted
                    if world.mounts.capabilities(1).has_directories:
                        assert len(there) <= len(wanted) + 1
                    world.validate()
                    close(world, ino)
                    await world.settle()
                    world.check_equal()
        finally:
            world.close()

    trio.run(main)


def test_what_is_in_nobodys_way_stays_where_it_is(place: Place) -> None:
    async def main() -> None:
        world = World(place.state, place.open_ufs, place.uri, {})
        try:
            with trio.fail_after(60):
                async with world.running():
                    ino = _begin(world)
                    await world.settle()
                    world.open_inos.add(ino)
                    world.remove("d/f")
                    await until(lambda: is_all_done_but_held(world))
                    await trio.sleep(1.2)  # it has been looked at again
                    record = world.store.inode(ino)
                    assert record is not None
                    assert record.location == b"d/f"
                    close(world, ino)
                    await world.settle()
                    world.check_equal()
        finally:
            world.close()

    trio.run(main)


@pytest.mark.parametrize("change", [_replaced, _another_tree_in_its_place, _its_tree_moved])
def test_what_is_open_stays_when_the_master_dies(place: Place, change: Script) -> None:
    """Killed at each point of what follows the change; its session comes back to the next life."""

    async def life(point: int) -> bool:
        contents: dict[int, bytes] = {}
        countdown = point

        def at(_name: str) -> None:
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                raise Killed

        if not place.is_s3:
            os.mkdir(f"{place.uri}/{point}")
        world = World(place.state, place.open_ufs, f"{place.uri}/{point}", contents)
        try:
            async with world.running():
                ino = _begin(world)
                await world.settle()
                world.open_inos.add(ino)
                change(world)
        finally:
            world.close()
        world = World(place.state, place.open_ufs, f"{place.uri}/{point}", contents, at=at)
        world.open_inos.add(ino)
        try:
            async with world.running():
                await until(lambda: is_all_done_but_held(world))
        except* Killed:
            pass
        finally:
            world.validate()
            world.close()
        world = World(place.state, place.open_ufs, f"{place.uri}/{point}", contents)
        world.open_inos.add(ino)
        try:
            async with world.running():
                await until(lambda: is_all_done_but_held(world))
                assert bytes_of_orphan(world, ino) == b"old content"
                close(world, ino)
                await world.settle()
                world.check_equal()
        finally:
            world.close()
        return countdown <= 0

    async def main() -> None:
        with trio.fail_after(100):
            point = 1
            while await life(point):
                point += 1
                place.state = place.state.with_name(f"state{point}")
        assert point > 3  # killed at least twice

    trio.run(main)


def test_removed_while_its_object_is_renamed(place: Place) -> None:
    """Then its bytes are where it was renamed to, which another file wants."""

    async def main() -> None:
        armed = False

        def at(point: str) -> None:
            nonlocal armed
            if armed and point == "after I/O":
                armed = False
                world.remove("e/f")
                world.write("e/f", b"another")

        world = World(place.state, place.open_ufs, place.uri, {}, at=at)
        try:
            with trio.fail_after(60):
                async with world.running():
                    ino = _begin(world)
                    await world.settle()
                    world.open_inos.add(ino)
                    world.rename("d/f", "e/f")
                    armed = True
                    await until(lambda: not armed and is_all_done_but_held(world))
                    assert bytes_of_orphan(world, ino) == b"old content"
                    assert world.storage_tree()["e/f"] == b"another"
                    close(world, ino)
                    await world.settle()
                    world.check_equal()
        finally:
            world.close()

    trio.run(main)


def test_removed_with_its_tree_when_nobody_knows_whether_that_was_renamed(local_place: Place) -> None:
    """The master died right after it had moved the tree; what was removed since is below the new place."""
    place = local_place
    contents: dict[int, bytes] = {}
    is_armed = False

    def at(point: str) -> None:
        if is_armed and point == "after I/O":
            raise Killed

    async def first_life() -> int:
        nonlocal is_armed
        ino = 0
        world = World(place.state, place.open_ufs, place.uri, contents, at=at)
        try:
            async with world.running():
                ino = _begin(world)
                await world.settle()
                world.open_inos.add(ino)
                is_armed = True
                world.rename("d", "moved")
                await trio.sleep_forever()
        except* Killed:
            pass
        finally:
            world.close()
        return ino

    async def main() -> None:
        with trio.fail_after(60):
            ino = await first_life()
            world = World(place.state, place.open_ufs, place.uri, contents)
            assert "moved/f" in world.storage_tree()
            world.open_inos.add(ino)
            for name in ("moved/f", "moved/other", "moved"):
                world.remove(name)
            try:
                async with world.running():
                    await until(lambda: is_all_done_but_held(world))
                    assert bytes_of_orphan(world, ino) == b"old content"
                    close(world, ino)
                    await world.settle()
                    world.check_equal()
            finally:
                world.close()

    trio.run(main)


def test_a_store_that_refuses_does_not_hold_up_the_new_one(local_place: Place) -> None:
    """Where the old bytes can't go aside, the new ones are uploaded all the same."""

    async def main() -> None:
        world = World(local_place.state, local_place.open_ufs, local_place.uri, {})
        try:
            with trio.fail_after(60):
                async with world.running():
                    ino = _begin(world)
                    await world.settle()
                    os.mkdir(f"{local_place.uri}/.alluxiofuse-moving-{ino}")
                    os.mkdir(f"{local_place.uri}/.alluxiofuse-moving-{ino}/x")
                    world.open_inos.add(ino)
                    _replaced(world)
                    await until(lambda: is_all_done_but_held(world))
                    assert world.storage_tree()["d/f"] == b"new content"
        finally:
            world.close()

    trio.run(main)


class OpeningPlayer(Player):
    """Also opens files, and closes some of them again."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.opened: set[int] = set()

    def step(self, world: World) -> None:
        chance = self.random.random()
        if chance < 0.2:
            self._open(world)
        elif chance < 0.25 and self.opened:
            ino = self.random.choice(sorted(self.opened))
            self._note("close", str(ino))
            self.opened.discard(ino)
            close(world, ino)
        else:
            super().step(world)

    def _open(self, world: World) -> None:
        files = [path for path, is_dir in self._tree(world).items() if not is_dir]
        if files:
            path = self.random.choice(files)
            ino = world.find(path)
            self._note("open", path, str(ino))
            self.opened.add(ino)
            world.open_inos.add(ino)

    def check(self, world: World) -> None:
        for ino in self.opened:
            record = world.store.inode(ino)
            assert record is not None, ino
            is_clean = record.is_in_ufs and record.ufs_container == record.container
            if is_clean and record.size and not record.nlink:
                assert bytes_of_orphan(world, ino) == world.contents[record.container], ino


@pytest.mark.parametrize("seed", range(int(os.environ.get("SEEDS", "4"))))
def test_random_changes_of_what_is_open(place: Place, seed: int) -> None:
    """With a store that fails, and masters that die."""

    async def main() -> None:
        steady = place.open_ufs
        flaky(place, seed, 0.02)
        player = OpeningPlayer(seed)
        contents: dict[int, bytes] = {}
        for _life in range(5):
            countdown = player.random.randrange(10, 80)

            def at(point: str) -> None:
                nonlocal countdown
                countdown -= 1
                if countdown == 0:
                    raise Killed(point)

            world = World(place.state, place.open_ufs, place.uri, contents, at=at)
            world.open_inos.update(player.opened)
            try:
                with trio.fail_after(60):
                    async with world.running():
                        for _ in range(30):
                            player.step(world)
                            await trio.sleep(player.random.random() * 0.01)
                        await until(lambda world=world: is_all_done_but_held(world))  # type: ignore[misc]
            except* Killed:
                player.done.append("killed")
            finally:
                world.validate()
                world.close()
        world = World(place.state, steady, place.uri, contents)
        world.open_inos.update(player.opened)
        try:
            with trio.fail_after(60):
                async with world.running():
                    await until(lambda: is_all_done_but_held(world))
                    player.check(world)
                    for ino in player.opened:
                        close(world, ino)
                    await world.settle(35)
                world.check_equal()
        except BaseException:
            print("\n".join([*player.done, *world.dump()]))
            raise
        finally:
            world.close()

    trio.run(main)
