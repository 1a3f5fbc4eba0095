"""Which workers there are, and connections to them."""

from __future__ import annotations

import logging
import socket

import trio

from alluxiofuse.client.session import ask_again
from alluxiofuse.errors import AlluxioFuseError, PeerError, UnavailableError
from alluxiofuse.rpc.base import Connection
from alluxiofuse.rpc.client import connect_tcp, connect_unix
from alluxiofuse.rpc.reconnecting import Reconnecting
from alluxiofuse.rpc.security import Security
from alluxiofuse.wire import master_ops, worker_ops
from alluxiofuse.wire.types import Layout, WorkerAddress, WorkerInfo

log = logging.getLogger(__name__)

REFRESH_S = 10.0
"""How old the list of workers may be before it is asked for again, when something is missing from it
this is `MIN_REFRESH_S`."""
MIN_REFRESH_S = 0.25
LATELY_S = 30.0
RESTART_S = 2.0
"""How long workers that were stopped, and said so, are waited for: they may be restarted."""
DOWN_S = 1.0
"""A worker that could not be reached is dialled again after this, then after ever longer pauses."""
MAX_DOWN_S = 5.0
DIAL_S = 5.0
"""How long connecting may take, if patience is not shorter."""


class WorkerPool:
    """Dials lazily, prefers the worker of this machine, drops connections that broke.

    Run by the FileSystem that it was given to (`run`); all state belongs to its trio thread.
    """

    def __init__(
        self,
        master: Connection,
        *,
        hostname: str = "",
        security: Security | None = None,
        patience_s: float = 10.0,
        in_process: dict[int, Connection] | None = None,
    ) -> None:
        """`hostname` "": this machine's. `in_process`: worker id -> connection (one-process mode);
        more can come by `add_in_process`. Connections given here are not closed by the pool."""
        self.hostname = hostname or socket.gethostname()
        self._master = master
        self._security = security or Security()
        self._patience_s = patience_s
        self._in_process = dict(in_process or {})
        self._infos: dict[int, WorkerInfo] = {}
        """Alive, as of the last list."""
        self._listed_at = float("-inf")
        self._seen_at = float("-inf")
        """When a list last named an alive worker."""
        self.smallest_tier_bytes = 0
        """Capacity of the smallest tier of any alive worker; 0: not known."""
        self._listing = trio.Lock()
        self._connections: dict[int, Connection] = {}
        self._dialling: dict[int, trio.Lock] = {}
        self._down: dict[int, float] = {}
        """Workers that could not be reached, and when that was seen last. A task dials each again (see
        `_revive`); until it succeeds nobody else waits for them where another one can serve."""
        self._nursery: trio.Nursery | None = None

    def add_in_process(self, worker_id: int, connection: Connection) -> None:
        """A worker of this process; in place of what was there under its id."""
        self._in_process[worker_id] = connection

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the connections until cancelled. A master that does not answer now is asked later."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await self._refresh(MIN_REFRESH_S)
                task_status.started()
                while True:
                    await trio.sleep(REFRESH_S)
                    await self._refresh(REFRESH_S / 2)
            finally:
                self._nursery = None
                connections, self._connections = self._connections, {}
                with trio.CancelScope(shield=True):
                    for connection in connections.values():
                        await connection.aclose()

    # --- who there is -------------------------------------------------------------------------------

    @property
    def local_worker_id(self) -> int:
        """The worker on this machine; 0 when there is none."""
        for worker_id, connection in self._in_process.items():
            if not connection.is_closed:
                return worker_id
        for worker_id, info in self._infos.items():
            if self._is_local(info.address) and worker_id not in self._down:
                return worker_id
        return 0

    @property
    def was_seen_lately(self) -> bool:
        """There were workers a moment ago: if there are none now, some may be coming back (a restarted
        master hears of them one by one)."""
        return trio.current_time() - self._seen_at < LATELY_S

    def _is_local(self, address: WorkerAddress) -> bool:
        return bool(address.unix_path) and address.hostname == self.hostname

    def _is_heard_again(self, worker_id: int, info: WorkerInfo) -> bool:
        """The master heard of it after it had failed us: it was started again."""
        return self._listed_at - info.last_heartbeat_ms_ago / 1000 > self._down[worker_id]

    def _is_reachable(self, address: WorkerAddress) -> bool:
        """There is a way to it from this machine."""
        return bool(address.port) or self._is_local(address)

    async def home(self) -> int:
        """The worker to write new content to: the local one, else that with most room; 0: none."""
        if found := self.local_worker_id:
            return found
        await self._refresh(REFRESH_S)
        if found := self.local_worker_id:
            return found
        if not (found := self._roomiest()):
            await self._refresh(MIN_REFRESH_S)
            found = self.local_worker_id or self._roomiest()
        return found

    def _roomiest(self) -> int:
        rooms = {
            worker_id: sum(tier.capacity_bytes - tier.used_bytes for tier in info.tiers)
            for worker_id, info in self._infos.items()
            if self._is_reachable(info.address)
            and (worker_id not in self._down or self._is_heard_again(worker_id, info))
        }
        return max(rooms, key=rooms.__getitem__, default=0)

    def pick(self, layout: Layout, excluded: set[int] | frozenset[int] = frozenset()) -> int:
        """The worker to ask for this content; 0: none that is known can serve it. The one that must
        be asked (`home`, the only holder) is given also when it seems to be down."""
        if layout.home:
            return 0 if layout.home in excluded else layout.home
        local = self.local_worker_id
        has_local = local != 0 and local not in excluded
        if has_local and (layout.source is not None or local in layout.workers or not layout.workers):
            return local
        holders = [one for one in layout.workers if one not in excluded]
        for worker_id in holders:
            if worker_id not in self._down:
                return worker_id
        if layout.source is None and holders:
            return holders[0]
        for worker_id, info in self._infos.items():
            is_usable = self._is_reachable(info.address) and worker_id not in self._down
            if is_usable and worker_id not in excluded:
                return worker_id
        return 0

    async def refresh(self) -> None:
        """Ask for the list of workers, unless that was done a moment ago."""
        await self._refresh(MIN_REFRESH_S)

    async def _refresh(self, max_age_s: float) -> None:
        async with self._listing:
            now = trio.current_time()
            if now - self._listed_at < max_age_s:
                return
            if self._infos and isinstance(self._master, Reconnecting) and self._master.current is None:
                return  # The master is away: what it said last will do.
            try:
                infos = await ask_again(self._master, master_ops.ListWorkers())
            except AlluxioFuseError as exc:
                log.debug("no list of workers: %s", exc)
                return
            self._listed_at = now
            if any(info.is_alive for info in infos):
                self._seen_at = now
            elif infos and all(info.has_left for info in infos):
                self._seen_at = min(self._seen_at, now - LATELY_S + RESTART_S)
            self._infos = {info.address.worker_id: info for info in infos if info.is_alive}
            tiers = [tier.capacity_bytes for info in self._infos.values() for tier in info.tiers]
            self.smallest_tier_bytes = min(tiers, default=0)

    # --- connections --------------------------------------------------------------------------------

    def connected(self, worker_id: int) -> Connection | None:
        """The connection if there is one now."""
        connection = self._in_process.get(worker_id) or self._connections.get(worker_id)
        return None if connection is None or connection.is_closed else connection

    async def connection(self, worker_id: int) -> Connection:
        """Dialled if need be. UnavailableError: it can't be reached now; not retried here."""
        found = self.connected(worker_id)
        if found is not None:
            return found
        async with self._dialling.setdefault(worker_id, trio.Lock()):
            found = self.connected(worker_id)
            if found is not None:
                return found
            if worker_id in self._in_process:
                raise UnavailableError(f"worker {worker_id} of this process has ended")
            try:
                self._connections[worker_id] = connection = await self._dial(worker_id)
            except PeerError as exc:
                self._note_down(worker_id)
                if isinstance(exc, UnavailableError):
                    raise UnavailableError(f"worker {worker_id}: {exc.message}") from None
                raise
            self._down.pop(worker_id, None)
            return connection

    async def _dial(self, worker_id: int) -> Connection:
        await self._refresh(REFRESH_S if worker_id in self._infos else MIN_REFRESH_S)
        info = self._infos.get(worker_id)
        if info is None:
            raise UnavailableError(f"worker {worker_id} is not alive")
        if self._nursery is None:
            raise UnavailableError("this client is not running")
        address = info.address
        if self._is_local(address):
            try:
                return await self._checked(
                    worker_id,
                    await connect_unix(
                        self._nursery,
                        address.unix_path,
                        role="worker",
                        security=self._security,
                        timeout_s=min(self._patience_s, DIAL_S),
                    ),
                )
            except PeerError as exc:
                log.debug("worker %d by its Unix socket: %s", worker_id, exc)
                if not address.port:
                    raise
        if not address.port:
            raise UnavailableError(f"worker {worker_id} cannot be reached from this machine")
        connection = await connect_tcp(
            self._nursery,
            address.host,
            address.port,
            role="worker",
            security=self._security,
            timeout_s=min(self._patience_s, DIAL_S),
        )
        return await self._checked(worker_id, connection)

    async def _checked(self, worker_id: int, connection: Connection) -> Connection:
        """The connection, if it really leads to this worker: hosts share names, ports find new owners."""
        try:
            state = await connection.call(worker_ops.WorkerReport())
            if state.worker_id != worker_id:
                raise UnavailableError(f"worker {state.worker_id} answers where worker {worker_id} should")
        except BaseException:
            with trio.CancelScope(shield=True):
                await connection.aclose()
            raise
        return connection

    def failed(self, worker_id: int) -> None:
        """A call to this worker failed by its connection: others first, until it is reached again."""
        self._note_down(worker_id)
        self._listed_at = float("-inf")

    def _note_down(self, worker_id: int) -> None:
        if self._nursery is not None:
            if worker_id not in self._down:
                self._nursery.start_soon(self._revive, worker_id)
            self._down[worker_id] = trio.current_time()

    async def _revive(self, worker_id: int) -> None:
        """Dial it until it answers, or the master counts it as lost; nobody has to wait for that."""
        pause_s = DOWN_S
        while worker_id in self._down:
            await trio.sleep(pause_s)
            pause_s = min(MAX_DOWN_S, 2 * pause_s)
            try:
                await self.connection(worker_id)
            except AlluxioFuseError as exc:
                log.debug("worker %d is still away: %s", worker_id, exc)
                if worker_id in self._infos:
                    continue
            self._down.pop(worker_id, None)
