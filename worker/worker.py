"""The worker, assembled."""

from __future__ import annotations

import logging
from pathlib import Path

import trio

from alluxiofuse.config import WorkerConfig
from alluxiofuse.rpc.base import Connection
from alluxiofuse.ufs import registry
from alluxiofuse.ufs.upload_process import UploadProcess
from alluxiofuse.wire.types import WorkerAddress
from alluxiofuse.worker import recovery
from alluxiofuse.worker.fetcher import Fetcher
from alluxiofuse.worker.mounts import Mounts, OpenUfs
from alluxiofuse.worker.reading import Reading
from alluxiofuse.worker.recovery import Opened
from alluxiofuse.worker.reporting import Identity, Reporter
from alluxiofuse.worker.room import Room
from alluxiofuse.worker.service import Parts, WorkerService
from alluxiofuse.worker.slabs import Slabs
from alluxiofuse.worker.upkeep import Upkeep
from alluxiofuse.worker.uploads import Uploads
from alluxiofuse.worker.writing import Writing

log = logging.getLogger(__name__)


class Worker:
    """One worker. `service` may be served at any time; it answers UnavailableError while `run` has
    not recovered yet and after it ended."""

    def __init__(
        self,
        config: WorkerConfig,
        master: Connection,
        *,
        hostname: str,
        open_ufs: OpenUfs = registry.open_ufs,
    ) -> None:
        self.service = WorkerService()
        self.slabs: Slabs | None = None
        """The state, while `run` runs; for tests and reports."""
        self._config = config
        self._master = master
        self._open_ufs = open_ufs
        unix_path = config.unix_path or f"{config.state_dir}/worker.sock"
        self._address = WorkerAddress(0, hostname, config.host, max(0, config.port), unix_path)
        self._is_registered = trio.Event()

    def advertise(self, *, host: str, port: int, unix_path: str) -> None:
        """Where clients reach it, when that is not what the configuration says (port 0: no TCP, ""
        for no Unix socket). Before `run`."""
        self._address.host, self._address.port, self._address.unix_path = host, port, unix_path

    async def wait_registered(self) -> None:
        """Until the master knew this worker for the first time."""
        await self._is_registered.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Started when recovered; the master is looked for after that. Raises UserError and StateError
        before. Cancelled: fetches and uploads stop as soon as their threads can, what is dirty or
        open for writing stays for the next start."""
        opened = await trio.to_thread.run_sync(recovery.open_storage, self._config)
        mounts = Mounts(self._master, self._open_ufs)
        try:
            slabs = Slabs(opened.tiers, opened.index, high_watermark=self._config.high_watermark)
            try:
                await trio.to_thread.run_sync(recovery.load, slabs)
                await self._serve(slabs, opened, mounts, task_status)
            finally:
                self.service.stop()
                self.slabs = None
                slabs.fds.close()
        finally:
            mounts.close()
            opened.close()

    async def _serve(
        self, slabs: Slabs, opened: Opened, mounts: Mounts, task_status: trio.TaskStatus[None]
    ) -> None:
        config = self._config
        room = Room(slabs, high_watermark=config.high_watermark, low_watermark=config.low_watermark)
        fetcher = Fetcher(
            slabs, room, mounts, parallel=config.fetch_parallel, read_ahead_bytes=config.read_ahead_bytes
        )
        writing = Writing(slabs, room, fetcher, grace_s=config.session_grace_s)
        reading = Reading(slabs, fetcher, writing.leases)
        identity = Identity(opened.index.worker_uuid, self._address)
        # A connector that a test or a program hands in lives in this process only.
        is_apart = config.upload_process and self._open_ufs is registry.open_ufs
        process = UploadProcess(config.persist_parallel, _notes_dir(config)) if is_apart else None
        uploads = Uploads(slabs, fetcher, mounts, parallel=config.persist_parallel, process=process)
        reporter = Reporter(self._master, slabs, identity, uploads)
        async with trio.open_nursery() as nursery:
            upkeep = Upkeep(slabs, opened.claims)
            for task in (room.run, fetcher.run, writing.run, uploads.run, reporter.run, upkeep.run):
                nursery.start_soon(task)
            if process is not None:
                nursery.start_soon(process.run)
            await trio.lowlevel.checkpoint()
            self.slabs = slabs
            self.service.start(Parts(slabs, reading, writing, identity))
            task_status.started()
            try:
                await reporter.wait_registered()
                self._is_registered.set()
                await trio.sleep_forever()
            finally:
                await reporter.say_goodbye()


def _notes_dir(config: WorkerConfig) -> Path:
    """For `UploadProcess`."""
    directory = Path(config.state_dir) / "uploads"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory
