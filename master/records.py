"""What the metadata store holds: every record, key and sentinel, explained once, here.

Column families (all keys are bytes, integers in them 8 bytes big-endian so that they sort):

inode    ino                           -> InodeRecord
edge     parent ino + name             -> ino (8 bytes)
xattr    ino + name                    -> value
mount    mount id                      -> MountRecord
persist  b"s" + ino                    -> SyncEntry     "make the under storage equal to this inode"
         b"r" + mount id + path        -> RemoveEntry   "nothing may be left at this path"
         b"l" + mount id + path        -> ino           index of InodeRecord.location overrides
meta     b"format", b"cluster_id", b"next_ino", b"next_container", b"next_id", ...
         b"link" + ino + parent + name -> b""           further names of an inode (hard links)
         b"orphan" + ino               -> b""           nlink 0, kept while a session has it open
         b"open" + ino                 -> b""           home != 0: open for writing (for recovery)
         b"worker" + uuid              -> worker id (8 bytes)
         b"c" + container              -> ino           whose content (or base) it is: containers.py
"""

from __future__ import annotations

import msgspec

FORMAT = 1
"""Of the whole store; a store with a higher number is refused."""

COLUMN_FAMILIES = ("inode", "edge", "xattr", "mount", "persist", "meta")


class InodeRecord(msgspec.Struct, array_like=True, gc=False):
    """One inode. Regular files use the content fields, directories the listing fields."""

    mode: int
    """With S_IFMT bits."""
    nlink: int
    """Names; for a directory 2 + subdirectories. 0: orphan."""
    uid: int
    gid: int
    rdev: int
    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int
    parent: int
    """Directory of the primary name: the one under which the under storage has it. Root: itself.
    0 for an orphan."""
    name: bytes
    """The primary name; b"" for the root."""
    mount_id: int
    """The mount whose under storage it belongs to. A mount point's directory carries the id of the
    mount below it."""

    # content of regular files
    container: int = 0
    """The current content; 0: none was ever written (reads as zeros up to size)."""
    block_bytes: int = 0
    home: int = 0
    """Worker at which the file is open for writing; 0: sealed."""
    base_container: int = 0
    """While home != 0: the container that `container` was made from, still valid if the worker never
    heard of `container` (a crash between the two)."""
    base_size: int = 0

    # the under storage's copy
    is_in_ufs: bool = False
    """The under storage has (a version of) this inode at `location`."""
    ufs_container: int = 0
    """The container whose bytes the under storage has there. Content is clean when it equals
    `container` and is_in_ufs."""
    ufs_size: int = 0
    fingerprint: bytes = b""
    location: bytes | None = None
    """Path below the mount where the under storage has it, when that is not the place that its
    parent's location and its name give (renamed here, not moved there yet). None: that place.
    Directories hand it down: children without one of their own lie below their parent's location."""
    covers_ufs: bool = False
    """The under storage may have something else at the path where this inode belongs (an object
    that was deleted or replaced here, or a cut-short upload); it is overwritten or removed with it."""
    is_local_only: bool = False
    """Lives in the master only, never persisted (what the store can't hold, MUST_CACHE)."""
    checked_at_ns: int = 0
    """When it was last compared with the under storage (wall clock)."""

    # directories
    is_loaded: bool = False
    """All names below are known (listed once, or created here)."""
    listing_fingerprint: bytes = b""
    """Of the under storage's directory at the last listing; b"": unknown."""
    listed_at_ns: int = 0

    target: bytes = b""
    """Of a symlink."""

    held_by: int = 0
    """Of dirty sealed content: the worker that sealed it, which surely has it (its block report
    comes only with the next heartbeat). Means nothing when the content is clean."""
    mtime_set_at_ns: int = 0
    """While home != 0: when utimens(2) set mtime_ns (wall clock); a commit that tells of an older
    write does not change it. 0: not set since writing began."""


SYNC_CONTENT = 1
"""Create it there or bring its bytes up to date."""
SYNC_ATTRS = 2
"""Mode, owner, times (stores with has_posix_attrs)."""
SYNC_NAME = 4
"""Move it from its location to where it belongs."""


class SyncEntry(msgspec.Struct, array_like=True, gc=False):
    """Persist log: what the under storage still lacks of one inode. One entry an inode: a further
    change adds its bits and takes a new generation."""

    generation: int
    """Rises with every change; an executor removes the entry only if it is still the one it did."""
    what: int
    queued_at_ns: int
    intent: bytes | None = None
    """An upload to this path was started and may or may not have arrived."""


class RemoveEntry(msgspec.Struct, array_like=True, gc=False):
    """Persist log: a path at which nothing may be left. Never coexists with an inode that belongs
    there (the inode absorbs it as covers_ufs)."""

    generation: int
    is_dir: bool
    queued_at_ns: int


class MountRecord(msgspec.Struct, array_like=True, gc=False):
    mount_id: int
    ino: int
    """The directory it is mounted at."""
    uri: str
    is_readonly: bool
    sync_interval_s: float
    options: dict[str, str]
