"""Operations of the master on names and attributes. See `master_ops`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

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
    SymlinkTarget,
    XattrName,
    XattrValue,
)
from alluxiofuse.wire.types import (
    Attr,
    Caller,
    DirEntry,
    FsUsage,
    Layout,
)


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
