"""What the metadata store holds: every record, key and sentinel, explained once, here.

Column families (all keys are bytes, integers in them 8 bytes big-endian so that they sort):

inode    ino                           -> InodeRecord
edge     parent ino + name             -> ino (8 bytes)
xattr    ino + name                    -> value
mount    mount id                      -> MountRecord
persist  b"s" + ino                    -> SyncEntry     "make the under storage equal to this inode"
         b"r" + mount id + path        -> RemoveEntry   "what is at this path is nobody's"
         b"l" + mount id + path        -> ino           index of InodeRecord.location overrides
         b"i" + mount id + path        -> IntentRecord  "something is being put here"
meta     b"format", b"cluster_id", b"next_ino", b"next_container", b"next_id", ...
         b"link" + ino + parent + name -> b""           further names of an inode (hard links)
         b"orphan" + ino               -> b""           nlink 0, kept while a session has it open
         b"open" + ino                 -> b""           home != 0: open for writing (for recovery)
         b"worker" + uuid              -> worker id (8 bytes)
         b"c" + container              -> ino           whose content (or base) it is: containers.py
         b"reply" + session + slot (2) -> number (8 bytes) + answer to that request: replies.py
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
    Directories hand it down: children without one of their own lie below their parent's location.
    Of an orphan: where its bytes still are (not in the index)."""
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
    """While home != 0: the last write (by the home's clock) that mtime_ns takes account of, because it
    was committed or because utimens(2) came after it; a commit that tells of an older one does not
    change mtime_ns. 0: none since writing began."""
    is_shared: bool = False
    """More than one session has written to `container` (`Layout.is_shared`)."""


SYNC_CONTENT = 1
"""Create it there or bring its bytes up to date."""
SYNC_ATTRS = 2
"""Mode, owner, times (stores with has_posix_attrs)."""
SYNC_NAME = 4
"""Move it from its location to where it belongs."""
SYNC_TOUCHED = 8
"""Its attributes are being set there, or were when we died: a version that differs in nothing else from
the one of `fingerprint` is ours. Only together with SYNC_ATTRS."""


LISTED = b"d"
"""`fingerprint` of a directory that a store without directories showed in a listing: it goes when its
last object is removed outside. Directories made here, or emptied here, stay."""


class SyncEntry(msgspec.Struct, array_like=True, gc=False):
    """Persist log: what the under storage still lacks of one inode. One entry an inode: a further
    change adds its bits and takes a new generation."""

    generation: int
    """Taken from a store-wide counter at every change; an executor drops the ATTRS bit only if it is
    still the one that it did."""
    what: int
    queued_at_ns: int
    intent: bytes | None = None
    """Something of this inode is being put at this path and may or may not have arrived; the
    IntentRecord there says more."""


INTENT_UPLOAD = 0
"""A worker was told to upload a container."""
INTENT_MAKE = 1
"""The master makes it itself (directory, symlink, empty file, copy): the source stays where it is."""
INTENT_RENAME = 2
"""An atomic rename: what was at the inode's location is there or here."""


class IntentRecord(msgspec.Struct, array_like=True, gc=False):
    """Persist log: something of `ino` is being put at a path; committed before the first byte goes.
    Others keep off that path until it is known what became of it."""

    ino: int
    kind: int
    container: int = 0
    task_id: int = 0
    worker_id: int = 0


class RemoveEntry(msgspec.Struct, array_like=True, gc=False):
    """Persist log: the under storage may have something at this path that is nobody's. It is deleted,
    or overwritten by the inode that belongs there. Never at a path where an inode has its bytes."""

    generation: int
    is_dir: bool
    queued_at_ns: int
    holder: int = 0
    """The inode whose bytes these were: not deleted while a session still has it open (orphan)."""


class MountRecord(msgspec.Struct, array_like=True, gc=False):
    mount_id: int
    ino: int
    """The directory it is mounted at."""
    uri: str
    is_readonly: bool
    sync_interval_s: float
    options: dict[str, str]
