"""All operations of the master: from a request and who sent it to the part that answers it.

Handlers of the namespace are synchronous steps that the gate runs (see `loading`): they answer at
once, or with an awaitable when an under storage has to be asked first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

from alluxiofuse.errors import AuthError
from alluxiofuse.master.changes import Changes
from alluxiofuse.master.content import Content
from alluxiofuse.master.events import Events
from alluxiofuse.master.namespace import Namespace
from alluxiofuse.master.peers import as_peer
from alluxiofuse.master.replies import Replies
from alluxiofuse.master.sessions import Sessions
from alluxiofuse.master.state_mark import StateGuard
from alluxiofuse.master.workers import WorkerRegistry
from alluxiofuse.master.xattrs import Xattrs
from alluxiofuse.rpc.base import Buffer, Handler, Peer, Service
from alluxiofuse.wire import master_ops
from alluxiofuse.wire.messages import NOTHING, Nothing, Request, requests_of
from alluxiofuse.wire.types import FsUsage, Layout, StateMark


def _unchanged(request: Any, answer: Any) -> Any:
    return answer


class Persister(Protocol):
    """See `persister.Persister`."""

    def cancel(self, ino: int) -> None: ...

    def hurry(self, ino: int) -> None: ...

    async def wait(self, ino: int, container: int, wait_s: float) -> bool: ...


class SourceLoader(Protocol):
    async def source_changed(self, ino: int, container: int) -> None: ...


class MasterService(Service):
    """Constant after construction. `management`: the handlers of the operations of `manage`."""

    def __init__(
        self,
        namespace: Namespace,
        changes: Changes,
        xattrs: Xattrs,
        content: Content,
        sessions: Sessions,
        replies: Replies,
        events: Events,
        workers: WorkerRegistry,
        persister: Persister,
        loader: SourceLoader,
        state: StateGuard,
        cluster_id: str,
        management: dict[type[Request[Any]], Handler],
    ) -> None:
        self._namespace = namespace
        self._changes = changes
        self._xattrs = xattrs
        self._content = content
        self._sessions = sessions
        self._replies = replies
        self._events = events
        self._workers = workers
        self._persister = persister
        self._loader = loader
        self._state = state
        self._cluster_id = cluster_id
        self._store = namespace.store
        self._gate = namespace.gate
        self._handlers: dict[type[Request[Any]], Handler] = {
            **self._session_handlers(),
            **self._namespace_handlers(),
            **self._content_handlers(),
            **self._worker_handlers(),
            **management,
        }

    @property
    def ops(self) -> dict[str, type[Request[Any]]]:
        return requests_of(master_ops)

    @property
    def handlers(self) -> dict[type[Request[Any]], Handler]:
        return self._handlers

    # --- tables -----------------------------------------------------------------------------------

    def _session_handlers(self) -> dict[type[Request[Any]], Handler]:
        return {
            master_ops.OpenSession: self._open_session,
            master_ops.SessionHeartbeat: self._of_session(self._session_heartbeat),
            master_ops.CloseSession: self._of_session(self._close_session),
            master_ops.Watch: self._of_session(self._watch),
            master_ops.BeginSync: _plain(self._begin_sync),
            master_ops.SyncMetadata: _plain(self._sync_metadata),
            master_ops.StatFs: _plain(self._statfs),
        }

    def _namespace_handlers(self) -> dict[type[Request[Any]], Handler]:
        names, changes, xattrs = self._namespace, self._changes, self._xattrs
        return {
            master_ops.Lookup: self._step(lambda r: names.lookup(r.who, r.parent, r.name)),
            master_ops.Resolve: self._step(lambda r: names.resolve(r.who, r.path, r.follow)),
            master_ops.GetAttr: self._step(lambda r: names.getattr(r.ino)),
            master_ops.ReadDir: self._step(lambda r: names.readdir(r.who, r.ino, r.after, r.limit)),
            master_ops.ReadLink: self._step(lambda r: names.readlink(r.ino)),
            master_ops.Access: self._step(lambda r: names.access(r.who, r.ino, r.mask)),
            master_ops.SetAttr: self._change(changes.setattr),
            master_ops.Mkdir: self._change(changes.mkdir),
            master_ops.Mknod: self._change(changes.mknod),
            master_ops.Symlink: self._change(changes.symlink),
            master_ops.Link: self._change(changes.link),
            master_ops.Unlink: self._change(changes.unlink),
            master_ops.Rmdir: self._change(changes.rmdir),
            master_ops.Rename: self._change(changes.rename),
            master_ops.GetXattr: self._step(xattrs.get),
            master_ops.ListXattr: self._step(lambda r: xattrs.list(r.ino)),
            master_ops.SetXattr: self._change(xattrs.set),
            master_ops.RemoveXattr: self._change(xattrs.remove),
        }

    def _content_handlers(self) -> dict[type[Request[Any]], Handler]:
        content = self._content
        return {
            master_ops.Create: self._change(content.create, content.created_before),
            master_ops.Open: self._session_step(content.open),
            master_ops.Release: self._session_step(content.release),
            master_ops.BeginWrite: self._durably_begun(self._change(self._begin_write, content.begun_before)),
            master_ops.CommitContent: self._change(content.commit_content),
            master_ops.WaitPersisted: _plain(self._wait_persisted),
            master_ops.SourceChanged: self._of_session(self._source_changed),
        }

    def _worker_handlers(self) -> dict[type[Request[Any]], Handler]:
        workers = self._workers
        return {
            master_ops.ListWorkers: _plain(lambda r: workers.infos()),
            master_ops.RegisterWorker: _trusted_only(self._register_worker),
            master_ops.ReportBlocks: _trusted_only(workers.report_blocks),
            master_ops.WorkerHeartbeat: _trusted_only(self._worker_heartbeat),
            master_ops.WorkerGoodbye: _trusted_only(workers.goodbye),
            master_ops.WorkerCommands: _trusted_only(workers.commands),
        }

    def _step(self, function: Callable[[Any], Any]) -> Handler:
        """A handler that runs `function(request)` as a step, on behalf of whom the peer may speak for."""
        run = self._gate.run

        def handle(peer: Peer, request: Any, payload: Buffer) -> Any:
            if not peer.is_trusted:
                request = as_peer(peer, request)
            return run(partial(function, request))

        return handle

    def _session_step(self, function: Callable[[Any], Any]) -> Handler:
        """The same for what a session asks: by the connection that it belongs to, also when the step is
        run again later."""
        run, sessions = self._gate.run, self._sessions

        def step(peer: Peer, request: Any) -> Any:
            sessions.of(request.session_id, peer)
            return function(request)

        def handle(peer: Peer, request: Any, payload: Buffer) -> Any:
            if not peer.is_trusted:
                request = as_peer(peer, request)
            return run(partial(step, peer, request))

        return handle

    def _change(
        self, function: Callable[[Any], Any], restore: Callable[[Any, Any], Any] = _unchanged
    ) -> Handler:
        """The same for what is carried out once, however often it is asked (`Replies.once`)."""
        run, once = self._gate.run, self._replies.once

        def handle(peer: Peer, request: Any, payload: Buffer) -> Any:
            if not peer.is_trusted:
                request = as_peer(peer, request)
            return run(partial(once, function, request, peer, restore))

        return handle

    def _of_session(self, function: Callable[[Any], Any]) -> Handler:
        """What a session asks and is no step."""
        sessions = self._sessions

        def handle(peer: Peer, request: Any, payload: Buffer) -> Any:
            if not peer.is_trusted:
                request = as_peer(peer, request)
            sessions.of(request.session_id, peer)
            return function(request)

        return handle

    # --- sessions ---------------------------------------------------------------------------------

    def _open_session(
        self, peer: Peer, req: master_ops.OpenSession, payload: Buffer
    ) -> master_ops.SessionGrant:
        if not peer.is_trusted:
            as_peer(peer, req)
        self._state.check(f"{req.client_name} @ {req.hostname}", req.seen, "unmount and mount again")
        session = self._sessions.open(req.client_name, req.hostname, req.session_id, req.open_inos, peer)
        return master_ops.SessionGrant(
            session.session_id,
            self._sessions.lease_s,
            self._events.seq,
            self._cluster_id,
            self._state.mark(),
        )

    def _session_heartbeat(self, req: master_ops.SessionHeartbeat) -> Nothing:
        self._sessions.touch(req.session_id)
        return NOTHING

    def _close_session(self, req: master_ops.CloseSession) -> Nothing:
        self._content.end_session(req.session_id)
        return NOTHING

    async def _watch(self, req: master_ops.Watch) -> master_ops.WatchAnswer:
        session = self._sessions.touch(req.session_id)
        session.watch_count += 1
        if req.counters:
            session.counters = req.counters
        try:
            answer = await self._events.watch(req.session_id, req.after, req.wait_s)
        finally:
            session.watch_count -= 1
        self._sessions.touch(req.session_id)
        answer.state = self._state.mark()
        return answer

    def _begin_sync(self, req: master_ops.BeginSync) -> int:
        return self._store.durability.begin()

    async def _sync_metadata(self, req: master_ops.SyncMetadata) -> Nothing:
        await self._store.durability.wait(upto=req.upto)
        return NOTHING

    def _statfs(self, req: master_ops.StatFs) -> FsUsage:
        """Only what is dirty occupies the tiers: the rest gives way to what is written."""
        alive = [info for info in self._workers.infos() if info.is_alive]
        capacity = sum(tier.capacity_bytes for info in alive for tier in info.tiers)
        dirty = sum(info.dirty_bytes for info in alive)
        return FsUsage(capacity, max(0, capacity - dirty), self._store.estimate("inode"))

    # --- workers ----------------------------------------------------------------------------------

    def _register_worker(self, req: master_ops.RegisterWorker) -> master_ops.Registration:
        self._state.check(
            f"the worker at {req.address.hostname}",
            req.seen,
            "give the master its state back, or start the worker with a new state directory and empty tiers",
        )
        registration = self._workers.register(req)
        registration.state = self._state.mark()
        return registration

    def _worker_heartbeat(self, req: master_ops.WorkerHeartbeat) -> StateMark:
        self._workers.heartbeat(req)
        return self._state.mark()

    # --- content ----------------------------------------------------------------------------------

    def _durably_begun(self, begin: Handler) -> Handler:
        """Content is about to change at a worker in place, under the new container's name. A master that
        forgot that name with its machine, or that the old content is in the under storage, would ask for
        the old one, and have the new one dropped; so all that is durable first."""

        async def wait(answer: Layout | Awaitable[Layout]) -> Layout:
            layout = await answer if isinstance(answer, Awaitable) else answer
            if layout.base_container:
                await self._store.durability.wait()
            return layout

        def handle(peer: Peer, request: Any, payload: Buffer) -> Any:
            answer = begin(peer, request, payload)
            if isinstance(answer, Layout) and not answer.base_container:
                return answer
            return wait(answer)

        return handle

    def _begin_write(self, req: master_ops.BeginWrite) -> Layout:
        layout = self._content.begin_write(req)
        self._persister.cancel(req.ino)
        return layout

    async def _wait_persisted(self, req: master_ops.WaitPersisted) -> bool:
        self._persister.hurry(req.ino)
        if not await self._persister.wait(req.ino, req.container, req.wait_s):
            return False
        await self._store.durability.wait()
        return True

    async def _source_changed(self, req: master_ops.SourceChanged) -> Any:
        self._sessions.touch(req.session_id)
        await self._loader.source_changed(req.ino, req.container)
        return self._content.layout(req.ino, self._namespace.existing(req.ino))


def _plain(function: Callable[[Any], Any]) -> Handler:
    """What nobody is asked for."""

    def handle(peer: Peer, request: Any, payload: Buffer) -> Any | Awaitable[Any]:
        return function(request if peer.is_trusted else as_peer(peer, request))

    return handle


def _trusted_only(function: Callable[[Any], Any]) -> Handler:
    """What only daemons of the cluster may ask."""

    def handle(peer: Peer, request: Any, payload: Buffer) -> Any | Awaitable[Any]:
        if not peer.is_trusted:
            raise AuthError(f"{peer.name} may not speak for a worker")
        return function(request)

    return handle
