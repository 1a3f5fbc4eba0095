"""The worker's table of handlers."""

from __future__ import annotations

from typing import Any

from alluxiofuse import __version__
from alluxiofuse.errors import UnavailableError
from alluxiofuse.rpc.base import Buffer, Handler, Peer, Service
from alluxiofuse.wire import worker_ops
from alluxiofuse.wire.messages import Request, requests_of
from alluxiofuse.wire.worker_ops import WorkerReport, WorkerState
from alluxiofuse.worker.reading import Reading
from alluxiofuse.worker.reporting import Identity
from alluxiofuse.worker.slabs import Slabs
from alluxiofuse.worker.writing import Writing


class Parts:
    """What serves requests once the worker has recovered."""

    def __init__(self, slabs: Slabs, reading: Reading, writing: Writing, identity: Identity) -> None:
        self.reading = reading
        self.writing = writing
        self._slabs = slabs
        self._identity = identity

    def report(self) -> WorkerState:
        slabs = self._slabs
        counters = dict(slabs.counters)
        counters["containers"] = len(slabs.by_container)
        counters["locks"] = len(slabs.locks)
        counters["dirty_bytes"] = slabs.dirty_bytes
        worker_id = self._identity.address.worker_id
        return WorkerState(worker_id, __version__, slabs.tiers.report(), counters)


class WorkerService(Service):
    """Answers UnavailableError until `start` was called and after `stop`."""

    def __init__(self) -> None:
        self._parts: Parts | None = None

    def start(self, parts: Parts) -> None:
        self._parts = parts

    def stop(self) -> None:
        self._parts = None

    @property
    def ops(self) -> dict[str, type[Request[Any]]]:
        return requests_of(worker_ops)

    @property
    def handlers(self) -> dict[type[Request[Any]], Handler]:
        def reader(name: str) -> Handler:
            return lambda peer, request, _: getattr(self._running().reading, name)(peer, request)

        def writer(name: str) -> Handler:
            return lambda peer, request, _: getattr(self._running().writing, name)(peer, request)

        return {
            worker_ops.Attach: reader("attach"),
            worker_ops.Detach: reader("detach"),
            worker_ops.Fetch: reader("fetch"),
            worker_ops.Read: reader("read"),
            worker_ops.StatContainer: reader("stat"),
            worker_ops.ForgetMtime: writer("forget_mtime"),
            worker_ops.BeginWrite: writer("begin"),
            worker_ops.Reserve: writer("reserve"),
            worker_ops.Write: self._write,
            worker_ops.Truncate: writer("truncate"),
            worker_ops.EndWrite: writer("end"),
            worker_ops.SyncContainer: writer("sync"),
            worker_ops.WorkerReport: self._report,
        }

    def _write(self, peer: Peer, request: worker_ops.Write, payload: Buffer) -> Any:
        return self._running().writing.write(peer, request, payload)

    def _report(self, peer: Peer, request: WorkerReport, payload: Buffer) -> WorkerState:
        return self._running().report()

    def _running(self) -> Parts:
        if self._parts is None:
            raise UnavailableError("the worker is not ready")
        return self._parts
