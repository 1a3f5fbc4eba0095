"""A local under storage whose disk is not mounted, and what a kill in the middle of a put leaves there."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import LocalDaemon, run_cli

from alluxiofuse.errors import UfsUnavailableError
from alluxiofuse.ufs.base import TEMP_PREFIX, UfsAttrs
from alluxiofuse.ufs.local import LocalUnderStorage
from alluxiofuse.ufs.registry import open_ufs

ATTRS = UfsAttrs(0o644, os.geteuid(), os.getegid(), 1_000_000_000)


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def unmount(place: Path) -> None:
    subprocess.run(["umount", "--lazy", str(place)], check=False, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """(a "disk", the empty directory where a test mounts and unmounts it)."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    content, place = tmp_path / "content", tmp_path / "place"
    content.mkdir()
    place.mkdir()
    yield content, place
    while f" {place} " in Path("/proc/self/mountinfo").read_text():
        unmount(place)


def put(store: LocalUnderStorage, path: bytes, data: bytes) -> None:
    fd = os.memfd_create("data")
    try:
        os.write(fd, data)
        store.put(path, fd, len(data), ATTRS)
    finally:
        os.close(fd)


# --- the disk is not mounted -----------------------------------------------------------------------------


def test_an_unmounted_disk_is_not_an_empty_store(
    disk: tuple[Path, Path], local_daemon: Callable[..., LocalDaemon]
) -> None:
    """Neither while it runs nor at a later start."""
    content, place = disk
    mount("--bind", content, place)
    site = local_daemon(place, arguments=["--sync-interval", "0"])
    (site.mount / "dir").mkdir()
    (site.mount / "dir/file").write_text("kept")
    (site.mount / "other").write_text("kept too")
    site.wait_persisted()
    for life in range(2):
        unmount(place)
        if life:
            assert site.stop() == 0
            site.daemon.start()
        assert sorted(path.name for path in site.mount.iterdir()) == sorted(
            ["dir", "other", *(f"new{number}" for number in range(life))]
        )
        assert (site.mount / "dir/file").read_text() == "kept"
        (site.mount / f"new{life}").write_text("waits")
        done = run_cli("fs", "persist", "--timeout", "1s", site.mount / f"new{life}", check=False)
        assert done.returncode == 1
        assert list(place.iterdir()) == [], "nothing is put where the disk is not"
        assert any("disk mounted" in line for line in site.report()["persist_failing"])
        mount("--bind", content, place)
        site.wait_persisted()
        assert (content / f"new{life}").read_text() == "waits"
    assert site.report()["persist_failing"] == []
    names = ["dir", "new0", "new1", "other"]
    assert sorted(path.name for path in content.iterdir()) == names
    assert sorted(path.name for path in site.mount.iterdir()) == names


def test_another_disk_is_refused_unless_told(disk: tuple[Path, Path]) -> None:
    content, place = disk
    mount("-t", "tmpfs", "-o", "size=1M", "first", place)
    store = LocalUnderStorage(str(place))
    put(store, b"f", b"1")
    identity = store.identity()
    unmount(place)
    mount("-t", "tmpfs", "-o", "size=1M", "second", place)
    (place / "g").write_text("of another disk")
    for known in (store, open_ufs(str(place), {"identity": identity})):
        with pytest.raises(UfsUnavailableError, match="identity=new"):
            known.list(b"")
        with pytest.raises(UfsUnavailableError, match="identity=new"):
            known.check()
        with pytest.raises(UfsUnavailableError, match="identity=new"):
            known.delete(b"g")
    told = open_ufs(str(place), {"identity": "new"})
    assert [entry.path for entry in told.list(b"").entries] == [b"g"]
    assert told.identity() != identity
    assert content.exists()


def test_a_directory_restored_in_its_filesystem_is_accepted(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    store = LocalUnderStorage(str(place))
    put(store, b"f", b"1")
    known = open_ufs(str(place), {"identity": store.identity()})
    place.rename(tmp_path / "old")
    place.mkdir()
    for one in (store, known):
        with pytest.raises(UfsUnavailableError):
            one.list(b"")
    (place / "f").write_text("1")
    for one in (store, known):
        assert [entry.path for entry in one.list(b"").entries] == [b"f"]


# --- a kill in the middle of a put -----------------------------------------------------------------------

KILLED = textwrap.dedent("""
    import os, sys
    from alluxiofuse.ufs.base import UfsAttrs
    from alluxiofuse.ufs.local import LocalUnderStorage

    def hang():
        print("in the middle", flush=True)
        sys.stdin.read()

    with open(sys.argv[2], "rb") as file:
        LocalUnderStorage(sys.argv[1]).put(
            b"d/f", file.fileno(), os.fstat(file.fileno()).st_size, UfsAttrs(0o644, 0, 0, 0), hang)
    """)


@pytest.fixture
def putting(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the middle of a put of "d/f" below `tmp_path / "ufs"`."""
    (tmp_path / "ufs/d").mkdir(parents=True)
    (tmp_path / "source").write_bytes(b"half")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "ufs"), str(tmp_path / "source")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in the middle\n"
        yield process
        process.kill()


def temporaries(place: Path) -> list[str]:
    return [name for name in os.listdir(place) if name.startswith(TEMP_PREFIX.decode())]


@pytest.mark.parametrize("how", ["put", "delete", "tidy", "rename", "symlink"])
def test_what_a_kill_left_goes_with_the_name(
    putting: subprocess.Popen[bytes], tmp_path: Path, how: str
) -> None:
    place = tmp_path / "ufs/d"
    store = LocalUnderStorage(str(tmp_path / "ufs"))
    (place / "f").write_text("old")

    def act() -> None:
        if how == "put":
            put(store, b"d/f", b"new")
        elif how == "delete":
            store.delete(b"d/f")
        elif how == "tidy":
            store.tidy(b"d/f")
        elif how == "rename":
            store.rename(b"d/f", b"d/g")
        else:
            store.symlink(b"d/f", b"target", ATTRS)

    assert len(temporaries(place)) == 1
    if how in ("put", "tidy"):
        act()
        assert len(temporaries(place)) == 1, "it is being written"
    putting.kill()
    putting.wait()
    assert len(temporaries(place)) == 1
    act()
    assert temporaries(place) == []
    wanted = {"put": "new", "tidy": "old"}
    if how in wanted:
        assert (place / "f").read_text() == wanted[how]
