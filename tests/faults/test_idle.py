"""Nothing spins while a part is away: the CPU time of daemons that have nothing to do, which other
programs on the machine don't change."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import Cluster, Daemon

WINDOW_S = 10.0
MOST_SHARE = 0.1
"""Measured: 0.001 to 0.004."""

pytestmark = pytest.mark.skipif(
    os.environ.get("FAULTS_WORKERS") != "all", reason="long: FAULTS_WORKERS=all (make test-faults)"
)


def cpu_s(daemon: Daemon) -> float:
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def check_idle(site: Cluster, situation: str) -> None:
    running = [daemon for daemon in site.daemons if daemon.is_running]
    before = [cpu_s(daemon) for daemon in running]
    time.sleep(WINDOW_S)
    shares = {d.name: (cpu_s(d) - b) / WINDOW_S for d, b in zip(running, before, strict=True)}
    assert max(shares.values()) < MOST_SHARE, f"{situation}: {shares}"


def test_nothing_spins(cluster: Callable[..., Cluster]) -> None:
    site = cluster()
    site.expects_clean_end = False
    for number in range(20):
        (site.mount / f"file{number}").write_bytes(b"x" * 100_000)
    site.wait_persisted()
    check_idle(site, "all is well")
    worker = site.workers[0]
    for daemon, name in ((worker, "worker"), (site.master, "master")):
        os.kill(daemon.pid, signal.SIGSTOP)
        check_idle(site, f"the {name} is paused")
        os.kill(daemon.pid, signal.SIGCONT)
        daemon.kill()
        check_idle(site, f"the {name} is dead")
        daemon.start()
    away = site.base / "away"
    os.rename(site.ufs_dir, away)
    for number in range(20):
        (site.mount / f"new{number}").write_bytes(b"x" * 100_000)
    check_idle(site, "the under storage is gone")
    os.rename(away, site.ufs_dir)
    site.wait_persisted()
