"""Directories that must not lie within each other: an under storage, where it is mounted, and where state
and cache are kept. A mount that shows itself, or a cache that caches itself, has no end."""

from __future__ import annotations

import os
from collections.abc import Iterable

from alluxiofuse.errors import UserError
from alluxiofuse.ufs.registry import local_directory


def check_apart(ufs: str, mount: str | None, ours: Iterable[tuple[str, str]]) -> None:
    """UserError that names the first two that overlap. `ufs`: its URI ("": not known here); `mount`: the
    FUSE mount point; `ours`: (what it is, directory), which need not exist."""
    store = local_directory(ufs) if ufs else None
    store_path = None if store is None else os.path.realpath(store)
    mount_path = None if mount is None else os.path.realpath(os.fsencode(mount))
    if store_path is not None and mount_path is not None and _overlap(store_path, mount_path):
        raise UserError(
            f"the mount point {mount} and the under storage {ufs} lie within each other, so it would show "
            "itself without end: choose a directory elsewhere"
        )
    for what, directory in ours:
        path = os.path.realpath(os.fsencode(directory))
        if store_path is not None and _overlap(store_path, path):
            raise UserError(
                f"the {what} {directory} and the under storage {ufs} lie within each other: choose a "
                "directory elsewhere"
            )
        if mount_path is not None and _overlap(mount_path, path):
            raise UserError(
                f"the {what} {directory} and the mount point {mount} lie within each other: choose a "
                "directory elsewhere"
            )


def _overlap(one: bytes, other: bytes) -> bool:
    return os.path.commonpath([one, other]) in (one, other)
