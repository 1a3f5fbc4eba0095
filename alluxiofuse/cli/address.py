"""Which master a command talks to, and what a PATH argument means.

The master: --master (HOST:PORT, unix:PATH, or a state directory), else the FUSE mount that a PATH is
below, else ALLUXIOFUSE_MASTER or the configuration, else the only alluxiofuse mount on this machine,
else 127.0.0.1:19998.

A PATH is absolute in the namespace (`/a/b`), or a path below an alluxiofuse mount of this machine
(`mnt/a`, `/mnt/a`). `alluxiofuse:/a` is in the namespace whatever is mounted on /a.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alluxiofuse.cli.state_dir import MASTER_SOCKET
from alluxiofuse.config import Config
from alluxiofuse.errors import UserError

if TYPE_CHECKING:
    from alluxiofuse.fuse.mountpoint import Mount, Place

DEFAULT_MASTER = "127.0.0.1:19998"
NAMESPACE_PREFIX = "alluxiofuse:"
LOCAL_PREFIX = "file:"


@dataclass(frozen=True, slots=True)
class Target:
    """A namespace path and the FUSE mount it was named through, if any."""

    path: bytes
    mount: Mount | None


def target_of(text: str) -> Target:
    """What a PATH argument means. UserError: relative, and not below a mount of ours."""
    if text.startswith(NAMESPACE_PREFIX):
        return Target(_absolute(text.removeprefix(NAMESPACE_PREFIX), text), None)
    place = _place_of(os.fsencode(os.path.abspath(text)))
    if place is None:
        return Target(_absolute(text, text), None)
    path = os.path.join(namespace_root(place.mount), place.inside.lstrip(b"/"))
    return Target(os.path.normpath(path), place.mount)


def _place_of(path: bytes) -> Place | None:
    """Where an absolute path is below a mount. A symlink as its last part is not followed: it is the
    thing that is named."""
    from alluxiofuse.fuse.mountpoint import Place, find_mount

    parent, name = os.path.split(path)
    above = find_mount(parent) if name else None
    if above is not None:
        return Place(above.mount, os.path.join(above.inside, name))
    here = find_mount(path)
    return here if here is not None and here.inside == b"/" else None


def namespace_root(mount: Mount) -> bytes:
    """The directory of the namespace that a mount shows, with a leading slash."""
    return b"/" + os.fsencode(split_source(mount.source)[1]).strip(b"/")


def split_source(source: str) -> tuple[str, str]:
    """HOST:PORT[/path] as (address, path); the path of unix:/a/b/master.sock[/path] begins behind
    the socket's name."""
    if source.startswith("unix:"):
        socket, _, path = source.partition(f"/{MASTER_SOCKET}")
        if path or source.endswith(f"/{MASTER_SOCKET}"):
            return f"{socket}/{MASTER_SOCKET}", path
        return source, ""
    address, slash, path = source.partition("/")
    return address, slash + path


def _absolute(path: str, shown: str) -> bytes:
    if not path.startswith("/"):
        raise UserError(
            f"{shown!r} is relative and not below an alluxiofuse mount: write /{path} for the namespace"
        )
    return os.path.normpath(b"/" + os.fsencode(path).lstrip(b"/"))


def master_address(asked: str | None, config: Config, mount: Mount | None = None) -> str:
    """The address of the master to talk to, see the module. UserError: several mounts to choose from."""
    if asked:
        return expand(asked)
    if mount is not None:
        return split_source(mount.source)[0]
    if config.cluster.master:
        return expand(config.cluster.master)
    from alluxiofuse.fuse.mountpoint import mounts

    sources = sorted({split_source(one.source)[0] for one in mounts() if one.is_ours})
    if len(sources) > 1:
        raise UserError(f"several masters are mounted here ({', '.join(sources)}): choose one with --master")
    return sources[0] if sources else DEFAULT_MASTER


def expand(text: str) -> str:
    """A state directory as its master's socket; other addresses as they are."""
    if not text.startswith("unix:") and os.path.isdir(text):
        return f"unix:{os.path.abspath(os.path.join(text, MASTER_SOCKET))}"
    return text
