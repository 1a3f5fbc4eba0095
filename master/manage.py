"""Management of the whole: mounts, freeing, persisting and comparing trees, reports.

Trees are walked in the store, with a checkpoint now and then; what changes meanwhile may be missed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

import alluxiofuse
from alluxiofuse.errors import FsError
from alluxiofuse.ids import ROOT_INO, ROOT_MOUNT_ID
from alluxiofuse.master import places
from alluxiofuse.master.content import Content
from alluxiofuse.master.events import Events
from alluxiofuse.master.mount_tree import MountTree
from alluxiofuse.master.mounts import MountTable
from alluxiofuse.master.namespace import Namespace
from alluxiofuse.master.peers import as_peer
from alluxiofuse.master.persist_plan import is_clean
from alluxiofuse.master.persister import Persister
from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.replies import Replies
from alluxiofuse.master.sessions import Sessions
from alluxiofuse.master.state_mark import StateGuard
from alluxiofuse.master.store import u64
from alluxiofuse.master.tree import OPEN
from alluxiofuse.master.ufs_loader import UfsLoader
from alluxiofuse.master.workers import WorkerRegistry
from alluxiofuse.rpc.base import Buffer, Handler, Peer
from alluxiofuse.wire import master_ops
from alluxiofuse.wire.messages import NOTHING, Nothing, Request
from alluxiofuse.wire.types import EVENT_DATA, EVENT_FREED, Attr, Caller, Event

FREE_PATIENCE_S = 5.0
_POLL_S = 0.05
_FREE_BATCH = 1000
"""Containers of one command."""
_STEPS_PER_CHECKPOINT = 500
MAX_HURRIED = 10_000


@dataclass(slots=True)
class Parts:
    """The parts of the master that management looks into."""

    namespace: Namespace
    content: Content
    sessions: Sessions
    replies: Replies
    events: Events
    workers: WorkerRegistry
    mounts: MountTable
    loader: UfsLoader
    persister: Persister
    state: StateGuard
    cluster_id: str


class Management:
    """Construct inside trio.run (it notes when the master started)."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._store = parts.namespace.store
        self._started_s = parts.namespace.clock.monotonic()
        self._mount_tree = MountTree(parts.namespace, parts.mounts, parts.events, parts.workers)

    def handlers(self) -> dict[type[Request[Any]], Handler]:
        return {
            master_ops.GetMount: self._get_mount,
            master_ops.ListMounts: self._list_mounts,
            master_ops.MountUfs: _for_admin(self._mount),
            master_ops.UnmountUfs: _for_admin(self._unmount),
            master_ops.Free: _as_caller(self._free),
            master_ops.Persist: _as_caller(self._persist),
            master_ops.SyncPath: _as_caller(self._sync_path),
            master_ops.Locations: _as_caller(self._locations),
            master_ops.ReportState: self._report,
            master_ops.PersistDone: _for_workers(self._parts.persister.done),
        }

    async def resume(self) -> None:
        """Finish the removal of metadata of mounts that were unmounted in an earlier life."""
        await self._mount_tree.resume()

    # --- mounts -----------------------------------------------------------------------------------

    def _get_mount(self, peer: Peer, req: master_ops.GetMount, payload: Buffer) -> Any:
        return self._parts.mounts.info(req.mount_id, peer.is_authenticated)

    def _list_mounts(self, peer: Peer, req: master_ops.ListMounts, payload: Buffer) -> Any:
        mounts = self._parts.mounts
        return [mounts.info(mount_id, peer.is_authenticated) for mount_id in mounts.ids()]

    async def _mount(self, req: master_ops.MountUfs) -> Any:
        parent, name = _split(req.path)
        directory = await self._resolve(req.who, parent)
        child = await self._child(directory.ino, name)
        return await self._mount_tree.mount(req, directory.ino, name, child)

    async def _unmount(self, req: master_ops.UnmountUfs) -> Nothing:
        found = await self._resolve(req.who, req.path)
        mount_id = self._parts.mounts.mount_at(found.ino)
        if mount_id is None:
            raise FsError(errno.EINVAL, "nothing is mounted there")
        if mount_id == ROOT_MOUNT_ID:
            raise FsError(errno.EBUSY, "the root mount can't be unmounted")
        await self._mount_tree.unmount(mount_id, found.ino)
        return NOTHING

    # --- trees ------------------------------------------------------------------------------------

    async def _free(self, req: master_ops.Free) -> master_ops.FreeResult:
        parts = self._parts
        top = await self._resolve(req.who, req.path)
        if stat.S_ISDIR(top.mode) and not req.recursive:
            raise FsError(errno.EISDIR, "it is a directory: free it recursively")
        result = master_ops.FreeResult(0, 0, 0)
        freed: list[int] = []
        told: list[int] = []
        seq = parts.events.seq
        async for ino, record in self._walk(top.ino):
            if not stat.S_ISREG(record.mode) or not record.container:
                continue
            if record.home or not is_clean(record):
                result.dirty_count += 1
                continue
            result.file_count += 1
            result.in_use_count += parts.sessions.is_open(ino)
            freed.append(record.container)
            if len(freed) % _FREE_BATCH == 0:
                told = parts.workers.free_clean(freed[-_FREE_BATCH:])
            seq = parts.events.publish(
                0, Event(EVENT_DATA, ino), Event(EVENT_FREED, ino, b"", record.container)
            )
        if rest := len(freed) % _FREE_BATCH:
            told = parts.workers.free_clean(freed[-rest:])
        workers = parts.workers
        with trio.move_on_after(FREE_PATIENCE_S):
            await parts.events.wait_acknowledged(seq, FREE_PATIENCE_S)
            while any(map(workers.pending_commands, told)) or any(map(workers.holders, freed)):  # noqa: ASYNC110 - heartbeats tell, once a second
                await trio.sleep(_POLL_S)
        return result

    async def _persist(self, req: master_ops.Persist) -> int:
        top = await self._resolve(req.who, req.path)
        count = steps = 0
        for key, _ in self._store.scan("persist", b"s"):
            steps += 1
            if steps % _STEPS_PER_CHECKPOINT == 0:
                await trio.lowlevel.checkpoint()
            ino = int.from_bytes(key, "big")
            record = self._store.inode(ino)
            if record is None or not self._is_below(ino, record, top.ino):
                continue
            if count < MAX_HURRIED:
                self._parts.persister.hurry(ino)
            count += not stat.S_ISDIR(record.mode)
        return count + self._count_written(top.ino)

    def _count_written(self, top: int) -> int:
        """Files at or below `top` that the persist log will hear of only when their writers close them."""
        count = 0
        for key, _ in self._store.scan("meta", OPEN):
            ino = int.from_bytes(key, "big")
            record = self._store.inode(ino)
            if record is not None and self._store.get("persist", b"s" + key) is None:
                count += bool(record.nlink) and self._is_below(ino, record, top)
        return count

    async def _sync_path(self, req: master_ops.SyncPath) -> Nothing:
        try:
            top = await self._resolve(req.who, req.path)
        except FsError as exc:
            if exc.errno != errno.ENOENT:
                raise
            above = await self._resolve(req.who, _split(req.path)[0])
            await self._parts.loader.load_children(above.ino)
            top = await self._resolve(req.who, req.path)
        await self._sync_tree(top.ino, req.recursive)
        return NOTHING

    async def _sync_tree(self, top: int, recursive: bool) -> None:
        todo = [top]
        while todo:
            ino = todo.pop()
            await self._parts.loader.refresh(ino, force=True)
            record = self._store.inode(ino)
            if record is None or not stat.S_ISDIR(record.mode):
                continue
            await self._parts.loader.load_children(ino)
            if recursive:
                todo += [child for child, below in self._children(ino) if stat.S_ISDIR(below.mode)]

    async def _locations(self, req: master_ops.Locations) -> master_ops.LocationReport:
        attr = await self._resolve(req.who, req.path)
        record = self._parts.namespace.existing(attr.ino)
        mount = self._parts.mounts.record(record.mount_id)
        path = places.desired_path(self._store, attr.ino, record) or b""
        uri = "" if mount is None or record.is_local_only else mount.uri.rstrip("/")
        text = path.decode("utf-8", "backslashreplace")
        return master_ops.LocationReport(
            attr,
            self._parts.content.layout(attr.ino, record),
            f"{uri}/{text}" if uri and text else uri,
            self._parts.workers.blocks_of(record.container) if record.container else {},
        )

    def _report(self, peer: Peer, req: master_ops.ReportState, payload: Buffer) -> master_ops.MasterReport:
        parts = self._parts
        return master_ops.MasterReport(
            parts.cluster_id,
            alluxiofuse.__version__,
            parts.namespace.clock.monotonic() - self._started_s,
            self._store.estimate("inode"),
            parts.sessions.names(),
            parts.persister.pending_count(),
            parts.persister.failing(),
            parts.workers.infos(),
            [parts.mounts.info(mount_id, False) for mount_id in parts.mounts.ids()],
            self._counters(),
            parts.persister.waiting(),
        )

    def _counters(self) -> dict[str, int]:
        parts = self._parts
        return {
            "refresh_failed": parts.loader.failed_count,
            "commits": self._store.commit_count,
            "sessions_resumed": parts.sessions.resumed_count,
            "sessions_expired": parts.sessions.expired_count,
            "requests_answered_again": parts.replies.repeated_count,
            "requests_refused": parts.sessions.refused_count,
            "foreign_states_refused": parts.state.refused_count,
            **{f"client_{name}": count for name, count in parts.sessions.client_counters().items()},
            **parts.persister.counts(),
            **parts.mounts.counts(),
        }

    # --- within -----------------------------------------------------------------------------------

    async def _resolve(self, who: Caller, path: bytes) -> Attr:
        found = self._parts.namespace.gate.run(partial(self._parts.namespace.resolve, who, path, True))
        attrs = await found if isinstance(found, Awaitable) else found
        return attrs[-1]

    async def _child(self, parent: int, name: bytes) -> int | None:
        namespace = self._parts.namespace
        found = namespace.gate.run(lambda: namespace.child(parent, namespace.directory(parent), name))
        return await found if isinstance(found, Awaitable) else found

    def _children(self, directory: int) -> list[tuple[int, InodeRecord]]:
        found = []
        for _, value in self._store.scan("edge", u64(directory)):
            ino = int.from_bytes(value, "big")
            record = self._store.inode(ino)
            if record is not None:
                found.append((ino, record))
        return found

    async def _walk(self, top: int) -> AsyncIterator[tuple[int, InodeRecord]]:
        """What is known below (and the top itself); nothing is loaded."""
        record = self._store.inode(top)
        if record is None:
            return
        yield top, record
        todo, steps = [top], 0
        while todo:
            for ino, below in self._children(todo.pop()):
                steps += 1
                if steps % _STEPS_PER_CHECKPOINT == 0:
                    await trio.lowlevel.checkpoint()
                yield ino, below
                if stat.S_ISDIR(below.mode):
                    todo.append(ino)

    def _is_below(self, ino: int, record: InodeRecord, top: int) -> bool:
        while ino != top:
            if ino == ROOT_INO or not record.parent:
                return False
            above = self._store.inode(record.parent)
            if above is None:
                return False
            ino, record = record.parent, above
        return True


def _split(path: bytes) -> tuple[bytes, bytes]:
    """(directory, last name) of an absolute path."""
    above, _, name = path.rstrip(b"/").rpartition(b"/")
    if not name or name in (b".", b".."):
        raise FsError(errno.EINVAL, "name a directory below the root")
    return above or b"/", name


def _as_caller(function: Callable[[Any], Any]) -> Handler:
    """Peers that are not trusted speak for themselves."""

    def handle(peer: Peer, request: Any, payload: Buffer) -> Any:
        return function(request if peer.is_trusted else as_peer(peer, request))

    return handle


def _for_admin(function: Callable[[Any], Any]) -> Handler:
    """Root, or the user that the master runs as, by a trusted peer."""

    def handle(peer: Peer, request: Any, payload: Buffer) -> Any:
        if not peer.is_trusted or request.who.uid not in (0, os.geteuid()):
            raise FsError(errno.EPERM, "only root or the master's user may mount and unmount")
        return function(request)

    return handle


def _for_workers(function: Callable[[Any], Any]) -> Handler:
    def handle(peer: Peer, request: Any, payload: Buffer) -> Any:
        if not peer.is_trusted:
            raise FsError(errno.EPERM, "only workers may say so")
        return function(request)

    return handle


__all__ = ["Management", "Parts"]
