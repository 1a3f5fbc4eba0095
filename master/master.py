"""The master, put together: opens its state, answers requests (`service`), runs in a nursery.

State directory: `lock` (held while a master runs) and `meta` (the metadata store). Serving on sockets
is the caller's (`rpc.server`); in one process the caller joins `service` by `rpc.inprocess`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import trio

from alluxiofuse.config import MasterConfig
from alluxiofuse.errors import StateError, UserError
from alluxiofuse.ids import ROOT_INO, ROOT_MOUNT_ID
from alluxiofuse.master.changes import Changes
from alluxiofuse.master.clock import Clock
from alluxiofuse.master.content import Content
from alluxiofuse.master.events import Events
from alluxiofuse.master.format import ensure_formatted
from alluxiofuse.master.loading import Gate
from alluxiofuse.master.manage import Management, Parts
from alluxiofuse.master.mounts import MountTable, OpenUfs
from alluxiofuse.master.namespace import Namespace
from alluxiofuse.master.persist_log import PersistLog
from alluxiofuse.master.persister import Persister
from alluxiofuse.master.replies import Replies
from alluxiofuse.master.service import MasterService
from alluxiofuse.master.sessions import Sessions
from alluxiofuse.master.state_mark import StateGuard
from alluxiofuse.master.store import Store
from alluxiofuse.master.tree import Tree
from alluxiofuse.master.ufs_loader import UfsLoader
from alluxiofuse.master.workers import WorkerRegistry
from alluxiofuse.master.xattrs import Xattrs
from alluxiofuse.rpc.base import Service
from alluxiofuse.ufs import registry
from alluxiofuse.wire.types import OrphanSeal

log = logging.getLogger(__name__)

SYNC_AFTER_S = 0.1
"""A commit is fsynced at most this much later."""
SWEEP_EVERY_S = 1.0
EVENTS_PER_S = 1_000_000
"""Event numbers of a life start at the wall clock in these: beyond those of all lives before."""


class Master:
    """Everything is constructed inside trio.run (leases start then) and belongs to its thread."""

    def __init__(
        self,
        config: MasterConfig,
        *,
        open_ufs: OpenUfs = registry.open_ufs,
        wall_ns: Callable[[], int] = time.time_ns,
        close_stale_sessions: bool = False,
    ) -> None:
        """Opens the state directory, creating what is missing, and blocks for it; the network is not
        touched, except that at the first start the root's under storage is probed. UserError when
        another master runs on the directory, or it was made for another under storage; StateError
        when it is foreign or damaged; UfsError from the probe. On an error nothing is left open, and
        a first start has left nothing behind that a second one would mind.

        `close_stale_sessions`: no client of an earlier life can come back (one-process mode), so
        what those held is given up at once."""
        self.config = config
        with ExitStack() as undo:
            directory = _state_directory(config.state_dir)
            undo.callback(_unlock, _lock(directory))
            store = self.store = Store(directory / "meta")
            undo.callback(store.close)
            clock = Clock(wall_ns)
            mounts = self.mounts = MountTable(store, open_ufs, notes_dir=directory / "uploads")
            undo.callback(mounts.close)
            self._format(store, mounts, clock)
            self._build(store, mounts, clock, close_stale_sessions)
            self._on_close = undo.pop_all()

    def _format(self, store: Store, mounts: MountTable, clock: Clock) -> None:
        """At the first start nothing is written before the under storage was found good."""
        config, tx = self.config, store.transaction()
        is_new = tx.inode(ROOT_INO) is None
        self.cluster_id = ensure_formatted(tx, clock.now_ns())
        mounts.ensure_root(config.ufs, config.ufs_options, config.sync_interval_s, tx)
        if is_new:
            mounts.storage(ROOT_MOUNT_ID).check()
            mounts.learn_root(tx)
        tx.commit()

    def _build(self, store: Store, mounts: MountTable, clock: Clock, close_stale_sessions: bool) -> None:
        config = self.config
        events = Events(config.max_events, clock.now_ns() * EVENTS_PER_S // 10**9)
        sessions = self.sessions = Sessions(store, clock, config.session_lease_s, close_stale_sessions)
        state = StateGuard(store, self.cluster_id)
        replies = self.replies = Replies(store, sessions)
        workers = WorkerRegistry(store, clock, config)
        persist_log = PersistLog(store, mounts, wall_ns=clock.now_ns)
        tree = Tree(store, persist_log, sessions.is_open, workers.drop_container, clock)
        loader = UfsLoader(store, mounts, persist_log, tree, events, workers, clock, config.block_bytes)
        namespace = self.namespace = Namespace(
            store, tree, Gate(loader), clock, mounts.is_readonly, workers.is_away
        )
        changes = Changes(namespace, persist_log, events)
        content = self._content = Content(
            namespace, changes, sessions, replies, workers, persist_log, events, config.block_bytes
        )
        self.workers = workers
        self.persister = Persister(
            store,
            mounts,
            persist_log,
            workers,
            loader,
            clock,
            config,
            change_count=lambda: replies.change_count,
        )
        self._management = Management(
            Parts(
                namespace,
                content,
                sessions,
                replies,
                events,
                workers,
                mounts,
                loader,
                self.persister,
                state,
                self.cluster_id,
            )
        )
        self.service: Service = MasterService(
            namespace,
            changes,
            Xattrs(namespace, events),
            content,
            sessions,
            replies,
            events,
            workers,
            self.persister,
            loader,
            state,
            self.cluster_id,
            self._management.handlers(),
        )
        workers.on_ready.append(content.worker_ready)
        workers.on_orphan_seal.append(self._orphan_sealed)
        self._committed = trio.Event()
        store.on_commit.append(lambda: self._committed.set())

    def _orphan_sealed(self, worker_id: int, seal: OrphanSeal) -> None:
        self._content.orphan_sealed(seal, worker_id)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Background work, until cancelled: then all that was acknowledged is on the disk, and the
        state directory is free. Must not be called twice."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sync_log)
                nursery.start_soon(self._sweep)
                nursery.start_soon(self.persister.run)
                nursery.start_soon(self._management.resume)
                task_status.started()
        finally:
            try:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self.store.sync)
            except StateError:
                pass  # logged
            self.close()

    def close(self) -> None:
        """Without `run` (a command that only looks, an error before it). Idempotent."""
        self._on_close.close()

    async def _sync_log(self) -> None:
        while True:
            await self._committed.wait()
            durability = self.store.durability
            with trio.move_on_after(SYNC_AFTER_S):
                await durability.hurried.wait()
            self._committed = trio.Event()
            durability.hurried = trio.Event()
            try:
                await durability.wait()
            except StateError:
                pass  # logged; opening the store again writes all of it anew

    async def _sweep(self) -> None:
        while True:
            if self.store.heal():
                try:
                    self.workers.check_lost()
                    self._content.sweep()
                except StateError:
                    pass  # logged; whatever is left is swept when it can be written again
            await trio.sleep(SWEEP_EVERY_S)


# --- the state directory ------------------------------------------------------------------------------


def _state_directory(name: str) -> Path:
    if not name:
        raise UserError("no state directory is configured for the master: name one")
    directory = Path(name)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = set(os.listdir(directory))
    except (FileExistsError, NotADirectoryError):
        raise StateError(f"{directory} is not a directory") from None
    except OSError as exc:
        raise StateError(f"{directory} can't be used for state: {exc.strerror}") from None
    if names - {"lock"} and "meta" not in names:
        raise StateError(f"{directory} holds other files and no state of a master: name an empty directory")
    return directory


def _lock(directory: Path) -> int:
    """A descriptor that holds the lock. UserError when another process has it."""
    path = directory / "lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise StateError(f"{path} can't be opened: {exc.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise UserError(
            f"{directory} is in use by another master: stop it or name another state directory"
        ) from None
    return fd


def _unlock(fd: int) -> None:
    os.close(fd)
