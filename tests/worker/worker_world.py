"""A real worker on real files, with a small master and a local directory as under storage."""

from __future__ import annotations

import functools
import itertools
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import trio

from alluxiofuse.config import DirectoryConfig, TierConfig, WorkerConfig
from alluxiofuse.errors import SessionExpiredError, UnavailableError
from alluxiofuse.ids import PAGE_BYTES
from alluxiofuse.rpc.base import Answer, Handler, Service
from alluxiofuse.rpc.inprocess import InProcess
from alluxiofuse.ufs import registry
from alluxiofuse.ufs.base import UnderStorage
from alluxiofuse.wire.master_ops import (
    BlocksAccepted,
    GetMount,
    PersistDone,
    RegisterWorker,
    Registration,
    ReportBlocks,
    WorkerCommands,
    WorkerHeartbeat,
)
from alluxiofuse.wire.messages import NOTHING, Nothing, Request
from alluxiofuse.wire.types import BlockReport, Command, MountInfo, OrphanSeal, PersistCommand, UfsSource
from alluxiofuse.wire.worker_ops import (
    Attach,
    Attached,
    BeginWrite,
    Detach,
    EndWrite,
    Fetch,
    Presence,
    Read,
    Reserve,
    WriteEnd,
    WriteGrant,
)
from alluxiofuse.worker.slabs import Slabs
from alluxiofuse.worker.validation import validate
from alluxiofuse.worker.worker import Worker

MB = PAGE_BYTES
TIMEOUT_S = 30.0
T = TypeVar("T")


def trio_test(function: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test within `TIMEOUT_S`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        async def bounded() -> None:
            with trio.fail_after(TIMEOUT_S):
                await function(*args, **kwargs)

        trio.run(bounded)

    return run


async def eventually(is_true: Callable[[], bool], what: str) -> None:
    """Poll until it is; the test's own deadline ends it."""
    for _ in range(2000):
        if is_true():
            return
        await trio.sleep(0.005)
    raise TimeoutError(what)


class TinyMaster(Service):
    """What a worker sees of a master. `is_down`: every call is UnavailableError."""

    def __init__(self, ufs: Path) -> None:
        self.ufs = ufs
        self.uri = f"file://{ufs}"
        self.options = {"fsync": "false"}
        self.is_down = False
        self.epoch = 0
        self.blocks: dict[int, BlockReport] = {}
        self.seals: list[OrphanSeal] = []
        self.done: list[PersistDone] = []
        self.reports: list[ReportBlocks] = []
        """Of the newest registration."""
        self.unknown: list[int] = []
        self.clean: list[int] = []
        self.beats = 0
        self.commands: list[Command] = []
        self.wake = trio.Event()

    @property
    def ops(self) -> dict[str, type[Request[Any]]]:
        return {request.OP: request for request in self.handlers}

    @property
    def handlers(self) -> dict[type[Request[Any]], Handler]:
        table: dict[type[Request[Any]], Callable[[Any], Any]] = {
            GetMount: self._mount,
            RegisterWorker: self._register,
            ReportBlocks: self._report,
            WorkerHeartbeat: self._beat,
            WorkerCommands: self._commands,
            PersistDone: self._done,
        }
        return {request: self._guarded(handler) for request, handler in table.items()}

    def send(self, *commands: Command) -> None:
        self.commands += commands
        self.wake.set()

    def expire(self) -> None:
        """Forget the worker, as after a restart of the master."""
        self.epoch += 100
        self.blocks.clear()
        self.wake.set()

    def _guarded(self, handler: Callable[[Any], Any]) -> Handler:
        def run(peer: Any, request: Any, payload: Any) -> Any:
            if self.is_down:
                raise UnavailableError("the master is down")
            if getattr(request, "epoch", self.epoch) != self.epoch:
                raise SessionExpiredError("register again")
            return handler(request)

        return run

    def _mount(self, request: GetMount) -> MountInfo:
        return MountInfo(request.mount_id, b"/", self.uri, False, -1.0, self.options)

    def _register(self, request: RegisterWorker) -> Registration:
        self.epoch += 1
        self.reports.clear()
        return Registration(7, self.epoch, 0.02)

    def _report(self, request: ReportBlocks) -> BlocksAccepted:
        self.reports.append(request)
        self._take(request.reports)
        here = {report.container for report in request.reports}
        return BlocksAccepted(
            [one for one in self.unknown if one in here], [one for one in self.clean if one in here]
        )

    def _take(self, reports: list[BlockReport]) -> None:
        for report in reports:
            if report.blocks or report.is_dirty:
                self.blocks[report.container] = report
            else:
                self.blocks.pop(report.container, None)

    def _beat(self, request: WorkerHeartbeat) -> Nothing:
        self._take(request.deltas)
        self.seals += request.orphan_seals
        self.beats += 1
        return NOTHING

    async def _commands(self, request: WorkerCommands) -> list[Command]:
        if not self.commands:
            with trio.move_on_after(request.wait_s):
                await self.wake.wait()
            self.wake = trio.Event()
        if request.epoch != self.epoch:
            raise SessionExpiredError("register again")
        taken, self.commands = self.commands, []
        return taken

    def _done(self, request: PersistDone) -> Nothing:
        self.done.append(request)
        return NOTHING


def make_config(root: Path, tiers: dict[str, list[tuple[Path, int]]], **changes: Any) -> WorkerConfig:
    return WorkerConfig(
        state_dir=str(root / "state"),
        tiers=[
            TierConfig(
                alias=alias, directories=[DirectoryConfig(path=str(path), quota_bytes=q) for path, q in dirs]
            )
            for alias, dirs in tiers.items()
        ],
        **changes,
    )


@dataclass
class World:
    """A running worker and its client; `pattern` makes bytes that differ everywhere."""

    root: Path
    config: WorkerConfig
    master: TinyMaster
    worker: Worker
    client: InProcess
    containers: Any = field(default_factory=lambda: itertools.count(1000))
    session_id: int = 5

    @property
    def slabs(self) -> Slabs:
        assert self.worker.slabs is not None
        return self.worker.slabs

    def validate(self) -> None:
        validate(self.slabs, with_bytes=True)

    def ufs_file(self, name: str, data: bytes) -> UfsSource:
        path = self.master.ufs / name
        path.write_bytes(data)
        storage = registry.open_ufs(f"file://{self.master.ufs}", {"fsync": "false"})
        try:
            entry = storage.stat(name.encode())
        finally:
            storage.close()
        return UfsSource(1, name.encode(), entry.size, entry.fingerprint)

    async def attach(self, container: int, source: UfsSource | None, size: int = -1) -> tuple[Attached, int]:
        """The answer and the descriptor (the caller closes it), -1 without one."""
        size = source.size if size < 0 and source else max(size, 0)
        answer = await self.client.exchange(Attach(self.session_id, container, size, source, True))
        return answer.result, answer.fds[0] if answer.fds else -1

    async def read_all(self, container: int, source: UfsSource | None, size: int = -1) -> bytes:
        """By Read, in pieces."""
        size = source.size if size < 0 and source else max(size, 0)
        found = b""
        while len(found) < size:
            request = Read(self.session_id, container, size, source, len(found), min(3 * MB + 77, size))
            answer = await self.client.exchange(request)
            data = payload_of(answer)
            assert data, "no bytes before the end"
            found += data
        return found

    async def begin(
        self,
        container: int,
        old: int = 0,
        size: int = 0,
        source: UfsSource | None = None,
        reserve: int = 0,
        *,
        passes: bool = False,
        is_emptying: bool = False,
    ) -> tuple[WriteGrant, int]:
        request = BeginWrite(
            self.session_id, container, old, size, source, reserve, True, passes, is_emptying
        )
        answer = await self.client.exchange(request)
        return answer.result, answer.fds[0]

    async def write_new(self, data: bytes, container: int = 0) -> tuple[int, WriteEnd]:
        """A sealed dirty container with these bytes, its lock detached."""
        container = container or next(self.containers)
        grant, fd = await self.begin(container)
        try:
            if len(data) > grant.granted_end:
                await self.client.call(Reserve(grant.lock_id, len(data)))
            os.pwrite(fd, data, 0)
            end = await self.client.call(EndWrite(grant.lock_id, None))
        finally:
            os.close(fd)
        await self.client.call(Detach([grant.lock_id]))
        return container, end

    async def fetch(self, lock_id: int, offset: int, length: int) -> Presence:
        return await self.client.call(Fetch(lock_id, offset, length))

    async def detach(self, *lock_ids: int) -> None:
        await self.client.call(Detach(list(lock_ids)))

    async def heartbeats(self, count: int = 4) -> None:
        """Time for whatever could happen meanwhile to happen."""
        wanted = self.master.beats + count
        await eventually(lambda: self.master.beats >= wanted, "heartbeats")

    async def settled(self) -> None:
        """Until no fetch is under way."""
        await eventually(
            lambda: not any(slab.jobs for slab in self.slabs.by_container.values()), "fetches end"
        )

    def persist(self, container: int, size: int, path: bytes, task_id: int = 1) -> None:
        self.master.send(PersistCommand(task_id, container, size, 1, path, 0o644, 0, 0, 10**18))


def payload_of(answer: Answer[Any]) -> bytes:
    assert isinstance(answer.payload, bytes | bytearray | memoryview)
    return bytes(answer.payload)


def pattern(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@asynccontextmanager
async def running(
    root: Path,
    tiers: dict[str, list[tuple[Path, int]]] | None = None,
    *,
    master: TinyMaster | None = None,
    open_ufs: Callable[[str, dict[str, str]], UnderStorage] = registry.open_ufs,
    check: bool = True,
    **changes: Any,
) -> AsyncIterator[World]:
    """A worker under `root` (again, with the same root: a restart). Validates at the end."""
    ufs = root / "ufs"
    ufs.mkdir(exist_ok=True, parents=True)
    tiers = tiers or {"SSD": [(root / "ssd", 256 * MB)]}
    config = make_config(root, tiers, **changes)
    master = master or TinyMaster(ufs)
    link = InProcess(master)
    worker = Worker(config, link, hostname="here", open_ufs=open_ufs)
    async with trio.open_nursery() as nursery:
        await nursery.start(worker.run)
        client = InProcess(worker.service)
        world = World(root, config, master, worker, client)
        yield world
        if check:
            await world.settled()
            world.validate()
        await client.aclose()
        nursery.cancel_scope.cancel()
