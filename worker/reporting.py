"""The worker's side of the conversation with the master: registration, heartbeats, commands.

The master never dials: what it wants rides on the answer to a long poll. While it can't be reached
the worker goes on serving what it has; changes are collected (once per container) meanwhile.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from alluxiofuse import __version__
from alluxiofuse.errors import (
    AlluxioFuseError,
    ForeignStateError,
    PeerError,
    SessionExpiredError,
    StateError,
    UserError,
)
from alluxiofuse.rpc.base import Connection
from alluxiofuse.rpc.tally import tally
from alluxiofuse.wire.master_ops import (
    REPORTS_PER_CALL,
    PersistDone,
    RegisterWorker,
    ReportBlocks,
    WorkerCommands,
    WorkerGoodbye,
    WorkerHeartbeat,
)
from alluxiofuse.wire.types import (
    CancelPersistCommand,
    CleanCommand,
    Command,
    FreeCommand,
    PersistCommand,
    StateMark,
    WorkerAddress,
)
from alluxiofuse.worker.layout import slab_path
from alluxiofuse.worker.slab import CLEAN, DIRTY, WRITING
from alluxiofuse.worker.slabs import Slabs
from alluxiofuse.worker.uploads import Outcome, Uploads

log = logging.getLogger(__name__)

MIN_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0
POLL_S = 30.0
REFUSED_S = 45.0
"""After so long a refusal is no matter of time."""
FREES_PER_STEP = 4
REPORT_PAUSE_S = 0.05
"""Between calls that report clean containers: each keeps the master from others for some 20 ms."""
SEE_EVERY_S = 10.0
"""How often the master's state is written down."""
GOODBYE_S = 2.0
MAX_NAMED = 20
MAX_PERSIST_TASKS = 256
"""Persist commands accepted at once; no more commands are polled for while there are so many."""


@dataclass
class Identity:
    """Who this worker is; `address.worker_id` and `epoch` are the master's to give."""

    worker_uuid: str
    address: WorkerAddress
    epoch: int = 0


class Reporter:
    """Owned by the worker; `run` is its only task."""

    def __init__(
        self,
        master: Connection,
        slabs: Slabs,
        identity: Identity,
        uploads: Uploads,
    ) -> None:
        self._master = master
        self._slabs = slabs
        self._identity = identity
        self._uploads = uploads
        self._heartbeat_s = 1.0
        self._life = uuid.uuid4().hex
        self._refused_since: float | None = None
        self._registered = trio.Event()
        """Set while registered; replaced when the registration ends."""
        self._clean_left: list[int] = []
        """Clean containers that the master has not been told of since the registration."""
        self._persisting = trio.CapacityLimiter(MAX_PERSIST_TASKS)
        self._was_registered = False
        """Ever, in this life."""
        self._nursery: trio.Nursery | None = None
        self._seen = slabs.index.seen_state
        self._seen_at_s = float("-inf")
        """When it was written down, on trio's clock."""
        self._refusal = ""

    async def wait_registered(self) -> None:
        """Until the master knows this worker, and all that is dirty or open for writing in it."""
        while not self._registered.is_set():
            await self._registered.wait()

    async def run(self) -> None:
        """StateError: the master, asked for the first time, has another state than the one that this
        worker's content belongs to."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            backoff_s = MIN_BACKOFF_S
            while True:
                try:
                    await self._register()
                    backoff_s = MIN_BACKOFF_S
                    self._refused_since = None
                    if not self._was_registered:
                        self._was_registered = True
                        nursery.start_soon(self._uploads.resume)
                    self._refusal = ""
                    self._registered.set()
                    await self._converse()
                except UserError as exc:
                    self._refused(exc)
                except SessionExpiredError:
                    self._slabs.counters["registrations_expired"] += 1
                except ForeignStateError as exc:
                    refusal = self._foreign(exc)
                    if not self._was_registered:
                        raise refusal from None
                    if refusal.message != self._refusal:
                        log.error("%s", refusal.message)
                    self._refusal = refusal.message
                    backoff_s = MAX_BACKOFF_S
                except AlluxioFuseError as exc:
                    level = logging.INFO if isinstance(exc, PeerError) else logging.WARNING
                    log.log(level, "the master can't be reached: %s", exc.message)
                if self._registered.is_set():
                    self._registered = trio.Event()
                await trio.sleep(backoff_s)
                backoff_s = min(MAX_BACKOFF_S, backoff_s * 2)

    def _refused(self, exc: UserError) -> None:
        """The master will not have us; raises that when it goes on. A machine that went without a word
        and came back soon is refused while the master has not noticed."""
        now = trio.current_time()
        self._refused_since = self._refused_since or now
        self._slabs.counters["registrations_refused"] += 1
        log.warning("the master refuses us: %s", exc.message)
        if now - self._refused_since > REFUSED_S:
            raise exc

    # --- registration -----------------------------------------------------------------------------

    async def _register(self) -> None:
        me = self._identity
        granted = await self._master.call(
            RegisterWorker(
                me.worker_uuid,
                me.address,
                self._slabs.tiers.report(),
                __version__,
                self._life,
                self._seen,
            )
        )
        self._see(granted.state, now=True)
        me.address.worker_id, me.epoch = granted.worker_id, granted.epoch
        self._heartbeat_s = max(0.01, granted.heartbeat_s)
        slabs = self._slabs
        slabs.changed.clear()
        urgent = [slab.container for slab in slabs.by_container.values() if slab.state != CLEAN]
        known = set(urgent)
        self._clean_left = [container for container in slabs.by_container if container not in known]
        for at in range(0, max(1, len(urgent)), REPORTS_PER_CALL):
            part = urgent[at : at + REPORTS_PER_CALL]
            await self._report(part, is_last=at + REPORTS_PER_CALL >= len(urgent))

    async def _report(self, containers: list[int], *, is_last: bool) -> None:
        me = self._identity
        reports = [self._slabs.report(container) for container in containers]
        self._seal_again(containers)
        has_more = bool(self._clean_left)
        request = ReportBlocks(me.address.worker_id, me.epoch, reports, is_last, has_more)
        accepted = await self._master.call(request)
        await self._free(accepted.unknown, keep_dirty=False)
        self._clean(accepted.clean)

    async def _report_clean(self) -> None:
        """The rest of the full report. What a million cached files are takes seconds to tell, and
        nobody has to wait for it: a reader finds out at the worker itself. What changes meanwhile is
        told by the heartbeats as well, in whichever order: always what is there at that moment."""
        while left := self._clean_left:
            part = left[-REPORTS_PER_CALL:]
            del left[-REPORTS_PER_CALL:]
            await self._report(part, is_last=True)
            await trio.sleep(REPORT_PAUSE_S)

    def _see(self, mark: StateMark, *, now: bool = False) -> None:
        """The master is at this state: with an older one, or another cluster's, nothing that is here must
        be mixed up."""
        self._seen = mark
        if now or trio.current_time() - self._seen_at_s > SEE_EVERY_S:
            self._seen_at_s = trio.current_time()
            self._slabs.index.see_state(mark)

    def _foreign(self, exc: ForeignStateError) -> StateError:
        """All that is here stays as it is, and what is only here is named."""
        self._slabs.counters["registrations_refused"] += 1
        dirty = [slab for slab in self._slabs.by_container.values() if slab.state != CLEAN]
        paths = [slab_path(str(slab.directory.root), slab.container) for slab in dirty[:MAX_NAMED]]
        more = f" and {len(dirty) - len(paths)} more" if len(dirty) > len(paths) else ""
        kept = f" Kept here, and in no under storage: {', '.join(paths)}{more}." if dirty else ""
        return StateError(f"the master refuses this worker: {exc.message}.{kept}")

    async def say_goodbye(self) -> None:
        """When the worker ends: nobody need wait for it. Bounded, and never fails."""
        with trio.move_on_after(GOODBYE_S) as scope:
            scope.shield = True
            try:
                if self._registered.is_set():
                    self._slabs.index.see_state(self._seen)
                    await self._master.call(
                        WorkerGoodbye(self._identity.address.worker_id, self._identity.epoch)
                    )
            except AlluxioFuseError as exc:
                log.info("the master was not told that this worker ends: %s", exc.message)

    def _seal_again(self, containers: list[int]) -> None:
        """A master whose machine failed may have lost what it was told of seals."""
        for container in containers:
            slab = self._slabs.get(container)
            if slab is not None and slab.state == DIRTY:
                self._slabs.report_orphan(slab)

    # --- while registered -------------------------------------------------------------------------

    async def _converse(self) -> None:
        """Heartbeats and commands until one of them fails; raises what failed."""
        failures: list[AlluxioFuseError] = []

        async def guarded(task: Callable[[], Awaitable[None]]) -> None:
            try:
                await task()
            except AlluxioFuseError as exc:
                failures.append(exc)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(guarded, self._heartbeats)
            nursery.start_soon(guarded, self._commands)
            nursery.start_soon(guarded, self._report_clean)
        raise failures[0]

    async def _heartbeats(self) -> None:
        while True:
            await self._beat()
            await trio.sleep(self._heartbeat_s)

    async def _beat(self) -> None:
        slabs, me = self._slabs, self._identity
        self._refit()
        taken = slabs.take_changed(REPORTS_PER_CALL)
        seals = list(slabs.orphans.values())[:REPORTS_PER_CALL]
        gauges = {"open_slabs": len(slabs.writing), "untold_seals": len(seals)}
        is_heard = False
        try:
            state = await self._master.call(
                WorkerHeartbeat(
                    me.address.worker_id,
                    me.epoch,
                    slabs.tiers.report(),
                    [slabs.report(container) for container in taken],
                    seals,
                    max(0, slabs.dirty_bytes),
                    {**slabs.counters, **tally, **self._uploads.ufs_counts(), **gauges},
                )
            )
            self._see(state)
            is_heard = True
        finally:
            if not is_heard:
                slabs.put_back(taken)
        for seal in seals:
            if slabs.orphans.get(seal.container) is seal:
                del slabs.orphans[seal.container]

    def _refit(self) -> None:
        """Directories whose filesystem was full may have room again."""
        for directory in self._slabs.tiers.directories:
            if directory.limit_bytes < directory.quota_bytes:
                try:
                    stat = os.statvfs(directory.root)
                except OSError:
                    continue
                if directory.refit(stat.f_bavail * stat.f_frsize):
                    self._slabs.room_changed()

    async def _commands(self) -> None:
        me = self._identity
        while True:
            for command in await self._master.call(WorkerCommands(me.address.worker_id, me.epoch, POLL_S)):
                await self._execute(command)

    async def _execute(self, command: Command) -> None:
        """In order; uploads go on beside."""
        if isinstance(command, FreeCommand):
            await self._free(command.containers, keep_dirty=command.keep_dirty)
        elif isinstance(command, CleanCommand):
            self._clean(command.containers)
        elif isinstance(command, CancelPersistCommand):
            self._uploads.cancel(command.task_id)
        elif self._nursery is not None:
            token = object()
            await self._persisting.acquire_on_behalf_of(token)
            self._nursery.start_soon(self._run_persist, command, token)

    async def _run_persist(self, command: PersistCommand, token: object) -> None:
        try:
            outcome = await self._uploads.persist(command)
            if outcome is not None:
                await self._deliver(command, outcome)
        finally:
            self._persisting.release_on_behalf_of(token)

    async def _free(self, containers: list[int], *, keep_dirty: bool) -> None:
        """Thousands at once when a tree was removed, and on a busy disk each unlink may take a
        millisecond: others have their turn in between. Cancelled: what is left is told again, or found
        unknown, at the next registration."""
        for number, container in enumerate(containers, 1):
            self._free_one(container, keep_dirty=keep_dirty)
            if number % FREES_PER_STEP == 0:
                await trio.lowlevel.checkpoint()

    def _free_one(self, container: int, *, keep_dirty: bool) -> None:
        slab = self._slabs.get(container)
        if slab is None:
            self._slabs.changed[container] = None
            return
        if slab.upload is not None and not keep_dirty:
            slab.upload.cancel()
        if not self._slabs.free(slab, keep_dirty=keep_dirty):
            self._slabs.changed[container] = None

    def _clean(self, containers: list[int]) -> None:
        for container in containers:
            slab = self._slabs.get(container)
            if slab is not None and slab.state == WRITING:
                # It was sealed and uploaded once: the index lost that with the power, and what is in the
                # file may be torn. The under storage has it whole.
                self._slabs.counters["lost_seals"] += 1
                self._slabs.free(slab, keep_dirty=False)
            elif slab is not None:
                self._slabs.mark_clean(slab)

    # --- outcomes of uploads ----------------------------------------------------------------------

    async def _deliver(self, command: PersistCommand, outcome: Outcome) -> None:
        """Delivers it, however long that takes. Cancelled: it is not delivered, and the master will
        ask again."""
        me = self._identity
        backoff_s = MIN_BACKOFF_S
        while True:
            await self.wait_registered()
            request = PersistDone(
                me.address.worker_id,
                me.epoch,
                command.task_id,
                command.container,
                command.size,
                outcome.fingerprint,
                outcome.error_code,
                outcome.error_message,
            )
            try:
                await self._master.call(request)
                return
            except PeerError:
                await trio.sleep(backoff_s)
                backoff_s = min(MAX_BACKOFF_S, backoff_s * 2)
            except AlluxioFuseError as exc:
                log.warning("the master does not take the outcome of an upload: %s", exc.message)
                return
