"""The persist log: what is left to be done converges to the namespace, on real under storages."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.lowlevel
from persist_places import Place
from persist_world import Killed, World


@asynccontextmanager
async def life(
    place: Place, contents: dict[int, bytes] | None = None, at: Callable[[str], None] = lambda point: None
) -> AsyncIterator[World]:
    """A world that is closed at the end, not yet running."""
    with trio.fail_after(60):
        contents = {} if contents is None else contents
        world = World(place.state, place.open_ufs, place.uri, contents, at=at)
        try:
            yield world
        finally:
            world.close()


Script = Callable[[World], object]


def steps(*scripts: Script, is_settled_between: bool) -> Callable[[World], Awaitable[None]]:
    async def run(world: World) -> None:
        for script in scripts:
            script(world)
            world.validate()
            if is_settled_between:
                await world.settle()
                world.check_equal()
            else:
                await trio.lowlevel.checkpoint()
        await world.settle()
        world.check_equal()

    return run


def a_tree(world: World) -> int:
    world.mkdir("d")
    world.mkdir("d/e")
    world.write("d/f", b"one")
    world.write("d/e/g", b"two")
    world.write("top", b"three")
    return world.write("empty", b"")


SCRIPTS: dict[str, list[Script]] = {
    "create": [a_tree],
    "create, delete, create": [
        lambda w: w.write("x", b"1"),
        lambda w: w.remove("x"),
        lambda w: w.write("x", b"2"),
    ],
    "delete all": [
        a_tree,
        lambda w: [w.remove(p) for p in ("d/e/g", "d/e", "d/f", "d", "top", "empty")],
    ],
    "rename chain": [
        a_tree,
        lambda w: w.rename("top", "t2"),
        lambda w: w.rename("t2", "d/t3"),
        lambda w: w.rename("d/t3", "t4"),
    ],
    "rename there and back": [a_tree, lambda w: w.rename("top", "x"), lambda w: w.rename("x", "top")],
    "swap by a temporary name": [
        a_tree,
        lambda w: [w.rename("top", "x"), w.rename("d/f", "top"), w.rename("x", "d/f")],
    ],
    "swap of directories": [
        a_tree,
        lambda w: w.mkdir("d2") and w.write("d2/h", b"four"),
        lambda w: [w.rename("d", "x"), w.rename("d2", "d"), w.rename("x", "d2")],
    ],
    "rename a directory": [a_tree, lambda w: w.rename("d", "n"), lambda w: w.write("n/new", b"5")],
    "rename a directory, make the old one anew": [
        a_tree,
        lambda w: [w.rename("d", "n"), w.mkdir("d"), w.write("d/f", b"other")],
    ],
    "a directory into what is made at its old place": [
        a_tree,
        lambda w: [w.rename("d/e", "x"), w.mkdir("d/e"), w.rename("x", "d/e/b")],
    ],
    "a directory far into what is made at its old place": [
        a_tree,
        lambda w: [w.rename("d", "x"), w.mkdir("d"), w.mkdir("d/n"), w.rename("x", "d/n/o")],
        lambda w: w.write("d/n/o/f", b"changed"),
    ],
    "a file into a directory made at its old place": [
        a_tree,
        lambda w: [w.rename("top", "x"), w.mkdir("top"), w.rename("x", "top/b")],
    ],
    "a changed file into a directory made at its old place": [
        a_tree,
        lambda w: [w.rename("top", "x"), w.mkdir("top"), w.rename("x", "top/b"), w.write("top/b", b"new")],
        lambda w: [w.rename("d/f", "x"), w.mkdir("d/f"), w.rename("x", "d/f/b"), w.write("d/f/b", b"")],
    ],
    "rename a directory with removals and writes below": [
        a_tree,
        lambda w: [w.remove("d/f"), w.write("d/e/new", b"6"), w.write("d/e/g", b"7")],
        lambda w: w.rename("d", "n"),
        lambda w: [w.remove("n/e/new"), w.rename("n/e", "e")],
    ],
    "all in one go": [
        lambda w: (
            [
                a_tree(w),
                w.remove("d/f"),
                w.write("d/e/new", b"6"),
                w.rename("d", "n"),
                w.write("n/f", b"8"),
                w.rename("n/e", "d"),
            ]
        ),
    ],
    "into a path whose old object is to be removed": [
        a_tree,
        lambda w: [w.remove("top"), w.rename("d/f", "top")],
    ],
    "overwrite by rename": [a_tree, lambda w: w.rename("d/f", "top"), lambda w: w.rename("top", "d/e/g")],
    "write, then rename over the target": [
        a_tree,
        lambda w: [w.write("top.tmp", b"new content"), w.rename("top.tmp", "top")],
    ],
    "file becomes directory": [
        a_tree,
        lambda w: [w.remove("top"), w.mkdir("top"), w.write("top/x", b"9")],
    ],
    "directory becomes file": [
        a_tree,
        lambda w: [w.remove("d/e/g"), w.remove("d/e"), w.write("d/e", b"a file now")],
    ],
    "file out of a directory that goes, in a circle": [
        a_tree,
        lambda w: (
            [
                w.rename("d/e/g", "tmp"),
                w.remove("d/e"),
                w.rename("top", "d/e"),
                w.rename("tmp", "top"),
            ]
        ),
    ],
    "rewritten and renamed": [
        a_tree,
        lambda w: [w.write("top", b"changed"), w.rename("top", "d/top"), w.write("top", b"other")],
    ],
    "primary of a hard link removed": [
        a_tree,
        lambda w: [w.link("top", "d/other"), w.link("top", "d/third")],
        lambda w: w.remove("top"),
        lambda w: w.write("top", b"again"),
    ],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_after_each_step(place: Place, name: str) -> None:
    async def main() -> None:
        async with life(place) as world, world.running():
            await steps(*SCRIPTS[name], is_settled_between=True)(world)

    trio.run(main)


@pytest.mark.parametrize("name", SCRIPTS)
def test_all_steps_at_once(place: Place, name: str) -> None:
    async def main() -> None:
        async with life(place) as world, world.running():
            await steps(*SCRIPTS[name], is_settled_between=False)(world)

    trio.run(main)


@pytest.mark.parametrize("name", SCRIPTS)
def test_first_step_before_the_persister_runs(place: Place, name: str) -> None:
    """The rest is found in the store by the next life."""

    async def main() -> None:
        contents: dict[int, bytes] = {}
        async with life(place, contents) as world:
            SCRIPTS[name][0](world)
            async with world.running():
                await world.settle()
            for script in SCRIPTS[name][1:]:
                script(world)
            world.validate()
        async with life(place, contents) as world, world.running():
            await world.settle()
            world.check_equal()

    trio.run(main)


def test_local_attributes(local_place: Place) -> None:
    async def main() -> None:
        async with life(local_place) as world, world.running():
            a_tree(world)
            world.symlink("link", "top")
            world.chmod("top", 0o600)
            world.chmod("d", 0o711)
            await world.settle()
            world.chmod("d/f", 0o640)
            await world.settle()
            world.check_equal()
            data = Path(local_place.uri)
            assert (data / "top").stat().st_mode & 0o777 == 0o600
            assert (data / "d").stat().st_mode & 0o777 == 0o711
            assert (data / "d/f").stat().st_mode & 0o777 == 0o640
            assert os.readlink(data / "link") == "top"
            assert (data / "top").stat().st_mtime_ns == world.record("top").mtime_ns
            for path in ("top", "d/f"):
                assert world.storage.stat(path.encode()).fingerprint == world.record(path).fingerprint

    trio.run(main)


def test_what_may_be_above_is_looked_at_first(local_place: Place) -> None:
    """A file was being uploaded when the master died; its name is a directory's now. Nothing is put below
    that before it is known what became of the file."""

    async def main() -> None:
        contents: dict[int, bytes] = {}
        async with life(local_place, contents) as world:
            begun = trio.Event()

            async def hold(_: object) -> None:
                begun.set()
                await trio.sleep_forever()

            world.worker.gate = hold
            async with world.running():
                world.write("c", b"content")
                await begun.wait()
        async with life(local_place, contents) as world, world.running():
            world.rename("c", "e")
            world.mkdir("c")
            world.write("c/empty", b"")
            await trio.sleep(0.5)
            world.remove("e")
            world.validate()
            await world.settle()
            world.check_equal()

    trio.run(main)


async def _renamed_and_killed(place: Place, contents: dict[int, bytes]) -> None:
    """A life that ends before the atomic rename of "d" to "n" is done; it is not known to the next."""
    is_armed = False

    def at(point: str) -> None:
        if is_armed and point == "before I/O":
            raise Killed(point)

    async with life(place, contents, at) as world:
        try:
            async with world.running():
                a_tree(world)
                await world.settle()
                is_armed = True
                world.rename("d", "n")
                await trio.sleep_forever()
        except* Killed:
            pass


def test_a_directory_goes_back_from_where_it_never_arrived(local_place: Place) -> None:
    async def main() -> None:
        contents: dict[int, bytes] = {}
        await _renamed_and_killed(local_place, contents)
        async with life(local_place, contents) as world:
            world.rename("n", "d")
            async with world.running():
                await world.settle()
            world.check_equal()

    trio.run(main)


def test_a_rename_between_a_plan_and_its_job(local_place: Place) -> None:
    """A job's task begins to run a little after it was planned. Here it would say that the directory is
    where it belongs, which is not true any more."""

    async def main() -> None:
        contents: dict[int, bytes] = {}
        await _renamed_and_killed(local_place, contents)
        async with life(local_place, contents) as world:
            world.rename("n", "d")
            directory = world.find("d")
            async with trio.open_nursery() as nursery:
                while "Kind.SETTLE" not in world.persister.explain(directory):
                    world.persister._round(nursery)
                    await trio.sleep(0.005)
                world.persister._round(nursery)
                world.rename("d", "other")
            world.validate()
            async with world.running():
                await world.settle()
            world.check_equal()

    trio.run(main)
