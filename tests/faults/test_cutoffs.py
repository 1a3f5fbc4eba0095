"""The network between machines is cut, in every way, and comes back.

    make test-faults                     50 cut-offs of each kind
    FAULTS_CUTOFFS=5 pytest tests/faults/test_cutoffs.py -s

A failure names its seed; FAULTS_SEED=N repeats it.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cut_site import LEASE_S, Cut, CutSite
from harness import Harness, seed_of_run
from netns import KINDS
from servers import wait_until
from stores import DirectoryStore

CUTOFFS = int(os.environ.get("FAULTS_CUTOFFS", "1"))
IS_LONG = CUTOFFS > 1
ENDS = [("h0", "m"), ("h0", "h1"), ("m", "h1")]
SLOW_S = 5.0
"""A machine that is busy may take so much longer."""


@contextmanager
def running(site: CutSite) -> Iterator[CutSite]:
    try:
        yield site.start()
    except BaseException:
        site.expects_clean_end = False
        for daemon in site.daemons:
            print(f"--- {daemon.name}\n{daemon.log_text()[-3000:]}")
        site.close()
        raise
    wrong = site.close()
    assert not wrong, "\n\n".join(wrong)


@pytest.fixture(scope="module")
def site() -> Iterator[CutSite]:
    # Programs get their errors soon here.
    with running(CutSite(mount_options=["master_patience=3s", "master_patience=3s"])) as found:
        yield found


@pytest.fixture
def pair(site: CutSite, request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path]]:
    """A directory as the host that will be cut off, h0, shows it, and as h1 does."""
    name = "".join(char if char.isalnum() else "_" for char in request.node.name)
    (site.mounts[1] / name).mkdir()
    wait_until((site.mounts[0] / name).is_dir, "the other sees the directory")
    yield site.mounts[0] / name, site.mounts[1] / name
    site.network.heal()
    wait_until(lambda: works(site.mounts[0]), "it works again")
    subprocess.run(["rm", "-rf", "--", str(site.mounts[1] / name)], check=True, timeout=120)


def works(mount: Path) -> bool:
    try:
        (mount / "probe").write_bytes(b"")
        os.unlink(mount / "probe")
    except OSError:
        return False
    return True


def asked(question: Callable[[], object]) -> object:
    """The answer, or EIO."""
    try:
        return question()
    except OSError as exc:
        if exc.errno != errno.EIO:
            raise
        return errno.EIO


@pytest.mark.parametrize("kind", KINDS if IS_LONG else KINDS[:1])
def test_nothing_cached_is_older_than_the_lease(site: CutSite, pair: tuple[Path, Path], kind: str) -> None:
    """Names, names that do not exist, attributes: what was known is believed for a lease after the last
    word from the master, then it is an error. When all is healed nothing of the old view remains."""
    here, there = pair
    (there / "changed").write_bytes(b"old")
    (there / "removed").write_bytes(b"old")
    wait_until((here / "removed").exists, "all names")
    assert (here / "changed").stat().st_size == 3
    assert not (here / "made").exists()
    site.network.cut("h0", "m", kind)
    began = time.monotonic()
    is_link_down = kind == "link"
    (there / "changed").write_bytes(b"longer than before")
    os.unlink(there / "removed")
    (there / "made").write_bytes(b"")
    changed_at = time.monotonic()
    questions: list[tuple[Callable[[], object], object]] = [
        (lambda: (here / "changed").stat().st_size, 3),
        (lambda: stat.S_ISREG((here / "removed").stat().st_mode), True),
        (lambda: (here / "made").exists(), False),
    ]
    for question, old in questions:
        while True:
            asked_at = time.monotonic()
            answer = asked(question)
            if answer == errno.EIO:
                break
            assert answer == old, f"news came through the cut ({kind})"
            assert asked_at - changed_at < LEASE_S + SLOW_S, "it is still believed"
            time.sleep(0.05)
    print(f"{kind}: the first error {time.monotonic() - began:.1f} s after the cut")
    if not is_link_down:  # The others saw none of it.
        assert (there / "changed").read_bytes() == b"longer than before"
    site.network.heal()
    wait_until(lambda: works(site.mounts[0]), "it works again")
    assert (here / "changed").read_bytes() == b"longer than before"
    wait_until(lambda: (here / "changed").stat().st_size == 18, "its size")
    wait_until(lambda: not (here / "removed").exists() and (here / "made").exists(), "the names")
    assert sorted(os.listdir(here)) == sorted(os.listdir(there)) == ["changed", "made"]
    wait_until(lambda: site.report()["counters"].get("client_leases_lapsed", 0) > 0, "it is counted")


_WRITES_ON = """
import os, sys
with open(sys.argv[1] + "/log", "wb", buffering=0) as log:
    log.write(b"before")
    print("written", flush=True)
    input()
    log.write(b", during")
    os.fstat(log.fileno())
    assert not os.path.exists(sys.argv[1] + "/missing")
    print("asked", flush=True)
    input()
    log.write(b", after")
"""


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_short_cut_is_a_pause(site: CutSite, pair: tuple[Path, Path], kind: str) -> None:
    """Less than patience: a program that asks meanwhile waits, and gets its answer."""
    here, there = pair
    # A process of its own: what we start to heal the network would close its descriptors, and wait for that.
    program = subprocess.Popen(
        [sys.executable, "-c", _WRITES_ON, str(here)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdin is not None
    assert program.stdout is not None
    try:
        assert program.stdout.readline() == "written\n"
        site.network.cut("h0", "m", kind)
        print("go on", file=program.stdin, flush=True)
        time.sleep(0.7)
        site.network.heal()
        assert program.stdout.readline() == "asked\n"
        print("go on", file=program.stdin, flush=True)
        assert program.wait(30) == 0
    finally:
        program.kill()
        program.communicate()
    wait_until((there / "log").exists, "the name")
    assert (there / "log").read_bytes() == b"before, during, after"
    assert (here / "log").read_bytes() == b"before, during, after"


def test_reading_from_a_worker_that_is_cut_off(site: CutSite, pair: tuple[Path, Path]) -> None:
    """What is in the under storage is read from there; what only that worker has, when it is back."""
    here, there = pair
    data = os.urandom(2 << 20)
    (there / "stored").write_bytes(data)
    wait_until(lambda: (site.ufs_dir / there.name / "stored").exists(), "it is uploaded")
    site.wait_persisted("/" + there.name)
    wait_until((here / "stored").exists, "the name")
    site.network.cut("h0", "h1")
    assert (here / "stored").read_bytes() == data
    (there / "stored").write_bytes(data[::-1])
    site.network.heal()
    assert (here / "stored").read_bytes() == data[::-1]


def test_what_is_open_for_writing_outlives_a_cut_for_longer_than_the_lease(
    site: CutSite, pair: tuple[Path, Path]
) -> None:
    """The client's machine, with the worker on it, can't reach the master, which gives its session up. What
    was written before is there afterwards, synced or not, and the files are written on."""
    here, there = pair
    (here / "older").write_bytes(b"older content")
    fds = {"new": os.open(here / "new", os.O_RDWR | os.O_CREAT)}
    fds["synced"] = os.open(here / "synced", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    fds["older"] = os.open(here / "older", os.O_RDWR)
    for name, fd in fds.items():
        os.pwrite(fd, b"before", 0)
        if name == "synced":
            os.fsync(fd)
    site.network.cut("h0", "m")
    time.sleep(3 * LEASE_S)
    site.network.heal()
    wait_until(lambda: works(site.mounts[0]), "it works again")
    for name, fd in fds.items():
        before = b"beforecontent"[: os.fstat(fd).st_size]
        assert os.pread(fd, 100, 0) == before, name
        assert (there / name).read_bytes() == before, name
        os.pwrite(fd, b"after", len(before))
        os.fsync(fd)
        os.close(fd)
        assert (there / name).read_bytes() == before + b"after", name


def test_an_idle_client_does_not_poll(site: CutSite, pair: tuple[Path, Path]) -> None:
    """The long poll is renewed a few times in a lease, whatever is cached: no request for each name."""
    here, there = pair
    for number in range(200):
        (there / f"f{number}").write_bytes(b"")
    wait_until(lambda: len([path.stat() for path in here.iterdir()]) == 200, "all names")
    before = site.network.packets("h0")
    until = time.monotonic() + LEASE_S
    looks = 0
    while time.monotonic() < until:
        for number in range(200):
            (here / f"f{number}").stat()
        looks += 200
        time.sleep(0.01)
    sent = site.network.packets("h0") - before
    print(f"{looks} stats, {sent} packets (the worker's heartbeats among them)")
    assert sent < looks / 10


@pytest.mark.parametrize("ends", ENDS if IS_LONG else ENDS[:1], ids="-".join)
def test_cut_offs_under_load(ends: tuple[str, str]) -> None:
    seed = seed_of_run()
    print(f"FAULTS_SEED={seed} FAULTS_CUTOFFS={CUTOFFS}")
    found = CutSite()
    found.expects_clean_end = False
    with running(found), Harness(found, found.mounts, DirectoryStore(found.ufs_dir), seed) as harness:
        harness.run(Cut(found, *ends), CUTOFFS)
        harness.finish()


@pytest.mark.parametrize("ends", ENDS if IS_LONG else ENDS[:1], ids="-".join)
def test_cut_offs_for_longer_than_the_lease_under_load(ends: tuple[str, str]) -> None:
    seed = seed_of_run()
    print(f"FAULTS_SEED={seed} FAULTS_CUTOFFS={CUTOFFS}")
    found = CutSite()
    found.expects_clean_end = False
    cut = Cut(found, *ends, shortest_s=0.5 * LEASE_S, longest_s=3 * LEASE_S)
    with running(found), Harness(found, found.mounts, DirectoryStore(found.ufs_dir), seed) as harness:
        harness.run(cut, CUTOFFS)
        harness.finish()
