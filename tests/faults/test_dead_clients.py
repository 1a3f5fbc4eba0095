"""Clients that are killed leave nothing behind: no lock, descriptor, session or open file."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable

import trio
from daemons import Cluster, Daemon
from servers import wait_until

from alluxiofuse.rpc.address import UnixAddress
from alluxiofuse.rpc.client import connect
from alluxiofuse.rpc.security import Security
from alluxiofuse.wire.worker_ops import WorkerReport

CLIENT_COUNT = int(os.environ.get("FAULTS_CLIENTS", "20"))
BOUND_S = 60.0 + CLIENT_COUNT

KILL = """
import os, signal, sys
from alluxiofuse.client.blocking import connect

address, count, *hosts = sys.argv[1:]
for number in range(int(count)):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        fs = connect(address, name=f"victim {number}", hostname=hosts[number % len(hosts)])
        held = [fs.open(path, "rb", buffering=0) for path in ("/clean", "/large")]
        assert held[0].read(10) and held[1].read(10)
        held.append(fs.open(f"/written{number}", "wb", buffering=0))
        held[-1].write(b"x" * 1000)
        held.append(fs.open(f"/removed{number}", "wb", buffering=0))
        held[-1].write(b"x" * 1000)
        fs.remove(f"/removed{number}")
        os.write(writing, b"1")
        signal.pause()
    os.close(writing)
    alive = os.read(reading, 1)
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert alive, "the client failed before it was killed"
"""


def fd_count(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


def worker_counters(site: Cluster) -> dict[str, int]:
    async def ask() -> dict[str, int]:
        async with trio.open_nursery() as nursery:
            address = UnixAddress(str(site.base / "worker1" / "worker.sock"))
            connection = await connect(nursery, address, role="worker", security=Security())
            state = await connection.call(WorkerReport())
            await connection.aclose()
            return state.counters

    return trio.run(ask)


def test_killed_clients_leave_nothing(cluster: Callable[..., Cluster]) -> None:
    here = socket.gethostname()
    env = {
        "ALLUXIOFUSE_MASTER_SESSION_LEASE_S": "3s",
        "ALLUXIOFUSE_WORKER_SESSION_GRACE_S": "1s",
    }
    site = cluster(workers=0, env=env)
    worker = site.add_worker(here)
    (site.mount / "clean").write_bytes(b"clean" * 1000)
    (site.ufs_dir / "large").write_bytes(bytes(8 << 20))
    wait_until((site.mount / "large").exists, "a file made outside is seen")
    assert len((site.mount / "large").read_bytes()) == 8 << 20
    site.wait_persisted()
    wait_until(lambda: worker_counters(site)["locks"] == 0, "nothing is locked")
    before = {daemon: fd_count(daemon) for daemon in (site.master, worker)}
    sessions = site.report()["sessions"]

    # By descriptors and the Unix socket, and by TCP.
    command = [sys.executable, "-c", KILL, site.address, str(CLIENT_COUNT), here, "elsewhere"]
    subprocess.run(command, check=True, timeout=BOUND_S)

    wait_until(lambda: site.report()["sessions"] == sessions, "their sessions have ended", BOUND_S)
    wait_until(lambda: worker_counters(site)["locks"] == 0, "their locks have ended", BOUND_S)
    names = sorted(f"written{number}" for number in range(CLIENT_COUNT))
    wait_until(lambda: written(site) == names, "what they wrote is kept", BOUND_S)
    site.wait_persisted()
    assert all((site.ufs_dir / name).read_bytes() == b"x" * 1000 for name in names)
    wait_until(lambda: worker_counters(site)["containers"] == 2 + CLIENT_COUNT, "what they removed is gone")
    for daemon, count in before.items():
        # The worker keeps descriptors of the slabs themselves, up to its bound.
        spare = 2 * (2 + CLIENT_COUNT) if daemon is worker else 0
        wait_until(lambda d=daemon, c=count + spare: fd_count(d) <= c, f"{daemon.name} keeps no descriptor")  # type: ignore[misc]


def written(site: Cluster) -> list[str]:
    return sorted(
        path.name
        for path in site.mount.iterdir()
        if path.name.startswith("written") and path.stat().st_size == 1000
    )
