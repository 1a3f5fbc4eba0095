"""Puts daemons together: a master or a worker with its sockets, each as a context manager.

Inside the block everything is ready; leaving it ends things in the reverse order. The sockets of a
daemon end before the daemon, so that nobody is served by half of one.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from alluxiofuse.cli.lifecycle import running
from alluxiofuse.config import MasterConfig, WorkerConfig
from alluxiofuse.errors import ConnectionLost, UfsUnavailableError, UnavailableError, UserError
from alluxiofuse.ids import ROOT_MOUNT_ID
from alluxiofuse.rpc.address import TcpAddress, UnixAddress
from alluxiofuse.rpc.base import Connection, Service
from alluxiofuse.rpc.client import Reconnecting, connect
from alluxiofuse.rpc.inprocess import InProcess
from alluxiofuse.rpc.security import Security
from alluxiofuse.rpc.server import serve_tcp, serve_unix
from alluxiofuse.wire.master_ops import ListWorkers
from alluxiofuse.wire.worker_ops import WorkerReport

if TYPE_CHECKING:
    from alluxiofuse.master.master import Master
    from alluxiofuse.ufs.base import UnderStorage
    from alluxiofuse.worker.slabs import Slabs
    from alluxiofuse.worker.worker import Worker

log = logging.getLogger(__name__)
UFS_CHECK_TIMEOUT_S = 45.0
MASTER_PATIENCE_S = 10.0
WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104 - recognised, not bound


async def check_new_root(config: MasterConfig) -> None:
    """Before anything is made at a first start: the under storage is known, reachable and lets us in."""
    from alluxiofuse.ufs.registry import open_ufs

    if not config.ufs:
        raise UserError("no under storage: give --ufs a directory or s3://bucket/prefix")
    storage = open_ufs(config.ufs, dict(config.ufs_options))
    try:
        await _check(storage)
    finally:
        storage.close()


async def check_known_root(master: Master) -> None:
    """At later starts, with the options that are stored. A store that is merely unreachable is a warning:
    what is cached can be served. So is a directory that is gone: probing would make it, empty, and all
    that was in it would count as deleted."""
    from alluxiofuse.ufs.registry import local_directory

    root = master.mounts.record(ROOT_MOUNT_ID)
    directory = None if root is None else local_directory(root.uri)
    try:
        await _check(master.mounts.storage(ROOT_MOUNT_ID), directory)
    except UfsUnavailableError as exc:
        log.warning("%s; going on with what is cached", exc.message)


async def _check(storage: UnderStorage, directory: bytes | None = None) -> None:
    """`storage.check` within a bounded time. `directory`: must be there already."""

    def check() -> None:
        if directory is not None and not os.path.lexists(directory):
            raise UfsUnavailableError(f"{os.fsdecode(directory)} is gone: is its filesystem mounted?")
        storage.check()

    with trio.move_on_after(UFS_CHECK_TIMEOUT_S):
        await trio.to_thread.run_sync(check, abandon_on_cancel=True)
        return
    raise UfsUnavailableError(f"{storage.uri} did not answer within {UFS_CHECK_TIMEOUT_S:g} s")


def has_metadata(config: MasterConfig) -> bool:
    return (Path(config.state_dir) / "meta").is_dir()


@asynccontextmanager
async def listening(
    service: Service, security: Security, *, tcp: TcpAddress | None, unix: Path | None
) -> AsyncIterator[TcpAddress | None]:
    """Sockets of a service; gives the TCP address with its real port."""
    async with AsyncExitStack() as stack:
        address = None
        if unix is not None:
            await stack.enter_async_context(
                running(partial(serve_unix, service, str(unix), security=security))
            )
        if tcp is not None:
            address = await stack.enter_async_context(
                running(partial(serve_tcp, service, tcp.host, tcp.port, security=security))
            )
        yield address


def tcp_of(host: str, port: int) -> TcpAddress | None:
    """Port -1: none."""
    return None if port < 0 else TcpAddress(host, port)


@asynccontextmanager
async def running_master(
    config: MasterConfig, security: Security, *, is_one_process: bool
) -> AsyncIterator[tuple[Master, TcpAddress | None]]:
    """The master with its Unix socket (`config.unix_path`) and, unless `config.port` is -1, TCP."""
    from alluxiofuse.master.master import Master

    is_new = not has_metadata(config)
    if is_new:
        await check_new_root(config)
    master = Master(config, close_stale_sessions=is_one_process)
    if not is_new:
        try:
            await check_known_root(master)
        except BaseException:
            master.close()
            raise
    async with running(master.run):
        security.cluster_id = master.cluster_id
        unix = Path(config.unix_path) if config.unix_path else None
        async with listening(
            master.service, security, tcp=tcp_of(config.host, config.port), unix=unix
        ) as address:
            yield master, address


@asynccontextmanager
async def running_worker(
    config: WorkerConfig,
    master: Connection,
    security: Security,
    hostname: str,
    disposable: Path | None = None,
) -> AsyncIterator[tuple[Worker, TcpAddress | None]]:
    """A worker with its sockets, registered at the master. `disposable`: a storage directory in
    memory that is removed at the end, if nothing in it is only there."""
    from alluxiofuse.worker.worker import Worker

    worker = Worker(config, master, hostname=hostname)
    unix = Path(config.unix_path) if config.unix_path else None
    slabs = None
    async with listening(
        worker.service, security, tcp=tcp_of(config.host, config.port), unix=unix
    ) as address:
        worker.advertise(
            host=hostname if config.host in WILDCARDS else config.host,
            port=address.port if address is not None else 0,
            unix_path=config.unix_path,
        )
        async with running(worker.run):
            await worker.wait_registered()
            slabs = worker.slabs
            yield worker, address
    if disposable is not None and slabs is not None and not _holds_dirty(slabs, disposable):
        shutil.rmtree(disposable, ignore_errors=True)


def _holds_dirty(slabs: Slabs, directory: Path) -> bool:
    """After the worker ended: is there anything in `directory` that no under storage has?"""
    from alluxiofuse.worker.slab import CLEAN

    return any(
        slab.state != CLEAN and Path(slab.directory.root) == directory for slab in slabs.by_container.values()
    )


async def worker_id_of(worker: Worker) -> int:
    """Which the master gave it."""
    connection = InProcess(worker.service, "start")
    try:
        return (await connection.call(WorkerReport())).worker_id
    finally:
        await connection.aclose()


@asynccontextmanager
async def reconnecting(address: TcpAddress | UnixAddress, security: Security) -> AsyncIterator[Reconnecting]:
    """A connection to a master that comes back. Waits, with a word in the log, for one that does not
    answer yet; AuthError and ProtocolError at once. The cluster id is learnt from it."""
    async with trio.open_nursery() as nursery:
        # The handshake does not look at the cluster: the master itself says what is wrong, and counts it.
        of_any_cluster = Security(secret=security.secret)

        async def dial() -> Connection:
            connection = await connect(nursery, address, role="master", security=of_any_cluster)
            security.cluster_id = security.cluster_id or connection.cluster_id
            return connection

        connection = Reconnecting(dial, patience_s=MASTER_PATIENCE_S)
        try:
            await _wait_for_master(connection)
            yield connection
        finally:
            with trio.CancelScope(shield=True):
                await connection.aclose()
            nursery.cancel_scope.cancel()


async def _wait_for_master(connection: Connection) -> None:
    while True:
        try:
            await connection.call(ListWorkers())
            return
        except (UnavailableError, ConnectionLost) as exc:
            log.warning("no master yet: %s", exc.message)


def this_host() -> str:
    return socket.gethostname()
