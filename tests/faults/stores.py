"""Is what the under storage holds what the namespace says? Asked when nothing is left to persist.

A file of several names (hard links) is stored once, under one of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from actor import scan
from oracle import DIRECTORY, FILE, SYMLINK, Found
from servers import SeaweedS3


class Store(Protocol):
    has_phantoms: bool
    """A directory that is gone may be seen again for a while, without files: SeaweedFS lists a prefix for
    40 s and more after its last key was deleted (docs/ufs.md)."""

    def differences(self, tree: dict[str, Found]) -> list[str]:
        """From a scan of the FUSE mount, leftovers included."""
        ...


def missing(tree: dict[str, Found], stored: set[str], kinds: set[str]) -> list[str]:
    """What of `tree` is not stored, what is twice, and what should not be there."""
    wrong = [f"{path}: only in the store" for path in sorted(stored - tree.keys())]
    names: dict[int, list[str]] = {}
    for path, one in tree.items():
        if one.kind in kinds:
            names.setdefault(one.ino, []).append(path)
        elif path in stored:
            wrong.append(f"{path}: stored, a {one.kind}")
    for paths in names.values():
        count = sum(path in stored for path in paths)
        if count != 1:
            wrong.append(f"{sorted(paths)}: stored {count} times")
    return wrong


class DirectoryStore:
    has_phantoms = False

    def __init__(self, top: Path) -> None:
        self._top = top

    def differences(self, tree: dict[str, Found]) -> list[str]:
        stored = scan(str(self._top), 0)
        wrong = missing(tree, set(stored), {FILE, DIRECTORY, SYMLINK})
        for path in sorted(tree.keys() & stored.keys()):
            ours, theirs = tree[path], stored[path]
            if _about(ours) != _about(theirs):
                wrong.append(f"{path}: {_about(theirs)} in the store, not {_about(ours)}")
            if ours.data != theirs.data:
                wrong.append(f"{path}: other bytes in the store")
        return wrong


def _about(one: Found) -> tuple[object, ...]:
    if one.kind == DIRECTORY:
        return one.kind, one.mode
    if one.kind == SYMLINK:
        return one.kind, one.target
    return one.kind, one.mode, len(one.data), one.mtime_ns


class BucketStore:
    """Files and nothing else are objects."""

    has_phantoms = True

    def __init__(self, server: SeaweedS3, bucket: str) -> None:
        self._client: Any = server.client()
        self._bucket = bucket

    def differences(self, tree: dict[str, Found]) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket)
        keys = {one["Key"] for page in pages for one in page.get("Contents", ())}
        wrong = missing(tree, keys, {FILE})
        for key in sorted(keys & tree.keys()):
            body = self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
            if body != tree[key].data:
                wrong.append(f"{key}: other bytes in the store")
        uploads = self._client.list_multipart_uploads(Bucket=self._bucket).get("Uploads", ())
        return wrong + [f"{one['Key']}: an upload that nobody ends" for one in uploads]
