"""The metadata part of a master without under storage: a store on disk, everything loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from alluxiofuse.config import MasterConfig
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.master.changes import Changes
from alluxiofuse.master.clock import Clock
from alluxiofuse.master.content import Content
from alluxiofuse.master.events import Events
from alluxiofuse.master.format import ensure_formatted
from alluxiofuse.master.fsck import problems
from alluxiofuse.master.loading import Gate
from alluxiofuse.master.namespace import Namespace
from alluxiofuse.master.persist_log import PersistLog
from alluxiofuse.master.records import InodeRecord, MountRecord
from alluxiofuse.master.replies import Replies
from alluxiofuse.master.sessions import Sessions
from alluxiofuse.master.store import Store
from alluxiofuse.master.tree import Tree
from alluxiofuse.master.workers import WorkerRegistry
from alluxiofuse.master.xattrs import Xattrs
from alluxiofuse.ufs.base import Capabilities
from alluxiofuse.wire.master_ops import RegisterWorker, ReportBlocks
from alluxiofuse.wire.types import Caller, Tier, WorkerAddress

KERNEL = Caller(0, 0, None)
POSIX_STORE = Capabilities(True, True, True, True, True, -1.0, 4, 1 << 20)


@dataclasses.dataclass
class OneMount:
    """A writable mount at the root, and whatever else a test puts in `readonly`."""

    readonly: set[int] = dataclasses.field(default_factory=set)

    def capabilities(self, mount_id: int) -> Capabilities:
        return POSIX_STORE

    def is_readonly(self, mount_id: int) -> bool:
        return mount_id in self.readonly

    def record(self, mount_id: int) -> MountRecord | None:
        return MountRecord(1, ROOT_INO, "test:", False, -1.0, {}) if mount_id == 1 else None

    def is_known(self, mount_id: int) -> bool:
        return True

    def is_dying(self, mount_id: int) -> bool:
        return False


class NothingToLoad:
    def needs_child(self, parent: int, parent_record: InodeRecord, name: bytes, child: int | None) -> bool:
        return False

    async def load_child(self, parent: int, name: bytes) -> None:
        raise AssertionError

    def needs_children(self, ino: int, record: InodeRecord) -> bool:
        return False

    async def load_children(self, ino: int) -> None:
        raise AssertionError

    def needs_refresh(self, ino: int, record: InodeRecord) -> bool:
        return False

    async def refresh(self, ino: int) -> None:
        raise AssertionError

    def cache_s(self, record: InodeRecord) -> float:
        return 60.0

    def listed_cache_s(self, directory: int, record: InodeRecord) -> Callable[[InodeRecord], float]:
        return self.cache_s


class World:
    """Construct inside trio.run. `reopen` gives the next life on the same store."""

    def __init__(self, directory: Path, *, close_stale_sessions: bool = False) -> None:
        self.directory = directory
        self.clock = Clock()
        self.store = Store(directory)
        tx = self.store.transaction()
        self.cluster_id = ensure_formatted(tx, self.clock.now_ns())
        tx.commit()
        self.mounts = OneMount()
        config = MasterConfig()
        self.events = Events(1000)
        self.sessions = Sessions(self.store, self.clock, config.session_lease_s, close_stale_sessions)
        self.workers = WorkerRegistry(self.store, self.clock, config)
        self.persist_log = PersistLog(self.store, self.mounts)
        self.tree = Tree(
            self.store, self.persist_log, self.sessions.is_open, self.workers.drop_container, self.clock
        )
        gate = Gate(NothingToLoad())
        self.namespace = Namespace(
            self.store, self.tree, gate, self.clock, self.mounts.is_readonly, lambda worker, container: False
        )
        self.changes = Changes(self.namespace, self.persist_log, self.events)
        self.xattrs = Xattrs(self.namespace, self.events)
        self.content = Content(
            self.namespace,
            self.changes,
            self.sessions,
            Replies(self.store, self.sessions),
            self.workers,
            self.persist_log,
            self.events,
            config.block_bytes,
        )
        self.workers.on_ready.append(self.content.worker_ready)
        root = self.namespace.existing(ROOT_INO)
        root.is_loaded = True
        tx = self.store.transaction()
        tx.put_inode(ROOT_INO, root)
        tx.commit()

    def reopen(self, *, close_stale_sessions: bool = False) -> World:
        self.store.close()
        return World(self.directory, close_stale_sessions=close_stale_sessions)

    def validate(self) -> None:
        assert problems(self.store, self.mounts) == []

    def session(self) -> int:
        return self.sessions.open("test", "here", 0, []).session_id

    def worker(self, name: str = "worker-1", reports: ReportBlocks | None = None) -> tuple[int, int]:
        """(worker id, epoch) of a worker that is alive and has nothing."""
        tier = Tier("MEM", 1 << 30, 0, [])
        address = WorkerAddress(0, "here", "127.0.0.1", 1, "")
        granted = self.workers.register(RegisterWorker(name, address, [tier], "1"))
        report = reports or ReportBlocks(0, 0, [], True)
        report.worker_id, report.epoch = granted.worker_id, granted.epoch
        self.workers.report_blocks(report)
        return granted.worker_id, granted.epoch
