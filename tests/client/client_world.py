"""A master, workers and clients in one trio loop, joined in process or by real sockets."""

from __future__ import annotations

import functools
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from alluxiofuse.client.filesystem import FileSystem, OpenFile
from alluxiofuse.client.intents import IntentLog
from alluxiofuse.client.parallel import unwrapped
from alluxiofuse.client.paths import Paths
from alluxiofuse.client.workers import WorkerPool
from alluxiofuse.config import ClientConfig, DirectoryConfig, MasterConfig, TierConfig, WorkerConfig
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.master.master import Master
from alluxiofuse.rpc.base import Connection
from alluxiofuse.rpc.client import Reconnecting, connect_tcp, connect_unix
from alluxiofuse.rpc.inprocess import InProcess
from alluxiofuse.rpc.security import Security
from alluxiofuse.rpc.server import serve_tcp, serve_unix
from alluxiofuse.wire import worker_ops
from alluxiofuse.wire.types import Caller
from alluxiofuse.worker.worker import Worker

ROOT = Caller(0, 0, None)
TIMEOUT_S = 60.0
HERE = socket.gethostname()
IN_PROCESS, UNIX, TCP = "in-process", "unix", "tcp"


class Part:
    """One daemon: its task and its server, stopped together, the server first."""

    def __init__(self) -> None:
        self._running: list[tuple[trio.CancelScope, trio.Event]] = []

    async def run(
        self,
        function: Callable[..., Awaitable[None]],
        *,
        task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        scope, ended = trio.CancelScope(), trio.Event()
        self._running.append((scope, ended))
        try:
            with scope:
                await function(task_status=task_status)
        finally:
            ended.set()

    async def stop(self) -> None:
        for scope, ended in reversed(self._running):
            scope.cancel()
            await ended.wait()


class WorkerPart(Part):
    def __init__(self, worker: Worker, name: str) -> None:
        super().__init__()
        self.worker = worker
        self.name = name
        self.worker_id = 0
        self.port = 0
        self.connection = InProcess(worker.service, name)


class World:
    """`kind` says how clients reach the daemons; the daemons among themselves likewise."""

    def __init__(self, nursery: trio.Nursery, base: Path, kind: str, security: Security) -> None:
        self.base = base
        self.kind = kind
        self.ufs = base / "ufs"
        self.security = security
        self.master: Master
        self.master_part = Part()
        self.workers: dict[str, WorkerPart] = {}
        self._nursery = nursery
        self._port = 0
        self.relayed: dict[int, int] = {}
        """TCP port of a daemon -> port of a relay in front of it, for those who dial from then on."""

    # --- master -------------------------------------------------------------------------------------

    async def start_master(self, **settings: Any) -> None:
        config = MasterConfig(
            state_dir=str(self.base / "master"),
            ufs=str(self.ufs),
            **{"persist_delay_s": 0.02, "session_lease_s": 5.0, "worker_heartbeat_s": 0.1, **settings},
        )
        self.master = Master(config)
        self.master_part = Part()
        await self._nursery.start(self.master_part.run, self.master.run)
        if self.kind == UNIX:
            await self._nursery.start(
                self.master_part.run,
                functools.partial(
                    serve_unix, self.master.service, str(self.base / "m.sock"), security=self.security
                ),
            )
        elif self.kind == TCP:
            address = await self._nursery.start(
                self.master_part.run,
                functools.partial(
                    serve_tcp, self.master.service, "127.0.0.1", self._port, security=self.security
                ),
            )
            self._port = address.port
        self._master_connection = InProcess(self.master.service, "master")

    @property
    def master_port(self) -> int:
        return self._port

    async def stop_master(self) -> None:
        await self._master_connection.aclose()
        await self.master_part.stop()

    async def _dial_master(self, nursery: trio.Nursery) -> Connection:
        if self.kind == UNIX:
            return await connect_unix(
                nursery, str(self.base / "m.sock"), role="master", security=self.security
            )
        if self.kind == TCP:
            port = self.relayed.get(self._port, self._port)
            return await connect_tcp(nursery, "127.0.0.1", port, role="master", security=self.security)
        return InProcess(self.master.service, "client")

    # --- workers ------------------------------------------------------------------------------------

    async def start_worker(
        self,
        name: str = "w1",
        *,
        quota: int = 1 << 30,
        tier: str = "SSD",
        hostname: str = HERE,
        relay: Callable[[int], int] | None = None,
        **settings: Any,
    ) -> WorkerPart:
        """`relay`: from its TCP port to the one that clients are told."""
        config = WorkerConfig(
            state_dir=str(self.base / name),
            tiers=[
                TierConfig(
                    alias=tier,
                    directories=[DirectoryConfig(path=str(self.base / f"{name}-{tier}"), quota_bytes=quota)],
                )
            ],
            **{"session_grace_s": 2.0, **settings},
        )
        (self.base / f"{name}-{tier}").mkdir(exist_ok=True)
        link = Reconnecting(functools.partial(self._dial_master, self._nursery))
        worker = Worker(config, link, hostname=hostname)
        part = self.workers[name] = WorkerPart(worker, name)
        path = str(self.base / f"{name}.sock")
        if self.kind == UNIX:
            worker.advertise(host="127.0.0.1", port=0, unix_path=path)
            await self._nursery.start(
                part.run,
                functools.partial(serve_unix, worker.service, path, security=self.security),
            )
        elif self.kind == TCP:
            address = await self._nursery.start(
                part.run,
                functools.partial(serve_tcp, worker.service, "127.0.0.1", 0, security=self.security),
            )
            part.port = address.port
            port = relay(address.port) if relay is not None else address.port
            worker.advertise(host="127.0.0.1", port=port, unix_path="")
        else:
            worker.advertise(host="127.0.0.1", port=0, unix_path="")
        await self._nursery.start(part.run, worker.run)
        await worker.wait_registered()
        state = await part.connection.call(worker_ops.WorkerReport())
        part.worker_id = state.worker_id
        return part

    async def stop_worker(self, name: str = "w1") -> None:
        part = self.workers.pop(name)
        await part.connection.aclose()
        await part.stop()

    # --- clients ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def client(
        self, name: str = "client", intents: IntentLog | None = None, **settings: Any
    ) -> AsyncIterator[Client]:
        config = ClientConfig(**{"patience_s": 5.0, **settings})
        links = trio.CancelScope(shield=True)

        async def hold(task_status: trio.TaskStatus[trio.Nursery]) -> None:
            with links:
                async with trio.open_nursery() as nursery:
                    task_status.started(nursery)
                    await trio.sleep_forever()

        async def run(task_status: trio.TaskStatus[None]) -> None:
            try:
                await fs.run(task_status=task_status)
            finally:
                links.cancel()

        with unwrapped():
            async with trio.open_nursery() as nursery:
                link_nursery = await nursery.start(lambda task_status: hold(task_status))
                master = Reconnecting(
                    functools.partial(self._dial_master, link_nursery),
                    on_connected=lambda connection: fs.resume(connection),
                    patience_s=config.patience_s,
                )
                joined = {}
                if self.kind == IN_PROCESS:
                    joined = {
                        part.worker_id: InProcess(part.worker.service, name) for part in self.workers.values()
                    }
                pool = WorkerPool(
                    master,
                    hostname=HERE,
                    security=self.security,
                    patience_s=config.patience_s,
                    in_process=dict(joined),
                )
                fs = FileSystem(master, pool, config, name=name, hostname=HERE, intents=intents)
                await nursery.start(lambda task_status: run(task_status))
                client = Client(self, fs, pool, master)
                try:
                    yield client
                finally:
                    client.joined.extend(joined.values())
                    nursery.cancel_scope.cancel()
        for connection in client.joined:
            await connection.aclose()


class Client:
    """A FileSystem with shorthands that work in the root directory."""

    def __init__(self, world: World, fs: FileSystem, pool: WorkerPool, master: Reconnecting) -> None:
        self.world = world
        self.fs = fs
        self.master = master
        self.pool = pool
        self.paths = Paths(fs, ROOT)
        self.joined: list[Connection] = []

    def rejoin(self, part: WorkerPart) -> None:
        """In process: know the worker's new life."""
        if self.world.kind == IN_PROCESS:
            connection = InProcess(part.worker.service, "client")
            self.joined.append(connection)
            self.pool.add_in_process(part.worker_id, connection)

    async def create(self, name: bytes, flags: int = os.O_RDWR, parent: int = ROOT_INO) -> OpenFile:
        _, file = await self.fs.create(ROOT, parent, name, 0o644, flags)
        return file

    async def open(self, name: bytes, flags: int = os.O_RDONLY) -> OpenFile:
        attr = await self.fs.lookup(ROOT, ROOT_INO, name)
        return await self.fs.open(ROOT, attr.ino, flags)

    async def put(self, name: bytes, data: bytes) -> None:
        await self.paths.write_bytes(b"/" + name, data)

    async def get(self, name: bytes) -> bytes:
        return await self.paths.read_bytes(b"/" + name)

    async def close(self, file: OpenFile) -> None:
        await file.flush()
        await file.release()


async def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    """Poll a plain or async condition; fails the test after `timeout_s`."""
    with trio.fail_after(timeout_s):
        while True:
            found = condition()
            if hasattr(found, "__await__"):
                found = await found
            if found:
                return
            await trio.sleep(0.01)


def in_world(
    kind: str,
    *,
    worker: dict[str, Any] | None = None,
    master: dict[str, Any] | None = None,
    secret: bytes | None = None,
    clock: trio.abc.Clock | None = None,
) -> Callable[[Callable[[World], Awaitable[None]]], None]:
    """Run an async test in a World of one master and (unless `worker` is {}) one worker."""

    def run(test: Callable[[World], Awaitable[None]]) -> None:
        # Unix socket paths are short: not pytest's directories.
        with tempfile.TemporaryDirectory(prefix="afc") as directory:
            base = Path(directory)
            (base / "ufs").mkdir()

            async def main() -> None:
                with trio.fail_after(TIMEOUT_S), unwrapped():
                    async with trio.open_nursery() as nursery:
                        world = World(nursery, base, kind, Security(secret=secret))
                        await world.start_master(**(master or {}))
                        if worker != {}:
                            await world.start_worker(**(worker or {}))
                        await test(world)
                        for name in list(world.workers):
                            await world.stop_worker(name)
                        await world.stop_master()
                        nursery.cancel_scope.cancel()

            before = len(os.listdir("/proc/self/fd"))
            trio.run(main, clock=clock)
            assert len(os.listdir("/proc/self/fd")) <= before + 2, "descriptors leaked"

    return run
