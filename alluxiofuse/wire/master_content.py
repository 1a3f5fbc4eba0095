"""Operations of the master about files' content. See `master_ops`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from alluxiofuse.wire.messages import (
    U63,
    Change,
    Id,
    Ino,
    Message,
    Nothing,
    Ns,
    Request,
    Size,
)
from alluxiofuse.wire.types import (
    Attr,
    Caller,
    Layout,
)


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
