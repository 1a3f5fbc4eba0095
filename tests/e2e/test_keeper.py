"""A mount that outlives its daemon (docs/adr/0002-keeper.md): `-o keeper=on`."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import Cluster, Daemon, LocalDaemon, Site, mount_lines, run_cli
from keeper_loads import Appends, Archives, Database, Listings, Load, ManyAppends, Names, Reads, Writes
from servers import wait_until

KILLS = int(os.environ.get("FAULTS_KEEPER_KILLS", "3"))
BETWEEN_S = 1.0 if KILLS <= 8 else 8.0
"""More than nine within a minute are too many for the keeper."""
OPTIONS = "session=native,keeper=on"
PAUSE_S = 2.0


def child_of(pid: int) -> int:
    """The daemon of a keeper; 0: none now."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found[0]) if found else 0


def words_of(pid: int) -> set[bytes]:
    """What is in its command line."""
    try:
        return set(re.findall(rb"[a-z.]+", Path(f"/proc/{pid}/cmdline").read_bytes()))
    except OSError:
        return set()


class KeptMount:
    """A site whose mount has a keeper."""

    def __init__(self, site: Site, daemon: Daemon) -> None:
        self.site, self.daemon, self.mount = site, daemon, site.mount
        self.pauses: list[float] = []

    @property
    def keeper(self) -> int:
        return self.daemon.pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        """The daemon; returns when the next one answers."""
        before = child_of(self.keeper)
        assert before
        os.kill(before, number)
        started = time.monotonic()
        answered = threading.Event()

        def ask() -> None:
            while child_of(self.keeper) in (0, before):
                time.sleep(0.005)
            os.statvfs(self.mount)
            answered.set()

        threading.Thread(target=ask, daemon=True).start()
        assert answered.wait(20), self.daemon.log_text()[-3000:]
        self.pauses.append(time.monotonic() - started)


def local(**options: str) -> KeptMount:
    site = LocalDaemon(session="native", mount_options="keeper=on").start()
    return KeptMount(site, site.daemon)


def cluster(hostname: str | None) -> KeptMount:
    site = Cluster(workers=0, mount_options=OPTIONS)
    site.master.start()
    place = site.master.arguments.index("--port") + 1
    site.master.arguments[place] = site.address.rpartition(":")[2]
    site.add_worker(hostname)
    return KeptMount(site, site.add_mount())


PLACES: dict[str, Callable[[], KeptMount]] = {
    "local": local,
    "mount": lambda: cluster(socket.gethostname()),
    "remote": lambda: cluster(None),
}


@pytest.fixture(params=list(PLACES))
def kept(request: pytest.FixtureRequest) -> Iterator[KeptMount]:
    mount = PLACES[request.param]()
    yield mount
    wrong = mount.site.close()
    assert not wrong, "\n\n".join(wrong)


def under_kills(kept: KeptMount, loads: list[Load]) -> None:
    for load in loads:
        load.start()
    for _ in range(KILLS):
        time.sleep(BETWEEN_S)
        kept.kill()
    time.sleep(BETWEEN_S)
    for load in loads:
        load.end()
    print("pauses:", *(f"{pause:.2f}" for pause in kept.pauses), "rounds:", *(load.rounds for load in loads))


def test_reads_and_writes(kept: KeptMount) -> None:
    under_kills(kept, [Reads(kept.mount / "r"), Writes(kept.mount / "w"), Database(kept.mount / "d")])


def test_names_happen_once(kept: KeptMount, tmp_path: Path) -> None:
    under_kills(
        kept, [Names(kept.mount / "n"), Archives(kept.mount / "a", tmp_path), Listings(kept.mount / "l")]
    )


def test_appends_happen_once(kept: KeptMount) -> None:
    under_kills(kept, [Appends(kept.mount / "one"), ManyAppends(kept.mount / "many")])


def test_an_unlinked_file_lives_on(kept: KeptMount) -> None:
    path = kept.mount / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(fd, b"before")
    path.unlink()
    kept.kill()
    assert os.pread(fd, 100, 0) == b"before"
    os.write(fd, b", after")
    kept.kill()
    os.fsync(fd)
    assert os.pread(fd, 100, 0) == b"before, after"
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)
    assert os.listdir(kept.mount) == []


def stuck_threads(pid: int) -> list[str]:
    """Where threads of a process that has ended wait in the kernel."""
    try:
        if "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
            return []
        return [
            (task / "wchan").read_text()
            for task in Path(f"/proc/{pid}/task").iterdir()
            if task.name != str(pid)
        ]
    except OSError:
        return []


def test_a_thread_that_waits_for_an_answer_of_its_own_daemon() -> None:
    """The kernel is told to forget pages of which some are being read: it waits for that, and the thread that
    told it can't be killed. Only the next daemon can answer the read."""
    site = Cluster(workers=2, mount_options=OPTIONS).start()
    try:
        other = site.base / "other"
        other.mkdir()
        site.add_mount(other)
        kept = KeptMount(site, site.client)  # type: ignore[arg-type]
        (other / "file").write_bytes(b"before" * 1_000_000)
        site.wait_persisted("/file")
        before = child_of(kept.keeper)
        wait_until(lambda: site.fs_json("location", "/file")[0]["cached"], "a worker reports it")
        [cached] = site.fs_json("location", "/file")[0]["cached"]
        worker = site.workers[int(cached["hostname"][1:]) - 1]
        os.kill(worker.pid, signal.SIGSTOP)
        try:
            program = subprocess.Popen(["cat", kept.mount / "file"], stdout=subprocess.DEVNULL)
            time.sleep(0.5)
            (site.ufs_dir / "file").write_bytes(b"after")
            wait_until(lambda: (other / "file").stat().st_size == 5, "the master has seen that")
            time.sleep(0.3)
            os.kill(before, signal.SIGKILL)
            time.sleep(0.3)
            assert stuck_threads(before), "nothing was stuck, so nothing is shown"
        finally:
            os.kill(worker.pid, signal.SIGCONT)
        wait_until(lambda: child_of(kept.keeper) not in (0, before), "there is another daemon")
        program.wait(60)
        assert (kept.mount / "file").read_bytes() == b"after"
    finally:
        wrong = site.close()
    assert not wrong, "\n\n".join(wrong)


def test_an_upgrade_under_load(kept: KeptMount) -> None:
    loads: list[Load] = [Reads(kept.mount / "r"), Appends(kept.mount / "a"), Names(kept.mount / "n")]
    for load in loads:
        load.start()
    for _ in range(2):
        time.sleep(0.5)
        before = child_of(kept.keeper)
        run_cli("mount", "--upgrade", kept.mount)
        assert child_of(kept.keeper) not in (0, before)
    assert run_cli("mount", "--upgrade", kept.mount / "r", check=False).returncode == 2
    for load in loads:
        load.end()


@pytest.fixture
def mounted() -> Iterator[KeptMount]:
    mount = local()
    yield mount
    wrong = mount.site.close()
    assert not wrong, "\n\n".join(wrong)


def test_a_daemon_that_keeps_dying_is_given_up(mounted: KeptMount) -> None:
    mounted.site.expects_clean_end = False
    while mounted.daemon.is_running:
        # Not what it unmounts by in the end.
        if (daemon := child_of(mounted.keeper)) and not {b"umount", b"keeper.py"} & words_of(daemon):
            os.kill(daemon, signal.SIGKILL)
        time.sleep(0.02)
    assert mounted.daemon.wait() == 1
    last = mounted.daemon.log_text().splitlines()[-1]
    wanted = f"alluxiofuse: error: the daemon of {mounted.mount} ended 10 times"
    assert last.startswith(wanted), mounted.daemon.log_text()
    assert not mount_lines(mounted.mount)


@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.4])
def test_unmounting_while_there_is_no_daemon(mounted: KeptMount, delay_s: float) -> None:
    os.kill(child_of(mounted.keeper), signal.SIGKILL)
    time.sleep(delay_s)
    run_cli("umount", mounted.mount)
    assert mounted.daemon.wait(10) == 0
    assert not mount_lines(mounted.mount)


@pytest.mark.parametrize("delay_s", [0.0, 0.3])
def test_a_signal_while_there_is_no_daemon(mounted: KeptMount, delay_s: float) -> None:
    os.kill(child_of(mounted.keeper), signal.SIGKILL)
    time.sleep(delay_s)
    assert mounted.daemon.stop() in (0, 1, 137)
    assert not mount_lines(mounted.mount)


def test_a_signal_while_the_next_daemon_begins(mounted: KeptMount) -> None:
    """It is between fork(2) and execve(2): what it is sent then must not be lost."""
    before = child_of(mounted.keeper)
    os.kill(before, signal.SIGKILL)
    while child_of(mounted.keeper) in (0, before):
        pass
    assert mounted.daemon.stop() in (0, 1, 143)
    assert not mount_lines(mounted.mount)


def test_ctrl_c_comes_once(mounted: KeptMount) -> None:
    """To the keeper, whoever else is in its process group; files that are open do not hold it up twice."""
    daemon = child_of(mounted.keeper)
    assert os.getpgid(daemon) == daemon != os.getpgid(mounted.keeper)
    assert os.getsid(daemon) == os.getsid(mounted.keeper)
    assert mounted.daemon.stop(signal.SIGINT) == 0
    assert mounted.daemon.log_text().count("got SIGINT") == 1
    assert not os.path.exists(f"/proc/{daemon}")


def test_it_is_small(mounted: KeptMount) -> None:
    status = Path(f"/proc/{mounted.keeper}/status").read_text()
    rss_kib = int(status.partition("VmRSS:")[2].split()[0])
    assert rss_kib < 15 << 10


def test_without_its_keeper_a_daemon_ends(mounted: KeptMount) -> None:
    mounted.site.expects_clean_end = False
    (mounted.mount / "file").write_bytes(b"content")
    daemon = child_of(mounted.keeper)
    mounted.daemon.kill()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{daemon}"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not mount_lines(mounted.mount)
    assert (mounted.site.base / "ufs/file").read_bytes() == b"content"


def test_in_the_background(tmp_path: Path) -> None:
    """`mount` returns; nobody's descriptors are kept."""
    kept = PLACES["mount"]()
    try:
        place = tmp_path / "m"
        place.mkdir()
        kept.site.mounts.append(place)
        done = run_cli("mount", kept.site.address, "m", "-o", OPTIONS, cwd=tmp_path, timeout_s=30)
        assert done.stdout == ""
        words = f" {kept.site.address} m -o {OPTIONS} "
        keeper = next(pid for pid, line in keepers().items() if line.endswith(words))
        (place / "file").write_bytes(b"content")
        os.kill(child_of(keeper), signal.SIGKILL)
        assert (place / "file").read_bytes() == b"content"
        run_cli("umount", place)
        deadline = time.monotonic() + 10
        while os.path.exists(f"/proc/{keeper}"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        wrong = kept.site.close()
    assert not wrong, wrong


def keepers() -> dict[int, str]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if "/keeper.py " in words:
                found[int(entry.name)] = words
    return found
