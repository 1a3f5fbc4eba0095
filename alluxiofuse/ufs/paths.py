"""What a path inside an under storage may be, and how it is shown. No I/O."""

from __future__ import annotations

import errno
import re

from alluxiofuse.errors import UfsError
from alluxiofuse.ids import MAX_NAME_BYTES, MAX_PATH_BYTES
from alluxiofuse.ufs.base import TEMP_PREFIX

_SHOWN_CHARS = 200
_BAD_COMPONENT = re.compile(rb"(?:^|/)\.{0,2}(?:/|$)|\0")
"""An empty, "." or ".." component (so also a leading or trailing slash), or a NUL byte."""


def check_path(path: bytes) -> None:
    """UfsError(EINVAL) for a path that breaks the rule of `base`; b"" is good.

    Callers guarantee the rule; this is the second lock on the door, because a ".." that slipped
    through would leave the mounted place."""
    if path and (_BAD_COMPONENT.search(path) or len(path) > MAX_PATH_BYTES):
        raise UfsError(f"{show(path)} is not a path inside an under storage", errno=errno.EINVAL)


def check_new_path(path: bytes) -> None:
    """The same for a path about to be made: not the place itself, no name that is kept for our
    own half-written files, no name too long for the mount."""
    check_path(path)
    name = path.rpartition(b"/")[2]
    if not path or name.startswith(TEMP_PREFIX):
        raise UfsError(f"{show(path)!r} can't be stored: the name is reserved", errno=errno.EINVAL)
    if len(name) > MAX_NAME_BYTES:
        raise UfsError(f"{show(path)}: the name is too long", errno=errno.ENAMETOOLONG)


def is_good_relative(path: bytes) -> bool:
    """True when a stored name can be shown on a mount at all (else hide and count it)."""
    if not path or _BAD_COMPONENT.search(path):
        return False
    return all(len(name) <= MAX_NAME_BYTES for name in path.split(b"/"))


def show(path: bytes) -> str:
    """The path for a message: text, the tail of a long one."""
    text = path.decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return text if len(text) <= _SHOWN_CHARS else "..." + text[-_SHOWN_CHARS:]
