"""Daemons whose descriptors run out: they say no, go on, and serve again when there are some."""

from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from daemons import Cluster, Daemon, require_fuse
from servers import wait_until

is_long = pytest.mark.skipif(
    os.environ.get("FAULTS_WORKERS") != "all", reason="long: FAULTS_WORKERS=all (make test-faults)"
)
BOUND_S = 120.0
LIMIT = 160
"""For each daemon; idle, none has more than 60 open."""
FILE_COUNT = 300

HOLD = """
import os, sys
# Opens every file, reads it, and holds it open; prints what each read gave.
held, wrong = [], {}
for name in sorted(os.listdir(sys.argv[1])):
    try:
        fd = os.open(os.path.join(sys.argv[1], name), os.O_RDWR)
        held.append(fd)
        data = os.pread(fd, 100, 0)
        if data != name.encode() * 10:
            wrong[name] = "bytes"
        os.pwrite(fd, data, 0)
        os.fsync(fd)
    except OSError as exc:
        wrong[name] = os.strerror(exc.errno)
print(wrong, flush=True)
sys.stdin.read()
"""


class SmallCluster(Cluster):
    """One worker, on the client's machine, so that descriptors are passed; every daemon with few."""

    def __init__(self) -> None:
        super().__init__(workers=0, env={"ALLUXIOFUSE_CLIENT_PATIENCE_S": "2s"})

    def _daemon(self, name: str, arguments: list[str]) -> Daemon:
        daemon = super()._daemon(name, arguments)
        daemon.prefix = ["prlimit", f"--nofile=100:{LIMIT}", "--"]
        return daemon

    def start(self) -> Cluster:
        require_fuse()
        self.master.start()
        self.add_worker(socket.gethostname())
        self.client = self.add_mount()
        return self


@pytest.fixture
def small() -> Iterator[SmallCluster]:
    site = SmallCluster()
    try:
        site.start()
        yield site
    finally:
        wrong = site.close()
    assert not wrong, "\n\n".join(wrong)


def limits(daemon: Daemon) -> tuple[int, int]:
    return resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)


def socket_count(daemon: Daemon) -> int:
    folder = f"/proc/{daemon.pid}/fd"
    count = 0
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):
            count += os.readlink(f"{folder}/{name}").startswith("socket:")
    return count


def fd_count(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


def cpu_s(daemon: Daemon) -> float:
    """User and system time of the daemon until now."""
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def holding(directory: Path) -> Iterator[str]:
    """A program that has all files of the directory open; what went wrong for it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(BOUND_S)


def test_more_open_files_than_descriptors(small: SmallCluster) -> None:
    """Everything works, by the worker's socket where no descriptor is left for a slab."""
    directory = small.mount / "many"
    directory.mkdir()
    for number in range(FILE_COUNT):
        name = f"file{number:04}"
        (directory / name).write_text(name * 10)
    assert {limits(daemon) for daemon in small.daemons} == {(LIMIT, LIMIT)}  # Raised to the hard limit.
    with holding(directory) as wrong:
        assert wrong == "{}"
        (directory / "another").write_text("another" * 10)
        assert (directory / "another").read_text() == "another" * 10
    small.wait_persisted()
    assert len(list((small.ufs_dir / "many").iterdir())) == FILE_COUNT + 1


@pytest.mark.parametrize("which", ["master", "worker"])
def test_a_flood_of_connections(small: SmallCluster, which: str) -> None:
    """Those that are too many are refused with a line in the log; nothing spins; the others are served."""
    daemon = small.master if which == "master" else small.workers[0]
    place = daemon.ready_line.split(" at ")[1].split()[0].rpartition(":")
    (small.mount / "before").write_text("before")
    small.wait_persisted()
    before = socket_count(daemon)
    with ExitStack() as stack:
        for _ in range(2 * LIMIT):
            with suppress(ConnectionResetError):
                stack.enter_context(socket.create_connection((place[0], int(place[2])), timeout=BOUND_S))
        (small.mount / "during").write_text("during")
        assert (small.mount / "during").read_text() == "during"
        wait_until(lambda: "are open already" in daemon.log_text(), "it says that it refuses")
        used_s = cpu_s(daemon)
        time.sleep(2)  # What is looked for is work when there is nothing to do.
        assert cpu_s(daemon) - used_s < 1.0
    wait_until(lambda: socket_count(daemon) <= before, "all are closed again")
    assert (small.mount / "before").read_text() == "before"


@pytest.mark.parametrize(
    "which", [pytest.param("master", marks=is_long), "worker", pytest.param("mount", marks=is_long)]
)
def test_no_descriptor_left_at_all(small: SmallCluster, which: str) -> None:
    """The limit is lowered to what is in use: whatever needs one more fails or waits, nothing breaks
    for good."""
    daemon = {"master": small.master, "worker": small.workers[0], "mount": small.client}[which]
    assert daemon is not None
    (small.mount / "kept").write_text("kept")
    small.wait_persisted()
    _, hard = limits(daemon)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (fd_count(daemon), hard))
    found = set()
    for number in range(3):
        try:
            (small.mount / f"file{number}").write_text("x")
            (small.ufs_dir / f"outside{number}").write_text("y")
            (small.mount / f"outside{number}").read_text()
        except OSError as exc:
            found.add(exc.errno)
    assert found <= {errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOENT}
    connections = [socket.socket() for _ in range(3)]
    place = small.workers[0] if which == "worker" else small.master
    address = place.ready_line.split(" at ")[1].split()[0].rpartition(":")
    for one in connections:
        one.settimeout(BOUND_S)
        one.connect((address[0], int(address[2])))
    used_s = cpu_s(daemon)
    time.sleep(2)
    assert cpu_s(daemon) - used_s < 1.0
    for one in connections:
        one.close()
    assert daemon.is_running
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (hard, hard))
    wait_until(lambda: _works(small.mount), "all works again")
    assert (small.mount / "kept").read_text() == "kept"
    small.wait_persisted()


def _works(mount: Path) -> bool:
    try:
        (mount / "after").write_text("after")
        return (mount / "after").read_text() == "after"
    except OSError:
        return False
