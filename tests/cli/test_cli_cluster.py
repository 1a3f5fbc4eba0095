"""Master, two workers and a mount as processes of their own, with and without a secret."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import Cluster, mount_lines, run_cli
from servers import wait_until

Start = Callable[..., Cluster]


@pytest.mark.parametrize("secret", [False, True], ids=["open", "secret"])
def test_the_same_works_across_processes(cluster: Start, secret: bool) -> None:
    site = cluster(secret=secret)
    data = os.urandom(5_000_000)
    (site.mount / "dir").mkdir()
    (site.mount / "dir/file").write_bytes(data)
    assert (site.mount / "dir/file").read_bytes() == data
    site.wait_persisted()
    assert (site.ufs_dir / "dir/file").read_bytes() == data
    (site.ufs_dir / "dir/outside").write_bytes(data)
    site.fs("sync", "/")
    assert (site.mount / "dir/outside").read_bytes() == data
    found = site.report()
    assert [worker["hostname"] for worker in found["workers"]] == ["w1", "w2"]
    assert all(worker["is_alive"] for worker in found["workers"])
    assert found["mounts"][0]["path"] == "/"
    assert site.fs("ls", "/dir").split() == ["file", "outside"]
    for daemon in reversed(site.daemons):
        assert daemon.stop() == 0, daemon.log_text()
    assert mount_lines(site.mount) == []
    assert not list(site.base.glob("*/*.sock"))


def test_who_has_no_secret_gets_nothing(cluster: Start, tmp_path: Path) -> None:
    site = cluster(secret=True, workers=1)
    (site.mount / "x").write_text("x")
    wrong = tmp_path / "wrong"
    wrong.touch(mode=0o600)
    wrong.write_text(secrets.token_hex(32))
    for arguments, words in (([], "requires a secret"), (["--secret-file", str(wrong)], "secret")):
        done = run_cli("fs", "ls", "--master", site.address, *arguments, "/", check=False)
        assert done.returncode == 1
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
        done = run_cli(
            *["worker", "--master", site.address, "--state", str(tmp_path / "w"), "--port", "0", *arguments],
            *["--tier", f"SSD:{tmp_path}/ssd:1GB"],
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        (tmp_path / "mnt").mkdir(exist_ok=True)
        done = run_cli("mount", site.address, tmp_path / "mnt", *arguments, check=False)
        assert done.returncode == 2
        assert words in done.stderr
        assert mount_lines(tmp_path / "mnt") == []
    assert len(site.report()["workers"]) == 1
    assert site.secret_file is not None
    logs = "".join(daemon.log_text() for daemon in site.daemons)
    assert site.secret_file.read_text() not in logs


def test_mounting_in_the_background_and_a_subtree(cluster: Start) -> None:
    site = cluster(workers=1)
    (site.mount / "a/b").mkdir(parents=True)
    (site.mount / "a/b/file").write_text("deep")
    other = site.base / "other"
    other.mkdir()
    done = run_cli("mount", f"{site.address}/a/b", other, "-o", f"ro,log_file={site.base}/other.log")
    assert done.stdout == ""
    try:
        assert (other / "file").read_text() == "deep"
        with pytest.raises(OSError, match="Read-only"):
            (other / "new").write_text("no")
        assert f"{site.address}/a/b" in mount_lines(other)[0]
        assert run_cli("fs", "stat", other / "file").stdout.startswith("path         /a/b/file\n")
    finally:
        run_cli("umount", other)
    assert mount_lines(other) == []
    wait_until(lambda: len(site.report()["sessions"]) == 1, "the daemon said goodbye")


def test_a_worker_waits_for_its_master(cluster: Start) -> None:
    site = cluster(workers=1)
    (site.mount / "x").write_bytes(b"x" * 2_000_000)
    worker = site.workers[0]
    assert worker.stop() == 0
    assert site.master.stop() == 0
    worker.start(wait=False)
    wait_until(lambda: "no master yet" in worker.log_text(), "it says that it waits")
    site.master.start()
    worker.wait_ready()
    wait_until(lambda: site.report()["workers"][0]["is_alive"], "it is back")
    assert (site.mount / "x").read_bytes() == b"x" * 2_000_000


def test_mount_helper_as_mount_8_calls_it(cluster: Start) -> None:
    site = cluster(workers=1)
    (site.mount / "x").write_text("x")
    other = site.base / "other"
    other.mkdir()
    run_cli(site.address, other, "-o", "rw,noatime,dev,suid")
    try:
        assert (other / "x").read_text() == "x"
    finally:
        run_cli("umount", other)
    done = run_cli(site.address, other, "-o", "rw,nonsense", check=False)
    assert done.returncode == 1
    assert "nonsense" in done.stderr
    done = run_cli("127.0.0.1:1", other, "-o", "rw", check=False)
    assert done.returncode == 32
    assert done.stderr.count("\n") == 1
    wait_until(lambda: len(site.report()["sessions"]) == 1, "the daemon said goodbye")
