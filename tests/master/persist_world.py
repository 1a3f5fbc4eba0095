"""A namespace over a real under storage with the real persister, and a worker played by the test.

The played worker holds content as bytes and answers PersistCommands by calling the connector's `put`
on a real file. Namespace operations are those of `Tree`, without permissions.
"""

from __future__ import annotations

import os
import random
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from alluxiofuse.config import MasterConfig
from alluxiofuse.errors import UfsError, UfsUnavailableError
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.master.clock import Clock
from alluxiofuse.master.containers import forget_container, give_container, new_container
from alluxiofuse.master.events import Events
from alluxiofuse.master.format import ensure_formatted
from alluxiofuse.master.fsck import problems
from alluxiofuse.master.mounts import MountTable
from alluxiofuse.master.persist_log import PersistLog
from alluxiofuse.master.persister import Persister
from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.store import Store, u64
from alluxiofuse.master.tree import Tree
from alluxiofuse.master.ufs_loader import UfsLoader
from alluxiofuse.master.workers import WorkerRegistry
from alluxiofuse.ufs.base import PutCancelled, UfsAttrs, UnderStorage
from alluxiofuse.wire.master_ops import (
    PersistDone,
    RegisterWorker,
    ReportBlocks,
    WorkerCommands,
    WorkerHeartbeat,
)
from alluxiofuse.wire.types import BlockReport, CancelPersistCommand, PersistCommand, Tier, WorkerAddress


async def until(is_true: Callable[[], bool]) -> None:
    """Poll; the caller's deadline bounds it."""
    while not is_true():  # noqa: ASYNC110 - what is waited for is in a store or a thread
        await trio.sleep(0.005)


class KnownMounts:
    """The mount table of a world, for the check of its store."""

    def __init__(self, table: MountTable) -> None:
        self.capabilities = table.capabilities
        self.is_readonly = table.is_readonly
        self.record = table.record

    def is_known(self, mount_id: int) -> bool:
        return self.record(mount_id) is not None

    def is_dying(self, mount_id: int) -> bool:
        return False


class Killed(Exception):
    """The master died here."""


class World:
    """One life of a master on `state`. Construct inside trio.run."""

    def __init__(
        self,
        state: Path,
        open_ufs: Callable[[str, dict[str, str]], UnderStorage],
        uri: str,
        contents: dict[int, bytes],
        *,
        sync_interval_s: float = -1.0,
        at: Callable[[str], None] = lambda point: None,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.clock = Clock(wall_ns)
        self.store = Store(state)
        self.mounts = MountTable(self.store, open_ufs)
        tx = self.store.transaction()
        ensure_formatted(tx, self.clock.now_ns())
        self.mounts.ensure_root(uri, {}, sync_interval_s, tx)
        tx.commit()
        config = MasterConfig(persist_delay_s=0.0, worker_timeout_s=10.0)
        self.events = Events(100_000)
        self.workers = WorkerRegistry(self.store, self.clock, config)
        self.log = PersistLog(self.store, self.mounts, wall_ns=wall_ns)
        self.open_inos: set[int] = set()
        self.tree = Tree(
            self.store, self.log, self.open_inos.__contains__, self.workers.drop_container, self.clock
        )
        self.loader = UfsLoader(
            self.store, self.mounts, self.log, self.tree, self.events, self.workers, self.clock
        )
        self.persister = Persister(
            self.store,
            self.mounts,
            self.log,
            self.workers,
            self.loader,
            self.clock,
            config,
            first_retry_s=0.01,
            at=at,
        )
        self.contents = contents
        self.worker = PlayedWorker(self)

    @property
    def storage(self) -> UnderStorage:
        return self.mounts.storage(1)

    def close(self) -> None:
        self.mounts.close()
        self.store.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.persister.run)
            nursery.start_soon(self.worker.run)
            yield
            nursery.cancel_scope.cancel()

    async def settle(self, timeout_s: float = 20.0) -> None:
        """Until the log is empty."""
        with trio.move_on_after(timeout_s):
            while not self.persister.is_idle():  # noqa: ASYNC110
                await trio.sleep(0.005)
            self.validate()
            return
        print("not settled:", *self.dump(), *self.persister.failing(), sep="\n")
        raise AssertionError("not settled")

    def dump(self) -> list[str]:
        """What is pending, and what the persister would do about it."""
        found = []
        for key, value in self.store.scan("persist", b""):
            name = f"{key[:1].decode()} {int.from_bytes(key[1:9], 'big')} {key[9:].decode()}"
            if key[:1] in b"sr":
                ino = int.from_bytes(key[1:9], "big")
                plan = self.persister.explain(ino if key[:1] == b"s" else (ino, key[9:]))
                found.append(f"{name}: {plan}")
            else:
                found.append(f"{name}: {value.hex()}")
        return found[:40]

    def validate(self) -> None:
        found = problems(self.store, KnownMounts(self.mounts))
        if found:
            print(*self.dump(), sep="\n")
            for key, _ in self.store.scan("inode", b""):
                print(int.from_bytes(key, "big"), self.store.inode(int.from_bytes(key, "big")))
        assert not found, found

    # --- namespace --------------------------------------------------------------------------------

    def find(self, path: str) -> int:
        ino = ROOT_INO
        for name in path.encode().split(b"/"):
            if name:
                found = self.store.child(ino, name)
                assert found is not None, path
                ino = found
        return ino

    def record(self, path: str) -> InodeRecord:
        record = self.store.inode(self.find(path))
        assert record is not None
        return record

    def _parent(self, path: str) -> tuple[int, bytes]:
        above, _, name = path.rpartition("/")
        return self.find(above), name.encode()

    def _create(self, path: str, record: InodeRecord) -> int:
        parent, name = self._parent(path)
        tx = self.store.transaction()
        parent_record = tx.inode(parent)
        assert parent_record is not None
        ino = self.tree.insert(tx, parent, parent_record, name, record)
        tx.commit()
        return ino

    def mkdir(self, path: str) -> int:
        return self._create(path, self._record(stat.S_IFDIR | 0o755, 2))

    def symlink(self, path: str, target: str) -> int:
        record = self._record(stat.S_IFLNK | 0o777, 1)
        record.target = target.encode()
        return self._create(path, record)

    def _record(self, mode: int, nlink: int) -> InodeRecord:
        now = self.clock.now_ns()
        uid, gid = os.geteuid(), os.getegid()
        return InodeRecord(mode, nlink, uid, gid, 0, 0, now, now, now, now, 0, b"", 0)

    def write(self, path: str, data: bytes) -> int:
        """Create or replace, as a writer that closes the file does."""
        parent, name = self._parent(path)
        ino = self.store.child(parent, name)
        if ino is None:
            ino = self._create(path, self._record(stat.S_IFREG | 0o644, 1))
        self.persister.cancel(ino)
        tx = self.store.transaction()
        record = tx.inode(ino)
        assert record is not None
        forget_container(tx, record.container)
        record.container = new_container(self.store)
        give_container(tx, record.container, ino)
        self.contents[record.container] = data
        record.size, record.held_by = len(data), self.worker.worker_id or 1
        record.mtime_ns = self.clock.now_ns()
        self.log.content_committed(tx, ino, record)
        tx.put_inode(ino, record)
        tx.commit()
        return ino

    def chmod(self, path: str, mode: int) -> None:
        ino = self.find(path)
        tx = self.store.transaction()
        record = tx.inode(ino)
        assert record is not None
        record.mode = stat.S_IFMT(record.mode) | mode
        self.log.attrs_changed(tx, ino, record)
        tx.put_inode(ino, record)
        tx.commit()

    def remove(self, path: str) -> int:
        parent, name = self._parent(path)
        ino = self.find(path)
        tx = self.store.transaction()
        record = tx.inode(ino)
        assert record is not None
        self.tree.detach(tx, parent, name, ino, record)
        tx.commit()
        return ino

    def link(self, path: str, new: str) -> int:
        ino = self.find(path)
        parent, name = self._parent(new)
        tx = self.store.transaction()
        record, parent_record = tx.inode(ino), tx.inode(parent)
        assert record is not None
        assert parent_record is not None
        self.tree.link(tx, parent, parent_record, name, ino, record)
        tx.commit()
        return ino

    def rename(self, old: str, new: str) -> int:
        parent, name = self._parent(old)
        new_parent, new_name = self._parent(new)
        ino, replaced = self.find(old), self.store.child(new_parent, new_name)
        if replaced == ino:
            return ino
        tx = self.store.transaction()
        record, source = tx.inode(ino), tx.inode(parent)
        target = source if parent == new_parent else tx.inode(new_parent)
        assert record is not None
        assert source is not None
        assert target is not None
        gone = None if replaced is None else tx.inode(replaced)
        pair = None if replaced is None or gone is None else (replaced, gone)
        self.tree.rename(tx, (parent, source, name), (new_parent, target, new_name), (ino, record), pair)
        tx.commit()
        return ino

    def names(self, path: str = "") -> list[str]:
        return [name.decode() for name, _ in self.store.scan("edge", u64(self.find(path)))]

    # --- what is where ----------------------------------------------------------------------------

    def namespace_tree(self) -> dict[str, bytes | str | None]:
        """Path -> bytes of a file, target of a symlink, None of a directory; primary names only."""
        found: dict[str, bytes | str | None] = {}
        self._walk(ROOT_INO, "", found)
        return found

    def _walk(self, directory: int, base: str, found: dict[str, bytes | str | None]) -> None:
        for name, value in self.store.scan("edge", u64(directory)):
            ino = int.from_bytes(value, "big")
            record = self.store.inode(ino)
            assert record is not None
            path = f"{base}/{name.decode()}" if base else name.decode()
            if (record.parent, record.name) != (directory, name) or record.is_local_only:
                continue
            if stat.S_ISDIR(record.mode):
                if self.mounts.capabilities(1).has_directories:
                    found[path] = None
                self._walk(ino, path, found)
            elif stat.S_ISLNK(record.mode):
                found[path] = record.target.decode()
            else:
                found[path] = self.contents.get(record.container, b"")

    def storage_tree(self) -> dict[str, bytes | str | None]:
        """The same of the under storage."""
        found: dict[str, bytes | str | None] = {}
        todo = [b""]
        while todo:
            base, token = todo.pop(), None
            while True:
                page = self.storage.list(base, token)
                for entry in page.entries:
                    path = entry.path.decode()
                    if entry.is_dir:
                        todo.append(entry.path)
                        if self.storage.capabilities.has_directories:
                            found[path] = None
                    elif stat.S_ISLNK(entry.mode):
                        found[path] = entry.target.decode()
                    else:
                        found[path] = bytes(self.storage.read(entry.path, 0, entry.size))
                token = page.next_token
                if token is None:
                    break
        return found

    def check_equal(self) -> None:
        wanted, there = self.namespace_tree(), self.storage_tree()
        paths = wanted.keys() | there.keys()
        wrong = {
            path for path in paths if path not in wanted or path not in there or wanted[path] != there[path]
        }
        assert not wrong, {path: (wanted.get(path, "nothing"), there.get(path, "nothing")) for path in wrong}


class PlayedWorker:
    """Registers, says what it holds, uploads what it is told to."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.worker_id = 0
        self.epoch = 0
        self.uploaded = 0
        self.cancelled: set[int] = set()
        self.gate: Callable[[PersistCommand], Any] | None = None
        """Awaited before each upload."""
        self.is_mute = False
        """Uploads, but never says so."""
        self.register()

    def register(self) -> None:
        address = WorkerAddress(0, "here", "127.0.0.1", 0, "")
        answer = self.world.workers.register(
            RegisterWorker("worker-uuid-1", address, [Tier("MEM", 1 << 30, 0, [])], "1")
        )
        self.worker_id, self.epoch = answer.worker_id, answer.epoch
        reports = [BlockReport(container, b"\1", True) for container in self.world.contents]
        self.world.workers.report_blocks(ReportBlocks(self.worker_id, self.epoch, reports, True))

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat)
            while True:
                request = WorkerCommands(self.worker_id, self.epoch, 5.0)
                for command in await self.world.workers.commands(request):
                    if isinstance(command, PersistCommand):
                        nursery.start_soon(self._persist, command)
                    elif isinstance(command, CancelPersistCommand):
                        self.cancelled.add(command.task_id)

    async def _beat(self) -> None:
        while True:
            self.world.workers.heartbeat(WorkerHeartbeat(self.worker_id, self.epoch, [], [], [], 0))
            await trio.sleep(1.0)

    async def _persist(self, command: PersistCommand) -> None:
        if self.gate is not None:
            await self.gate(command)
        error, fingerprint = "", b""
        try:
            fingerprint = await trio.to_thread.run_sync(self._put, command)
            self.uploaded += 1
        except PutCancelled:
            error = "cancelled"
        except UfsError as exc:
            error = exc.code
        if not self.is_mute:
            self.say(command, fingerprint, error)

    def say(self, command: PersistCommand, fingerprint: bytes, error: str = "") -> None:
        self.world.persister.done(
            PersistDone(
                self.worker_id,
                self.epoch,
                command.task_id,
                command.container,
                command.size,
                fingerprint,
                error,
                "it failed" if error else "",
            )
        )

    def _put(self, command: PersistCommand) -> bytes:
        attrs = UfsAttrs(command.mode, command.uid, command.gid, command.mtime_ns)
        with tempfile.TemporaryFile() as file:
            file.write(self.world.contents[command.container])
            file.flush()
            entry = self.world.storage.put(
                command.path,
                file.fileno(),
                command.size,
                attrs,
                lambda: command.task_id in self.cancelled,
            )
        return entry.fingerprint


class Flaky(UnderStorage):
    """Fails some calls with UfsUnavailableError, before or after having done them."""

    def __init__(self, inner: UnderStorage, seed: int, rate: float = 0.1) -> None:
        self.inner = inner
        self.scheme, self.uri, self.capabilities = inner.scheme, inner.uri, inner.capabilities
        self.rate = rate
        self._random = random.Random(seed)

    def _call(self, work: Callable[[], Any]) -> Any:
        dice = self._random.random()
        if dice < self.rate / 2:
            raise UfsUnavailableError("injected, before")
        result = work()
        if dice < self.rate:
            raise UfsUnavailableError("injected, after")
        return result

    def check(self) -> None:
        self.inner.check()

    def stat(self, path: bytes) -> Any:
        return self._call(lambda: self.inner.stat(path))

    def list(self, path: bytes, token: str | None = None, limit: int = 1000) -> Any:
        return self._call(lambda: self.inner.list(path, token, limit))

    def read(self, path: bytes, offset: int, length: int, fingerprint: bytes | None = None) -> Any:
        return self.inner.read(path, offset, length, fingerprint)

    def put(
        self,
        path: bytes,
        fd: int,
        size: int,
        attrs: UfsAttrs,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Any:
        return self._call(lambda: self.inner.put(path, fd, size, attrs, is_cancelled))

    def mkdir(self, path: bytes, attrs: UfsAttrs) -> Any:
        return self._call(lambda: self.inner.mkdir(path, attrs))

    def symlink(self, path: bytes, target: bytes, attrs: UfsAttrs) -> Any:
        return self._call(lambda: self.inner.symlink(path, target, attrs))

    def set_attrs(self, path: bytes, attrs: UfsAttrs) -> Any:
        return self._call(lambda: self.inner.set_attrs(path, attrs))

    def rename(self, source: bytes, target: bytes) -> Any:
        return self._call(lambda: self.inner.rename(source, target))

    def copy(self, source: bytes, target: bytes) -> Any:
        return self._call(lambda: self.inner.copy(source, target))

    def delete(self, path: bytes) -> None:
        self._call(lambda: self.inner.delete(path))

    def delete_many(self, paths: Any) -> None:
        self._call(lambda: self.inner.delete_many(paths))

    def close(self) -> None:
        self.inner.close()
