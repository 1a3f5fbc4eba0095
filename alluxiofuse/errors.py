"""The error tree. Layer 0: imports nothing of the project.

Every error has a stable `code` (what a peer, a log reader and a test match on), an `errno`
(what a program on the mount sees) and a message of one sentence that names the thing and,
where there is one, the way out. The class says who is to blame:

* `UserError`      - the person at the command line; printed as one line, exit code 2.
* `FsError`        - the program on the mount, an ordinary POSIX outcome; never logged.
* `PeerError`      - the other end of a connection (garbage, bad credentials, gone).
* `UfsError`       - an under storage.
* `StateError`     - our own data on disk (corrupt, foreign, too new).

An error crosses the wire as `(code, errno, message)`, see `to_wire` and `from_wire`.
No message ever holds a secret: credentials are never formatted into one.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import ClassVar

MAX_MESSAGE_CHARS = 500


class AlluxioFuseError(Exception):
    """Base of everything this project raises on purpose."""

    code: ClassVar[str] = "internal"
    default_errno: ClassVar[int] = _errno.EIO
    errno: int

    def __init__(self, message: str = "", *, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = self.default_errno if errno is None else errno

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else ""


class UserError(AlluxioFuseError):
    """A mistake in an argument, a configuration or the environment. One line, exit code 2."""

    code = "user"
    default_errno = _errno.EINVAL


class FsError(AlluxioFuseError):
    """An ordinary POSIX outcome such as ENOENT; `FsError(errno.ENOENT, "a/b")`."""

    code = "fs"

    def __init__(self, errno: int, message: str = "") -> None:
        super().__init__(message or os.strerror(errno), errno=errno)


class NoSpaceError(AlluxioFuseError):
    """No tier has room, and nothing that could be evicted or persisted would make any."""

    code = "no_space"
    default_errno = _errno.ENOSPC


class StaleError(AlluxioFuseError):
    """The inode, container or grant that was named is no more: look it up again."""

    code = "stale"
    default_errno = _errno.ESTALE


class ChecksumError(AlluxioFuseError):
    """A page's bytes are not those that were stored, and no other copy could be had."""

    code = "checksum"


class PeerError(AlluxioFuseError):
    """Something is wrong with the other end of a connection."""

    code = "peer"


class ProtocolError(PeerError):
    """The peer sent bytes that are no valid frame, message or sequence; the connection is dead."""

    code = "protocol"
    default_errno = _errno.EPROTO


class BadRequestError(PeerError):
    """A well-framed request whose method or arguments are not valid; the connection lives on."""

    code = "bad_request"
    default_errno = _errno.EINVAL


class AuthError(PeerError):
    """The handshake failed: no secret, a wrong one, a foreign cluster, or a peer not allowed."""

    code = "auth"
    default_errno = _errno.EACCES


class ConnectionLost(PeerError):
    """The connection broke before the answer came: the request may or may not have been done."""

    code = "connection_lost"


class UnavailableError(PeerError):
    """Nobody answers (refused, timed out), or no worker is there to do it."""

    code = "unavailable"


class SessionExpiredError(PeerError):
    """The master or worker does not know this session or registration any more: start anew."""

    code = "session_expired"
    default_errno = _errno.ESTALE


class UfsError(AlluxioFuseError):
    """An under storage failed for good; EIO to the program."""

    code = "ufs"


class UfsNotFoundError(UfsError):
    code = "ufs_not_found"
    default_errno = _errno.ENOENT


class UfsExistsError(UfsError):
    code = "ufs_exists"
    default_errno = _errno.EEXIST


class UfsPermissionError(UfsError):
    """Credentials are wrong or do not allow it."""

    code = "ufs_permission"
    default_errno = _errno.EACCES


class UfsUnavailableError(UfsError):
    """Throttled, timed out, unreachable: the same call may succeed later."""

    code = "ufs_unavailable"


class UfsChangedError(UfsError):
    """The object is no longer the version (fingerprint) that was asked for."""

    code = "ufs_changed"
    default_errno = _errno.ESTALE


class StateError(AlluxioFuseError):
    """A state directory is foreign, unreadable, newer than this program, or inconsistent."""

    code = "state"


class ForeignStateError(StateError):
    """The master's state is not the one that was known before, or an older version of it."""

    code = "foreign_state"


def _tree(cls: type[AlluxioFuseError]) -> dict[str, type[AlluxioFuseError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        found.update(_tree(sub))
    return found


_BY_CODE = _tree(AlluxioFuseError)


def to_wire(exc: AlluxioFuseError) -> tuple[str, int, str]:
    """(code, errno, message) of at most `MAX_MESSAGE_CHARS` characters."""
    return exc.code, exc.errno, exc.message[:MAX_MESSAGE_CHARS]


def from_wire(code: str, errno: int, message: str) -> AlluxioFuseError:
    """The error a peer sent; an unknown code becomes the base class with that errno."""
    cls = _BY_CODE.get(code, AlluxioFuseError)
    if cls is FsError:
        return FsError(errno, message)
    return cls(message, errno=errno)
