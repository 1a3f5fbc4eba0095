"""Operations that a master answers.

Errors: namespace operations answer `FsError` with the errno of the system call of that name;
an inode that is gone is ESTALE (`StaleError`), never ENOENT, so that the kernel repeats the lookup.
All changes are atomic and serialised; an answer means the change is in the write-ahead log
(survives the process); `SyncMetadata` makes it survive the machine.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta, field

from alluxiofuse.wire.messages import (
    U32,
    U63,
    Change,
    Id,
    Ino,
    Message,
    Name,
    Nothing,
    Ns,
    Path,
    Request,
    Size,
    SymlinkTarget,
    Text,
    XattrName,
    XattrValue,
)
from alluxiofuse.wire.types import (
    Attr,
    BlockReport,
    Caller,
    Command,
    Counters,
    DirEntry,
    Event,
    FsUsage,
    Layout,
    MountInfo,
    OrphanSeal,
    StateMark,
    Tier,
    WorkerAddress,
    WorkerInfo,
)

# --- client sessions ------------------------------------------------------------------------------


class OpenSession(Request["SessionGrant"]):
    """Start a client session; or, with `session_id`, take up an old one after a reconnect or a
    master restart (then `open_inos` says what the client still holds open)."""

    OP: ClassVar[str] = "master.open_session"
    client_name: Text
    """For people: "fuse /mnt/a", "cli"."""
    hostname: Text
    session_id: Id = 0
    open_inos: Annotated[list[int], Meta(max_length=1 << 20)] = []
    seen: StateMark = field(default_factory=StateMark)
    """ForeignStateError when the master's state does not go on from there: ids would mean other things."""


class SessionGrant(Message):
    session_id: Id
    lease_s: float
    """Without a heartbeat (or a watch poll) for this long, the session and all it holds end."""
    event_seq: U63
    """Where the first `Watch` starts."""
    cluster_id: Text
    state: StateMark = field(default_factory=StateMark)


class SessionHeartbeat(Request[Nothing]):
    OP: ClassVar[str] = "master.session_heartbeat"
    session_id: Id


class CloseSession(Request[Nothing]):
    OP: ClassVar[str] = "master.close_session"
    session_id: Id


class Watch(Request["WatchAnswer"]):
    """Long poll: answers when something changed that this session did not do itself, at the latest
    after `wait_s`. Polling with `after` = n acknowledges that all events up to n were applied."""

    OP: ClassVar[str] = "master.watch"
    session_id: Id
    after: U63
    wait_s: Annotated[float, Meta(ge=0, le=60)]
    counters: Counters = {}
    """What went wrong at the client since it started: see `rpc.tally`. Empty: nothing new."""


class WatchAnswer(Message):
    seq: U63
    """Poll with this `after` next."""
    is_reset: bool
    """Events were missed: everything that is cached is void."""
    events: list[Event]
    state: StateMark = field(default_factory=StateMark)
    """What of the master's state may be remembered now."""


# --- names ----------------------------------------------------------------------------------------


class Lookup(Request[Attr]):
    """ENOENT when the name does not exist. Loads under-storage metadata on first use."""

    OP: ClassVar[str] = "master.lookup"
    who: Caller
    parent: Ino
    name: Name


class Resolve(Request[list[Attr]]):
    """A path in one call: attributes of every directory on the way and, last, of the path itself.
    The path is absolute in the namespace; symlinks are followed when `follow` (also the last)."""

    OP: ClassVar[str] = "master.resolve"
    who: Caller
    path: Path
    follow: bool = True


class GetAttr(Request[Attr]):
    OP: ClassVar[str] = "master.getattr"
    ino: Ino


class SetAttr(Change[Attr]):
    """chmod, chown, utimens. None leaves a field as it is; `*_now` takes the master's clock.
    Size is not set here: truncation goes through the home worker and `CommitContent`."""

    OP: ClassVar[str] = "master.setattr"
    who: Caller
    session_id: Id
    ino: Ino
    mode: U32 | None = None
    uid: U32 | None = None
    gid: U32 | None = None
    atime_ns: Ns | None = None
    mtime_ns: Ns | None = None
    atime_now: bool = False
    mtime_now: bool = False
    written_ns: Ns = 0
    """With an mtime, of a file that has a home: what the home's `ForgetMtime` answered just now. A
    commit that tells of writes up to then does not change the mtime."""
    request_id: Id = 0


class ReadDir(Request["DirPage"]):
    """Entries in byte order of their names, after `after` (b"" from the start), without . and .."""

    OP: ClassVar[str] = "master.readdir"
    who: Caller
    ino: Ino
    after: Annotated[bytes, Meta(max_length=4096)]
    limit: Annotated[int, Meta(ge=1, le=10_000)]


class DirPage(Message):
    entries: list[DirEntry]
    is_last: bool


class Create(Change["Created"]):
    """open(2) with O_CREAT: a regular file, opened for writing by the session when `home` is given.

    The name exists already: EEXIST with `exclusive`, else an `Open` of what is there (`is_new`
    False; O_TRUNC is then the caller's next step)."""

    OP: ClassVar[str] = "master.create"
    who: Caller
    session_id: Id
    parent: Ino
    name: Name
    mode: U32
    """Permission bits after umask."""
    exclusive: bool
    home: Id
    """The worker that the client wants to write to; 0: not decided (opened for reading)."""
    request_id: Id = 0


class Created(Message):
    attr: Attr
    layout: Layout
    is_new: bool


class Mkdir(Change[Attr]):
    OP: ClassVar[str] = "master.mkdir"
    who: Caller
    session_id: Id
    parent: Ino
    name: Name
    mode: U32
    request_id: Id = 0


class Mknod(Change[Attr]):
    """A regular file, FIFO, socket or device; `mode` with its S_IFMT bits."""

    OP: ClassVar[str] = "master.mknod"
    who: Caller
    session_id: Id
    parent: Ino
    name: Name
    mode: U32
    rdev: U63
    request_id: Id = 0


class Symlink(Change[Attr]):
    OP: ClassVar[str] = "master.symlink"
    who: Caller
    session_id: Id
    parent: Ino
    name: Name
    target: SymlinkTarget
    request_id: Id = 0


class ReadLink(Request[bytes]):
    OP: ClassVar[str] = "master.readlink"
    ino: Ino


class Link(Change[Attr]):
    """EXDEV when the directory is in another mount than the inode."""

    OP: ClassVar[str] = "master.link"
    who: Caller
    session_id: Id
    ino: Ino
    parent: Ino
    name: Name
    request_id: Id = 0


class Unlink(Change["Unlinked"]):
    OP: ClassVar[str] = "master.unlink"
    who: Caller
    session_id: Id
    parent: Ino
    name: Name
    request_id: Id = 0


class Unlinked(Message):
    ino: Ino
    nlink: U32
    """0: gone, except that sessions which have it open keep it until they release it."""
    container: Id


class Rmdir(Change[Nothing]):
    OP: ClassVar[str] = "master.rmdir"
    who: Caller
    session_id: Id
    parent: Ino
    name: Name
    request_id: Id = 0


RENAME_NOREPLACE = 1


class Rename(Change["Renamed"]):
    """rename(2): EXDEV across mounts, ENOTEMPTY/EEXIST on a full directory, EINVAL into itself."""

    OP: ClassVar[str] = "master.rename"
    who: Caller
    session_id: Id
    parent: Ino
    name: Name
    new_parent: Ino
    new_name: Name
    flags: U32
    request_id: Id = 0


class Renamed(Message):
    ino: Ino
    replaced: Unlinked | None


class Access(Request[Nothing]):
    """access(2): EACCES unless `mask` (4 read, 2 write, 1 execute) is allowed."""

    OP: ClassVar[str] = "master.access"
    who: Caller
    ino: Ino
    mask: Annotated[int, Meta(ge=0, le=7)]


class StatFs(Request[FsUsage]):
    OP: ClassVar[str] = "master.statfs"


class GetXattr(Request[bytes]):
    """ENODATA when there is none."""

    OP: ClassVar[str] = "master.getxattr"
    who: Caller
    ino: Ino
    name: XattrName


class SetXattr(Change[Nothing]):
    OP: ClassVar[str] = "master.setxattr"
    who: Caller
    session_id: Id
    ino: Ino
    name: XattrName
    value: XattrValue
    flags: Annotated[int, Meta(ge=0, le=2)]
    """XATTR_CREATE = 1 (EEXIST), XATTR_REPLACE = 2 (ENODATA)."""
    request_id: Id = 0


class ListXattr(Request[list[bytes]]):
    OP: ClassVar[str] = "master.listxattr"
    ino: Ino


class RemoveXattr(Change[Nothing]):
    OP: ClassVar[str] = "master.removexattr"
    who: Caller
    session_id: Id
    ino: Ino
    name: XattrName
    request_id: Id = 0


# --- content --------------------------------------------------------------------------------------


class Open(Request["Opened"]):
    """Register an open file of the session and learn where its content is. Every open is released
    once (`Release`); while any session has an inode open, it outlives its last name."""

    OP: ClassVar[str] = "master.open"
    who: Caller
    session_id: Id
    ino: Ino
    for_write: bool
    """Read-only mounts answer EROFS."""
    passes_at: Id = 0
    """The worker whose slabs the kernel of this session reads itself: while the inode is open, it is the
    best home for it, also of what others write."""


class Opened(Message):
    attr: Attr
    layout: Layout


class Release(Request[Nothing]):
    """Give back opens, one item for each open that ended; may come late and in batches. A session's
    pending writes of a file must have been committed before its last release."""

    OP: ClassVar[str] = "master.release"
    session_id: Id
    inos: Annotated[list[int], Meta(max_length=65536)]


class BeginWrite(Change[Layout]):
    """Before the first change of a sealed file's content: the file gets a home and a new container
    id, durably, so that no other copy of it is used any more. `home` is the worker that the client
    prefers; the answer names the one in force (another session may have begun before).

    `truncate`: the old content is not wanted, the new container starts empty with size 0.
    The old container id is what the worker turns into the new one (`worker_ops.BeginWrite`)."""

    OP: ClassVar[str] = "master.begin_write"
    session_id: Id
    ino: Ino
    home: Id
    truncate: bool
    request_id: Id = 0


class CommitContent(Change[Attr]):
    """Tell size and mtime of a file that is being written (after the worker's `EndWrite`). `mtime_ns`
    is of the home's clock, as it told; 0: not written since writing began, or since `ForgetMtime`.

    `is_sealed`: the worker sealed the container; the file may be cached anywhere again, and under
    (A)SYNC_THROUGH it is entered in the persist log in the same batch. StaleError when `container`
    is no longer the inode's (it was replaced meanwhile): the bytes are of nobody's interest."""

    OP: ClassVar[str] = "master.commit_content"
    session_id: Id
    ino: Ino
    container: Id
    size: Size
    mtime_ns: Ns
    is_sealed: bool
    is_abandoned: bool = False
    """The home worker could not begin (no room, gone) and nobody has written: when no other session
    has it open for writing, the content is `base_container` with its size again and home is 0. Sent
    with is_sealed False; size and mtime are ignored."""
    is_unbegun: bool = False
    """With is_sealed: the session never told the home, because it had nothing to write, so nothing is
    sealed there on its account. Unless it surely was the only writer the file stays as it is, with its
    home: then begin and end there."""
    request_id: Id = 0


class WaitPersisted(Request[bool]):
    """Long poll: True once the inode's content as of `container` (or newer) is in the under
    storage, False after `wait_s`. UfsError when the persist log gave up for a stated reason
    (permission, read-only); UfsUnavailableError after `wait_s` when the last attempt has failed or the
    store does not answer. Starts persisting at once, without the usual delay."""

    OP: ClassVar[str] = "master.wait_persisted"
    ino: Ino
    container: Id
    wait_s: Annotated[float, Meta(ge=0, le=60)]


class BeginSync(Request[int]):
    """Begin to make what was acknowledged so far survive the machine, without waiting for it. Answers what
    to wait for (`SyncMetadata.upto`); 0: nothing. Size and time of what is open for writing do not count:
    its home has them, and tells them again when they are lost."""

    OP: ClassVar[str] = "master.begin_sync"


class SyncMetadata(Request[Nothing]):
    """fsync of the write-ahead log: all that was acknowledged survives the machine."""

    OP: ClassVar[str] = "master.sync_metadata"

    upto: U63 = 0
    """What was acknowledged before that BeginSync is enough; 0: all."""


class SourceChanged(Request[Layout]):
    """A reader met UfsChangedError: load the file's metadata from the under storage again. Answers
    the new layout; ENOENT/StaleError when the object is gone."""

    OP: ClassVar[str] = "master.source_changed"
    session_id: Id
    ino: Ino
    container: Id


# --- mounts and management ------------------------------------------------------------------------


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


# --- workers --------------------------------------------------------------------------------------


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
