"""Everything at once on a few inodes from both mounts: news arrive while the same inode is written, looked
up, released, listed and mapped. Nothing may hang; a watchdog prints the stacks of all daemons if it does.

`STRESS_S=600 pytest tests/coherence/test_two_mounts_stress.py -s` looks further.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from servers import wait_until
from two_mounts import TwoMounts

STRESS_S = float(os.environ.get("STRESS_S", "5"))
HANG_S = 120.0
"""No single call may take this long (what is busy answers within seconds)."""
FRESH_S = 1.0
"""How long news of names may take to the other mount."""
NAMES = ("a", "b", "c")
MAPPED_BYTES = 200_000
EXPECTED = {errno.ENOENT, errno.ESTALE, errno.EEXIST, errno.ENOTEMPTY}
"""Others move and remove the same names."""


Step = Callable[[Path, random.Random], None]


class Actor(threading.Thread):
    """Does one thing again and again; `since` is when its present call began."""

    def __init__(self, root: Path, step: Step, seed: str, until: float) -> None:
        super().__init__(daemon=True, name=f"{step.__name__} on {root.parent.name}")
        self._root, self._step, self._dice, self._until = root, step, random.Random(seed), until
        self.since = time.monotonic()
        self.count = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while time.monotonic() < self._until:
                self.since = time.monotonic()
                try:
                    self._step(self._root, self._dice)
                except OSError as exc:
                    if exc.errno not in EXPECTED:
                        raise
                self.count += 1
        except BaseException as exc:
            self.failure = exc


def some(root: Path, dice: random.Random) -> Path:
    return root / dice.choice(NAMES)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Only opening may fail because of what others do: what is open stays usable."""
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
        os.close(fd)
    except OSError as exc:
        raise AssertionError(f"{path.name} was open: {exc}") from exc


def write(root: Path, dice: random.Random) -> None:
    flags = os.O_RDWR | os.O_CREAT | dice.choice([0, 0, os.O_TRUNC, os.O_APPEND])
    with opened(some(root, dice), flags) as fd:
        for _ in range(dice.randrange(4)):
            os.pwrite(fd, dice.randbytes(dice.choice([10, 5000, 200_000])), dice.randrange(100_000))
            if dice.random() < 0.2:
                os.fsync(fd)


def read(root: Path, dice: random.Random) -> None:
    with opened(some(root, dice), os.O_RDONLY) as fd:
        for _ in range(3):
            os.pread(fd, 300_000, dice.randrange(50_000))
            os.fstat(fd)


def look(root: Path, dice: random.Random) -> None:
    for _ in range(20):
        some(root, dice).exists()


def browse(root: Path, dice: random.Random) -> None:
    for entry in os.scandir(root):
        entry.stat()


def move(root: Path, dice: random.Random) -> None:
    os.rename(some(root, dice), some(root, dice))


def replace(root: Path, dice: random.Random) -> None:
    new = root / f"new{threading.get_ident()}"
    new.write_bytes(dice.randbytes(5000))
    os.rename(new, some(root, dice))


def remove(root: Path, dice: random.Random) -> None:
    os.unlink(some(root, dice))
    os.mkdir(root / "d")
    os.rmdir(root / "d")


def cut(root: Path, dice: random.Random) -> None:
    os.truncate(some(root, dice), dice.randrange(100_000))
    os.utime(some(root, dice))


def map_pages(root: Path, dice: random.Random) -> None:
    """Of a file that nobody makes shorter. The kernel touches the mapping here, so that a page that can't
    be had is EFAULT, with a line in the report of the test, and no SIGBUS that ends it."""
    with (
        open(root / "mapped", "r+b") as file,
        mmap.mmap(file.fileno(), MAPPED_BYTES) as memory,
        memoryview(memory) as view,
        Pipe() as pipe,
    ):
        at = dice.randrange(MAPPED_BYTES - 1000)
        with view[at : at + 1000] as part:
            pipe.copy(dice.randbytes(1000), part, f"written at {at}")
        if dice.random() < 0.3:
            memory.flush()
        for page in range(0, MAPPED_BYTES, mmap.PAGESIZE):
            with view[page : page + mmap.PAGESIZE] as part:
                pipe.copy(part, bytearray(len(part)), f"read at {page}")


class Pipe:
    """Copies memory by system calls."""

    def __enter__(self) -> Pipe:
        self._ends = os.pipe()
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            os.close(end)

    def copy(self, source: bytes | memoryview, target: bytearray | memoryview, what: str) -> None:
        try:
            counts = os.write(self._ends[1], source), os.readv(self._ends[0], [target])
        except OSError as exc:
            raise AssertionError(f"a mapped page can't be {what}: {exc}") from exc
        assert counts == (len(source), len(source)), f"a mapped page can't be {what}"


def overwrite_mapped(root: Path, dice: random.Random) -> None:
    with opened(root / "mapped", os.O_WRONLY) as fd:
        os.pwrite(fd, dice.randbytes(5000), dice.randrange(MAPPED_BYTES - 5000))


STEPS = (write, read, look, browse, move, replace, remove, cut, map_pages, overwrite_mapped)


@pytest.mark.parametrize("session", ["native", "pyfuse3"])
def test_nothing_hangs(session: str) -> None:
    options = (f"session={session}", f"session={session}")
    site = TwoMounts(mount_options=options, master_arguments=["--sync-interval", "-1"])
    try:
        site.start()
        stress(site)
    except BaseException:
        for daemon in site.daemons:
            print(f"--- {daemon.name}\n{daemon.log_text()[-6000:]}")
        site.expects_clean_end = False
        site.close()
        raise
    wrong = site.close()
    assert not wrong, "\n\n".join(wrong)


def stress(site: TwoMounts) -> None:
    roots = [mount / "stress" for mount in site.mounts]
    roots[0].mkdir()
    (roots[0] / "mapped").write_bytes(bytes(MAPPED_BYTES))
    wait_until(lambda: (roots[1] / "mapped").exists(), "the names")
    seed, until = random.SystemRandom().randrange(1 << 31), time.monotonic() + STRESS_S
    print(f"seed {seed}")
    actors = [Actor(root, step, f"{seed} {step.__name__} {root}", until) for root in roots for step in STEPS]
    for actor in actors:
        actor.start()
    for actor in actors:
        while actor.is_alive():
            actor.join(1.0)
            stuck = [one for one in actors if one.is_alive() and time.monotonic() - one.since > HANG_S]
            if stuck:
                raise AssertionError(f"hang: {[one.name for one in stuck]}\n{stacks(site)}")
    failures = [f"{actor.name}: {actor.failure!r}" for actor in actors if actor.failure is not None]
    assert not failures, failures
    print({actor.name: actor.count for actor in actors})
    compare(roots)


def compare(roots: list[Path]) -> None:
    """Both show the same once the news of the last names had the time that is promised for them."""
    ended = time.monotonic()
    while differing(roots) and time.monotonic() - ended < FRESH_S:
        time.sleep(0.01)
    print(f"the same after {time.monotonic() - ended:.3f} s")
    time.sleep(max(0.0, ended + FRESH_S - time.monotonic()))
    assert not differing(roots)


def differing(roots: list[Path]) -> list[str]:
    return [name for name in (*NAMES, "mapped") if content(roots[0] / name) != content(roots[1] / name)]


def content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def stacks(site: TwoMounts) -> str:
    """Of all daemons, in their logs; then they are killed, so that nothing waits for ever."""
    for daemon in site.daemons:
        os.kill(daemon.pid, signal.SIGUSR2)
    time.sleep(2)
    texts = [f"--- {daemon.name}\n{daemon.log_text()[-6000:]}" for daemon in site.daemons]
    for daemon in reversed(site.daemons):
        daemon.kill()
    return "\n".join(texts)
