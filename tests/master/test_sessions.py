"""Leases, opens, orphans, and what a restart of the master makes of them."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import trio
from namespace_world import KERNEL, World
from trio.testing import MockClock

from alluxiofuse.errors import FsError, SessionExpiredError, UnavailableError
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.master import sessions
from alluxiofuse.wire.master_ops import Create, Open, Release, Unlink


def run(directory: Path, test: object) -> None:
    async def main() -> None:
        with trio.fail_after(10_000):
            world = World(directory / "meta")
            last = await test(world)  # type: ignore[operator]
            (last or world).store.close()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def make(world: World, session: int, name: bytes) -> int:
    return world.content.create(Create(KERNEL, session, ROOT_INO, name, 0o644, True, 0)).attr.ino


def test_an_open_file_outlives_its_name_until_the_last_release(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        a, b = world.session(), world.session()
        ino = make(world, a, b"f")
        world.content.open(Open(KERNEL, b, ino, False))
        assert world.changes.unlink(Unlink(KERNEL, a, ROOT_INO, b"f")).nlink == 0
        world.content.release(Release(a, [ino]))
        assert world.namespace.getattr(ino).nlink == 0
        world.validate()
        world.content.release(Release(b, [ino, ino]))
        assert world.store.inode(ino) is None
        world.validate()

    run(tmp_path, test)


def test_a_lease_that_runs_out_ends_what_the_session_held(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        session = world.session()
        ino = make(world, session, b"f")
        world.changes.unlink(Unlink(KERNEL, session, ROOT_INO, b"f"))
        await trio.sleep(world.sessions.lease_s - 1)
        world.content.sweep()
        world.sessions.touch(session)
        await trio.sleep(world.sessions.lease_s + 1)
        world.content.sweep()
        assert world.store.inode(ino) is None
        with pytest.raises(SessionExpiredError):
            world.content.open(Open(KERNEL, session, ROOT_INO, False))
        with pytest.raises(SessionExpiredError):
            world.sessions.open("late", "here", session, [])
        world.validate()

    run(tmp_path, test)


def test_a_session_comes_back_after_a_restart_with_its_orphans(tmp_path: Path) -> None:
    async def test(world: World) -> World:
        back, lost = world.session(), world.session()
        kept, freed = make(world, back, b"kept"), make(world, lost, b"freed")
        for name in (b"kept", b"freed"):
            world.changes.unlink(Unlink(KERNEL, back, ROOT_INO, name))
        world = world.reopen()
        world.content.sweep()
        assert world.sessions.open("test", "here", back, [kept]).session_id == back
        assert world.namespace.getattr(kept).nlink == 0
        await trio.sleep(world.sessions.lease_s + 1)
        world.sessions.touch(back)
        world.content.sweep()
        assert world.store.inode(freed) is None
        assert world.namespace.getattr(kept).nlink == 0
        with pytest.raises(SessionExpiredError):
            world.sessions.open("test", "here", lost, [freed])
        assert world.session() > lost
        world.content.release(Release(back, [kept]))
        assert world.store.inode(kept) is None
        world.validate()
        return world

    run(tmp_path, test)


def test_in_one_process_nothing_of_the_life_before_is_waited_for(tmp_path: Path) -> None:
    async def test(world: World) -> World:
        session = world.session()
        ino = make(world, session, b"f")
        world.changes.unlink(Unlink(KERNEL, session, ROOT_INO, b"f"))
        world = world.reopen(close_stale_sessions=True)
        world.content.sweep()
        assert world.store.inode(ino) is None
        with pytest.raises(SessionExpiredError):
            world.sessions.open("test", "here", session, [])
        return world

    run(tmp_path, test)


def test_a_reconnect_tells_exactly_what_is_open(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        session = world.session()
        one, two = make(world, session, b"1"), make(world, session, b"2")
        world.sessions.open("test", "here", session, [two, two])
        assert not world.sessions.is_open(one)
        assert not world.sessions.release(session, two)
        assert world.sessions.release(session, two)
        assert not world.sessions.release(session, two), "a release too many"

    run(tmp_path, test)


def test_sessions_and_opens_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that opens and never gives back gets an error; others go on, and it too once it does."""
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 3)
    monkeypatch.setattr(sessions, "MAX_OPENS_PER_SESSION", 4)
    monkeypatch.setattr(sessions, "MAX_NAMES", 2)

    async def test(world: World) -> None:
        one, two, three = world.session(), world.session(), world.session()
        with pytest.raises(UnavailableError, match="3 clients"):
            world.session()
        assert world.sessions.names() == ["test @ here", "test @ here", "and 1 more"]
        assert world.sessions.open("test", "here", one, []).session_id == one, "it is there already"
        world.content.end_session(three)
        world.session()

        ino = make(world, one, b"f")
        for _ in range(3):
            world.content.open(Open(KERNEL, one, ino, False))
        for operation in (
            lambda: world.content.open(Open(KERNEL, one, ino, False)),
            lambda: make(world, one, b"g"),
        ):
            with pytest.raises(FsError) as caught:
                operation()
            assert caught.value.errno == errno.EMFILE
        assert world.store.child(ROOT_INO, b"g") is None
        make(world, two, b"h")
        world.content.release(Release(one, [ino, ino]))
        make(world, one, b"g")
        world.content.release(Release(one, [ino] * 10))
        assert not world.sessions.is_open(ino)

    run(tmp_path, test)
