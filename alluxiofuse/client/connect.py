"""From an address to a running FileSystem."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from alluxiofuse.client.filesystem import FileSystem
from alluxiofuse.client.intents import IntentLog
from alluxiofuse.client.parallel import unwrapped
from alluxiofuse.client.workers import WorkerPool
from alluxiofuse.config import ClientConfig
from alluxiofuse.rpc.address import parse_address
from alluxiofuse.rpc.base import Connection
from alluxiofuse.rpc.client import Reconnecting, connect
from alluxiofuse.rpc.security import Security

DEFAULT_PORT = 19998


@asynccontextmanager
async def open_filesystem(
    address: str,
    *,
    security: Security | None = None,
    config: ClientConfig | None = None,
    name: str = "python",
    hostname: str = "",
    intents: IntentLog | None = None,
) -> AsyncIterator[FileSystem]:
    """A FileSystem on the master at `address` ("HOST[:PORT]", "unix:PATH"), running until the block
    ends, whose exceptions pass as they are. UnavailableError when nobody answers within
    `config.patience_s`; AuthError, ProtocolError as of `rpc.client.connect`; UserError: no address."""
    where = parse_address(address, DEFAULT_PORT)
    security = security or Security()
    config = config or ClientConfig()
    with unwrapped():
        async with trio.open_nursery() as nursery:
            links = trio.CancelScope(shield=True)  # The FileSystem says goodbye over them.
            link_nursery = await nursery.start(_hold, links)

            async def dial() -> Connection:
                return await connect(link_nursery, where, role="master", security=security)

            async def resume(connection: Connection) -> None:
                await filesystem.resume(connection)

            master = Reconnecting(dial, on_connected=resume, patience_s=config.master_patience_s)
            workers = WorkerPool(master, hostname=hostname, security=security, patience_s=config.patience_s)
            filesystem = FileSystem(master, workers, config, name=name, hostname=hostname, intents=intents)
            try:
                try:
                    await master.connect(config.patience_s)
                except BaseException:
                    links.cancel()
                    raise
                await nursery.start(_run, filesystem, links)
                yield filesystem
            finally:
                nursery.cancel_scope.cancel()


async def _hold(
    scope: trio.CancelScope, *, task_status: trio.TaskStatus[trio.Nursery] = trio.TASK_STATUS_IGNORED
) -> None:
    """A nursery for connections."""
    with scope:
        async with trio.open_nursery() as nursery:
            task_status.started(nursery)
            await trio.sleep(math.inf)


async def _run(
    filesystem: FileSystem,
    links: trio.CancelScope,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    try:
        await filesystem.run(task_status=task_status)
    finally:
        links.cancel()
