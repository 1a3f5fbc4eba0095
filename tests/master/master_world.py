"""A whole master over a real directory, asked through its connection, and a worker that keeps bytes
in files and uploads them when told."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from alluxiofuse.config import MasterConfig
from alluxiofuse.errors import SessionExpiredError
from alluxiofuse.master.fsck import problems
from alluxiofuse.master.master import Master
from alluxiofuse.rpc.inprocess import InProcess
from alluxiofuse.ufs.base import UfsAttrs
from alluxiofuse.ufs.registry import open_ufs
from alluxiofuse.wire.master_ops import (
    BeginWrite,
    CommitContent,
    Create,
    GetMount,
    Lookup,
    OpenSession,
    PersistDone,
    RegisterWorker,
    Release,
    ReportBlocks,
    Resolve,
    WorkerCommands,
)
from alluxiofuse.wire.types import (
    Attr,
    BlockReport,
    Caller,
    FreeCommand,
    PersistCommand,
    Tier,
    WorkerAddress,
)

KERNEL = Caller(0, 0, None)


@dataclass
class StandIn:
    """What a master needs of a worker. Sealed containers are files of `directory`."""

    directory: Path
    master: InProcess
    worker_id: int = 0
    epoch: int = 0
    freed: set[int] = field(default_factory=set)

    async def register(self) -> None:
        tier = Tier("MEM", 1 << 30, 0, [])
        address = WorkerAddress(0, "here", "127.0.0.1", 1, "")
        grant = await self.master.call(RegisterWorker("stand-in-worker", address, [tier], "1"))
        self.worker_id, self.epoch = grant.worker_id, grant.epoch
        reports = [BlockReport(int(name), b"\x01", True) for name in os.listdir(self.directory)]
        answer = await self.master.call(ReportBlocks(self.worker_id, self.epoch, reports, True))
        for container in answer.unknown:
            (self.directory / str(container)).unlink()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self.register()
        task_status.started()
        while True:
            try:
                commands = await self.master.call(WorkerCommands(self.worker_id, self.epoch, 30))
            except SessionExpiredError:
                await self.register()
                continue
            for command in commands:
                if isinstance(command, PersistCommand):
                    await self._persist(command)
                elif isinstance(command, FreeCommand):
                    self.freed |= set(command.containers)

    async def _persist(self, command: PersistCommand) -> None:
        mount = await self.master.call(GetMount(command.mount_id))
        storage = open_ufs(mount.uri, mount.options)
        attrs = UfsAttrs(command.mode, command.uid, command.gid, command.mtime_ns)
        with (self.directory / str(command.container)).open("rb") as file:
            entry = await trio.to_thread.run_sync(
                storage.put, command.path, file.fileno(), command.size, attrs
            )
        storage.close()
        ids = (self.worker_id, self.epoch, command.task_id, command.container)
        await self.master.call(PersistDone(*ids, command.size, entry.fingerprint))


class Client:
    """One session of a client that writes whole files."""

    def __init__(self, master: InProcess, worker: StandIn, session_id: int) -> None:
        self.master = master
        self.worker = worker
        self.session_id = session_id

    async def write(self, parent: int, name: bytes, content: bytes) -> Attr:
        """Create or replace."""
        made = await self.master.call(
            Create(KERNEL, self.session_id, parent, name, 0o644, False, self.worker.worker_id)
        )
        ino, container = made.attr.ino, made.layout.container
        if not made.is_new:
            begin = BeginWrite(self.session_id, ino, self.worker.worker_id, True)
            container = (await self.master.call(begin)).container
        (self.worker.directory / str(container)).write_bytes(content)
        stat = (self.worker.directory / str(container)).stat()
        commit = CommitContent(self.session_id, ino, container, len(content), stat.st_mtime_ns, True)
        attr = await self.master.call(commit)
        await self.master.call(Release(self.session_id, [ino]))
        return attr

    async def attr(self, path: bytes) -> Attr:
        return (await self.master.call(Resolve(KERNEL, path)))[-1]

    async def lookup(self, parent: int, name: bytes) -> Attr:
        return await self.master.call(Lookup(KERNEL, parent, name))


@dataclass
class Running:
    master: Master
    connection: InProcess
    worker: StandIn
    client: Client
    ufs: Path

    def validate(self) -> None:
        assert problems(self.master.store) == []


@asynccontextmanager
async def running(
    directory: Path, *, persist_delay_s: float = 0.0, sync_interval_s: float | None = None
) -> AsyncIterator[Running]:
    """Everything that survives is in `directory`: `ufs`, `state` and `worker`."""
    ufs, kept = directory / "ufs", directory / "worker"
    ufs.mkdir(exist_ok=True)
    kept.mkdir(exist_ok=True)
    config = MasterConfig(
        state_dir=str(directory / "state"),
        ufs=str(ufs),
        ufs_options={"fsync": "false"},
        persist_delay_s=persist_delay_s,
        sync_interval_s=sync_interval_s,
    )
    master = Master(config, close_stale_sessions=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(master.run)
        connection = InProcess(master.service)
        worker = StandIn(kept, connection)
        await nursery.start(worker.run)
        grant = await connection.call(OpenSession("test", "here"))
        client = Client(connection, worker, grant.session_id)
        yield Running(master, connection, worker, client, ufs)
        nursery.cancel_scope.cancel()
    await connection.aclose()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(30):
            await test()

    trio.run(main)


async def until(condition: Callable[[], bool]) -> None:
    """Poll; the deadline is the caller's `fail_after`."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.01)
