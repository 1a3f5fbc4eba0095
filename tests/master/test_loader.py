"""Loading metadata on first use, and comparing it again: outside changes come in, our own pending
changes are never undone."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from persist_places import Place
from persist_world import World

from alluxiofuse.errors import UfsUnavailableError
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.master import ufs_freshness, ufs_loader
from alluxiofuse.ufs.base import UfsAttrs
from alluxiofuse.wire.types import EVENT_DATA, EVENT_ENTRY

ATTRS = UfsAttrs(0o644, os.geteuid(), os.getegid(), 10**18)


class Time:
    """A wall clock that tests set."""

    def __init__(self) -> None:
        self.now = 2 * 10**18

    def __call__(self) -> int:
        self.now += 1000
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += int(seconds * 1e9)


@asynccontextmanager
async def life(place: Place, interval_s: float = 10.0) -> AsyncIterator[tuple[World, Time]]:
    time = Time()
    with trio.fail_after(60):
        world = World(place.state, place.open_ufs, place.uri, {}, sync_interval_s=interval_s, wall_ns=time)
        try:
            yield world, time
        finally:
            world.close()


def outside(world: World, path: str, data: bytes, tmp: Path) -> None:
    """Somebody else puts a file into the under storage."""
    file = tmp / "outside"
    file.write_bytes(data)
    with open(file, "rb") as opened:
        world.storage.put(path.encode(), opened.fileno(), len(data), ATTRS)


async def look(world: World, path: str) -> int | None:
    """A lookup, as the namespace does it: load what has to be loaded on the way."""
    ino = ROOT_INO
    for part in path.split("/"):
        record = world.store.inode(ino)
        assert record is not None
        name = part.encode()
        if world.loader.needs_child(ino, record, name, world.store.child(ino, name)):
            await world.loader.load_child(ino, name)
        child = world.store.child(ino, name)
        if child is None:
            return None
        ino = child
    return ino


async def listing(world: World, path: str = "") -> list[str]:
    ino = ROOT_INO if not path else await look(world, path)
    assert ino is not None
    record = world.store.inode(ino)
    assert record is not None
    if world.loader.needs_children(ino, record):
        await world.loader.load_children(ino)
    return world.names(path)


def both(
    test: Callable[[World, Time, Path], Any], place: Place, tmp_path: Path, interval_s: float = 10.0
) -> None:
    async def main() -> None:
        async with life(place, interval_s) as (world, time), world.running():
            await test(world, time, tmp_path)
            world.validate()

    trio.run(main)


def test_first_lookup_and_listing(place: Place, tmp_path: Path) -> None:
    async def test(world: World, time: Time, tmp: Path) -> None:
        outside(world, "a/b/c", b"hello", tmp)
        outside(world, "a/d", b"", tmp)
        assert await look(world, "a/b/x") is None
        ino = await look(world, "a/b/c")
        assert ino is not None
        record = world.record("a/b/c")
        assert (record.size, record.is_in_ufs, record.ufs_container) == (5, True, record.container)
        assert stat.S_ISDIR(world.record("a").mode)
        assert await listing(world, "a") == ["b", "d"]
        assert world.persister.is_idle()

    both(test, place, tmp_path)


def test_negative_names_are_asked_once(local_place: Place, tmp_path: Path) -> None:
    async def test(world: World, time: Time, tmp: Path) -> None:
        assert await look(world, "nothing") is None
        root = world.store.inode(ROOT_INO)
        assert root is not None
        assert not world.loader.needs_child(ROOT_INO, root, b"nothing", None)
        outside(world, "nothing", b"1", tmp)
        assert await look(world, "nothing") is None
        time.pass_s(11)
        assert await look(world, "nothing") is not None

    both(test, local_place, tmp_path)


def test_outside_changes_are_seen_after_the_interval(place: Place, tmp_path: Path) -> None:
    async def test(world: World, time: Time, tmp: Path) -> None:
        for name in ("kept", "changed", "gone", "dir/below"):
            outside(world, name, b"old", tmp)
        assert await listing(world) == ["changed", "dir", "gone", "kept"]
        assert await listing(world, "dir") == ["below"]
        before = {name: world.record(name) for name in ("kept", "changed")}
        outside(world, "changed", b"new and longer", tmp)
        outside(world, "new", b"1", tmp)
        world.storage.delete(b"gone")
        world.storage.delete(b"dir/below")
        assert await listing(world) == ["changed", "dir", "gone", "kept"]
        seq = world.events.seq
        time.pass_s(11)
        assert [n for n in await listing(world) if n != "dir"] == ["changed", "kept", "new"]
        for name in ("changed", "kept"):
            await look(world, name)
        assert world.record("kept").container == before["kept"].container
        changed = world.record("changed")
        assert changed.container != before["changed"].container
        assert changed.size == 14
        kinds = {event.kind for _, event in list(world.events._kept)[-(world.events.seq - seq) :]}
        assert {EVENT_DATA, EVENT_ENTRY} <= kinds
        if await look(world, "dir") is not None:
            assert await listing(world, "dir") == []
        assert world.persister.is_idle()

    both(test, place, tmp_path)


def test_interval_never(place: Place, tmp_path: Path) -> None:
    async def test(world: World, time: Time, tmp: Path) -> None:
        outside(world, "a", b"1", tmp)
        assert await listing(world) == ["a"]
        outside(world, "b", b"1", tmp)
        time.pass_s(10**6)
        assert await listing(world) == ["a"]
        await world.loader.load_children(ROOT_INO)
        assert world.names() == ["a", "b"]

    both(test, place, tmp_path, -1.0)


def test_interval_always(local_place: Place, tmp_path: Path) -> None:
    async def test(world: World, time: Time, tmp: Path) -> None:
        outside(world, "a", b"1", tmp)
        assert await listing(world) == ["a"]
        outside(world, "b", b"1", tmp)
        assert await listing(world) == ["a", "b"]
        outside(world, "a", b"other", tmp)
        await look(world, "a")
        assert world.record("a").size == 5

    both(test, local_place, tmp_path, 0.0)


def test_ten_thousand_entries(local_place: Place, tmp_path: Path) -> None:
    async def test(world: World, time: Time, tmp: Path) -> None:
        big = Path(local_place.uri) / "big"
        big.mkdir()
        for number in range(10_000):
            (big / f"f{number:05}").touch()
        assert await look(world, "big/f00007") is not None
        assert await look(world, "big/f09999") is not None
        assert await look(world, "big/nothing") is None
        names = await listing(world, "big")
        assert names == [f"f{number:05}" for number in range(10_000)]
        assert world.record("big").is_loaded
        (big / "f00003").unlink()
        time.pass_s(ufs_freshness.MAX_COMPARED_S + 1)  # what comparing them took decides when it is due again
        assert len(await listing(world, "big")) == 9_999

    both(test, local_place, tmp_path)


def test_a_large_directory_is_not_loaded_by_a_lookup(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ufs_loader, "PAGE_ENTRIES", 7)

    async def test(world: World, time: Time, tmp: Path) -> None:
        for number in range(25):
            outside(world, f"d/{number:02}", b"x", tmp)
        assert await look(world, "d/20") is not None
        assert await look(world, "d/nothing") is None
        assert await look(world, "d/24") is not None
        if place.is_s3:  # a local directory lists all at once
            assert not world.record("d").is_loaded
            assert len(world.names("d")) == 9
        assert len(await listing(world, "d")) == 25
        assert world.record("d").is_loaded

    both(test, place, tmp_path)


def test_no_ghosts_of_what_is_to_be_removed_or_moved(place: Place, tmp_path: Path) -> None:
    """The persister does not run: all is pending while the listings are taken."""

    async def main() -> None:
        async with life(place, 0.0) as (world, _):
            for name in ("gone", "moved", "d/inner", "e/f"):
                outside(world, name, b"1", tmp_path)
            assert await listing(world) == ["d", "e", "gone", "moved"]
            assert await listing(world, "d") == ["inner"]
            assert await listing(world, "e") == ["f"]
            world.remove("gone")
            world.rename("moved", "e/here")
            world.rename("d", "n")
            world.remove("e/f")
            world.mkdir("d")
            assert await listing(world) == ["d", "e", "n"]
            assert await listing(world, "d") == []
            assert await listing(world, "e") == ["here"]
            assert await listing(world, "n") == ["inner"]
            for ghost in ("gone", "moved", "d/inner", "e/f"):
                assert await look(world, ghost) is None
            world.validate()
            async with world.running():
                await world.settle()
            assert set(world.storage_tree()) - {"d", "e", "n"} == {"n/inner", "e/here"}

    trio.run(main)


@pytest.mark.parametrize("change", ["write", "remove", "rename"])
def test_a_listing_older_than_our_own_persist(place: Place, tmp_path: Path, change: str) -> None:
    """It is taken, then our change is persisted completely, then the listing is compared."""

    async def main() -> None:
        async with life(place, 0.0) as (world, _), world.running():
            world.write("a", b"first")
            world.write("other", b"x")
            await world.settle()
            assert await listing(world) == ["a", "other"]
            taken, go_on = trio.Event(), trio.Event()
            ask = world.loader._ask

            async def slow(mount_id: int, work: Any, *, is_known: bool) -> Any:
                answer = await ask(mount_id, work, is_known=is_known)
                if hasattr(answer, "entries"):
                    taken.set()
                    await go_on.wait()
                return answer

            world.loader._ask = slow  # type: ignore[method-assign]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: world.loader.load_children(ROOT_INO))
                await taken.wait()
                if change == "write":
                    world.write("a", b"second, longer")
                elif change == "remove":
                    world.remove("a")
                else:
                    world.rename("a", "b")
                await world.settle()
                before = world.namespace_tree()
                containers = {name: world.record(name).container for name in before}
                go_on.set()
            assert world.namespace_tree() == before
            assert {name: world.record(name).container for name in before} == containers
            await world.settle()
            world.check_equal()

    trio.run(main)


def test_what_is_dirty_here_survives_removal_outside(local_place: Place, tmp_path: Path) -> None:
    async def main() -> None:
        async with life(local_place, 0.0) as (world, _):
            outside(world, "d/clean", b"1", tmp_path)
            outside(world, "d/dirty", b"1", tmp_path)
            assert await listing(world, "d") == ["clean", "dirty"]
            world.write("d/dirty", b"mine")
            for name in ("clean", "dirty"):
                (Path(local_place.uri) / "d" / name).unlink()
            (Path(local_place.uri) / "d").rmdir()
            await listing(world)
            assert world.names("d") == ["dirty"]
            world.validate()
            async with world.running():
                await world.settle()
            world.check_equal()

    trio.run(main)


def test_unreachable(local_place: Place, tmp_path: Path) -> None:
    """The first load fails with the error; what is known is served."""

    async def main() -> None:
        async with life(local_place, 10.0) as (world, time):
            outside(world, "a", b"1", tmp_path)
            inner, is_down = world.loader._ask, True

            async def ask(mount_id: int, work: Any, *, is_known: bool) -> Any:
                if is_down:
                    raise UfsUnavailableError("down")
                return await inner(mount_id, work, is_known=is_known)

            world.loader._ask = ask  # type: ignore[method-assign]
            with pytest.raises(UfsUnavailableError):
                await look(world, "a")
            with pytest.raises(UfsUnavailableError):
                await listing(world)
            is_down = False
            assert await listing(world) == ["a"]
            is_down = True
            time.pass_s(11)
            assert await listing(world) == ["a"]
            assert await look(world, "a") is not None
            assert world.loader.failed_count > 0

    trio.run(main)


def test_reader_met_another_version(place: Place, tmp_path: Path) -> None:
    async def test(world: World, time: Time, tmp: Path) -> None:
        outside(world, "a", b"1", tmp)
        ino = await look(world, "a")
        assert ino is not None
        old = world.record("a").container
        outside(world, "a", b"22", tmp)
        await world.loader.source_changed(ino, old)
        assert (world.record("a").size, world.record("a").container != old) == (2, True)
        world.storage.delete(b"a")
        await world.loader.source_changed(ino, world.record("a").container)
        assert world.store.inode(ino) is None

    both(test, place, tmp_path)


class Calls:
    """Counts what the store is asked, and can make listings take their time."""

    def __init__(self, world: World, time: Time) -> None:
        self.stat_count = self.list_count = 0
        self.list_s = 0.0
        storage, passed_s = world.storage, 0.0
        stat_, list_, monotonic = storage.stat, storage.list, world.clock.monotonic

        def stat(path: bytes) -> Any:
            self.stat_count += 1
            return stat_(path)

        def list_slowly(*arguments: Any) -> Any:
            nonlocal passed_s
            self.list_count += 1
            passed_s += self.list_s
            time.pass_s(self.list_s)
            return list_(*arguments)

        storage.stat, storage.list = stat, list_slowly  # type: ignore[method-assign, assignment]
        world.clock.monotonic = lambda: monotonic() + passed_s  # type: ignore[method-assign]


def test_what_takes_long_to_compare_is_compared_less_often(local_place: Place, tmp_path: Path) -> None:
    """A tenth of the time goes into it at most, however large a directory is: also lookups in it then
    count what the listing showed."""

    async def test(world: World, time: Time, tmp: Path) -> None:
        outside(world, "d/a", b"1", tmp)
        calls = Calls(world, time)
        calls.list_s = 4.0
        assert await listing(world, "d") == ["a"]
        seen = calls.list_count
        outside(world, "d/b", b"1", tmp)
        cost_s = 4.0 * seen  # with the first page that a lookup asked for
        time.pass_s(ufs_freshness.COMPARE_SHARE * 4.0 - cost_s - 1)
        assert await listing(world, "d") == ["a"]
        assert await look(world, "d/b") is None
        assert await look(world, "d/a") is not None
        assert calls.list_count == seen
        assert world.loader.cache_s(world.record("d/a")) <= 10 + cost_s
        time.pass_s(cost_s + 2)
        assert await listing(world, "d") == ["a", "b"]
        calls.list_s = 10_000.0
        time.pass_s(1000)
        await listing(world, "d")
        outside(world, "d/c", b"1", tmp)
        time.pass_s(1)
        assert await listing(world, "d") == ["a", "b", "c"]

    both(test, local_place, tmp_path)


def test_asking_for_all_names_one_by_one_becomes_a_listing(local_place: Place, tmp_path: Path) -> None:
    """As `rm -r`, or `ls -l` when the kernel has let go of the attributes, does."""

    async def test(world: World, time: Time, tmp: Path) -> None:
        for number in range(300):
            outside(world, f"d/{number:03}", b"x", tmp)
        assert len(await listing(world, "d")) == 300
        time.pass_s(ufs_freshness.MAX_COMPARED_S + 1)
        calls = Calls(world, time)
        for number in range(300):
            assert await look(world, f"d/{number:03}") is not None
        assert calls.list_count == 1
        assert calls.stat_count < 3 * (ufs_freshness.MIN_ASKS + 300 // ufs_freshness.LOCAL_ENTRIES_PER_ASK)
        world.storage.delete(b"d/007")
        time.pass_s(ufs_freshness.MAX_COMPARED_S + 1)
        assert await look(world, "d/007") is None

    both(test, local_place, tmp_path)
