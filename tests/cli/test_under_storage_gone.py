"""The under storage's directory is not there when the daemon starts (a disk that is not mounted, say)."""

from __future__ import annotations

from collections.abc import Callable

from daemons import LocalDaemon, run_cli


def test_a_directory_that_is_gone_at_a_later_start(local_daemon: Callable[..., LocalDaemon]) -> None:
    site = local_daemon(arguments=["--sync-interval", "0"])
    (site.mount / "dir").mkdir()
    (site.mount / "dir/file").write_text("cached")
    (site.mount / "other").write_text("cached too")
    site.wait_persisted()
    assert site.stop() == 0
    away = site.ufs_dir.rename(site.base / "away")

    site.daemon.start()
    assert f"{site.ufs_dir} is gone" in site.daemon.log_text()
    assert sorted(path.name for path in site.mount.iterdir()) == ["dir", "other"]
    assert (site.mount / "dir/file").read_text() == "cached"
    (site.mount / "new").write_text("waits")
    assert not site.ufs_dir.exists(), "it would be an empty under storage, and everything deleted"
    done = run_cli("fs", "persist", "--timeout", "1s", site.mount / "new", check=False)
    assert done.returncode == 1

    away.rename(site.ufs_dir)
    site.wait_persisted()
    assert (site.ufs_dir / "new").read_text() == "waits"
    assert sorted(path.name for path in site.mount.iterdir()) == ["dir", "new", "other"]


def test_errors_name_the_path(local_daemon: Callable[..., LocalDaemon]) -> None:
    site = local_daemon()
    (site.mount / "f").write_text("x")
    for command in (["cp", "/f", "/f/x"], ["mv", "/f", "/f/x"]):
        done = run_cli("fs", command[0], "--master", site.address, *command[1:], check=False)
        assert done.returncode == 1
        assert done.stderr == "alluxiofuse: error: /f/x: Not a directory\n"
    help_text = run_cli("fs", check=False)
    assert help_text.returncode == 2
    assert "Usage:" in help_text.stderr
    assert len(help_text.stderr.splitlines()) > 10
