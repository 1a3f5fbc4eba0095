"""Homes, containers and seals, with workers that only talk to the registry."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import trio
from namespace_world import KERNEL, World
from test_sessions import run

from alluxiofuse.config import MasterConfig
from alluxiofuse.errors import FsError, StaleError, UnavailableError
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.wire.master_ops import (
    REPORTS_PER_CALL,
    BeginWrite,
    CommitContent,
    Create,
    Created,
    Open,
    ReportBlocks,
    SetAttr,
    Unlink,
    WorkerCommands,
    WorkerHeartbeat,
)
from alluxiofuse.wire.types import BlockReport, FreeCommand, OrphanSeal, Tier


def create(world: World, session: int, name: bytes, home: int, exclusive: bool = True) -> Created:
    return world.content.create(Create(KERNEL, session, ROOT_INO, name, 0o644, exclusive, home))


def seal(world: World, session: int, ino: int, container: int, size: int = 3, mtime_ns: int = 5) -> None:
    world.content.commit_content(CommitContent(session, ino, container, size, mtime_ns, True))
    world.validate()


def beat(world: World, worker: tuple[int, int], *deltas: BlockReport) -> None:
    world.workers.heartbeat(WorkerHeartbeat(*worker, [Tier("MEM", 1 << 30, 0, [])], list(deltas), [], 0))


async def vanished(world: World) -> tuple[tuple[int, int], Created]:
    """A home, and a file created there whose writer's session has ended before the home told of it."""
    worker, session = world.worker(), world.session()
    made = create(world, session, b"f", worker[0])
    await trio.sleep(world.sessions.lease_s + 1)  # else it could be of the life before
    world.content.end_session(session)
    return worker, made


async def freed(world: World, worker: tuple[int, int]) -> set[int]:
    """Containers that the worker is told to drop."""
    found: set[int] = set()
    world.store.sync()  # A thread would not be in time for a clock that jumps.
    for command in await world.workers.commands(WorkerCommands(*worker, 0)):
        if isinstance(command, FreeCommand):
            found |= set(command.containers)
    return found


def test_create_write_seal_write_again(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        worker, session = world.worker(), world.session()
        made = create(world, session, b"f", worker[0])
        ino, first = made.attr.ino, made.layout.container
        assert (made.is_new, made.layout.home, made.layout.base_container) == (True, worker[0], 0)
        world.validate()
        seal(world, session, ino, first, 3)
        opened = world.content.open(Open(KERNEL, session, ino, True))
        assert (opened.attr.size, opened.attr.home, opened.layout.container) == (3, 0, first)
        assert opened.layout.workers == [worker[0]], "known before its block report"
        again = world.content.begin_write(BeginWrite(session, ino, worker[0], False))
        assert again.container != first
        assert (again.base_container, again.base_size, again.size) == (first, 3, 3)
        world.validate()
        seal(world, session, ino, again.container, 7)
        assert await freed(world, worker) == {first}
        assert world.namespace.getattr(ino).size == 7

    run(tmp_path, test)


def test_truncating_starts_empty_and_keeps_the_base_until_the_seal(tmp_path: Path) -> None:
    async def test(world: World) -> World:
        worker, session = world.worker(), world.session()
        made = create(world, session, b"f", worker[0])
        seal(world, session, made.attr.ino, made.layout.container)
        layout = world.content.begin_write(BeginWrite(session, made.attr.ino, worker[0], True))
        assert (layout.size, layout.base_container, layout.source) == (0, 0, None)
        assert world.namespace.getattr(made.attr.ino).size == 0
        world.validate()
        # The home comes back without ever having heard of the new container: nothing was lost.
        world = world.reopen(close_stale_sessions=True)
        old = BlockReport(made.layout.container, b"\x01", True)
        world.worker(reports=ReportBlocks(0, 0, [old], True))
        attr = world.namespace.getattr(made.attr.ino)
        assert (attr.size, attr.home, attr.container) == (3, 0, made.layout.container)
        world.validate()
        return world

    run(tmp_path, test)


def test_a_second_writer_joins_at_the_home_in_force(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        one, two = world.worker("worker-1"), world.worker("worker-2")
        a, b = world.session(), world.session()
        made = create(world, a, b"f", one[0])
        joined = world.content.begin_write(BeginWrite(b, made.attr.ino, two[0], False))
        assert (joined.home, joined.container) == (one[0], made.layout.container)
        assert create(world, b, b"f", two[0], exclusive=False).is_new is False
        with pytest.raises(FsError) as caught:
            create(world, b, b"f", two[0])
        assert caught.value.errno == errno.EEXIST

    run(tmp_path, test)


def test_dirty_content_can_only_go_on_where_it_is(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        one, two = world.worker("worker-1"), world.worker("worker-2")
        session = world.session()
        made = create(world, session, b"f", one[0])
        seal(world, session, made.attr.ino, made.layout.container)
        await trio.sleep(world.workers._config.worker_timeout_s + 1)
        two = world.worker("worker-2")
        session = world.session()
        with pytest.raises(UnavailableError):
            world.content.begin_write(BeginWrite(session, made.attr.ino, two[0], False))
        # What is thrown away anyway can begin anew elsewhere.
        layout = world.content.begin_write(BeginWrite(session, made.attr.ino, two[0], True))
        assert layout.home == two[0]
        world.validate()

    run(tmp_path, test)


def test_without_a_worker_nothing_is_created(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        session = world.session()
        with pytest.raises(UnavailableError, match="start one"):
            create(world, session, b"f", 1)
        assert world.store.child(ROOT_INO, b"f") is None
        assert create(world, session, b"f", 0).layout.container == 0

    run(tmp_path, test)


def test_a_commit_of_replaced_content_is_stale(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        worker, session = world.worker(), world.session()
        made = create(world, session, b"f", worker[0])
        ino = made.attr.ino
        seal(world, session, ino, made.layout.container)
        second = world.content.begin_write(BeginWrite(session, ino, worker[0], True))
        seal(world, session, ino, second.container)
        world.content.begin_write(BeginWrite(session, ino, worker[0], True))
        with pytest.raises(StaleError):
            seal(world, session, ino, made.layout.container)
        world.changes.unlink(Unlink(KERNEL, session, ROOT_INO, b"f"))
        attr = world.namespace.getattr(ino)
        seal(world, session, ino, attr.container)
        assert world.namespace.getattr(ino).nlink == 0

    run(tmp_path, test)


def test_a_repeated_commit_is_no_error_while_the_next_writing_goes_on(tmp_path: Path) -> None:
    """Its first answer was lost with the connection, and another session began to write."""

    async def test(world: World) -> None:
        worker, one, two = world.worker(), world.session(), world.session()
        made = create(world, one, b"f", worker[0])
        ino = made.attr.ino
        seal(world, one, ino, made.layout.container)
        layout = world.content.begin_write(BeginWrite(two, ino, worker[0], False))
        before = world.namespace.getattr(ino)
        seal(world, one, ino, made.layout.container)
        assert world.namespace.getattr(ino) == before
        with pytest.raises(StaleError):  # No repetition: its worker had taken it for the first writer.
            seal(world, one, ino, made.layout.container, 77)
        assert world.namespace.getattr(ino) == before
        seal(world, two, ino, layout.container, 5)
        assert world.namespace.getattr(ino).size == 5

    run(tmp_path, test)


@pytest.mark.parametrize("is_open", [True, False])
def test_a_writer_who_hears_late_that_others_sealed_and_went_on(tmp_path: Path, is_open: bool) -> None:
    async def test(world: World) -> None:
        worker, one, two = world.worker(), world.session(), world.session()
        made = create(world, one, b"f", worker[0])
        ino, first = made.attr.ino, made.layout.container
        world.sessions.add_open(two, ino)
        assert world.content.begin_write(BeginWrite(two, ino, worker[0], False)).container == first
        seal(world, two, ino, first)
        second = world.content.begin_write(BeginWrite(two, ino, worker[0], False))
        seal(world, two, ino, second.container, 5)
        world.content.begin_write(BeginWrite(two, ino, worker[0], False))
        before = world.namespace.getattr(ino)
        with pytest.raises(StaleError):  # Its worker had evicted it, and took the writer for the first one.
            seal(world, one, ino, first, 77)
        if is_open:
            seal(world, one, ino, first)
        else:
            world.sessions.release(one, ino)
            with pytest.raises(StaleError):
                seal(world, one, ino, first)
        assert world.namespace.getattr(ino) == before

    run(tmp_path, test)


def test_a_writer_whose_content_was_thrown_away_hears_of_it(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        worker, one, two = world.worker(), world.session(), world.session()
        made = create(world, one, b"f", worker[0])
        ino, first = made.attr.ino, made.layout.container
        await trio.sleep(10)
        worker = world.worker("another")
        second = world.content.begin_write(BeginWrite(two, ino, worker[0], True))
        assert second.container != first
        with pytest.raises(StaleError):
            seal(world, one, ino, first)
        seal(world, two, ino, second.container, 5)
        with pytest.raises(StaleError):
            seal(world, one, ino, first)

    run(tmp_path, test)


def test_a_worker_that_lost_its_seal_says_what_is_left(tmp_path: Path) -> None:
    """The power failed at the worker only: what was not synced is gone, and the size tells it."""

    async def test(world: World) -> None:
        worker, session = world.worker(), world.session()
        made = create(world, session, b"f", worker[0])
        seal(world, session, made.attr.ino, made.layout.container, 11)
        world.content.orphan_sealed(OrphanSeal(made.layout.container, 7, 5), worker[0])
        assert world.namespace.getattr(made.attr.ino).size == 7
        assert world.content.layout(made.attr.ino, world.namespace.existing(made.attr.ino)).home == 0

    run(tmp_path, test)


def test_an_orphan_seal_counts_like_the_writers_own_and_only_once(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        worker, session = world.worker(), world.session()
        made = create(world, session, b"f", worker[0])
        ino, container = made.attr.ino, made.layout.container
        world.content.orphan_sealed(OrphanSeal(container, 11, 1), worker[0])
        assert world.namespace.getattr(ino).size == 11
        ctime_ns = world.namespace.getattr(ino).ctime_ns
        world.content.orphan_sealed(OrphanSeal(container, 11, 2), worker[0])
        seal(world, session, ino, container, 11)
        assert world.namespace.getattr(ino).ctime_ns == ctime_ns
        world.content.orphan_sealed(OrphanSeal(999, 1, 1), worker[0])
        assert await freed(world, worker) == {999}
        # Told once more, late: it is the base of what is being written now.
        layout = world.content.begin_write(BeginWrite(session, ino, worker[0], False))
        world.content.orphan_sealed(OrphanSeal(container, 11, 1), worker[0])
        assert await freed(world, worker) == set()
        assert layout.base_container == container
        world.validate()

    run(tmp_path, test)


def test_times_set_while_writing_are_kept(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        worker, session = world.worker(), world.session()
        made = create(world, session, b"f", worker[0])
        ino, container = made.attr.ino, made.layout.container
        wrong_clock = 10**6  # of the home: what counts is the order of its own numbers
        world.changes.setattr(SetAttr(KERNEL, session, ino, mtime_ns=12345, written_ns=wrong_clock))
        before = world.namespace.getattr(ino).ctime_ns
        seal(world, session, ino, container, 3, mtime_ns=wrong_clock)
        attr = world.namespace.getattr(ino)
        assert (attr.mtime_ns, attr.ctime_ns) == (12345, before)
        layout = world.content.begin_write(BeginWrite(session, ino, worker[0], False))
        world.changes.setattr(SetAttr(KERNEL, session, ino, mtime_ns=54321, written_ns=wrong_clock))
        seal(world, session, ino, layout.container, 3, mtime_ns=wrong_clock + 1)
        assert world.namespace.getattr(ino).mtime_ns == wrong_clock + 1

    run(tmp_path, test)


def test_an_older_write_that_is_committed_later_does_not_turn_the_time_back(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        worker, one, two = world.worker(), world.session(), world.session()
        made = create(world, one, b"f", worker[0])
        ino, container = made.attr.ino, made.layout.container
        world.content.begin_write(BeginWrite(two, ino, worker[0], False))
        world.content.commit_content(CommitContent(two, ino, container, 3, 2000, False))
        seal(world, one, ino, container, 3, mtime_ns=1000)
        assert world.namespace.getattr(ino).mtime_ns == 2000

    run(tmp_path, test)


def test_a_writer_that_vanished_before_it_began_at_the_worker(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        worker, made = await vanished(world)
        world.content.sweep()
        assert world.namespace.getattr(made.attr.ino).home == worker[0]
        await trio.sleep(world.sessions.lease_s + 1)
        beat(world, worker)
        world.content.sweep()
        attr = world.namespace.getattr(made.attr.ino)
        assert (attr.home, attr.container, attr.size) == (0, 0, 0)
        world.validate()

    run(tmp_path, test)


@pytest.mark.parametrize("has_more", [False, True])
def test_a_home_that_is_cut_off_may_have_what_it_has_not_told_of(tmp_path: Path, has_more: bool) -> None:
    """The client's session ends, and nothing was heard from the home since it began to write."""

    async def test(world: World) -> None:
        worker, made = await vanished(world)
        for _ in range(3):
            world.content.sweep()
            await trio.sleep(world.sessions.lease_s + 1)
        assert world.namespace.getattr(made.attr.ino).home == worker[0]
        if has_more:
            beat(world, worker, *(BlockReport(1000 + n, b"", False) for n in range(REPORTS_PER_CALL)))
            world.content.sweep()
            assert world.namespace.getattr(made.attr.ino).home == worker[0]
        beat(world, worker, BlockReport(made.layout.container, b"\1", True))
        for _ in range(3):
            world.content.sweep()
            await trio.sleep(world.sessions.lease_s + 1)
        attr = world.namespace.getattr(made.attr.ino)
        assert (attr.home, attr.container) == (worker[0], made.layout.container)

    run(tmp_path, test)


def test_a_home_that_was_silent_for_long_reverts_nothing_before_it_has_told_all(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        worker, made = await vanished(world)
        await trio.sleep(MasterConfig().worker_timeout_s + 1)
        beat(world, worker, *(BlockReport(1000 + n, b"", False) for n in range(REPORTS_PER_CALL)))
        assert world.namespace.getattr(made.attr.ino).home == worker[0]
        beat(world, worker, BlockReport(made.layout.container, b"\1", True))
        world.content.sweep()
        assert world.namespace.getattr(made.attr.ino).home == worker[0]

    run(tmp_path, test)


def test_removing_frees_the_container_everywhere(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        worker, session = world.worker(), world.session()
        made = create(world, session, b"f", worker[0])
        seal(world, session, made.attr.ino, made.layout.container)
        world.sessions.release(session, made.attr.ino)
        gone = world.changes.unlink(Unlink(KERNEL, session, ROOT_INO, b"f"))
        assert (gone.nlink, gone.container) == (0, made.layout.container)
        assert await freed(world, worker) == {made.layout.container}
        with pytest.raises(StaleError):
            world.content.open(Open(KERNEL, session, made.attr.ino, False))
        world.validate()

    run(tmp_path, test)


def test_who_wrote_nothing_does_not_seal_under_another_writer(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        worker, a, b = world.worker(), world.session(), world.session()
        made = create(world, a, b"f", worker[0])
        ino, container = made.attr.ino, made.layout.container
        assert world.content.begin_write(BeginWrite(b, ino, worker[0], True)).is_joined
        unbegun = CommitContent(a, ino, container, 0, 0, True, is_unbegun=True)
        assert world.content.commit_content(unbegun).home == worker[0]
        seal(world, b, ino, container, 9)
        attr = world.namespace.getattr(ino)
        assert (attr.home, attr.size) == (0, 9)

    run(tmp_path, test)


def test_the_seal_of_an_emptied_file_counts_also_when_another_session_writes(tmp_path: Path) -> None:
    """It joined, truncated, and was the last at the home: who created it has not begun there."""

    async def test(world: World) -> None:
        worker, a, b = world.worker(), world.session(), world.session()
        made = create(world, a, b"f", worker[0])
        ino, container = made.attr.ino, made.layout.container
        world.content.begin_write(BeginWrite(b, ino, worker[0], True))
        seal(world, b, ino, container, 0)
        assert world.namespace.getattr(ino).home == 0
        assert world.content.begin_write(BeginWrite(a, ino, worker[0], True)).container != container

    run(tmp_path, test)


def test_content_that_two_sessions_wrote_is_marked(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        worker, a, b = world.worker(), world.session(), world.session()
        made = create(world, a, b"f", worker[0])
        ino, container = made.attr.ino, made.layout.container
        again = world.content.begin_write(BeginWrite(a, ino, worker[0], False))
        assert (again.is_joined, again.is_shared) == (True, False)
        assert world.content.begin_write(BeginWrite(b, ino, worker[0], False)).is_shared
        answer = await world.events.watch(a, 0, 0)
        assert answer.is_reset or any(event.ino == ino for event in answer.events)
        seal(world, b, ino, container)
        assert world.content.open(Open(KERNEL, a, ino, False)).layout.is_shared
        assert world.content.begin_write(BeginWrite(b, ino, worker[0], False)).is_shared, "its base"
        assert not world.content.open(Open(KERNEL, a, ino, False)).layout.is_shared

    run(tmp_path, test)


def test_an_abandoned_write_leaves_the_old_content(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        worker, a, b = world.worker(), world.session(), world.session()
        made = create(world, a, b"f", worker[0])
        ino, first = made.attr.ino, made.layout.container
        seal(world, a, ino, first)
        container = world.content.begin_write(BeginWrite(a, ino, worker[0], False)).container
        world.content.begin_write(BeginWrite(b, ino, worker[0], False))
        for session, expected in ((a, container), (b, first)):
            given_up = CommitContent(session, ino, container, 0, 0, False, is_abandoned=True)
            assert world.content.commit_content(given_up).container == expected
        attr = world.namespace.getattr(ino)
        assert (attr.home, attr.size) == (0, 3)
        world.validate()

    run(tmp_path, test)
