"""Values that several operations share."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from alluxiofuse.wire.messages import U32, U63, Id, Ino, Message, Name, Ns, Path, Size, Text

Counters = Annotated[dict[Annotated[str, Meta(max_length=64)], U63], Meta(max_length=256)]
"""Name -> how often it happened since the process started."""


class StateMark(Message):
    """Which state of a master somebody has seen; the next master must go on from there."""

    cluster_id: Annotated[str, Meta(max_length=64)] = ""
    """"": none yet."""
    sequence: U63 = 0
    """Number of a commit that was on the master's disk. Grows with every commit of a state, also from
    life to life; a smaller one means that the state is an older version."""


# --- who asks -----------------------------------------------------------------------------------


class Caller(Message):
    """On whose behalf a namespace operation runs.

    `groups` None means that the kernel has already checked permissions (default_permissions):
    the master then skips mode checks and uses uid and gid only as owner of what is created. Only
    trusted peers may say so (`Peer.is_trusted`); from others None is taken as "no other groups".
    """

    uid: U32
    gid: U32
    groups: Annotated[list[int], Meta(max_length=65536)] | None = None


SUPERUSER = Caller(0, 0, [])

# --- inodes -------------------------------------------------------------------------------------

NOT_PERSISTED = 0
"""Lives here only, and nothing is under way (MUST_CACHE, or what a store can't hold)."""
TO_BE_PERSISTED = 1
"""Its current content or name is not in the under storage yet; an entry in the persist log says so."""
PERSISTED = 2
LOST = 3
"""The only copy is on a worker that is lost, or that came back without it. With the copy it comes back."""

PERSISTENCE_NAMES = ("NOT_PERSISTED", "TO_BE_PERSISTED", "PERSISTED", "LOST")


class Attr(Message):
    """What stat(2) shows of an inode, and what a client needs to cache it.

    For a file that is open for writing somewhere (`home` != 0), size, mtime and allocation are as
    of the last commit; the home worker knows better (`worker_ops.StatContainer`).
    """

    ino: Ino
    mode: U32
    nlink: U32
    uid: U32
    gid: U32
    rdev: U63
    size: Size
    atime_ns: Ns
    mtime_ns: Ns
    ctime_ns: Ns
    btime_ns: Ns
    container: Id
    """Changes whenever the content does, so equal containers mean equal bytes."""
    home: Id
    """The worker where it is open for writing, 0 when it is sealed."""
    persistence: Annotated[int, Meta(ge=0, le=3)]
    mount_id: Id
    cache_s: float
    """For how long this and the name that led here may be cached without a watch event (seconds);
    bounded by the mount's sync interval."""
    mtime_set_at_ns: Ns = 0
    """While `home` != 0: up to when the home's writes are older than `mtime_ns`, by the home's clock."""


class DirEntry(Message):
    name: Name
    attr: Attr


# --- content ------------------------------------------------------------------------------------


class UfsSource(Message):
    """Where clean bytes of a container can be read: a path below a mount of an under storage."""

    mount_id: Id
    path: Path
    """Relative to the mount's root, no leading slash."""
    size: Size
    fingerprint: Annotated[bytes, Meta(max_length=1024)]
    """The version; reading any other version raises UfsChangedError."""


class Layout(Message):
    """How to reach the content of one file."""

    ino: Ino
    container: Id
    """0: no content; reads give zeros up to `size`."""
    size: Size
    block_bytes: U63
    source: UfsSource | None
    """None: (newer than) the under storage has; only workers have the bytes."""
    home: Id
    """Worker that all readers and writers must use; 0 when sealed (any worker may cache it)."""
    workers: Annotated[list[int], Meta(max_length=1024)]
    """Workers that have at least one block, best first; for a sealed file."""
    base_container: Id = 0
    """While home != 0: the container that the worker turns into `container` (its BeginWrite's
    `old_container`); 0: it starts empty. `source` is then where the base's bytes are."""
    base_size: Size = 0
    """Size of the base."""
    emptied_container: Id = 0
    """While home != 0 and it starts empty: the content before, whose slab readers may have open. The
    worker's BeginWrite names it, so that they see what becomes of the file."""
    is_joined: bool = False
    """In the answer to BeginWrite: another session had begun before, so this is its container, also
    when `truncate` was asked for: truncate it at the worker."""
    is_shared: bool = False
    """More than one session has written to `container`, so that none of them knows all of its bytes
    by its own writes. In the answer to a BeginWrite that did not join: so it was with the base."""


class Tier(Message):
    alias: Text
    capacity_bytes: U63
    used_bytes: U63
    directories: Annotated[list[str], Meta(max_length=256)]
    troubles: Annotated[list[str], Meta(max_length=256)] = []
    """Of its directories that are out of use now: which, and why. They are not in the sums."""


class WorkerAddress(Message):
    """How to reach a worker. `hostname` with `unix_path` is used by clients on the same host."""

    worker_id: Id
    hostname: Text
    host: Text
    port: Annotated[int, Meta(ge=0, le=65535)]
    """0: not reachable by TCP (one-process mode)."""
    unix_path: Text
    """"" when there is none."""


class WorkerInfo(Message):
    address: WorkerAddress
    tiers: Annotated[list[Tier], Meta(max_length=64)]
    is_alive: bool
    last_heartbeat_ms_ago: U63
    container_count: U63
    block_count: U63
    dirty_bytes: U63
    version: Text = ""
    counters: Counters = {}
    """What happened at the worker: work done, failures, retries, what was dropped."""
    has_left: bool = False
    """It was stopped, and said so."""


class BlockReport(Message):
    """Which blocks of a container a worker has completely; `blocks` empty: none any more."""

    container: Id
    blocks: Annotated[bytes, Meta(max_length=1 << 20)]
    """Bitmap, bit i of byte i // 8 is block i."""
    is_dirty: bool
    """Holds bytes that are in no under storage yet."""


class OrphanSeal(Message):
    """A container whose writers vanished without ending their writes (client or worker crash):
    the worker sealed what was there."""

    container: Id
    size: Size
    mtime_ns: Ns


class MountInfo(Message):
    mount_id: Id
    path: Path
    """Where it is mounted in the namespace, absolute."""
    uri: Text
    is_readonly: bool
    sync_interval_s: float
    """-1 never, 0 always, else seconds."""
    options: dict[str, str]
    """Connector options; those that are secrets are left out for peers that did not authenticate
    (they then use their own environment)."""


class FsUsage(Message):
    """statfs(2): of the cache tiers and the namespace."""

    capacity_bytes: U63
    available_bytes: U63
    inode_count: U63


# --- master -> client, on the watch ---------------------------------------------------------------

EVENT_ATTR = 0
"""Attributes of `ino` changed."""
EVENT_DATA = 1
"""Content of `ino` changed or its cached copy must be dropped: attributes and page cache are void."""
EVENT_ENTRY = 2
"""Name `name` in directory `ino` appeared, vanished or points elsewhere (negative entries too);
the directory's own attributes and cached listing are void as well."""
EVENT_FREED = 3
"""Container `container` was freed: let go of descriptors and locks of it that no open file uses."""


class Event(Message):
    kind: Annotated[int, Meta(ge=0, le=3)]
    ino: Id
    name: bytes = b""
    container: Id = 0


# --- master -> worker, on the command poll --------------------------------------------------------


class FreeCommand(Message, tag="free"):
    """Drop these containers. With `keep_dirty` a container that the worker holds dirty stays."""

    containers: Annotated[list[int], Meta(max_length=4096)]
    keep_dirty: bool


class PersistCommand(Message, tag="persist"):
    """Upload a sealed container to `path` of a mount, then say PersistDone."""

    task_id: Id
    container: Id
    size: Size
    mount_id: Id
    path: Path
    mode: U32
    uid: U32
    gid: U32
    mtime_ns: Ns


class CancelPersistCommand(Message, tag="cancel"):
    task_id: Id


class CleanCommand(Message, tag="clean"):
    """These containers are in the under storage now: evictable, no longer dirty."""

    containers: Annotated[list[int], Meta(max_length=4096)]


Command = FreeCommand | PersistCommand | CancelPersistCommand | CleanCommand
