"""The persister: makes under storages equal to the namespace, as the persist log demands.

One task takes keys that are due, has them planned, and starts jobs; uploads are handed to the
workers that hold the bytes and end with `done`. Everything that counts is in the store: after a kill
at any point a new persister starts from the `persist` family. All methods run in the master's thread.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import trio

from alluxiofuse.config import MasterConfig
from alluxiofuse.errors import AlluxioFuseError, StateError, UfsError, UfsUnavailableError, from_wire
from alluxiofuse.master import places
from alluxiofuse.master.clock import Clock
from alluxiofuse.master.mounts import MountTable
from alluxiofuse.master.persist_aside import MOVING_PREFIX
from alluxiofuse.master.persist_failures import MAX_RETRY_S, Failure, Failures
from alluxiofuse.master.persist_intake import Intake
from alluxiofuse.master.persist_jobs import JobRunner, Loading
from alluxiofuse.master.persist_lanes import Lanes
from alluxiofuse.master.persist_log import Key, PersistLog
from alluxiofuse.master.persist_pace import SAMPLE_S, Pace
from alluxiofuse.master.persist_plan import Blocked, Job, Kind, Planner, Waits, is_clean
from alluxiofuse.master.persist_queue import MAX_KEYS, PathLocks, ReadyQueue
from alluxiofuse.master.persist_removals import more_removals
from alluxiofuse.master.persist_uploads import EndedTasks, Upload, command_of, earlier_upload, is_upload
from alluxiofuse.master.persist_waiting import waiting
from alluxiofuse.master.records import INTENT_UPLOAD, InodeRecord, IntentRecord
from alluxiofuse.master.store import Store
from alluxiofuse.master.workers import WorkerRegistry
from alluxiofuse.ufs.base import UfsEntry
from alluxiofuse.ufs.paths import show
from alluxiofuse.wire.master_ops import PersistDone
from alluxiofuse.wire.messages import NOTHING, Nothing
from alluxiofuse.wire.types import CancelPersistCommand

log = logging.getLogger(__name__)

UPLOADS_PER_PARALLEL = 4
"""Uploads of a mount handed to workers at once, for each of `persist_parallel`: they queue there."""
KEYS_PER_ROUND = 1000
"""Entries looked at without a pause."""
_RESOLVING = frozenset({Kind.RESOLVE_PUT, Kind.RESOLVE_RENAME})
_NO_STORE_KINDS = {Kind.SETTLE, Kind.RESOLVE_PUT}
"""Jobs that do not ask the under storage."""
_STALE_KINDS = {Kind.EMPTY, Kind.MKDIR, Kind.SYMLINK, Kind.MOVE, Kind.MOVE_TREE, Kind.SETTLE}
"""Jobs that rely on the names and locations of which they were planned."""
ROUND_S = 0.01
"""Least time between two looks at what is due."""
DELAYS_TO_GIVE_WAY = 10
"""For how many times `persist_delay_s` it gives way to busy programs."""
BLOCKED_RETRY_S = 5.0
ORPHAN_RETRY_S = 1.0
WORKER_PATIENCE_S = 10.0
"""After a start: the worker that has the bytes may be starting too."""


class Persister:
    def __init__(
        self,
        store: Store,
        mounts: MountTable,
        persist_log: PersistLog,
        workers: WorkerRegistry,
        loader: Loading,
        clock: Clock,
        config: MasterConfig,
        *,
        change_count: Callable[[], int] = lambda: 0,
        first_retry_s: float = 0.2,
        at: Callable[[str], None] = lambda point: None,
    ) -> None:
        """`change_count()`: changes that programs asked for so far. `at` is called at named points (failure
        injection of tests)."""
        self._store = store
        self._log = persist_log
        self._workers = workers
        self._clock = clock
        self._built_s = clock.monotonic()
        self._config = config
        self._at = at
        self._change_count = change_count
        self._pace = Pace(DELAYS_TO_GIVE_WAY * config.persist_delay_s)
        self._gives_way = False
        """To programs, in this round."""
        self._locks = PathLocks()
        self._queue = ReadyQueue()
        self._intake = Intake(store, persist_log, self._queue, self._locks, config.persist_delay_s)
        self._planner = Planner(store, mounts, persist_log, self._locks)
        self._jobs = JobRunner(store, mounts, persist_log, loader, clock.now_ns, at)
        self._lanes = Lanes(config.persist_parallel, config.persist_parallel * UPLOADS_PER_PARALLEL)
        self._failed_count = 0
        self._uploads: dict[int, Upload] = {}
        self._upload_of: dict[int, int] = {}
        """Inode -> task id."""
        self._ended_tasks = EndedTasks()
        self._no_worker: dict[int, None] = {}
        """Inodes whose bytes are at no worker that is alive."""
        self._failures = Failures(first_retry_s)
        self._waiters: dict[int, trio.Event] = {}
        self._wake = trio.Event()
        self._hurried: set[Key] = set()
        persist_log.on_wake(self._woken)
        workers.on_ready.append(self._worker_ready)
        workers.on_lost.append(self._worker_lost)

    # --- for handlers -----------------------------------------------------------------------------

    def done(self, request: PersistDone) -> Nothing:
        """The end of an upload. Late, duplicate or unknown ones are harmless."""
        upload = self._uploads.get(request.task_id) or earlier_upload(self._store, request)
        if upload is None or upload.container != request.container:
            self._ended_tasks.add(request.task_id)
            return NOTHING
        if not request.error_code:
            self._at("before upload commit")
            found = UfsEntry(upload.path, 0o100000, request.size, 0, request.fingerprint)
            self._jobs.arrived(
                upload.ino, upload.mount_id, upload.path, upload.generation, upload.container, found
            )
            record = self._store.inode(upload.ino)
            if record is not None and record.is_in_ufs and record.ufs_container == upload.container:
                self._workers.mark_clean(upload.container, request.worker_id)  # Not that of an orphan.
            self._failures.forget(upload.ino)
            self._lanes.answered(upload.mount_id)
            self._end_upload(upload, None)
        elif request.error_code in ("stale", "cancelled"):
            self._jobs.abandon(upload.ino, upload.mount_id, upload.path)
            self._end_upload(upload, None if upload.is_cancelled else BLOCKED_RETRY_S)
        else:
            self._failed(upload.ino, upload.mount_id, from_wire(request.error_code, 5, request.error_message))
            self._end_upload(upload, self._failures.backoff_s(upload.ino))
        return NOTHING

    def cancel(self, ino: int) -> None:
        """The content of `ino` is about to change: its upload need not be finished. The path stays
        locked until the worker has answered."""
        upload = self._uploads.get(self._upload_of.get(ino, 0))
        if upload is None or upload.is_cancelled:
            return
        upload.is_cancelled = True
        if self._workers.withdraw(upload.worker_id, upload.task_id):
            self._jobs.abandon(ino, upload.mount_id, upload.path)
            self._end_upload(upload, None)
        else:
            self._workers.send(upload.worker_id, CancelPersistCommand(upload.task_id))

    def hurry(self, ino: int) -> None:
        """Persist it now, without the usual rest."""
        self._hurried.add(ino)
        self._woken()

    def hurry_all(self) -> None:
        """All that rests is due now (shutdown)."""
        self._hurried.update(self._queue.resting())
        self._hurried.update(key for key in self._log.take_touched())
        self._woken()

    async def wait(self, ino: int, container: int, wait_s: float) -> bool:
        """True once content `container` or newer of `ino` is in the under storage (or the inode is
        gone, or never goes there); False after `wait_s`. UfsError when it fails for a reason that
        waiting does not cure; UfsUnavailableError after `wait_s` when it does not get on: its last
        attempt failed, or the store does not answer."""
        with trio.move_on_after(wait_s):
            while not self._is_persisted(ino, container):
                failure = self._failures.get(ino)
                if failure is not None and failure.is_permanent:
                    raise UfsError(failure.message)
                self.hurry(ino)
                await self._waiters.setdefault(ino, trio.Event()).wait()
            return True
        if self._is_persisted(ino, container):
            return True
        why = self._why_stuck(ino)
        if why:
            raise UfsUnavailableError(why)
        return False

    def _why_stuck(self, ino: int) -> str:
        """ "": it is under way, or its turn will come."""
        failure, record = self._failures.get(ino), self._store.inode(ino)
        if failure is not None and (failure.count > 1 or not self._locks.is_held(ino)):
            return failure.message
        return "" if record is None else self._lanes.why_resting(record.mount_id)

    def pending_count(self) -> int:
        """Entries of the log; about, when there are many."""
        count = 0
        for prefix in (b"s", b"r"):
            for _ in self._store.scan("persist", prefix):
                count += 1
                if count >= MAX_KEYS:
                    return max(count, self._store.estimate("persist"))
        return count

    def failing(self, limit: int = 100) -> list[str]:
        """One line per mount whose under storage does not answer, and per entry that keeps failing."""
        lines = [f"mount {number} rests: {why}" for number, why in self._lanes.resting()]
        for key, failure in itertools.islice(self._failures.items(), limit - len(lines)):
            lines.append(f"{self._name(key)}: {failure.message} ({failure.count} times)")
        return lines

    def waiting(self) -> list[str]:
        """One line per entry that has waited for long without failing."""
        return waiting(
            self._store, self._planner, self._name, self._failures, self._no_worker, self._clock.now_ns()
        )

    def counts(self) -> dict[str, int]:
        """For `admin report`."""
        return {"persist_attempts_failed": self._failed_count, "persist_rests": self._lanes.rest_count}

    def explain(self, key: Key) -> str:
        """What would be done about an entry now, for people."""
        state = "held, " if self._locks.is_held(key) else ""
        return f"{state}due {self._queue.due_s(key)}, {self._planner.plan(key)}"

    def is_idle(self) -> bool:
        """Nothing is left to do: the log is empty. (Reads the store: for tests and shutdown.)"""
        if self._lanes.is_busy():
            return False
        return not any(True for p in (b"s", b"r", b"i") for _ in self._store.scan("persist", p))

    # --- the task ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled. A job that is in a thread then is waited for, and not committed."""
        async with trio.open_nursery() as nursery:
            self._intake.resolve_renames_first()
            while True:
                self._wake = trio.Event()
                self._round(nursery)
                began_s = trio.current_time()
                with trio.move_on_after(self._pause_s()):
                    await self._wake.wait()
                if not self._hurried:
                    # Under load each round then finds many entries, instead of many rounds one each.
                    await trio.sleep_until(began_s + ROUND_S)

    def _round(self, nursery: trio.Nursery) -> None:
        """Nothing happens while the store can't be written; its entries stay."""
        if self._store.is_failed:
            return
        now = self._clock.monotonic()
        is_waited_for = bool(self._hurried or self._waiters)
        self._gives_way = self._pace.gives_way(now, self._change_count()) and not is_waited_for
        try:
            self._intake.take_in(now, self._hurried)
            if not self._gives_way:
                self._start_due(nursery)
        except StateError:
            self._log.is_overflowed = True  # the entry that was being looked at is found by scanning
        self._watch_uploads()

    def _pause_s(self) -> float:
        if self._store.is_failed:
            return 1.0
        if self._gives_way:
            return SAMPLE_S
        now = self._clock.monotonic()
        most_s = 1.0 if self._uploads else 60.0
        dues = (self._queue.next_due_s, self._lanes.next_due_s(now))
        return min([most_s, *(max(0.001, due - now) for due in dues if due is not None)])

    def _start_due(self, nursery: trio.Nursery) -> None:
        now = self._clock.monotonic()
        for group in self._queue.parked():
            if group < 0:
                self._queue.unpark(group, self._lanes.upload_room(-group, now), now)
            else:  # more than fit: not all of them turn out to be jobs
                self._queue.unpark(group, 4 * self._lanes.room(group, now), now)
        looked: set[Key] = set()
        for _ in range(KEYS_PER_ROUND):
            key = self._queue.pop(now)
            if key is None:
                return
            if key in looked:  # it and another wait for each other's next change: not in this round
                self._queue.put(key, now + ORPHAN_RETRY_S)
                continue
            looked.add(key)
            record = self._store.inode(key) if isinstance(key, int) else None
            mount_id = _mount_of(key, record)
            if mount_id and not self._lanes.is_open(mount_id, now):
                self._queue.park(mount_id, key)
                continue
            if mount_id and is_upload(record) and not self._lanes.takes_upload(mount_id):
                self._queue.park(-mount_id, key)  # before it is planned, which costs as much as its creation
                continue
            plan = self._planner.plan(key)
            if isinstance(plan, Blocked):
                plan = self._wait_for(key, plan, now)
            if plan is None or isinstance(plan, Waits):
                if plan is None:
                    self._forget(key)
                self._queue.finished(key, now)
            elif isinstance(plan, Job):
                self._start(nursery, plan, now)

    def _wait_for(self, key: Key, blocked: Blocked, now: float) -> Plan:
        if blocked.by is None:
            self._queue.put(key, now + ORPHAN_RETRY_S)
            return Blocked(None)
        if not self._locks.is_held(blocked.by):
            breaker = self._planner.cycle_breaker(key)
            if breaker is not None:
                self._queue.block(key, breaker.key, now + BLOCKED_RETRY_S)
                return breaker
            self._queue.advance(blocked.by, now)
        self._queue.block(key, blocked.by, now + BLOCKED_RETRY_S)
        return blocked

    def _start(self, nursery: trio.Nursery, job: Job, now: float) -> None:
        if job.mount_id and not self._lanes.is_open(job.mount_id, now):  # breaks a circle
            self._queue.park(job.mount_id, job.key)
            return
        if job.kind is Kind.UPLOAD:
            self._start_upload(job, now)
            return
        if job.kind is Kind.RESOLVE_PUT and not self._is_over(job, now):
            return
        jobs = [job]
        if job.kind is Kind.REMOVE:
            rested_ns = int(self._config.persist_delay_s * 1e9)
            jobs += more_removals(
                self._store, self._planner, self._failures, job, self._clock.now_ns(), rested_ns
            )
        for one in jobs:
            self._queue.discard(one.key)
            self._locks.hold(one.key, one.locks)
        self._lanes.started(job.mount_id, is_upload=False)
        nursery.start_soon(self._run_jobs, jobs, self._store.commit_count)

    def _is_as_planned(self, job: Job, planned_at: int) -> bool:
        """Whether the job, planned when there were `planned_at` commits, is still what is to be done: a
        task begins to run a little later, and others come in between. What is on its way to a temporary name
        depends on nothing; what else there is reads again what it depends on."""
        if job.kind not in _STALE_KINDS or self._store.commit_count == planned_at:
            return True
        if job.target.startswith(MOVING_PREFIX):
            return True
        self._locks.release(job.key)
        try:
            return self._planner.plan(job.key) == job
        finally:
            self._locks.hold(job.key, job.locks)

    async def _run_jobs(self, jobs: list[Job], planned_at: int) -> None:
        retry_s: float | None = None
        try:
            if not self._is_as_planned(jobs[0], planned_at):
                return
            if jobs[0].kind is Kind.REMOVE:
                await self._jobs.remove(jobs[0].mount_id, jobs)
            else:
                await self._jobs.run(jobs[0])
            if jobs[0].kind not in _NO_STORE_KINDS:
                self._lanes.answered(jobs[0].mount_id)
            for job in jobs:
                if job.kind not in _RESOLVING:  # What failed and left this behind may well fail again.
                    self._failures.forget(job.key)
        except AlluxioFuseError as exc:
            for job in jobs:
                self._failed(job.key, job.mount_id if job is jobs[0] else 0, exc)
                retry_s = self._failures.backoff_s(job.key)
        finally:
            self._lanes.ended(jobs[0].mount_id, is_upload=False)
            for job in jobs:
                self._finished(job.key, retry_s)

    def _finished(self, key: Key, retry_s: float | None) -> None:
        """A job ended: look at its entry again, and at those that waited for it."""
        now = self._clock.monotonic()
        self._locks.release(key)
        if retry_s is None and not self._log.may_have(key):
            self._forget(key)
        else:
            self._queue.advance(key, now + (retry_s or 0.0))
        self._queue.finished(key, now)
        if isinstance(key, int):
            waiter = self._waiters.pop(key, None)
            if waiter is not None:
                waiter.set()
        self._wake.set()

    # --- uploads ----------------------------------------------------------------------------------

    def _start_upload(self, job: Job, now: float) -> None:
        if not self._lanes.takes_upload(job.mount_id):
            self._queue.park(-job.mount_id, job.key)
            return
        record = self._store.inode(job.ino)
        if record is None:
            return
        worker_id = self._holder(record.container, record.held_by)
        if not worker_id:
            self._no_worker[job.ino] = None
            is_back = self._workers.is_alive(record.held_by)
            patience_s = 0.0 if is_back else self._built_s + WORKER_PATIENCE_S - now
            if patience_s <= 0:
                what = "came back without it" if is_back else "is not running"
                message = f"its only copy is on worker {record.held_by}, which {what}"
                self._warn(job.ino, self._failures.note(job.ino, message))
            self._queue.put(job.ino, now + (patience_s if patience_s > 0 else MAX_RETRY_S))
            return
        task_id = self._store.take_number(b"next_id")
        intent = IntentRecord(job.ino, INTENT_UPLOAD, record.container, task_id, worker_id)
        if not self._jobs.begin(job, intent):
            return
        upload = Upload(
            task_id,
            job.ino,
            job.generation,
            job.mount_id,
            job.target,
            record.container,
            record.size,
            worker_id,
            now,
        )
        self._locks.hold(job.key, job.locks)
        self._lanes.started(job.mount_id, is_upload=True)
        self._uploads[task_id] = upload
        self._upload_of[job.ino] = task_id
        self._workers.send(worker_id, command_of(upload, record))

    def _holder(self, container: int, held_by: int) -> int:
        """An alive worker that has the bytes; 0: none."""
        if not self._workers.is_away(held_by, container):
            return held_by
        holders = self._workers.holders(container)
        return holders[0] if holders else 0

    def _end_upload(self, upload: Upload, retry_s: float | None) -> None:
        self._ended_tasks.add(upload.task_id)
        known = self._uploads.pop(upload.task_id, None)
        if known is None:
            self._queue.advance(upload.ino, self._clock.monotonic())
            self._wake.set()
            return
        self._upload_of.pop(upload.ino, None)
        self._lanes.ended(upload.mount_id, is_upload=True)
        if retry_s is None:
            self._failures.forget(upload.ino)
        self._finished(upload.ino, retry_s)

    def _is_over(self, job: Job, now: float) -> bool:
        """Whether an upload of unknown end surely writes no more; if not, it is told to stop, and the
        entry is looked at again."""
        intent = job.intent
        if intent is None or intent.kind != INTENT_UPLOAD or intent.task_id in self._ended_tasks:
            return True
        is_told, until_s = self._ended_tasks.stopping(intent.task_id, now)
        if not is_told:
            self._workers.send(intent.worker_id, CancelPersistCommand(intent.task_id))
        if now >= until_s:
            self._ended_tasks.add(intent.task_id)
            return True
        self._queue.put(job.key, min(until_s, now + 1.0))
        return False

    def _watch_uploads(self) -> None:
        """Send again what should have ended long ago: the command or its answer was lost."""
        now = self._clock.monotonic()
        for upload in list(self._uploads.values()):
            if now - upload.sent_at_s > 60 + upload.size / (2 << 20):
                upload.sent_at_s = now
                record = self._store.inode(upload.ino)
                if upload.is_cancelled:
                    self._workers.send(upload.worker_id, CancelPersistCommand(upload.task_id))
                elif record is not None:
                    self._workers.send(upload.worker_id, command_of(upload, record))

    def _worker_lost(self, worker_id: int) -> None:
        """What it was told is void: to be told again, to whoever has the bytes."""
        for upload in [u for u in self._uploads.values() if u.worker_id == worker_id]:
            self._end_upload(upload, self._failures.first_retry_s)

    def _worker_ready(self, worker_id: int) -> None:
        waiting, self._no_worker = self._no_worker, {}
        for ino in waiting:
            self._queue.advance(ino, self._clock.monotonic())
        self._wake.set()

    # --- within -----------------------------------------------------------------------------------

    def _woken(self) -> None:
        self._wake.set()

    def _is_persisted(self, ino: int, container: int) -> bool:
        record = self._store.inode(ino)
        if record is None or not record.parent or record.is_local_only:
            return True
        if record.is_in_ufs and record.ufs_container >= container and container:
            return True
        return is_clean(record)

    def _failed(self, key: Key, mount_id: int, exc: AlluxioFuseError) -> None:
        """`mount_id`: the one whose store has failed or refused; 0: that is counted already."""
        self._failed_count += 1
        if mount_id and isinstance(exc, UfsUnavailableError):
            self._lanes.failed(mount_id, exc.message, self._clock.monotonic())
        elif mount_id and isinstance(exc, UfsError):
            self._lanes.answered(mount_id)
        self._warn(key, self._failures.failed(key, exc))

    def _warn(self, key: Key, failure: Failure) -> None:
        if failure.count == 1 or failure.is_permanent:
            log.warning("persisting %s failed: %s", self._name(key), failure.message)

    def _forget(self, key: Key) -> None:
        self._failures.forget(key)
        if isinstance(key, int):
            self._no_worker.pop(key, None)
            waiter = self._waiters.pop(key, None)
            if waiter is not None:
                waiter.set()

    def _name(self, key: Key) -> str:
        if not isinstance(key, int):
            return f"removal of {show(key[1])}"
        record = self._store.inode(key)
        return f"inode {key}" if record is None else show(places.namespace_path(self._store, key, record))


def _mount_of(key: Key, record: InodeRecord | None) -> int:
    """0: of none (any more)."""
    if not isinstance(key, int):
        return key[0]
    return 0 if record is None else record.mount_id


Plan = Job | Blocked | Waits | None
