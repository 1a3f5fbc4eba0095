"""The worker registry: who is alive, who has which blocks, and what each worker is to do.

All in memory but the worker ids: workers report their blocks when they register, then as deltas.
Owned by the master's one thread; only `commands` awaits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from alluxiofuse.config import MasterConfig
from alluxiofuse.errors import (
    BadRequestError,
    SessionExpiredError,
    StateError,
    UnavailableError,
    UserError,
)
from alluxiofuse.master.clock import Clock
from alluxiofuse.master.containers import new_container, owner_record
from alluxiofuse.master.store import Store, u64
from alluxiofuse.wire.master_ops import (
    REPORTS_PER_CALL,
    BlocksAccepted,
    RegisterWorker,
    Registration,
    ReportBlocks,
    WorkerCommands,
    WorkerGoodbye,
    WorkerHeartbeat,
)
from alluxiofuse.wire.messages import NOTHING, Nothing
from alluxiofuse.wire.types import (
    BlockReport,
    CleanCommand,
    Command,
    FreeCommand,
    OrphanSeal,
    PersistCommand,
    Tier,
    WorkerAddress,
    WorkerInfo,
)

MAX_CONTAINERS_PER_COMMAND = 4096
MAX_COMMANDS_PER_POLL = 256
HOME_HEARTBEATS = 10
"""A worker not heard of for so many heartbeats gets no new content, long before it counts as lost."""
FREE_GATHER_S = 0.05
"""How long what is to be freed waits for more of it, before the log is synced for it."""
FAILED_LOG_S = 1.0
"""Between attempts while the log can't be synced."""
GATHER_S = 0.01
"""Least time between two answers to a worker's polls."""


@dataclass(slots=True)
class Worker:
    """One registration. `blocks` grows while the full report comes in; alive once all that is dirty is
    known."""

    address: WorkerAddress
    tiers: list[Tier]
    version: str
    epoch: int
    seen_at_s: float
    """Of the monotonic clock."""
    life: str = ""
    """Of the process that registered."""
    poll_count: int = 0
    """Polls for commands that wait here now: the process lives, or its machine went a moment ago."""
    told_all_at_s: float = -1.0
    """When it had last told of everything that it has, but for clean containers of its full report."""
    is_ready: bool = False
    is_complete: bool = False
    """The clean containers are known too."""
    has_left: bool = False
    """It was stopped, and said so."""
    dirty_bytes: int = 0
    counters: dict[str, int] = field(default_factory=dict)
    blocks: dict[int, tuple[bytes, bool]] = field(default_factory=dict)
    """Container -> (bitmap of complete blocks, is dirty). A million small files: 75 MB a worker."""
    block_count: int = 0
    to_free: dict[int, None] = field(default_factory=dict)
    to_clean: dict[int, None] = field(default_factory=dict)
    queue: deque[Command] = field(default_factory=deque)
    ready: deque[Command] = field(default_factory=deque)
    """Out of these three, to be handed out when the commits that they follow from are durable."""
    has_commands: trio.Event = field(default_factory=trio.Event)
    """Set while there is something to fetch; replaced when all was taken."""
    known_containers: int = 0
    """Container ids below this were given before it registered, so its full report names those it has."""
    sealed: set[int] = field(default_factory=set)
    sealed_before: set[int] = field(default_factory=set)
    """Containers sealed there since its last heartbeat, and since the one before: no report may have named
    them yet."""
    answered_at_s: float = -1.0
    """When commands were last fetched, on trio's clock."""

    @property
    def room_bytes(self) -> int:
        return sum(max(0, tier.capacity_bytes - tier.used_bytes) for tier in self.tiers)

    def put_report(self, report: BlockReport) -> None:
        old = self.blocks.pop(report.container, None)
        if old is not None:
            self.block_count -= _count(old[0])
        if any(report.blocks):
            self.blocks[report.container] = _shared(report.blocks, report.is_dirty)
            self.block_count += _count(report.blocks)


class WorkerRegistry:
    def __init__(self, store: Store, clock: Clock, config: MasterConfig) -> None:
        self._store = store
        self._clock = clock
        self._config = config
        self._workers: dict[int, Worker] = {}
        self.on_orphan_seal: list[Callable[[int, OrphanSeal], None]] = []
        """(worker id, seal): writers vanished without ending their writes."""
        self.on_ready: list[Callable[[int], None]] = []
        """A worker's full report is in: it is alive from here on."""
        self.on_lost: list[Callable[[int], None]] = []
        """A worker is not alive any more, or its process is a new one: what it was told is void."""

    # --- who ---------------------------------------------------------------------------------------

    def is_alive(self, worker_id: int) -> bool:
        worker = self._workers.get(worker_id)
        return worker is not None and worker.is_ready and not self._is_silent(worker)

    def alive(self) -> list[int]:
        return [worker_id for worker_id in self._workers if self.is_alive(worker_id)]

    def choose_home(self, preferred: int) -> int:
        """`preferred` when it was heard lately, else the one of these with most room. UnavailableError
        when there is none: new content is given to nobody who may have died a moment ago."""
        if self.was_heard_lately(preferred):
            return preferred
        candidates = [worker_id for worker_id in self.alive() if self.was_heard_lately(worker_id)]
        if not candidates:
            raise UnavailableError("no worker is running: start one")
        return max(candidates, key=lambda worker_id: self._workers[worker_id].room_bytes)

    def infos(self) -> list[WorkerInfo]:
        """Of all that registered in this life of the master, for people and clients."""
        return [self._info(worker_id, worker) for worker_id, worker in sorted(self._workers.items())]

    def room(self) -> tuple[int, int]:
        """(capacity, available) bytes of the tiers of alive workers."""
        tiers = [tier for worker_id in self.alive() for tier in self._workers[worker_id].tiers]
        capacity = sum(tier.capacity_bytes for tier in tiers)
        return capacity, max(0, capacity - sum(tier.used_bytes for tier in tiers))

    # --- who has what ------------------------------------------------------------------------------

    def holders(self, container: int) -> list[int]:
        """Alive workers with at least one of its blocks, dirty holders and those with most first."""
        found = [
            (worker.blocks[container], worker_id)
            for worker_id, worker in self._workers.items()
            if container in worker.blocks and self.is_alive(worker_id)
        ]
        found.sort(key=lambda item: (not item[0][1], -_count(item[0][0])))
        return [worker_id for _, worker_id in found]

    def blocks_of(self, container: int) -> dict[int, bytes]:
        """Worker id -> bitmap of complete blocks."""
        return {
            worker_id: self._workers[worker_id].blocks[container][0] for worker_id in self.holders(container)
        }

    def drop_container(self, container: int, also: int = 0) -> None:
        """Tell all who have it, and worker `also` (that may have it without having reported it), to
        drop it, dirty or not. Those that are away learn it when they register."""
        if not container:
            return
        for worker_id, worker in self._workers.items():
            if container in worker.blocks or worker_id == also:
                worker.to_free[container] = None
                worker.put_report(BlockReport(container, b"", False))
                worker.has_commands.set()

    def free_clean(self, containers: list[int]) -> list[int]:
        """Tell the workers to drop these containers (at most a command's number of them) where they
        are clean: all workers, since pages that fill no block are not reported. Those that were told."""
        told = self.alive()
        for worker_id in told:
            self.send(worker_id, FreeCommand(containers, keep_dirty=True))
        return told

    def mark_clean(self, container: int, also: int = 0) -> None:
        """Its bytes are in the under storage: tell those who hold it dirty, and worker `also`."""
        for worker_id, worker in self._workers.items():
            blocks, is_dirty = worker.blocks.get(container, (b"", False))
            if is_dirty or worker_id == also:
                worker.to_clean[container] = None
                if blocks:
                    worker.blocks[container] = _shared(blocks, False)
                worker.has_commands.set()

    # --- commands ----------------------------------------------------------------------------------

    def send(self, worker_id: int, command: Command) -> bool:
        """Queue a command. False: the worker is not registered."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return False
        worker.queue.append(command)
        worker.has_commands.set()
        return True

    def withdraw(self, worker_id: int, task_id: int) -> bool:
        """Take back a PersistCommand that was not fetched yet. False: it was (or never sent)."""
        worker = self._workers.get(worker_id)
        for queue in () if worker is None else (worker.queue, worker.ready):
            for command in queue:
                if isinstance(command, PersistCommand) and command.task_id == task_id:
                    queue.remove(command)
                    return True
        return False

    def pending_commands(self, worker_id: int) -> int:
        """How many commands wait to be fetched."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return 0
        return len(worker.queue) + len(worker.ready) + len(worker.to_free) + len(worker.to_clean)

    # --- what workers ask --------------------------------------------------------------------------

    def register(self, request: RegisterWorker) -> Registration:
        """A new registration voids the old one of the same uuid, its blocks and commands. UserError: the
        old one is of another process, and that one lives."""
        worker_id = self._worker_id(request.worker_uuid)
        known = worker_id in self._workers
        old = self._workers.get(worker_id)
        is_other = old is not None and old.life != request.life
        if old is not None and is_other and old.poll_count and self.was_heard_lately(worker_id):
            at = f"{old.address.host}:{old.address.port}" if old.address.port else old.address.unix_path
            raise UserError(
                f"worker {worker_id} runs already, at {at}: is this a copy of its state directory?"
            )
        if old is not None:
            old.has_commands.set()
        address = request.address
        address.worker_id = worker_id
        epoch = self._store.take_number(b"next_id")
        self._workers[worker_id] = Worker(
            address, request.tiers, request.version, epoch, self._clock.monotonic(), request.life
        )
        self._workers[worker_id].known_containers = new_container(self._store)
        if known:
            self._tell(self.on_lost, worker_id)
        return Registration(worker_id, epoch, self._config.worker_heartbeat_s)

    def report_blocks(self, request: ReportBlocks) -> BlocksAccepted:
        worker = self._known(request.worker_id, request.epoch)
        worker.seen_at_s = self._clock.monotonic()
        unknown: list[int] = []
        clean: list[int] = []
        is_durable = self._store.durability.is_durable
        for report in request.reports:
            state = self._judge(worker, report)
            if state is not False and not is_durable:
                self._judged(worker, report.container, state)
            elif state is None:
                unknown.append(report.container)
            elif state:
                clean.append(report.container)
        if request.is_last and not worker.is_ready:
            worker.is_ready = True
            worker.told_all_at_s = worker.seen_at_s
            self._tell(self.on_ready, request.worker_id)
        worker.is_complete = worker.is_complete or (request.is_last and not request.has_more)
        return BlocksAccepted(unknown, clean)

    def heartbeat(self, request: WorkerHeartbeat) -> Nothing:
        worker = self._known(request.worker_id, request.epoch)
        was_silent = self._is_silent(worker)
        worker.seen_at_s = self._clock.monotonic()
        worker.sealed, worker.sealed_before = set(), worker.sealed
        worker.tiers = request.tiers
        worker.dirty_bytes = request.dirty_bytes
        worker.counters = request.counters
        for report in request.deltas:
            state = self._judge(worker, report)
            if state is not False and any(report.blocks):
                self._judged(worker, report.container, state)
        if len(request.deltas) < REPORTS_PER_CALL:
            worker.told_all_at_s = worker.seen_at_s
        for seal in request.orphan_seals:
            for callback in self.on_orphan_seal:
                callback(request.worker_id, seal)
        if was_silent and worker.is_ready:
            self._tell(self.on_ready, request.worker_id)
        return NOTHING

    async def commands(self, request: WorkerCommands) -> list[Command]:
        """Long poll. If cancelled, nothing was taken."""
        worker = self._known(request.worker_id, request.epoch)
        worker.poll_count += 1
        try:
            with trio.move_on_after(request.wait_s):
                await worker.has_commands.wait()
                # In a burst many are answered at once: each answer costs both sides more than a command.
                await trio.sleep_until(worker.answered_at_s + GATHER_S)
        finally:
            worker.poll_count -= 1
        worker.answered_at_s = trio.current_time()
        if self._workers.get(request.worker_id) is not worker:
            raise SessionExpiredError("the worker registered anew")
        is_urgent = bool(worker.queue)
        _make_ready(worker)
        if worker.ready and not self._store.durability.is_durable:
            try:
                await self._store.durability.wait(0.0 if is_urgent else FREE_GATHER_S)
            except StateError:
                await trio.sleep(FAILED_LOG_S)
                return []
        return _take(worker)

    def goodbye(self, request: WorkerGoodbye) -> Nothing:
        worker = self._known(request.worker_id, request.epoch)
        worker.has_left = True
        self._lose(request.worker_id, worker)
        return NOTHING

    def _lose(self, worker_id: int, worker: Worker) -> None:
        worker.is_ready = False
        worker.blocks.clear()
        worker.block_count = 0
        worker.epoch = 0
        worker.has_commands.set()
        self._tell(self.on_lost, worker_id)

    def check_lost(self) -> None:
        """Forget the blocks of workers that have been silent for too long (they come back by
        registering). Called now and then by the master."""
        for worker_id, worker in list(self._workers.items()):
            if worker.is_ready and self._is_silent(worker):
                self._lose(worker_id, worker)

    # --- within -----------------------------------------------------------------------------------

    @staticmethod
    def _judged(worker: Worker, container: int, is_clean: bool | None) -> None:
        """It is to be told what `_judge` found."""
        (worker.to_free if is_clean is None else worker.to_clean)[container] = None
        worker.has_commands.set()

    def _judge(self, worker: Worker, report: BlockReport) -> bool | None:
        """Enter a report. None: nobody has that container; True: reported dirty, but it is clean."""
        if not any(report.blocks):
            worker.put_report(report)
            return False
        found = owner_record(self._store, report.container)
        if found is None:
            return None
        record = found[1]
        is_clean = report.is_dirty and record.is_in_ufs and record.ufs_container == report.container
        worker.put_report(BlockReport(report.container, report.blocks, report.is_dirty and not is_clean))
        return is_clean

    def has_container(self, worker_id: int, container: int) -> bool:
        worker = self._workers.get(worker_id)
        return worker is not None and container in worker.blocks

    def has_told_all(self, worker_id: int, since_s: float) -> bool:
        """It was heard after `since_s`, and had nothing more to tell: what is not known to be there now, and
        was begun before that, is not there."""
        return self.is_alive(worker_id) and self._workers[worker_id].told_all_at_s > since_s

    def is_away(self, worker_id: int, container: int) -> bool:
        """What this worker alone had can't be had now: it is lost, or came back without it."""
        if not self.is_alive(worker_id):
            return True
        worker = self._workers[worker_id]
        if container in worker.blocks or container in worker.sealed or container in worker.sealed_before:
            return False
        return worker.is_complete and container < worker.known_containers

    def sealed(self, worker_id: int, container: int) -> None:
        """It has this one, which its next reports will say."""
        if (worker := self._workers.get(worker_id)) is not None:
            worker.sealed.add(container)

    def was_heard_lately(self, worker_id: int) -> bool:
        """It may be given new content; what can do without it need not wait for it."""
        if not self.is_alive(worker_id):
            return False
        silence_s = self._clock.monotonic() - self._workers[worker_id].seen_at_s
        return silence_s < HOME_HEARTBEATS * self._config.worker_heartbeat_s

    def _known(self, worker_id: int, epoch: int) -> Worker:
        worker = self._workers.get(worker_id)
        if worker is None or worker.epoch != epoch or not epoch:
            raise SessionExpiredError("this registration is not known any more: register again")
        return worker

    def _is_silent(self, worker: Worker) -> bool:
        return self._clock.monotonic() - worker.seen_at_s >= self._config.worker_timeout_s

    def _worker_id(self, uuid: str) -> int:
        try:
            key = b"worker" + uuid.encode("ascii")
        except UnicodeEncodeError:
            raise BadRequestError("a worker uuid is ASCII") from None
        found = self._store.get("meta", key)
        if found is not None:
            return int.from_bytes(found, "big")
        worker_id = self._store.take_number(b"next_worker")
        tx = self._store.transaction()
        tx.put("meta", key, u64(worker_id))
        tx.commit()
        return worker_id

    def _info(self, worker_id: int, worker: Worker) -> WorkerInfo:
        silent_ms = int((self._clock.monotonic() - worker.seen_at_s) * 1000)
        return WorkerInfo(
            worker.address,
            worker.tiers,
            self.is_alive(worker_id),
            max(0, silent_ms),
            len(worker.blocks),
            worker.block_count,
            worker.dirty_bytes,
            worker.version,
            worker.counters,
            worker.has_left,
        )

    @staticmethod
    def _tell(callbacks: list[Callable[[int], None]], worker_id: int) -> None:
        for callback in callbacks:
            callback(worker_id)


_SMALL: dict[tuple[bytes, bool], tuple[bytes, bool]] = {}
"""What most containers have, files of up to 8 blocks: once, not a million times."""


def _shared(blocks: bytes, is_dirty: bool) -> tuple[bytes, bool]:
    value = (blocks, is_dirty)
    return _SMALL.setdefault(value, value) if len(blocks) <= 1 else value


def _count(bitmap: bytes) -> int:
    return int.from_bytes(bitmap, "little").bit_count()


def _make_ready(worker: Worker) -> None:
    """What is queued becomes ready, in commands of bounded size."""
    if worker.to_free:
        worker.ready.append(FreeCommand(_take_keys(worker.to_free), keep_dirty=False))
    if worker.to_clean:
        worker.ready.append(CleanCommand(_take_keys(worker.to_clean)))
    while worker.queue and len(worker.ready) < MAX_COMMANDS_PER_POLL:
        worker.ready.append(worker.queue.popleft())


def _take(worker: Worker) -> list[Command]:
    """All that is ready."""
    taken = list(worker.ready)
    worker.ready.clear()
    if not (worker.queue or worker.to_free or worker.to_clean):
        worker.has_commands = trio.Event()
    return taken


def _take_keys(keys: dict[int, None]) -> list[int]:
    taken = list(keys)[:MAX_CONTAINERS_PER_COMMAND]
    for key in taken:
        del keys[key]
    return taken
