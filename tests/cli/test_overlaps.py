"""Directories within each other, with the real program: a mount that would show itself, a cache within
what it caches. All are refused before anything is made."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import Cluster, LocalDaemon, mount_lines, require_fuse, run_cli


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    require_fuse()
    for name in ("ufs/inner", "mnt", "mnt2"):
        (tmp_path / name).mkdir(parents=True)
    yield tmp_path
    assert mount_lines(tmp_path / "mnt") == mount_lines(tmp_path / "ufs/inner") == []


def refused(base: Path, *words: str, **changes: str) -> None:
    """`local` with some of its directories changed."""
    given = {"ufs": "ufs", "mount": "mnt", "state": "state", "tier": "ssd"} | changes
    command = ["local"]
    for name in ("ufs", "mount", "state"):
        command += [f"--{name}", given[name]]
    before = sorted(base.rglob("*"))
    done = run_cli(*command, "--tier", f"SSD:{given['tier']}:100MB", check=False, cwd=base)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert "lie within each other" in line
    for word in words:
        assert word in line, line
    assert sorted(base.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mount": "ufs/inner"}, ["mount point", "ufs/inner"]),
        ({"ufs": "."}, ["mount point mnt"]),
        ({"ufs": "file://{base}"}, ["mount point mnt"]),
        ({"ufs": "link", "mount": "ufs/inner"}, ["mount point ufs/inner"]),
        ({"state": "ufs/state"}, ["state directory", "under storage"]),
        ({"ufs": "state/ufs"}, ["state directory", "under storage"]),
        ({"tier": "ufs/cache"}, ["tier directory", "under storage"]),
        ({"state": "mnt/state"}, ["state directory", "mount point"]),
        ({"tier": "mnt/cache"}, ["tier directory", "mount point"]),
    ],
)
def test_local(base: Path, changes: dict[str, str], words: list[str]) -> None:
    (base / "link").symlink_to(base / "ufs")
    refused(base, *words, **{name: value.format(base=base) for name, value in changes.items()})


def test_master_state_in_the_under_storage(base: Path) -> None:
    done = run_cli("master", "--state", "ufs/state", "--ufs", "ufs", "--port", "0", check=False, cwd=base)
    assert done.returncode == 2
    assert "lie within each other" in done.stderr
    assert not (base / "ufs/state").exists()


def test_mounting_a_cluster_in_its_own_under_storage(cluster: Callable[..., Cluster]) -> None:
    site = cluster(workers=1)
    inner = site.ufs_dir / "inner"
    inner.mkdir()
    done = run_cli("mount", site.address, inner, check=False)
    assert done.returncode == 2
    assert "lie within each other" in done.stderr
    assert mount_lines(inner) == []


def test_an_under_storage_on_a_mount_of_the_same_master(local_daemon: Callable[..., LocalDaemon]) -> None:
    site = local_daemon()
    (site.mount / "d").mkdir()
    done = run_cli("fs", "mount", site.mount / "loop", site.mount / "d", check=False)
    assert done.returncode == 2
    assert "on a mount of this same master" in done.stderr
    assert os.listdir(site.mount) == ["d"]


def test_persisting_what_is_open_says_so_and_waits(local_daemon: Callable[..., LocalDaemon]) -> None:
    site = local_daemon()
    path = site.mount / "file"
    path.write_text("old")
    site.wait_persisted()
    # In a process of its own: each one that is forked closes its copy of our descriptors, which seals.
    script = (
        "import sys; f = open(sys.argv[1], 'w'); f.write('newer'); f.flush(); print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        done = run_cli("fs", "persist", "--timeout", "2s", path, check=False)
        assert done.returncode == 1
        assert "open for writing" in done.stderr
        assert "not everything is in the under storage yet" in done.stderr
        assert "1 file(s)" in run_cli("fs", "persist", "--no-wait", site.mount).stdout
        writer.communicate(b"\n")
    site.wait_persisted()
    assert (site.ufs_dir / "file").read_text() == "newer"
