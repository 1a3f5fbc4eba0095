#!/usr/bin/env python3
"""What small files cost the daemon, without the kernel: master, worker and client in one process and one
thread, as `alluxiofuse local` has them, asked as the FUSE layer asks.

    scripts/profile_small_files.py [DIR] [--files 3000] [--only create,drain,open,...] [--profile create]

Shown is CPU time of the trio thread and of the whole process for one operation (steadier than seconds
on a busy machine), what reaches the two logs, and how often they are synced. `drain` is what remains to
be done in the background after the operation before it. DIR (default: /dev/shm) holds everything;
`/dev/shm` leaves the disk out.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import trio

from alluxiofuse.cli import assembly
from alluxiofuse.cli.lifecycle import running
from alluxiofuse.client.filesystem import FileSystem
from alluxiofuse.client.workers import WorkerPool
from alluxiofuse.config import ClientConfig, DirectoryConfig, MasterConfig, TierConfig, WorkerConfig
from alluxiofuse.errors import FsError
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.master.master import Master
from alluxiofuse.master.store import Store
from alluxiofuse.rpc.base import Connection
from alluxiofuse.rpc.inprocess import InProcess
from alluxiofuse.rpc.security import Security
from alluxiofuse.wire.types import Caller
from alluxiofuse.worker.index import Index

ROOT = Caller(0, 0, None)
DATA = os.urandom(4096)
FEW = 300
"""How often what waits for the disk is done."""
counts: Counter[str] = Counter()


def count(owner: type, method: str, name: str) -> None:
    real: Callable[..., Any] = getattr(owner, method)

    def counted(*arguments: Any, **named: Any) -> Any:
        counts[name] += 1
        return real(*arguments, **named)

    setattr(owner, method, counted)


class Loops:
    """Each method does its operation `files` times and answers how often."""

    def __init__(self, fs: FileSystem, master: Master, files: int, parents: list[int]) -> None:
        self.fs, self.master, self.files = fs, master, files
        self.here, self.there = parents
        self.inos: list[int] = []

    async def create(self) -> int:
        """LOOKUP, CREATE, WRITE, FLUSH, RELEASE."""
        for number in range(self.files):
            try:
                await self.fs.lookup(ROOT, self.here, b"f%d" % number)
            except FsError:
                pass
            self.inos.append(await self._write(b"f%d" % number, is_synced=False))
        return self.files

    async def createsync(self) -> int:
        for number in range(FEW):
            await self._write(b"s%d" % number, is_synced=True)
        return FEW

    async def _write(self, name: bytes, *, is_synced: bool) -> int:
        attr, file = await self.fs.create(ROOT, self.here, name, 0o644, os.O_WRONLY | os.O_EXCL)
        await file.write(0, DATA)
        if is_synced:
            await file.fsync()
        await file.flush()
        await file.release()
        return attr.ino

    async def open(self) -> int:
        """OPEN, READ, RELEASE."""
        for ino in self.inos:
            file = await self.fs.open(ROOT, ino)
            await file.read(0, len(DATA))
            await file.release()
        return len(self.inos)

    async def stat(self) -> int:
        for ino in self.inos:
            await self.fs.getattr(ino)
        return len(self.inos)

    async def rename(self) -> int:
        for number in range(self.files):
            await self.fs.rename(ROOT, self.here, b"f%d" % number, self.there, b"f%d" % number)
        return self.files

    async def unlink(self) -> int:
        for number in range(self.files):
            await self.fs.unlink(ROOT, self.there, b"f%d" % number)
        return self.files

    async def fsync(self) -> int:
        """4 KiB written in place, then fsync."""
        _, file = await self.fs.create(ROOT, self.here, b"synced", 0o644, os.O_RDWR)
        for _ in range(FEW):
            await file.write(0, DATA)
            await file.fsync()
        await file.flush()
        await file.release()
        return FEW

    async def drain(self) -> int:
        self.master.persister.hurry_all()
        while not self.master.persister.is_idle():  # noqa: ASYNC110 - idleness has no event
            await trio.sleep(0.02)
        return self.files


async def measure(base: Path, options: argparse.Namespace) -> None:
    (base / "ufs").mkdir()
    (base / "tier").mkdir()
    directory = DirectoryConfig(path=str(base / "tier"), quota_bytes=4 << 30)
    master_config = MasterConfig(
        state_dir=str(base / "master"), ufs=str(base / "ufs"), port=-1, persist_delay_s=options.delay
    )
    worker_config = WorkerConfig(
        state_dir=str(base / "worker"), port=-1, tiers=[TierConfig(alias="SSD", directories=[directory])]
    )
    security = Security()
    async with AsyncExitStack() as stack:
        master, _ = await stack.enter_async_context(
            assembly.running_master(master_config, security, is_one_process=True)
        )
        link = InProcess(master.service, "worker")
        worker, _ = await stack.enter_async_context(
            assembly.running_worker(worker_config, link, security, "here")
        )
        connection = InProcess(master.service, "client")
        workers: dict[int, Connection] = {
            await assembly.worker_id_of(worker): InProcess(worker.service, "client")
        }
        pool = WorkerPool(connection, hostname="here", security=security, patience_s=5.0, in_process=workers)
        fs = FileSystem(connection, pool, ClientConfig(), name="profile", hostname="here")
        await stack.enter_async_context(running(fs.run))
        parents = [(await fs.mkdir(ROOT, ROOT_INO, name, 0o755)).ino for name in (b"d", b"e")]
        loops = Loops(fs, master, options.files, parents)
        for name in options.only.split(","):
            await one(name, getattr(loops, name), options.profile == name)


async def one(name: str, loop: Callable[[], Awaitable[int]], is_profiled: bool) -> None:
    profile = cProfile.Profile()
    counts.clear()
    start, cpu, thread = time.perf_counter(), time.process_time(), time.thread_time()
    if is_profiled:
        profile.enable()
    done = await loop()
    profile.disable()
    took = [time.perf_counter() - start, time.thread_time() - thread, time.process_time() - cpu]
    seconds, in_thread, in_process = (value / done * 1e6 for value in took)
    logs = ", ".join(f"{value / done:.2f} {key}" for key, value in sorted(counts.items()))
    print(
        f"{name:11}{seconds:7.0f} us, CPU {in_thread:5.0f} (process {in_process:5.0f}) us; {logs}", flush=True
    )
    if is_profiled:
        pstats.Stats(profile).sort_stats("tottime").print_stats(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("directory", nargs="?", default="/dev/shm")  # noqa: S108 - a default to measure in
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--only", default="create,drain,open,stat,rename,drain,unlink,drain,fsync,createsync")
    parser.add_argument("--profile", default="", help="the operation whose functions are listed by time")
    parser.add_argument("--delay", type=float, default=100.0, help="persist_delay; short: uploads beside it")
    options = parser.parse_args()
    count(Store, "commit", "master batches")
    count(Store, "sync", "master syncs")
    count(Index, "_write", "worker batches")
    count(Index, "put", "worker puts")
    count(Index, "sync", "worker syncs")
    with tempfile.TemporaryDirectory(prefix="profile-", dir=options.directory) as base:
        trio.run(measure, Path(base), options)


if __name__ == "__main__":
    main()
