"""The worker registry: ids, reports, homes, commands, and who is lost, on a clock of the test."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from alluxiofuse.config import MasterConfig
from alluxiofuse.errors import SessionExpiredError, UnavailableError
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.master.clock import Clock
from alluxiofuse.master.containers import give_container, new_container
from alluxiofuse.master.format import ensure_formatted
from alluxiofuse.master.store import Store
from alluxiofuse.master.workers import HOME_HEARTBEATS, WorkerRegistry
from alluxiofuse.wire.master_ops import (
    RegisterWorker,
    Registration,
    ReportBlocks,
    WorkerCommands,
    WorkerHeartbeat,
)
from alluxiofuse.wire.types import (
    BlockReport,
    CleanCommand,
    FreeCommand,
    OrphanSeal,
    PersistCommand,
    Tier,
    WorkerAddress,
)


class Cluster:
    def __init__(self, directory: Path) -> None:
        self.store = Store(directory)
        tx = self.store.transaction()
        ensure_formatted(tx, 1)
        tx.commit()
        self.registry = WorkerRegistry(self.store, Clock(), MasterConfig(worker_timeout_s=10.0))

    def register(self, name: str, room: int = 100) -> Registration:
        address = WorkerAddress(0, "here", "127.0.0.1", 1, "")
        return self.registry.register(
            RegisterWorker(f"uuid-{name}", address, [Tier("MEM", room, 0, [])], "1")
        )

    def worker(self, name: str, reports: list[BlockReport] | None = None, room: int = 100) -> Registration:
        grant = self.register(name, room)
        self.registry.report_blocks(ReportBlocks(grant.worker_id, grant.epoch, reports or [], True))
        return grant

    def file(self, container: int, ufs_container: int = 0) -> None:
        """An inode that has this container (the root plays it)."""
        tx = self.store.transaction()
        record = tx.inode(ROOT_INO)
        assert record is not None
        record.container, record.ufs_container = container, ufs_container
        give_container(tx, container, ROOT_INO)
        tx.put_inode(ROOT_INO, record)
        tx.commit()

    def beat(self, grant: Registration, *deltas: BlockReport, seals: list[OrphanSeal] | None = None) -> None:
        self.registry.heartbeat(
            WorkerHeartbeat(grant.worker_id, grant.epoch, [], list(deltas), seals or [], 0)
        )

    async def commands(self, grant: Registration, wait_s: float = 0.0) -> list[object]:
        self.store.sync()  # A thread would not be in time for a clock that jumps.
        return list(await self.registry.commands(WorkerCommands(grant.worker_id, grant.epoch, wait_s)))


def run(test: object, tmp_path: Path) -> None:
    async def main() -> None:
        with trio.fail_after(1000):
            cluster = Cluster(tmp_path / "meta")
            try:
                await test(cluster)  # type: ignore[operator]
            finally:
                cluster.store.close()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_ids_and_epochs(tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        one, two, again = cluster.worker("1"), cluster.worker("2"), cluster.worker("1")
        assert one.worker_id == again.worker_id != two.worker_id
        with pytest.raises(SessionExpiredError):
            cluster.beat(one)
        cluster.beat(again)

    run(test, tmp_path)


def test_alive_after_the_full_report(tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        ready: list[int] = []
        cluster.registry.on_ready.append(ready.append)
        with pytest.raises(UnavailableError):
            cluster.registry.choose_home(0)
        grant = cluster.register("1")
        assert not cluster.registry.is_alive(grant.worker_id)
        cluster.file(5)
        report = BlockReport(5, b"\7", True)
        cluster.registry.report_blocks(ReportBlocks(grant.worker_id, grant.epoch, [report], False))
        assert ready == []
        cluster.registry.report_blocks(ReportBlocks(grant.worker_id, grant.epoch, [], True))
        assert ready == [grant.worker_id]
        assert cluster.registry.holders(5) == [grant.worker_id]
        info = cluster.registry.infos()[0]
        assert (info.is_alive, info.container_count, info.block_count) == (True, 1, 3)

    run(test, tmp_path)


def test_alive_while_clean_containers_are_still_reported(tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.file(5)
        while new_container(cluster.store) < 9:
            pass
        grant = cluster.register("1")
        report, worker_id = cluster.registry.report_blocks, grant.worker_id
        report(ReportBlocks(worker_id, grant.epoch, [BlockReport(5, b"\1", True)], True, has_more=True))
        assert cluster.registry.is_alive(worker_id)
        assert cluster.registry.holders(5) == [worker_id]
        assert not cluster.registry.is_away(worker_id, 4), "nobody knows yet"
        report(ReportBlocks(worker_id, grant.epoch, [BlockReport(7, b"\1", False)], True))
        assert cluster.registry.is_away(worker_id, 4)
        assert not cluster.registry.is_away(worker_id, 5)

    run(test, tmp_path)


def test_what_was_sealed_since_the_last_report_is_not_away(tmp_path: Path) -> None:
    """A write that was begun before the worker restarted, and ended after its full report."""

    async def test(cluster: Cluster) -> None:
        while (container := new_container(cluster.store)) < 9:
            pass
        grant = cluster.worker("1")
        assert cluster.registry.is_away(grant.worker_id, container)
        cluster.registry.sealed(grant.worker_id, container)
        assert not cluster.registry.is_away(grant.worker_id, container)
        cluster.beat(grant)
        assert not cluster.registry.is_away(grant.worker_id, container), "it may have been under way"
        cluster.beat(grant)
        assert cluster.registry.is_away(grant.worker_id, container), "it would have said so"

    run(test, tmp_path)


def test_home_is_the_preferred_or_the_roomiest(tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        small, large = cluster.worker("1", room=10), cluster.worker("2", room=1000)
        assert cluster.registry.choose_home(small.worker_id) == small.worker_id
        assert cluster.registry.choose_home(0) == large.worker_id
        assert cluster.registry.choose_home(77) == large.worker_id

    run(test, tmp_path)


def test_who_was_silent_for_a_while_gets_nothing_new(tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        config = cluster.registry._config
        config.worker_timeout_s = 100.0
        small, large = cluster.worker("1", room=10), cluster.worker("2", room=1000)
        await trio.sleep(HOME_HEARTBEATS * config.worker_heartbeat_s)
        cluster.beat(small)
        assert cluster.registry.is_alive(large.worker_id), "it may come back with what it has"
        assert cluster.registry.choose_home(large.worker_id) == small.worker_id
        await trio.sleep(HOME_HEARTBEATS * config.worker_heartbeat_s)
        with pytest.raises(UnavailableError, match="no worker is running"):
            cluster.registry.choose_home(small.worker_id)

    run(test, tmp_path)


def test_unknown_and_clean_containers(tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.file(5, ufs_container=5)
        grant = cluster.register("1")
        reports = [BlockReport(5, b"\1", True), BlockReport(6, b"\1", True)]
        cluster.store.sync()
        answer = cluster.registry.report_blocks(ReportBlocks(grant.worker_id, grant.epoch, reports, True))
        assert (answer.unknown, answer.clean) == ([6], [5])
        cluster.beat(grant, BlockReport(7, b"\1", True))
        [command] = await cluster.commands(grant)
        assert isinstance(command, FreeCommand)
        assert command.containers == [7]

    run(test, tmp_path)


def test_lost_and_back(tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        lost: list[int] = []
        cluster.registry.on_lost.append(lost.append)
        cluster.file(5)
        grant = cluster.worker("1", [BlockReport(5, b"\1", True)])
        for _ in range(5):
            await trio.sleep(9)
            cluster.beat(grant)
            cluster.registry.check_lost()
        assert cluster.registry.is_alive(grant.worker_id)
        await trio.sleep(11)
        assert not cluster.registry.is_alive(grant.worker_id)
        cluster.registry.check_lost()
        assert lost == [grant.worker_id]
        assert cluster.registry.holders(5) == []
        with pytest.raises(SessionExpiredError):
            cluster.beat(grant)
        again = cluster.worker("1", [BlockReport(5, b"\1", True)])
        assert again.worker_id == grant.worker_id
        assert cluster.registry.holders(5) == [grant.worker_id]

    run(test, tmp_path)


def test_commands(tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.file(5)
        grant = cluster.worker("1", [BlockReport(5, b"\1", True)])
        other = cluster.worker("2")
        command = PersistCommand(1, 5, 10, 1, b"p", 0o644, 0, 0, 0)
        async with trio.open_nursery() as nursery:

            async def later() -> None:
                await trio.sleep(3)
                cluster.registry.send(grant.worker_id, command)

            nursery.start_soon(later)
            assert await cluster.commands(grant, 60.0) == [command]
            assert trio.current_time() > 0
        cluster.registry.mark_clean(5)
        assert await cluster.commands(grant) == [CleanCommand([5])]
        cluster.registry.drop_container(5, also=other.worker_id)
        assert await cluster.commands(grant) == await cluster.commands(other)
        assert cluster.registry.holders(5) == []
        cluster.registry.send(grant.worker_id, command)
        assert cluster.registry.withdraw(grant.worker_id, 1)
        assert not cluster.registry.withdraw(grant.worker_id, 1)
        assert await cluster.commands(grant, 1.0) == []

    run(test, tmp_path)


def test_what_can_not_be_undone_waits_for_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker drops, or may evict, what the master could not want back after a power failure."""

    async def test(cluster: Cluster) -> None:
        events: list[str] = []
        sync = cluster.store.sync

        def noted_sync() -> None:
            sync()
            events.append("synced")

        monkeypatch.setattr(cluster.store, "sync", noted_sync)
        grant = cluster.worker("1", [BlockReport(5, b"\1", True)])
        request = WorkerCommands(grant.worker_id, grant.epoch, 60.0)
        cluster.file(5)
        cluster.registry.drop_container(5, also=grant.worker_id)
        assert await cluster.registry.commands(request) == [FreeCommand([5], keep_dirty=False)]
        events.append("freed")
        cluster.file(6, ufs_container=6)
        cluster.registry.mark_clean(6, grant.worker_id)
        assert await cluster.registry.commands(request) == [CleanCommand([6])]
        events.append("clean")
        cluster.file(7)
        answer = cluster.registry.report_blocks(
            ReportBlocks(grant.worker_id, grant.epoch, [BlockReport(8, b"\1", True)], True)
        )
        assert answer.unknown == []
        assert await cluster.registry.commands(request) == [FreeCommand([8], keep_dirty=False)]
        assert events == ["synced", "freed", "synced", "clean", "synced"]

    async def main() -> None:
        with trio.fail_after(60):
            cluster = Cluster(tmp_path / "meta")
            try:
                cluster.worker("1")  # Numbers are reserved, which syncs.
                await test(cluster)
            finally:
                cluster.store.close()

    trio.run(main)


def test_numbers_are_durable_before_they_are_given(tmp_path: Path) -> None:
    """Workers and under storages remember numbers that a master without power would give again."""
    store = Store(tmp_path / "meta")
    store.take_number(b"next_container")
    assert store.durability.is_durable
    store.close()


def test_many_commands_are_fetched_in_bounded_pieces(tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        grant = cluster.worker("1")
        for container in range(10_000):
            cluster.registry.drop_container(container + 1, also=grant.worker_id)
        sizes = []
        while commands := await cluster.commands(grant):
            [command] = commands
            assert isinstance(command, FreeCommand)
            sizes.append(len(command.containers))
        assert sizes == [4096, 4096, 1808]

    run(test, tmp_path)


def test_a_poll_of_an_old_registration_ends(tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        grant = cluster.worker("1")
        async with trio.open_nursery() as nursery:

            async def poll() -> None:
                with pytest.raises(SessionExpiredError):
                    await cluster.commands(grant, 60.0)

            nursery.start_soon(poll)
            await trio.sleep(1)
            cluster.worker("1")
        assert trio.current_time() < 1000

    run(test, tmp_path)


def test_orphan_seals_are_passed_on(tmp_path: Path) -> None:
    async def test(cluster: Cluster) -> None:
        told: list[tuple[int, OrphanSeal]] = []
        cluster.registry.on_orphan_seal.append(lambda *what: told.append(what))
        grant = cluster.worker("1")
        cluster.beat(grant, seals=[OrphanSeal(5, 1, 2)])
        assert told == [(grant.worker_id, OrphanSeal(5, 1, 2))]

    run(test, tmp_path)
