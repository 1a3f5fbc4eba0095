"""Workers that are paused, killed, gone, back, emptied, copied; what programs on a mount see."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
from daemons import Cluster, Daemon
from servers import wait_until

PATIENCE_S = 2
ENV = {
    "ALLUXIOFUSE_CLIENT_PATIENCE_S": f"{PATIENCE_S}s",
    "ALLUXIOFUSE_WORKER_SESSION_GRACE_S": "3s",
}
DIRTY = {**ENV, "ALLUXIOFUSE_MASTER_PERSIST_DELAY_S": "1h"}
"""What is written stays on its worker until somebody asks for its upload."""
is_long = pytest.mark.skipif(
    os.environ.get("FAULTS_WORKERS") != "all", reason="long: FAULTS_WORKERS=all (make test-faults)"
)
BOUND_S = 60.0
"""Far more than any wait here may take; a hang is what is looked for."""

READ = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
try:
    while chunk := os.read(fd, 1 << 20):
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
except OSError as exc:
    sys.exit(exc.errno)
"""


def read(path: Path) -> bytes | int:
    """All of a file, past the kernel's cache, or the errno. In a process of its own: a hang is an
    error and not the end of the tests."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)], capture_output=True, timeout=BOUND_S, check=False
    )
    assert done.returncode >= 0, done
    assert not done.stderr, done.stderr.decode()
    return done.stdout if done.returncode == 0 else done.returncode


def content(tag: str, size: int = 300_000) -> bytes:
    line = f"{tag} ".encode() * 64
    return (line * (size // len(line) + 1))[:size]


def holder_of(site: Cluster, path: str) -> Daemon:
    """The worker that has the file's blocks."""
    found: list[str] = []

    def is_reported() -> bool:
        found[:] = [one["hostname"] for one in site.fs_json("location", path)[0]["cached"]]
        return bool(found)

    wait_until(is_reported, f"a worker reports {path}")
    return site.workers[int(found[0][1:]) - 1]


@contextmanager
def paused(daemon: Daemon) -> Iterator[None]:
    """Stopped by SIGSTOP: its sockets live, and nobody answers."""
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


TRUNCATE = """
import os, sys
fd, other = (os.open(sys.argv[1], os.O_RDWR) for _ in range(2))
os.ftruncate(fd, 1)
os.close(os.dup(fd))
print("done", flush=True)
sys.stdin.read()
"""


def test_a_worker_that_lost_what_was_not_synced(cluster: Callable[..., Cluster]) -> None:
    """With the program that wrote it. The master has heard of it; until it is given up there, stat says
    what is read, and neither is changed by that."""
    site = cluster(workers=1, env={**DIRTY, "ALLUXIOFUSE_MASTER_SESSION_LEASE": "6s"})
    [worker] = site.workers
    (site.base / "other").mkdir()
    client = site.add_mount(site.base / "other")
    (site.mount / "file").write_bytes(content("before"))
    wait_until(lambda: site.report()["workers"][0]["counters"]["open_slabs"] == 0, "it is sealed")
    places = [site.base / name for name in ("worker1", "ssd1")]
    assert worker.stop() == 0
    for place in places:
        shutil.copytree(place, site.base / f"{place.name}.before")
    worker.start()
    command = [sys.executable, "-c", TRUNCATE, str(site.base / "other/file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"done\n"
        site.expects_clean_end = False
        client.kill()
        worker.kill()
        subprocess.run(["umount", "--lazy", str(site.base / "other")], check=True)
        program.communicate()
    for place in places:
        shutil.rmtree(place)
        (site.base / f"{place.name}.before").rename(place)
    assert site.fs_json("stat", "/file")[0]["size_bytes"] == 1
    worker.start()
    wait_until(lambda: (site.mount / "file").stat().st_size != 1, "the worker answers")
    assert site.fs_json("stat", "/file")[0]["is_open_for_write"], "it was given up before that was seen"

    def is_given_up() -> bool:
        assert (site.mount / "file").stat().st_size == 300_000
        assert read(site.mount / "file") == content("before")
        return not site.fs_json("stat", "/file")[0]["is_open_for_write"]

    wait_until(is_given_up, "it is given up")
    assert is_given_up()


def test_a_paused_worker(cluster: Callable[..., Cluster]) -> None:
    """Half alive: it accepts connections and takes requests. What others have is read from them; what
    it alone has is EIO after a while, and there again when it goes on, also when it was lost."""
    site = cluster(env=DIRTY, master_arguments=["--worker-timeout", "12s"])
    clean, dirty = site.mount / "clean", site.mount / "dirty"
    clean.write_bytes(content("clean"))
    site.wait_persisted("/clean")
    dirty.write_bytes(content("dirty"))
    holder = holder_of(site, "/dirty")
    assert holder is holder_of(site, "/clean")
    with paused(holder):
        blocked = subprocess.Popen([sys.executable, "-c", READ, str(dirty)], stdout=subprocess.DEVNULL)
        assert read(clean) == content("clean")
        assert read(dirty) == errno.EIO
        (site.mount / "new").write_bytes(content("new"))
        assert read(site.mount / "new") == content("new")
        assert blocked.wait(BOUND_S) == errno.EIO
        wait_until(lambda: not all(one["is_alive"] for one in site.report()["workers"]), "it counts as lost")
        assert site.fs_json("stat", "/dirty")[0]["persistence"] == "LOST"
        assert read(clean) == content("clean")
        assert read(dirty) == errno.EIO
    wait_until(lambda: read(dirty) == content("dirty"), "its files are back")
    assert site.fs_json("stat", "/dirty")[0]["persistence"] == "TO_BE_PERSISTED"
    dirty.write_bytes(content("other"))
    assert read(dirty) == content("other")


STEPS = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644)
for line in sys.stdin:
    what, *rest = line.split()
    try:
        if what == "write":
            n = os.write(fd, rest[0].encode() * int(rest[1]))
            answer = f"ok {n}"
        elif what == "fsync":
            os.fsync(fd)
            answer = "ok"
        elif what == "close":
            os.close(fd)
            answer = "ok"
        elif what == "seek":
            os.lseek(fd, int(rest[0]), 0)
            answer = "ok"
    except OSError as exc:
        answer = f"errno {exc.errno}"
    print(answer, flush=True)
"""


class Program:
    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", STEPS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, step: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(step + "\n")
        self._process.stdin.flush()

    def do(self, step: str) -> str:
        assert self._process.stdout is not None
        self.begin(step)
        return self._process.stdout.readline().strip()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(BOUND_S)


@contextmanager
def program(path: Path) -> Iterator[Program]:
    running = Program(path)
    try:
        yield running
    finally:
        running.end()


def test_a_writer_whose_home_dies(cluster: Callable[..., Cluster]) -> None:
    """Each call waits for its patience and is EIO, and the same descriptor goes on when the worker is
    back. What fsync answered for is there."""
    site = cluster(env=DIRTY)
    site.expects_clean_end = False
    path = site.mount / "file"
    with program(path) as writer:
        assert writer.do("write a 1000") == "ok 1000"
        assert writer.do("fsync") == "ok"
        home = holder_of(site, "/file")
        home.kill()
        failed = f"errno {errno.EIO}"
        assert [writer.do(step) for step in ("write b 1000", "fsync")] == [failed, failed]
        assert read(path) == errno.EIO
        (site.mount / "another").write_bytes(content("another"))
        assert read(site.mount / "another") == content("another")
        home.start()
        assert [writer.do(step) for step in ("write c 1000", "fsync")] == ["ok 1000", "ok"]
        assert read(path) == b"a" * 1000 + b"c" * 1000
        home.kill()
        assert writer.do("close") == failed
    # Overwriting needs nothing of what is there; what is left to its home comes back with it.
    other = site.mount / "other"
    with program(other) as writer:
        home.start()
        wait_until(lambda: writer.do("write x 1000") == "ok 1000", "a worker takes it")
        assert writer.do("fsync") == "ok"
        assert writer.do("close") == "ok"
    wait_until(lambda: read(path) == b"a" * 1000 + b"c" * 1000, "its home has sealed it")
    path.write_bytes(b"new")
    assert read(path) == b"new"


def test_a_worker_without_its_slabs(cluster: Callable[..., Cluster]) -> None:
    """What only it had is EIO, and named; it can be overwritten and removed. With the slabs it is back."""
    site = cluster(env=DIRTY, workers=1)
    site.expects_clean_end = False
    (site.mount / "persisted").write_bytes(content("persisted"))
    site.wait_persisted("/persisted")
    names = ("kept", "overwritten", "removed")
    for name in names:
        (site.mount / name).write_bytes(content(name))
    worker = holder_of(site, "/removed")
    worker.kill()
    tier, hidden = site.base / "ssd1", site.base / "hidden"
    os.rename(tier, hidden)
    worker.start()
    assert read(site.mount / "persisted") == content("persisted")
    assert read(site.mount / "kept") == errno.EIO
    with program(site.mount / "kept") as writer:
        assert writer.do("write a 10") == f"errno {errno.EIO}"
    (site.mount / "overwritten").write_bytes(b"new")
    assert read(site.mount / "overwritten") == b"new"
    (site.mount / "removed").unlink()
    wait_until(lambda: site.fs_json("stat", "/kept")[0]["persistence"] == "LOST", "it counts as lost")
    site.fs("persist", "--timeout", "1s", "/kept", check=False)
    wait_until(
        lambda: any("/kept" in line for line in site.report()["persist_failing"]), "the report names it"
    )
    worker.kill()
    shutil.rmtree(tier)
    os.rename(hidden, tier)
    worker.start()
    wait_until(lambda: read(site.mount / "kept") == content("kept"), "it is back")
    site.wait_persisted("/kept")
    assert (site.ufs_dir / "kept").read_bytes() == content("kept")

    # Without its index it is another worker, and leaves the slabs alone.
    (site.mount / "more").write_bytes(content("more"))
    worker.kill()
    os.rename(site.base / "worker1", hidden)
    with pytest.raises(AssertionError, match="belongs to a worker with another state directory"):
        worker.start()
    shutil.rmtree(site.base / "worker1", ignore_errors=True)
    os.rename(hidden, site.base / "worker1")
    worker.start()
    wait_until(lambda: read(site.mount / "more") == content("more"), "all is back")


def test_work_under_way_goes_on_elsewhere_or_later(cluster: Callable[..., Cluster]) -> None:
    """A reader of cold content and an upload, while workers are killed."""
    site = cluster(env=ENV)
    site.expects_clean_end = False
    cold = os.urandom(96 << 20)
    (site.ufs_dir / "cold").write_bytes(cold)
    reader = subprocess.Popen([sys.executable, "-c", READ, str(site.mount / "cold")], stdout=subprocess.PIPE)
    assert reader.stdout is not None
    parts = [reader.stdout.read(1 << 20)]
    for worker in site.workers:
        worker.kill()
        parts.append(reader.stdout.read(8 << 20))
        worker.start()
    parts.append(reader.stdout.read())
    assert reader.wait(BOUND_S) == 0
    assert b"".join(parts) == cold

    big = os.urandom(64 << 20)
    (site.mount / "big").write_bytes(big)
    for worker in site.workers:
        worker.kill()
        worker.start()
    site.wait_persisted("/big")
    assert (site.ufs_dir / "big").read_bytes() == big
    assert sorted(path.name for path in site.ufs_dir.iterdir()) == ["big", "cold"]


def test_a_reader_with_the_slab_of_a_dead_worker(cluster: Callable[..., Cluster]) -> None:
    """On the worker's machine: what it has open it goes on reading, though nobody else has it."""
    site = cluster(env=DIRTY, workers=0)
    site.expects_clean_end = False
    worker = site.add_worker(socket.gethostname())
    path = site.mount / "file"
    path.write_bytes(content("file"))
    with open(path, "rb", buffering=0) as file:
        assert file.read(10) == content("file")[:10]
        worker.kill()
        for _ in range(3):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file.fileno(), 300_000, 0) == content("file")
    assert read(path) == errno.EIO
    worker.start()
    wait_until(lambda: read(path) == content("file"), "it is back")


@is_long
def test_a_copied_worker(cluster: Callable[..., Cluster]) -> None:
    """Two with one identity would take turns, each with what it has: the second is refused while the
    first lives, and may follow it."""
    site = cluster(env=DIRTY, workers=1)
    site.expects_clean_end = False
    path = site.mount / "file"
    path.write_bytes(content("file"))
    (first,) = site.workers
    first.kill()
    for name in ("ssd", "worker"):
        shutil.copytree(
            site.base / f"{name}1",
            site.base / f"{name}2",
            ignore=lambda _, names: {"worker.sock"} & set(names),
        )
    first.start()
    path.write_bytes(content("newer"))
    copy = site.make_worker()
    copy.start(wait=False)
    wait_until(lambda: "runs already" in copy.log_text(), "it says why it can't")
    assert read(path) == content("newer")
    assert [one["is_alive"] for one in site.report()["workers"]] == [True]
    site.wait_persisted("/file")
    first.kill()
    copy.wait_ready()
    assert read(path) == content("newer")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees where a process waits")
@pytest.mark.parametrize("how", ["dead", pytest.param("paused", marks=is_long)])
def test_a_program_that_waits_can_be_ended(cluster: Callable[..., Cluster], how: str) -> None:
    """However long the patience is: by Ctrl-C and by SIGKILL, while it reads, writes or closes."""
    site = cluster(env={**DIRTY, "ALLUXIOFUSE_CLIENT_PATIENCE_S": "1h"}, workers=1)
    site.expects_clean_end = False
    path, (worker,) = site.mount / "file", site.workers
    path.write_bytes(content("file"))
    with program(site.mount / "written") as writer, ExitStack() as stack:
        assert writer.do("write a 1000") == "ok 1000"
        assert writer.do("fsync") == "ok"
        if how == "paused":
            stack.enter_context(paused(worker))
        else:
            worker.kill()
        for number in (signal.SIGINT, signal.SIGKILL):
            command = [sys.executable, "-c", READ, str(path)]
            blocked = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wait_until(partial(is_waiting, blocked.pid, "filemap_read"), "it waits for the mount")
            blocked.send_signal(number)
            assert blocked.wait(BOUND_S) != 0
        writer.begin("write b 1000")
        wait_until(partial(is_waiting, writer.pid, "fuse_perform_write"), "it waits for the mount")
        os.kill(writer.pid, signal.SIGKILL)
    if how == "dead":
        worker.start()  # The mount waits for it before it ends.


def is_waiting(pid: int, within: str) -> bool:
    """For a FUSE daemon, in this function of the kernel."""
    stack = Path(f"/proc/{pid}/stack").read_text()
    return within in stack and ("request_wait_answer" in stack or "folio_wait" in stack)
