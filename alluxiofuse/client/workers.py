"""Which workers there are, and connections to them."""

from __future__ import annotations

from alluxiofuse.rpc.base import Connection
from alluxiofuse.rpc.security import Security
from alluxiofuse.wire.types import Layout


class WorkerPool:
    """Dials lazily, prefers the worker of this machine, drops connections that broke."""

    def __init__(
        self,
        master: Connection,
        *,
        hostname: str = "",
        security: Security | None = None,
        patience_s: float = 10.0,
        in_process: dict[int, Connection] | None = None,
    ) -> None:
        """`hostname` "": this machine's. `in_process`: worker id -> connection (one-process mode)."""
        raise NotImplementedError

    @property
    def local_worker_id(self) -> int:
        """The worker on this machine; 0 when there is none."""
        raise NotImplementedError

    def pick(self, layout: Layout) -> int:
        """The worker to ask for this content; 0: none can serve it."""
        raise NotImplementedError
