"""The files of the state that tests damage, and what is left of them."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path

from daemons import LocalDaemon
from fsck_world import slab_of, store_of
from servers import wait_until

from alluxiofuse.master import places
from alluxiofuse.master.store import Store, u64

MIB = 1 << 20


def content(name: str, size: int) -> bytes:
    """Bytes that are nowhere else, and differ from page to page."""
    seed = name.encode() + b"."
    return (seed * (size // len(seed) + 1))[: size - 8] + b"the end." if size > 8 else b"x" * size


CLEAN_FILES = {
    "clean.bin": content("clean.bin", 3 * MIB + 17),
    "dir/small": content("small", 5000),
    "dir/sub/deep": content("deep", 100),
    "moved-before": content("moved", 4000),
    "removed-before": content("removed", 3000),
}
DIRTY_FILES = {
    "dirty.bin": content("dirty.bin", 3 * MIB + 5),
    "dir/dirty": content("dirty", 6000),
    "dir/sub/dirty": content("subdirty", 1200),
    "hard1": content("hard", 900),
    "again": content("again", MIB),
}


def build(site: LocalDaemon) -> None:
    """Fills a mount, some of it persisted and cached, the rest dirty, and leaves it to be killed.
    Nothing is persisted by itself (`persist_delay` of an hour)."""
    top = site.mount
    (top / "dir" / "sub").mkdir(parents=True)
    for name, data in CLEAN_FILES.items():
        (top / name).write_bytes(data)
    (top / "again").write_bytes(b"an older version")
    site.wait_persisted()
    os.rename(top / "moved-before", top / "moved")
    os.unlink(top / "removed-before")
    (top / "new" / "inner").mkdir(parents=True)
    for name, data in DIRTY_FILES.items():
        (top / name).write_bytes(data)
    os.link(top / "hard1", top / "hard2")
    os.symlink("clean.bin", top / "link")
    os.setxattr(top / "dirty.bin", b"user.color", b"blue")
    wait_until(lambda: not is_any_open(site, DIRTY_FILES), "what was closed is sealed")


def is_any_open(site: LocalDaemon, names: Iterable[str]) -> bool:
    """For writing: close(2) returns before the worker has ended it."""
    found = site.fs_json("stat", *(f"/{name}" for name in names))
    return any(one["is_open_for_write"] for one in found)


def expected() -> dict[str, bytes | str]:
    """Path -> bytes of a file, target of a symlink, or "dir"."""
    files: dict[str, bytes | str] = {**CLEAN_FILES, **DIRTY_FILES}
    files["moved"] = files.pop("moved-before")
    files.pop("removed-before")
    files["hard2"] = files["hard1"]
    for name in ("dir", "dir/sub", "new", "new/inner"):
        files[name] = "dir"
    files["link"] = "-> clean.bin"
    return files


def tree_of(site: LocalDaemon) -> dict[str, bytes | str]:
    """The same, as it is in the metadata, the slabs and the under storage."""
    found: dict[str, bytes | str] = {}
    with store_of(site) as store:
        _walk(site, store, 1, "", found)
    return found


def _walk(site: LocalDaemon, store: Store, parent: int, above: str, found: dict[str, bytes | str]) -> None:
    for name, raw in list(store.scan("edge", u64(parent))):
        ino = int.from_bytes(raw, "big")
        path = above + name.decode()
        record = store.inode(ino)
        assert record is not None, path
        if stat.S_ISDIR(record.mode):
            found[path] = "dir"
            _walk(site, store, ino, f"{path}/", found)
        elif stat.S_ISLNK(record.mode):
            found[path] = f"-> {record.target.decode()}"
        elif record.is_in_ufs and record.ufs_container == record.container:
            location = places.location_path(store, ino, record)
            assert location is not None
            found[path] = (site.ufs_dir / location.decode()).read_bytes()
        else:
            slab = slab_of(site, record.container)
            found[path] = slab.read_bytes()[: record.size] if slab.exists() else "no bytes"


def copy(source: Path, target: Path) -> None:
    """A directory tree in place of another, holes and times included."""
    shutil.rmtree(target, ignore_errors=True)
    os.makedirs(target.parent, exist_ok=True)
    subprocess.run(["cp", "-a", "--sparse=always", str(source), str(target)], check=True)
