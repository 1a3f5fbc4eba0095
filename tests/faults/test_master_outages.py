"""The master dies, stays away, or comes back as another one: real processes, programs on the mount."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import Cluster

WAIT_S = 90.0


@pytest.fixture
def site(cluster: Callable[..., Cluster]) -> Callable[..., Cluster]:
    """A cluster whose worker is local to the mount, and whose uploads rest unless a test says otherwise."""

    def start(*, patience_s: float = 60.0, lease_s: float = 20.0, persists: bool = False) -> Cluster:
        found = cluster(
            workers=0,
            mount_options=f"master_patience={patience_s:g}",
            env={
                "ALLUXIOFUSE_MASTER_SESSION_LEASE_S": f"{lease_s:g}s",
                "ALLUXIOFUSE_MASTER_PERSIST_DELAY_S": "0.1s" if persists else "1h",
                "ALLUXIOFUSE_CLIENT_PATIENCE_S": "10s",
            },
        )
        found.add_worker(os.uname().nodename)
        wait_until(lambda: creates(found.mount / "first"))
        return found

    return start


def wait_until(condition: Callable[[], object], explain: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen: {explain()}"
        time.sleep(0.02)


def creates(path: Path) -> bool:
    try:
        path.write_bytes(b"x")
    except OSError:
        return False
    return True


def kill_master(site: Cluster) -> None:
    site.expects_clean_end = False
    site.master.kill()


def write(path: Path, data: bytes) -> None:
    """Until it is closed; EIO is no answer."""
    with open(path, "xb", buffering=0) as file:
        file.write(data)


class Load:
    """A program that goes on making, renaming and removing files until it is told to stop, and minds
    every error."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.made_count = 0
        self.error: BaseException | None = None
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                name = self.directory / f"{self.made_count:06}"
                write(name, b"%d" % self.made_count)
                os.mkdir(f"{name}.d")
                os.rename(name, f"{name}.d/in")
                assert Path(f"{name}.d/in").read_bytes() == b"%d" % self.made_count
                os.unlink(f"{name}.d/in")
                os.rmdir(f"{name}.d")
                write(name, b"%d" % self.made_count)
                self.made_count += 1
        except BaseException as exc:
            self.error = exc

    def stop(self) -> None:
        self._is_stopping = True
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "it hangs"
        if self.error is not None:
            raise self.error


def test_a_master_that_dies_and_comes_back_is_a_pause(site: Callable[..., Cluster]) -> None:
    here = site()
    load = Load(here.mount)
    for _ in range(3):
        before = load.made_count
        wait_until(lambda: load.made_count > before + 3 or load.error)  # noqa: B023
        kill_master(here)
        time.sleep(1.0)
        here.master.start()
        before = load.made_count
        wait_until(lambda: load.made_count > before + 3 or load.error)  # noqa: B023
    load.stop()
    names = {name for name in os.listdir(here.mount) if name != "first"}
    assert names == {f"{number:06}" for number in range(load.made_count)}
    counters = here.report()["counters"]
    assert counters["sessions_resumed"] >= 1
    assert counters["sessions_expired"] == 0


def test_cached_content_stays_readable(site: Callable[..., Cluster]) -> None:
    """Through open files for as long as it takes, by name within the lease; both while nobody answers."""
    here = site(patience_s=1.0, lease_s=5.0)
    data = os.urandom(3 << 20)
    (here.mount / "file").write_bytes(data)
    assert (here.mount / "file").read_bytes() == data
    with open(here.mount / "file", "rb") as opened:
        opened.read(10)
        kill_master(here)
        by_name = [(here.mount / "file").read_bytes() for _ in range(3)]
        assert by_name == [data] * 3
        opened.seek(0)
        assert opened.read() == data
        assert here.client is not None
        wait_until(lambda: "no word from the master" in here.client.log_text())  # type: ignore[union-attr]
        opened.seek(0)
        assert opened.read() == data
        with pytest.raises(OSError) as caught:
            (here.mount / "file").read_bytes()
        assert caught.value.errno == errno.EIO
        here.master.start()
        wait_until(lambda: _reads(here.mount / "file", data))
        opened.seek(0)
        assert opened.read() == data


def _reads(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False


def test_a_master_that_stays_away_is_an_error_in_the_end(site: Callable[..., Cluster]) -> None:
    here = site(patience_s=3.0)
    kill_master(here)
    for path in ("new", "unknown/name"):
        with pytest.raises(OSError) as caught:
            os.stat(here.mount / path)
        assert caught.value.errno == errno.EIO
    with pytest.raises(OSError):
        os.mkdir(here.mount / "d")
    here.master.start()
    wait_until(lambda: creates(here.mount / "second"))
    os.mkdir(here.mount / "d")
    assert sorted(os.listdir(here.mount)) == ["d", "first", "second"]


@pytest.mark.parametrize("way", ["killed", "stopped"])
def test_a_program_that_waits_for_the_master_can_be_interrupted(
    site: Callable[..., Cluster], way: str
) -> None:
    here = site(patience_s=3600.0)
    if way == "killed":
        kill_master(here)
    else:
        os.kill(here.master.pid, signal.SIGSTOP)
    try:
        for command in (
            ["ls", "-l", f"{here.mount}/x"],
            ["mkdir", f"{here.mount}/y"],
            ["cat", f"{here.mount}/z"],
        ):
            program = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wait_until(lambda: _waits_in_fuse(program.pid))  # noqa: B023
            program.send_signal(signal.SIGINT)
            assert program.wait(WAIT_S) != 0
    finally:
        if way == "killed":
            here.master.start()
        else:
            os.kill(here.master.pid, signal.SIGCONT)
    wait_until(lambda: creates(here.mount / "second"))


def _waits_in_fuse(pid: int) -> bool:
    try:
        return (
            "fuse" in Path(f"/proc/{pid}/wchan").read_text()
            or "request_wait" in Path(f"/proc/{pid}/stack").read_text()
        )
    except OSError:
        return False


@pytest.fixture
def dirty(site: Callable[..., Cluster]) -> tuple[Cluster, bytes]:
    """With a file whose bytes are only at the worker."""
    here = site(patience_s=3.0)
    data = os.urandom(100_000)
    (here.mount / "only here").write_bytes(data)
    return here, data


def _slabs(here: Cluster) -> set[Path]:
    return {path for path in (here.base / "ssd1" / "slabs").rglob("*") if path.is_file()}


def _is_refused(here: Cluster) -> bool:
    assert here.client is not None
    is_worker = "the master refuses this worker" in here.workers[0].log_text()
    return is_worker and "the master refuses this client" in here.client.log_text()


def _expect_nothing_mixed_up(here: Cluster, data: bytes, slabs: set[Path]) -> None:
    """A master is there with another state: clear words, no answer from it, nothing lost."""
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            os.stat(here.mount / "another name")
        assert caught.value.errno == errno.EIO
    wait_until(
        lambda: _is_refused(here),
        lambda: f"{here.workers[0].log_text()}\n{here.client and here.client.log_text()}",
    )
    assert _slabs(here) >= slabs
    kept = [str(path) for path in slabs if path.read_bytes() == data]
    assert kept
    assert all(path in here.workers[0].log_text() for path in kept), here.workers[0].log_text()
    assert here.report()["counters"]["foreign_states_refused"] >= 2


def _expect_all_is_well(here: Cluster, data: bytes) -> None:
    wait_until(lambda: _reads(here.mount / "only here", data))
    wait_until(lambda: creates(here.mount / "second"))


def test_a_master_that_lost_its_state_gets_nothing_mixed_up(dirty: tuple[Cluster, bytes]) -> None:
    here, data = dirty
    slabs = _slabs(here)
    state = here.base / "master"
    assert here.master.stop() == 0
    state.rename(here.base / "kept")
    here.master.start()
    _expect_nothing_mixed_up(here, data, slabs)
    # Started anew on what it has, the worker does not go over to the stranger either.
    here.expects_clean_end = False
    here.workers[0].stop()
    here.workers[0].start(wait=False)
    assert here.workers[0].wait() != 0
    assert _slabs(here) >= slabs
    # When the state is given back, everything goes on.
    assert here.master.stop() == 0
    shutil.rmtree(state)
    (here.base / "kept").rename(state)
    here.master.start()
    here.workers[0].start()
    _expect_all_is_well(here, data)


def test_so_does_one_that_went_back_to_an_older_state(site: Callable[..., Cluster]) -> None:
    here = site(patience_s=3.0)
    state, old, new = here.base / "master", here.base / "old", here.base / "new"
    assert here.master.stop() == 0
    shutil.copytree(state, old, ignore=lambda _, names: [name for name in names if name.endswith(".sock")])
    here.master.start()
    data = os.urandom(100_000)
    wait_until(lambda: creates(here.mount / "only here"))
    (here.mount / "only here").write_bytes(data)
    _wait_for_marks(here)
    slabs = {path for path in _slabs(here) if path.read_bytes() == data}  # Others may be on their way out.
    assert here.master.stop() == 0
    state.rename(new)
    old.rename(state)
    here.master.start()
    _expect_nothing_mixed_up(here, data, slabs)
    assert here.master.stop() == 0
    shutil.rmtree(state)
    new.rename(state)
    here.master.start()
    _expect_all_is_well(here, data)


def _wait_for_marks(here: Cluster) -> None:
    """Client and worker have heard of what was committed: a notice reaches the client, a heartbeat the
    worker."""
    here.fs("mkdir", "/by another client")
    # Some polls of the client: the mark rides on their answers.
    for number in range(5):
        here.fs("mkdir", f"/by another client/{number}")
        wait_until(lambda: (here.mount / "by another client" / str(number)).exists())  # noqa: B023
        time.sleep(0.3)  # so that the log was synced when the next one is answered


def test_a_worker_that_is_stopped_says_so(cluster: Callable[..., Cluster]) -> None:
    """New files fail at once rather than after the time that one would wait for a lost worker."""
    here = cluster(workers=2, env={"ALLUXIOFUSE_CLIENT_PATIENCE_S": "1h"})
    (here.mount / "file").write_bytes(b"x")
    here.wait_persisted()
    for worker in here.workers:
        assert worker.stop() == 0
    report = here.report()
    assert [one["is_alive"] for one in report["workers"]] == [False, False]
    assert [one["has_left"] for one in report["workers"]] == [True, True]
    with pytest.raises(OSError) as caught:
        (here.mount / "new").write_bytes(b"x")
    assert caught.value.errno == errno.EIO
    here.workers[0].start()
    wait_until(lambda: creates(here.mount / "newer"))
    report = here.report()
    assert sorted(one["has_left"] for one in report["workers"]) == [False, True]


assert sys.platform == "linux"
