"""Finds the connector of a URI. Other packages add kinds of stores by an entry point in the group
`alluxiofuse.ufs`, named as the scheme, a callable `(uri, options) -> UnderStorage`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points

from alluxiofuse.errors import UserError
from alluxiofuse.ufs.base import UnderStorage

ENTRY_POINT_GROUP = "alluxiofuse.ufs"
HIDDEN = "******"
IDENTITY = "identity"
"""The option that the master keeps by itself (`UnderStorage.identity`)."""
NEW_IDENTITY = "new"
_IDENTITY = re.compile(r"[0-9a-f]+-[0-9a-f]+")
SECRET_OPTIONS = frozenset({"access_key", "secret_key", "session_token"})
"""Names of options whose values are never shown, logged or written where others may read."""
_SECRET_WORDS = ("secret", "token", "password", "passwd", "credential", "access_key", "private")

Opener = Callable[[str, dict[str, str]], UnderStorage]


def redact(options: Mapping[str, str]) -> dict[str, str]:
    """The options to show: a secret's value is replaced, also of an option nobody knows but whose
    name sounds like one."""
    return {name: HIDDEN if is_secret(name) else value for name, value in options.items()}


def is_secret(name: str) -> bool:
    return name in SECRET_OPTIONS or any(word in name.lower() for word in _SECRET_WORDS)


def open_ufs(uri: str, options: dict[str, str]) -> UnderStorage:
    """The connector of `file:///dir`, `/dir`, `./dir`, `s3://bucket/prefix`, `s3a://...` or another
    scheme some package offers. Nothing is asked of the store yet: call `check`.

    UserError of one line for an unknown scheme, an unknown option or a bad value; UfsPermissionError
    where a library finds no usable credentials."""
    scheme = scheme_of(uri)
    _check_no_credentials(uri)
    opener = _OPENERS.get(scheme) or _foreign(scheme)
    if opener is None:
        known = ", ".join(f"{name}://" for name in known_schemes())
        raise UserError(f"{uri}: no under storage is called {scheme}://; known are a directory, {known}")
    return opener(uri, options)


def scheme_of(uri: str) -> str:
    """ "file" for a plain path, else the lower-case part before "://"."""
    scheme, separator, _ = uri.partition("://")
    return scheme.lower() if separator and "/" not in scheme else "file"


def known_schemes() -> list[str]:
    return sorted({*_OPENERS, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def check_options(uri: str, options: Mapping[str, str], known: Mapping[str, str]) -> None:
    """UserError for the first option that is not `known` (name -> what it is for)."""
    for name in options:
        if name not in known:
            raise UserError(f"{uri}: unknown option {name}; known are {', '.join(sorted(known))}")


def _open_local(uri: str, options: dict[str, str]) -> UnderStorage:
    from alluxiofuse.ufs.local import OPTIONS, LocalUnderStorage

    check_options(uri, options, OPTIONS)
    fsync = options.get("fsync", "true").lower()
    if fsync not in ("true", "false"):
        raise UserError(f"option fsync={options['fsync']}: write true or false")
    identity = options.get("identity", "")
    if identity and identity != NEW_IDENTITY and not _IDENTITY.fullmatch(identity):
        raise UserError(f"option identity={identity}: write new, or leave it out")
    known = "" if identity == NEW_IDENTITY else identity
    return LocalUnderStorage(_directory_of(uri), is_synced=fsync == "true", identity=known)


def local_directory(uri: str) -> bytes | None:
    """Which directory of this machine a URI names; None when it names something else. UserError."""
    _check_no_credentials(uri)
    return _directory_of(uri) if scheme_of(uri) == "file" else None


def _check_no_credentials(uri: str) -> None:
    """URIs are shown, logged and kept in plain sight. UserError that does not repeat it."""
    scheme = scheme_of(uri)
    if scheme != "file" and "@" in uri.partition("://")[2].partition("/")[0]:
        raise UserError(
            f"the {scheme}:// URI holds credentials: leave them out, and use the store's environment "
            "variables or --option NAME=@FILE"
        )


def _directory_of(uri: str) -> bytes:
    """Of `file:///dir` or of a plain path; both are taken as they stand, without % escapes."""
    if not uri.lower().startswith("file://"):
        path = os.fsencode(uri)
    else:
        host, _, rest = uri[len("file://") :].partition("/")
        if host not in ("", "localhost") or (not rest and not uri.endswith("/")):
            raise UserError(f"{uri}: write file:///DIRECTORY, with three slashes, or the path alone")
        path = b"/" + os.fsencode(rest)
    if not path or b"\0" in path:
        raise UserError("the under storage is not a path: it is empty or holds a NUL")
    return os.path.abspath(path)


def _open_s3(uri: str, options: dict[str, str]) -> UnderStorage:
    # Imported here: it costs a quarter of a second that a local directory need not pay.
    from alluxiofuse.ufs.s3 import S3UnderStorage
    from alluxiofuse.ufs.s3_options import OPTIONS, parse_options

    check_options(uri, options, OPTIONS)
    return S3UnderStorage(parse_options(uri, options))


def _foreign(scheme: str) -> Opener | None:
    for point in entry_points(group=ENTRY_POINT_GROUP, name=scheme):
        found: Opener = point.load()
        return found
    return None


_OPENERS: dict[str, Opener] = {"file": _open_local, "s3": _open_s3, "s3a": _open_s3}
