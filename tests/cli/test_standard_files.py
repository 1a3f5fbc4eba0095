"""Daemons and commands whose standard output is closed, full or gone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from daemons import PROGRAM, LocalDaemon, clean_environment, mount_lines, require_fuse

Start = Callable[..., LocalDaemon]


def started(base: Path, redirections: str) -> tuple[subprocess.Popen[bytes], Path]:
    """`local`, by a shell that redirects its standard files."""
    (base / "ufs").mkdir()
    (base / "mnt").mkdir()
    command = ["local", "--ufs", "ufs", "--mount", "mnt", "--state", "state", "--tier", "SSD:ssd:100MB"]
    shell = f'exec "$@" {redirections}'
    process = subprocess.Popen(
        ["/bin/sh", "-c", shell, "sh", *PROGRAM, *command], cwd=base, env=clean_environment()
    )
    return process, base / "mnt"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def check_works_and_ends(process: subprocess.Popen[bytes], mount: Path) -> None:
    (mount / "x").write_text("x")
    assert (mount / "x").read_text() == "x"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_closed_standard_files(tmp_path: Path) -> None:
    """What is written to them goes nowhere, above all not into a file that got their numbers."""
    require_fuse()
    process, mount = started(tmp_path, "<&- >&- 2>&-")
    try:
        until(lambda: bool(mount_lines(mount)))
        for number in range(3):
            assert os.readlink(f"/proc/{process.pid}/fd/{number}") == os.devnull
        check_works_and_ends(process, mount)
    finally:
        process.kill()
    assert mount_lines(mount) == []


def test_a_ready_line_that_nobody_takes(tmp_path: Path) -> None:
    """It is an error, and nothing is left mounted."""
    require_fuse()
    process, mount = started(tmp_path, f">/dev/full 2>{tmp_path}/log")
    try:
        assert process.wait(60) == 1
    finally:
        process.kill()
    assert "No space left on device" in (tmp_path / "log").read_text()
    assert mount_lines(mount) == []


def test_a_log_that_is_full(tmp_path: Path) -> None:
    require_fuse()
    (tmp_path / "out").touch()
    process, mount = started(tmp_path, f">{tmp_path}/out 2>/dev/full")
    try:
        until(lambda: (tmp_path / "out").read_text().startswith("ready"))
        check_works_and_ends(process, mount)
    finally:
        process.kill()
    assert mount_lines(mount) == []
