"""The connector contract. `tests/contract/` holds the suite that every connector passes.

An `UnderStorage` is one mounted place in a store (a directory, a bucket with a prefix). All paths
are bytes relative to that place: b"" is the place itself, b"a/b" a thing below it; never a leading
or trailing slash, no empty, "." or ".." component (callers guarantee it; connectors hide stored
names that break this rule and count them).

Methods block. They are called from worker threads, several at once: connectors are thread-safe.
They raise `UfsError`s only (see `errors`): UfsNotFoundError, UfsExistsError, UfsPermissionError,
UfsUnavailableError (may be retried by the caller; connectors themselves retry only what their
library retries by itself, within `options.timeout_s`), UfsChangedError, UfsError for the rest.
"""

from __future__ import annotations

import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a store can do; the caller adapts."""

    has_directories: bool
    """Directories exist on their own. Without: a directory is there while something is below it,
    mkdir and rmdir do nothing."""
    has_posix_attrs: bool
    """Keeps mode, uid, gid and mtime: `UfsEntry` shows them and `set_attrs` changes them."""
    has_symlinks: bool
    has_atomic_rename: bool
    """`rename` works on files and whole trees, at once and atomically."""
    has_strong_versions: bool
    """`read` with a fingerprint can never return bytes of another version."""
    default_sync_interval_s: float
    max_parallel_reads: int
    """How many ranges of one file are worth fetching at once."""
    preferred_read_bytes: int
    """Range size that gives most of the bandwidth."""
    whole_read_bytes: int = 0
    """A file of up to this size is compared with the store's checksum, for which it has to be read whole:
    ask for all of it at once. 0: there is none."""


@dataclass(frozen=True, slots=True)
class UfsEntry:
    """One thing in the store."""

    path: bytes
    mode: int
    """With its S_IFMT bits: S_IFREG, S_IFDIR or S_IFLNK (others are shown as what they are and can
    only be listed and deleted). Permission bits only with has_posix_attrs, else 0."""
    size: int
    mtime_ns: int
    fingerprint: bytes
    """Of a file: equal fingerprints mean equal bytes (ETag; or inode, size, mtime and ctime).
    Of a directory: b"", or one that changes whenever a name in it appears or vanishes."""
    uid: int = 0
    gid: int = 0
    target: bytes = b""
    """Of a symlink."""
    rdev: int = 0

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)


@dataclass(frozen=True, slots=True)
class ListPage:
    entries: list[UfsEntry]
    """Direct children, in the byte order of their paths across pages where the store lists in
    order; every child appears once."""
    next_token: str | None
    """Pass it to get the next page; None: this was the last."""


@dataclass(frozen=True, slots=True)
class UfsAttrs:
    """What is kept with a file where has_posix_attrs; else ignored (content type by name may be set)."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int


class PutCancelled(Exception):
    """Raised by `put` when `is_cancelled` said so; nothing of the new content is visible."""


def stopping(is_cancelled: Callable[[], bool], what: str) -> Callable[[], None]:
    """What `put` calls between parts: raises PutCancelled, of `what`, when it is not wanted any more."""

    def go_on() -> None:
        if is_cancelled():
            raise PutCancelled(what)

    return go_on


class UnderStorage(ABC):
    scheme: str
    uri: str
    """As mounted, without any secret."""
    capabilities: Capabilities

    @abstractmethod
    def check(self) -> None:
        """Probe: reachable, credentials good, the place exists (is created, for a directory whose
        parent exists, or a prefix of an existing bucket). UfsError with a sentence a person can act on."""

    def identity(self) -> str:
        """What tells this place from another one that may appear under the same URI (a disk that is not
        mounted); "" where there is no such danger. It is given to later connectors as the option
        `identity`; they then refuse any other place with UfsUnavailableError. UfsError."""
        return ""

    def counts(self) -> dict[str, int]:
        """What went wrong since it was opened: name (`ufs_...`, docs/ufs.md) -> how often. Cheap."""
        return {}

    def resume(self, notes: Path) -> None:
        """Undo what an earlier process left half done in the store, as far as it noted that in the
        file `notes` (which nobody else uses meanwhile), and note there from now on what a crash of
        this one would leave. Nothing for a store whose `put` replaces or hides such leftovers itself.
        UfsUnavailableError: it could not be undone now; it will be tried with later puts."""
        return

    def tidy(self, path: bytes) -> None:
        """Remove what an interrupted `put` of exactly this path may have left. Nothing else is using
        the path. Not for a store where `resume` does it."""
        return

    @abstractmethod
    def stat(self, path: bytes) -> UfsEntry:
        """Never follows a symlink. UfsNotFoundError."""

    @abstractmethod
    def list(self, path: bytes, token: str | None = None, limit: int = 1000) -> ListPage:
        """Direct children of a directory. UfsNotFoundError (where has_directories)."""

    @abstractmethod
    def read(self, path: bytes, offset: int, length: int, fingerprint: bytes | None = None) -> Buffer:
        """Bytes [offset, offset + length), fewer only at the end of the object. With `fingerprint`:
        UfsChangedError when the object is another version. A body shorter than the store announced
        is UfsUnavailableError, never silently short."""

    @abstractmethod
    def put(
        self,
        path: bytes,
        fd: int,
        size: int,
        attrs: UfsAttrs,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> UfsEntry:
        """Store [0, size) of the open file `fd` (by pread; its offset is not used) as `path`,
        replacing what is there, creating parents. Visible only when complete: a reader sees the
        old bytes or the new ones. Large objects in parts, several at once; every part is aborted
        on failure or PutCancelled (`is_cancelled` is asked between parts and once at the end,
        just before the result becomes visible)."""

    @abstractmethod
    def mkdir(self, path: bytes, attrs: UfsAttrs) -> UfsEntry:
        """Also parents; no error when it is there."""

    @abstractmethod
    def symlink(self, path: bytes, target: bytes, attrs: UfsAttrs) -> UfsEntry: ...

    @abstractmethod
    def set_attrs(self, path: bytes, attrs: UfsAttrs) -> UfsEntry:
        """Mode, owner and mtime (owner best-effort when not root). UfsNotFoundError."""

    def is_touched(self, old: bytes, new: bytes, mtime_ns: int) -> bool:
        """By two fingerprints of a file: whether all that happened in between may have been a `set_attrs`
        with this mtime."""
        return old == new

    @abstractmethod
    def rename(self, source: bytes, target: bytes) -> UfsEntry:
        """With has_atomic_rename: file or tree, replacing a file (or empty directory) at target.
        Without: `copy` then `delete` of a single object. Creates parents of target."""

    @abstractmethod
    def copy(self, source: bytes, target: bytes) -> UfsEntry:
        """Inside the store, without the bytes passing here; a single file."""

    @abstractmethod
    def delete(self, path: bytes) -> None:
        """A file or symlink, or an empty directory. No error when it is not there.
        UfsError with errno ENOTEMPTY for a directory that is not empty."""

    def delete_many(self, paths: Sequence[bytes]) -> None:
        """Like `delete` of each, in as few requests as the store allows."""
        for path in paths:
            self.delete(path)

    @abstractmethod
    def close(self) -> None:
        """Idempotent."""


TEMP_PREFIX = b".alluxiofuse-tmp-"
"""Names of half-written files in stores without atomic put; connectors never list them."""
