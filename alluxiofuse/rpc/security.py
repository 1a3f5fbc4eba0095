"""Where the shared secret comes from. It is read from a file and goes nowhere else."""

from __future__ import annotations

import os
import stat

from alluxiofuse.errors import UserError
from alluxiofuse.wire.handshake import MIN_SECRET_BYTES, Security

__all__ = ["Security", "load_secret_file"]

MAX_SECRET_BYTES = 4096


def load_secret_file(path: str) -> bytes:
    """The secret in `path`, without white space at its ends.

    UserError: not readable, no regular file, readable or writable for group or others, owned by
    someone else than us or root, or with fewer than `MIN_SECRET_BYTES` bytes.
    """
    try:
        # O_NONBLOCK: a FIFO in this place must not hang us.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as exc:
        reason = os.strerror(exc.errno) if isinstance(exc, OSError) and exc.errno else "not a path"
        raise UserError(f"cannot read the secret file {path}: {reason}") from None
    try:
        _check_owner_and_mode(path, os.fstat(fd))
        data = os.read(fd, MAX_SECRET_BYTES + 1)
    except OSError as exc:
        raise UserError(f"cannot read the secret file {path}: {exc.strerror}") from None
    finally:
        os.close(fd)
    secret = data.strip()
    if len(data) > MAX_SECRET_BYTES:
        raise UserError(f"the secret file {path} is too large: at most {MAX_SECRET_BYTES} bytes")
    if len(secret) < MIN_SECRET_BYTES:
        raise UserError(
            f"the secret file {path} holds fewer than {MIN_SECRET_BYTES} bytes: "
            f"make one with `openssl rand -hex 32 > FILE; chmod 600 FILE`"
        )
    return secret


def _check_owner_and_mode(path: str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"the secret file {path} is not a regular file")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise UserError(f"the secret file {path} can be read by other users: run `chmod 600 {path}`")
    if found.st_uid not in (0, os.geteuid()):
        raise UserError(f"the secret file {path} belongs to another user (uid {found.st_uid})")
