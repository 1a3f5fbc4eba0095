"""A local daemon's state, to be damaged and checked."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from daemons import LocalDaemon, run_cli

from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.store import Store
from alluxiofuse.worker.index import Index


def fsck(*states: Path, arguments: tuple[str, ...] = ()) -> dict[str, Any]:
    """`alluxiofuse fsck --json`: the document, with its exit code."""
    named = [word for state in states for word in ("--state", str(state))]
    done = run_cli("fsck", "--json", *named, *arguments, check=False)
    assert done.returncode in (0, 1, 4), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["is_complete"] is True
    assert found["exit_code"] == done.returncode
    return found


def damage_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in found["findings"] if one["level"] != "note"]


def check_clean(*states: Path, arguments: tuple[str, ...] = ()) -> dict[str, Any]:
    found = fsck(*states, arguments=arguments)
    assert damage_of(found) == []
    assert found["exit_code"] == 0
    return found


def repair(*states: Path, arguments: tuple[str, ...] = ()) -> dict[str, Any]:
    """Everything is mended, and the next run finds nothing."""
    found = fsck(*states, arguments=("--repair", *arguments))
    assert found["left"] == {}, found
    check_clean(*states, arguments=arguments)
    return found


@contextmanager
def store_of(site: LocalDaemon) -> Iterator[Store]:
    """The metadata of a daemon that does not run."""
    store = Store(site.state / "master" / "meta")
    try:
        yield store
    finally:
        store.close()
        del store
        gc.collect()


@contextmanager
def index_of(site: LocalDaemon) -> Iterator[Index]:
    index = Index(site.state / "worker" / "index")
    try:
        yield index
    finally:
        index.close()
        del index
        gc.collect()


def find(store: Store, path: str) -> int:
    ino = 1
    for name in path.encode().split(b"/"):
        if name:
            found = store.child(ino, name)
            assert found is not None, path
            ino = found
    return ino


def record_of(store: Store, path: str) -> InodeRecord:
    record = store.inode(find(store, path))
    assert record is not None
    return record


def slab_of(site: LocalDaemon, container: int) -> Path:
    return site.base / "ssd" / "slabs" / f"{container & 255:02x}" / f"{container:016x}"
