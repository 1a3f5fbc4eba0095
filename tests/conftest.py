"""Fixtures that all tests share, and the rule that no test leaves anything running or mounted."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Container, Iterator
from pathlib import Path

import pytest
from daemons import SESSION, SITES, Cluster, LocalDaemon, Site
from servers import s3_server as s3_server

MARK = f"AF_TEST_RUN={uuid.uuid4()}"
"""In the environment of every process that this run starts, daemonised ones too."""
os.environ[MARK.partition("=")[0]] = MARK.partition("=")[2]
STRAY_GRACE_S = 5.0

# Run by nohup or in the background of a script, signals are ignored, and children would inherit that.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)


def fuse_mounts(base: Path) -> set[str]:
    """Where FUSE filesystems are mounted below this run's own directories; others on the machine are
    none of our business."""
    ours = [str(place) for place in (base, *SITES)]
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    found = {line.split(" ")[4] for line in lines if " - fuse" in line}
    return {place for place in found if any(place.startswith(f"{one}/") for one in ours)}


def processes_of_this_run() -> dict[int, str]:
    """pid -> command line, of living processes that this run started."""
    found = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if MARK.encode() in Path(entry.path, "environ").read_bytes():
                command = Path(entry.path, "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(entry.name)] = os.fsdecode(command)
        except OSError:
            continue  # ended meanwhile, or not ours to look at
    return found


def is_below(pid: int, ancestors: Container[int]) -> bool:
    """One of `ancestors` is the process or started it, directly or not."""
    while pid > 1 and pid not in ancestors:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return True  # it ended
    return pid in ancestors


def strays(before: Container[int]) -> dict[int, str]:
    """Processes that were not there before and do not belong to one that was. A helper whose daemon
    was killed gets a moment to notice."""
    deadline = time.monotonic() + STRAY_GRACE_S
    while True:
        found = {
            pid: command for pid, command in processes_of_this_run().items() if not is_below(pid, before)
        }
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Fails a test that leaves a FUSE mount or a process, and clears both away. What longer-lived
    fixtures started before the test does not count."""
    base = tmp_path_factory.getbasetemp()
    mounts, processes = fuse_mounts(base), processes_of_this_run()
    yield
    left = []
    for place in fuse_mounts(base) - mounts:
        left.append(f"mount {place}")
        path = place.encode("utf-8", "surrogateescape").decode("unicode_escape")
        subprocess.run(["umount", "--lazy", path], check=False, capture_output=True)
    for pid, command in strays(processes).items():
        left.append(f"process {pid}: {command}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if left:
        pytest.fail(f"{request.node.name} left behind:\n" + "\n".join(left))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of the FUSE folder that mount something do so with each session."""
    if "fuse_session" in metafunc.fixturenames and metafunc.definition.path.parent.name == "fuse":
        metafunc.parametrize("fuse_session", ["pyfuse3", "native"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def fuse_session(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", SESSION))


def _end(sites: list[Site]) -> None:
    wrong = [text for site in reversed(sites) for text in site.close()]
    assert not wrong, "\n\n".join(wrong)


@pytest.fixture
def local_daemon(fuse_session: str) -> Iterator[Callable[..., LocalDaemon]]:
    """A factory of running `alluxiofuse local` processes; its arguments are those of LocalDaemon."""
    sites: list[Site] = []

    def start(*arguments: object, **options: object) -> LocalDaemon:
        options.setdefault("session", fuse_session)
        site = LocalDaemon(*arguments, **options)  # type: ignore[arg-type]
        sites.append(site)
        return site.start()

    yield start
    _end(sites)


@pytest.fixture
def cluster() -> Iterator[Callable[..., Cluster]]:
    """A factory of running clusters; its arguments are those of Cluster."""
    sites: list[Site] = []

    def start(*arguments: object, **options: object) -> Cluster:
        site = Cluster(*arguments, **options)  # type: ignore[arg-type]
        sites.append(site)
        return site.start()

    yield start
    _end(sites)


@pytest.fixture(scope="module")
def shared_local(fuse_session: str) -> Iterator[LocalDaemon]:
    """One running `alluxiofuse local` on a directory for all tests of a module: each works in a
    directory of its own."""
    site = LocalDaemon(session=fuse_session)
    try:
        yield site.start()
    finally:
        _end([site])


@pytest.fixture
def here(shared_local: LocalDaemon, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory on the module's mount, removed afterwards through the mount."""
    name = "".join(char if char.isalnum() else "_" for char in request.node.name)[:80]
    path = shared_local.mount / name
    path.mkdir()
    yield path
    if shared_local.daemon.is_running:
        subprocess.run(["rm", "-rf", "--", str(path)], check=True, capture_output=True, timeout=120)
        assert not path.exists()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """At the very end just the names of what failed: a difference of two large values may be longer than what
    is kept of the output."""
    yield
    failed = [*terminalreporter.stats.get("failed", ()), *terminalreporter.stats.get("error", ())]
    for report in failed:
        terminalreporter.write_line(f"failed: {report.nodeid}")
