"""Every `fs` command and `admin report`, against a running filesystem."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from daemons import LocalDaemon, run_cli
from servers import wait_until

from alluxiofuse.wire.types import PERSISTENCE_NAMES


@pytest.fixture
def place(shared_local: LocalDaemon, request: pytest.FixtureRequest) -> str:
    """A directory of the test's own, as a namespace path."""
    name = f"/{request.node.name[:60]}".replace("[", "-").replace("]", "")
    shared_local.fs("mkdir", name)
    return name


def on_mount(site: LocalDaemon, path: str) -> Path:
    return site.mount / path.lstrip("/")


def names(listing: str) -> list[str]:
    return listing.split()


def failing(site: LocalDaemon, command: str, *arguments: str) -> str:
    """Standard error of a command that must fail as an operation: one line, code 1."""
    done = site.cli("fs", command, "--master", site.address, *arguments, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("alluxiofuse: error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert any(path.removeprefix("file:") in done.stderr for path in arguments), done.stderr
    return done.stderr


def test_mkdir(shared_local: LocalDaemon, place: str) -> None:
    shared_local.fs("mkdir", f"{place}/a", f"{place}/b")
    assert names(shared_local.fs("ls", place)) == ["a", "b"]
    assert "exists" in failing(shared_local, "mkdir", f"{place}/a")
    assert "No such file" in failing(shared_local, "mkdir", f"{place}/x/y")
    shared_local.fs("mkdir", "-p", f"{place}/x/y", f"{place}/a")
    shared_local.fs("mkdir", "-m", "700", f"{place}/private")
    assert on_mount(shared_local, place).joinpath("private").stat().st_mode & 0o777 == 0o700


def test_ls(shared_local: LocalDaemon, place: str) -> None:
    here = on_mount(shared_local, place)
    (here / "sub").mkdir()
    (here / "file").write_bytes(b"x" * 1500)
    os.symlink("file", here / "link")
    (here / "sub/deep").write_text("")
    assert names(shared_local.fs("ls", place)) == ["file", "link", "sub"]
    assert names(shared_local.fs("ls", f"{place}/file")) == ["file"]
    listing = shared_local.fs("ls", "-l", place).splitlines()
    assert listing[0].startswith("-rw-r--r--")
    assert " 1500 " in listing[0]
    assert listing[1].startswith("lrwxrwxrwx")
    assert listing[2].startswith("drwxr-xr-x")
    assert "1.5 KiB" in shared_local.fs("ls", "-l", "-h", place)
    assert names(shared_local.fs("ls", "-R", place)) == [
        f"{place}/file",
        f"{place}/link",
        f"{place}/sub",
        f"{place}/sub/deep",
    ]
    found = {Path(one["path"]).name: one for one in shared_local.fs_json("ls", place)}
    assert (found["file"]["type"], found["file"]["size_bytes"]) == ("file", 1500)
    assert (found["sub"]["type"], found["link"]["type"]) == ("directory", "symlink")
    assert found["file"]["mtime_ns"] == (here / "file").stat().st_mtime_ns
    assert found["file"]["persistence"] in PERSISTENCE_NAMES
    assert "No such file" in failing(shared_local, "ls", f"{place}/none")


def test_names_of_any_bytes(shared_local: LocalDaemon, place: str) -> None:
    name = b"caf\xc3\xa9 \xff\n"
    path = os.path.join(os.fsencode(on_mount(shared_local, place)), name)
    with open(path, "wb") as file:
        file.write(b"x")
    assert shared_local.fs("ls", place) == os.fsdecode(name) + "\n"
    (found,) = shared_local.fs_json("ls", place)
    assert os.fsencode(found["path"]).endswith(name)
    shared_local.fs("rm", f"{place}/{os.fsdecode(name)}")
    assert not os.path.lexists(path)


def test_cat(shared_local: LocalDaemon, place: str) -> None:
    here = on_mount(shared_local, place)
    (here / "a").write_text("one\n")
    (here / "b").write_text("two\n" * 100_000)
    assert shared_local.fs("cat", f"{place}/a", f"{place}/b") == "one\n" + "two\n" * 100_000
    assert "Is a directory" in failing(shared_local, "cat", place)
    assert "No such file" in failing(shared_local, "cat", f"{place}/none")


def test_rm(shared_local: LocalDaemon, place: str) -> None:
    here = on_mount(shared_local, place)
    (here / "d/e").mkdir(parents=True)
    (here / "d/e/f").write_text("x")
    (here / "g").write_text("x")
    os.symlink("/etc", here / "link")
    assert failing(shared_local, "rm", f"{place}/d")
    run_cli("fs", "rm", here / "link")
    assert os.path.isdir("/etc")
    shared_local.fs("rm", "-r", f"{place}/d", f"{place}/g")
    assert shared_local.fs("ls", place) == ""
    assert "No such file" in failing(shared_local, "rm", f"{place}/g")
    shared_local.fs("rm", "-f", f"{place}/g")
    done = shared_local.cli("fs", "rm", "-r", "--master", shared_local.address, "/", check=False)
    assert done.returncode == 2


def test_mv(shared_local: LocalDaemon, place: str) -> None:
    here = on_mount(shared_local, place)
    (here / "a").write_text("a")
    (here / "b").write_text("b")
    (here / "dir").mkdir()
    shared_local.fs("mv", f"{place}/a", f"{place}/c")
    assert (here / "c").read_text() == "a"
    shared_local.fs("mv", f"{place}/b", f"{place}/c", f"{place}/dir")
    assert names(shared_local.fs("ls", f"{place}/dir")) == ["b", "c"]
    done = shared_local.cli(
        "fs",
        "mv",
        "--master",
        shared_local.address,
        f"{place}/dir/b",
        f"{place}/dir/c",
        f"{place}/x",
        check=False,
    )
    assert done.returncode == 2
    assert "not a directory" in done.stderr


def test_cp_in_out_and_within(shared_local: LocalDaemon, place: str, tmp_path: Path) -> None:
    data = os.urandom(2_500_000)
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/one").write_bytes(data)
    (tmp_path / "tree/sub/two").write_text("two")
    shared_local.fs("cp", f"file:{tmp_path}/tree/one", f"{place}/copy")
    assert on_mount(shared_local, f"{place}/copy").read_bytes() == data
    assert "-r" in failing(shared_local, "cp", f"file:{tmp_path}/tree", f"{place}/tree")
    shared_local.fs("cp", "-r", f"file://{tmp_path}/tree", place)
    assert on_mount(shared_local, f"{place}/tree/sub/two").read_text() == "two"
    shared_local.fs("cp", f"{place}/tree/one", f"{place}/tree/three")
    assert on_mount(shared_local, f"{place}/tree/three").read_bytes() == data
    shared_local.fs("cp", "-r", f"{place}/tree", f"file:{tmp_path}/out")
    assert (tmp_path / "out/three").read_bytes() == data
    assert (tmp_path / "out/sub/two").read_text() == "two"
    (tmp_path / "into").mkdir()
    shared_local.fs("copyToLocal", f"{place}/copy", str(tmp_path / "into"))
    assert (tmp_path / "into/copy").read_bytes() == data
    shared_local.fs("copyFromLocal", str(tmp_path / "into"), f"{place}/again")
    assert on_mount(shared_local, f"{place}/again/copy").read_bytes() == data
    assert "No such file" in failing(shared_local, "cp", f"file:{tmp_path}/none", f"{place}/n")
    done = run_cli("fs", "cp", "file:/a", "file:/b", check=False)
    assert done.returncode == 2


def test_stat_and_location(shared_local: LocalDaemon, place: str) -> None:
    (on_mount(shared_local, place) / "file").write_bytes(b"x" * 3_000_000)
    shared_local.wait_persisted(place)
    found: list[dict[str, Any]] = shared_local.fs_json("stat", f"{place}/file", place)
    assert [one["type"] for one in found] == ["file", "directory"]
    assert found[0]["size_bytes"] == 3_000_000
    assert found[0]["persistence"] == "PERSISTED"
    assert found[0]["ufs_uri"].endswith(f"{place}/file")
    text = shared_local.fs("stat", f"{place}/file")
    assert "PERSISTED" in text
    assert "3000000 bytes" in text
    wait_until(
        lambda: bool(shared_local.fs_json("location", f"{place}/file")[0]["cached"]),
        "a heartbeat tells the master",
    )
    (where,) = shared_local.fs_json("location", f"{place}/file")
    assert where["block_count"] == 1
    assert [cached["blocks"] for cached in where["cached"]] == [[0]]
    assert where["cached"][0]["hostname"] in shared_local.fs("location", f"{place}/file")
    assert "No such file" in failing(shared_local, "stat", f"{place}/none")
    assert "No such file" in failing(shared_local, "location", f"{place}/none")


def test_du(shared_local: LocalDaemon, place: str) -> None:
    here = on_mount(shared_local, place)
    (here / "d").mkdir()
    (here / "d/a").write_bytes(b"x" * 1000)
    (here / "d/b").write_bytes(b"x" * 24)
    (here / "c").write_bytes(b"x")
    (whole,) = shared_local.fs_json("du", "-s", place)
    assert (whole["size_bytes"], whole["file_count"]) == (1025, 3)
    assert [one["size_bytes"] for one in shared_local.fs_json("du", place)] == [1, 1024, 1025]
    assert shared_local.fs("du", "-s", "-h", f"{place}/d").split()[:2] == ["1.0", "KiB"]


def test_free_and_load(shared_local: LocalDaemon, place: str) -> None:
    here = on_mount(shared_local, place)
    for number in range(3):
        (here / f"f{number}").write_bytes(b"x" * 1_500_000)
    shared_local.wait_persisted(place)

    def cached() -> list[bool]:
        return [bool(shared_local.fs_json("location", f"{place}/f{n}")[0]["cached"]) for n in range(3)]

    wait_until(lambda: cached() == [True, True, True], "a heartbeat tells the master")
    assert shared_local.fs("free", f"{place}/f0").startswith("freed 1 file(s)")
    assert cached() == [False, True, True]
    assert shared_local.fs("free", "-R", place).startswith("freed 3 file(s)")
    assert cached() == [False, False, False]
    assert shared_local.fs("load", place) == "loaded 3 file(s), 4.3 MiB\n"
    wait_until(lambda: cached() == [True, True, True], "the next heartbeat tells the master")
    assert (here / "f0").read_bytes() == b"x" * 1_500_000


def test_free_of_a_file_that_is_cached_in_part(
    local_daemon: Callable[..., LocalDaemon], tmp_path: Path
) -> None:
    """No whole block of it is anywhere, so the master doesn't know who has pages."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_bytes(bytes(range(256)) * (90 << 12))
    site = local_daemon(source)

    def used_bytes() -> int:
        return sum(tier["used_bytes"] for worker in site.report()["workers"] for tier in worker["tiers"])

    with open(site.mount / "f", "rb", buffering=0) as file:
        file.seek(70 << 20)
        assert file.read(4096)[:2] == b"\0\1"
    wait_until(lambda: used_bytes() > 0, "a heartbeat tells of the pages")
    site.fs("free", "/f")
    wait_until(lambda: used_bytes() == 0, "they are gone")


def test_persist(shared_local: LocalDaemon, place: str) -> None:
    here = on_mount(shared_local, place)
    (here / "a").write_text("a")
    assert shared_local.fs("persist", place) == f"persisted {place}\n"
    assert (shared_local.ufs_dir / place.lstrip("/") / "a").read_text() == "a"
    (here / "b").write_text("b")
    assert "being persisted" in shared_local.fs("persist", "--no-wait", f"{place}/b")
    assert "No such file" in failing(shared_local, "persist", f"{place}/none")


def test_sync(shared_local: LocalDaemon, place: str) -> None:
    shared_local.wait_persisted(place)
    outside = shared_local.ufs_dir / place.lstrip("/")
    (outside / "new").write_text("from outside")
    shared_local.fs("sync", place)
    assert shared_local.fs("cat", f"{place}/new") == "from outside"


def test_mount_and_unmount(shared_local: LocalDaemon, place: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "x").write_text("there")
    line = shared_local.fs("mount", "--readonly", f"{place}/m", str(other))
    assert str(other) in line
    assert "read-only" in line
    assert on_mount(shared_local, f"{place}/m/x").read_text() == "there"
    with pytest.raises(OSError, match="Read-only"):
        on_mount(shared_local, f"{place}/m/y").write_text("no")
    found = {one["path"]: one for one in shared_local.fs_json("mount")}
    assert set(found) == {"/", f"{place}/m"}
    assert found[f"{place}/m"]["readonly"] is True
    assert "read-write" in shared_local.fs("mount")
    shared_local.fs("unmount", f"{place}/m")
    assert len(shared_local.fs_json("mount")) == 1
    assert (other / "x").read_text() == "there"
    assert str(tmp_path / "none/there") in failing(
        shared_local, "mount", f"{place}/n", str(tmp_path / "none/there")
    )
    done = shared_local.cli("fs", "mount", "--master", shared_local.address, "/x", check=False)
    assert done.returncode == 2


def test_admin_report(shared_local: LocalDaemon) -> None:
    found = shared_local.report()
    assert found["mounts"][0]["path"] == "/"
    assert found["mounts"][0]["uri"].endswith(str(shared_local.ufs_dir))
    (worker,) = found["workers"]
    assert worker["is_alive"] is True
    assert worker["tiers"][0]["alias"] == "SSD"
    assert worker["tiers"][0]["capacity_bytes"] == 1 << 30
    assert any("fuse" in name for name in found["sessions"])
    assert found["persist_failing"] == []
    (shared_local.mount / "counted").write_bytes(b"x")
    shared_local.wait_persisted("/counted")
    wait_until(lambda: shared_local.report()["workers"][0]["counters"].get("uploads_done", 0) > 0, "counted")
    text = run_cli("admin", "report", "--master", shared_local.address).stdout
    assert "1 alive of 1" in text
    assert "    uploads_done = " in text
    assert found["cluster_id"] in text


def test_a_wrong_master_is_one_line(tmp_path: Path) -> None:
    for address, words in (
        ("127.0.0.1:1", "nobody answers at 127.0.0.1:1"),
        (str(tmp_path), "nobody answers at unix:"),
    ):
        done = run_cli("fs", "ls", "--master", address, "/", check=False)
        assert done.returncode == 1
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    done = run_cli("fs", "ls", "--master", "nonsense:port", "/", check=False)
    assert done.returncode == 2
