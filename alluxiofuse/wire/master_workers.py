"""Operations of the master for workers. See `master_ops`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta, field

from alluxiofuse.wire.messages import (
    U63,
    Id,
    Message,
    Nothing,
    Request,
    Size,
    Text,
)
from alluxiofuse.wire.types import (
    BlockReport,
    Command,
    Counters,
    OrphanSeal,
    StateMark,
    Tier,
    WorkerAddress,
)


class RegisterWorker(Request["Registration"]):
    """A worker introduces itself; it then reports all its blocks (`ReportBlocks`, in chunks). With
    `is_last` it is alive."""

    OP: ClassVar[str] = "master.register_worker"
    worker_uuid: Annotated[str, Meta(min_length=8, max_length=64)]
    """From the worker's state directory; the same uuid gets the same worker id again."""
    address: WorkerAddress
    """With worker_id 0 on first registration."""
    tiers: Annotated[list[Tier], Meta(max_length=64)]
    version: Text
    life: Annotated[str, Meta(max_length=64)] = ""
    """Of this process, by chance: another one with the same uuid is a restart, or a copy."""
    seen: StateMark = field(default_factory=StateMark)
    """As in OpenSession."""


class Registration(Message):
    worker_id: Id
    epoch: Id
    """Of this registration; heartbeats carry it, an old one gets SessionExpiredError."""
    heartbeat_s: float
    state: StateMark = field(default_factory=StateMark)


class ReportBlocks(Request["BlocksAccepted"]):
    OP: ClassVar[str] = "master.report_blocks"
    worker_id: Id
    epoch: Id
    reports: Annotated[list[BlockReport], Meta(max_length=10_000)]
    is_last: bool
    has_more: bool = False
    """With `is_last`: all that is dirty or open for writing was reported, clean containers follow in
    further calls, while the worker is alive already."""


class BlocksAccepted(Message):
    unknown: list[int]
    """Containers that no inode has (any more): drop them."""
    clean: list[int]
    """Reported dirty, but persisted meanwhile: mark them clean."""


REPORTS_PER_CALL = 5000
"""Of a full report, and in a heartbeat. A heartbeat with fewer deltas leaves nothing untold."""


class WorkerHeartbeat(Request[StateMark]):
    """Every `heartbeat_s`. SessionExpiredError: register again."""

    OP: ClassVar[str] = "master.worker_heartbeat"
    worker_id: Id
    epoch: Id
    tiers: Annotated[list[Tier], Meta(max_length=64)]
    deltas: Annotated[list[BlockReport], Meta(max_length=10_000)]
    orphan_seals: Annotated[list[OrphanSeal], Meta(max_length=10_000)]
    dirty_bytes: U63
    counters: Counters = {}
    """As in WorkerInfo."""


class WorkerGoodbye(Request[Nothing]):
    """The worker ends now, with all that it holds in its place: nobody need wait for it."""

    OP: ClassVar[str] = "master.worker_goodbye"
    worker_id: Id
    epoch: Id


class WorkerCommands(Request[list[Command]]):
    """Long poll for what the master wants done; a worker runs one at a time per command."""

    OP: ClassVar[str] = "master.worker_commands"
    worker_id: Id
    epoch: Id
    wait_s: Annotated[float, Meta(ge=0, le=60)]


class PersistDone(Request[Nothing]):
    """The end of a PersistCommand: the object's new fingerprint, or why not."""

    OP: ClassVar[str] = "master.persist_done"
    worker_id: Id
    epoch: Id
    task_id: Id
    container: Id
    size: Size
    fingerprint: Annotated[bytes, Meta(max_length=1024)]
    error_code: Text = ""
    """ "" on success; else `AlluxioFuseError.code`; "stale": the container changed meanwhile."""
    error_message: Text = ""
