"""Operations of the master about mounts, and for management. See `master_ops`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from alluxiofuse.wire.messages import (
    U63,
    Id,
    Message,
    Nothing,
    Path,
    Request,
    Text,
)
from alluxiofuse.wire.types import (
    Attr,
    Caller,
    Layout,
    MountInfo,
    WorkerInfo,
)


class ListWorkers(Request[list[WorkerInfo]]):
    OP: ClassVar[str] = "master.list_workers"


class GetMount(Request[MountInfo]):
    OP: ClassVar[str] = "master.get_mount"
    mount_id: Id


class ListMounts(Request[list[MountInfo]]):
    OP: ClassVar[str] = "master.list_mounts"


class MountUfs(Request[MountInfo]):
    """Mount an under storage at an existing, empty directory or a name that does not exist yet.
    The under storage is probed first (UfsError names what is wrong); nothing changes on error. EBUSY
    when it overlaps with one that is mounted already and both can be written."""

    OP: ClassVar[str] = "master.mount_ufs"
    DEADLINE_S: ClassVar[float] = 3600.0
    who: Caller
    path: Path
    uri: Text
    is_readonly: bool
    sync_interval_s: float | None
    """None: the connector's default."""
    options: Annotated[dict[Text, Text], Meta(max_length=100)]


class UnmountUfs(Request[Nothing]):
    """EBUSY while the mount has entries in the persist log or files open for writing."""

    OP: ClassVar[str] = "master.unmount_ufs"
    DEADLINE_S: ClassVar[float] = 3600.0
    who: Caller
    path: Path


class Free(Request["FreeResult"]):
    """Drop cached copies of a file, or with `recursive` of a tree, on all workers and in the page
    caches of all clients; files stay. Dirty files are skipped and counted. Answers after workers
    and watching clients have confirmed (bounded by a few seconds)."""

    OP: ClassVar[str] = "master.free"
    DEADLINE_S: ClassVar[float] = 3600.0
    who: Caller
    path: Path
    recursive: bool


class FreeResult(Message):
    file_count: U63
    dirty_count: U63
    """Skipped: not in the under storage yet."""
    in_use_count: U63
    """Open now: freed when closed."""


class Persist(Request[U63]):
    """Start persisting a path (recursively) now; the number of files still to be persisted below
    it, with those that are open for writing: they are persisted once they are closed. Poll it to wait."""

    OP: ClassVar[str] = "master.persist"
    DEADLINE_S: ClassVar[float] = 3600.0
    who: Caller
    path: Path


class SyncPath(Request[Nothing]):
    """Compare a directory (recursively when asked) or file with its under storage now."""

    OP: ClassVar[str] = "master.sync_path"
    DEADLINE_S: ClassVar[float] = 3600.0
    who: Caller
    path: Path
    recursive: bool


class Locations(Request["LocationReport"]):
    OP: ClassVar[str] = "master.locations"
    who: Caller
    path: Path


class LocationReport(Message):
    attr: Attr
    layout: Layout
    ufs_uri: Text
    """Where its bytes are (or will be) in the under storage."""
    blocks: dict[int, bytes]
    """Worker id -> bitmap of complete blocks (see BlockReport)."""


class ReportState(Request["MasterReport"]):
    OP: ClassVar[str] = "master.report"


class MasterReport(Message):
    cluster_id: Text
    version: Text
    started_s_ago: float
    inode_count: U63
    session_names: list[str]
    persist_pending_count: U63
    persist_failing: Annotated[list[str], Meta(max_length=100)]
    """One line per entry that keeps failing: path and reason, no secrets."""
    workers: list[WorkerInfo]
    mounts: list[MountInfo]
    counters: dict[str, int] = {}
    persist_waiting: Annotated[list[str], Meta(max_length=100)] = []
    """One line per entry that has waited for a minute and more without failing: path, and for what; some."""
