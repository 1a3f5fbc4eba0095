"""A local daemon's state, to be damaged and checked."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from daemons import LocalDaemon, run_cli

from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.store import Store
from alluxiofuse.worker.index import Index

Opened = TypeVar("Opened", Store, Index)


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
def _opened(make: Callable[[], Opened]) -> Iterator[Opened]:
    opened = make()
    try:
        yield opened
    finally:
        opened.close()
        del opened
        gc.collect()  # RocksDB's lock goes with the last reference


def store_of(site: LocalDaemon) -> AbstractContextManager[Store]:
    """The metadata of a daemon that does not run."""
    return _opened(lambda: Store(site.state / "master" / "meta"))


def index_of(site: LocalDaemon) -> AbstractContextManager[Index]:
    """The index of its worker."""
    return _opened(lambda: Index(site.state / "worker" / "index"))


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
