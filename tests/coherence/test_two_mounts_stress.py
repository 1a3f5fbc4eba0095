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
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import wait_until
from two_mounts import TwoMounts

STRESS_S = float(os.environ.get("STRESS_S", "5"))
HANG_S = 120.0
"""No single call may take this long (what is busy answers within seconds)."""
NAMES = ("a", "b", "c")
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


def write(root: Path, dice: random.Random) -> None:
    fd = os.open(
        some(root, dice), os.O_RDWR | os.O_CREAT | dice.choice([0, 0, os.O_TRUNC, os.O_APPEND]), 0o644
    )
    try:
        for _ in range(dice.randrange(4)):
            os.pwrite(fd, dice.randbytes(dice.choice([10, 5000, 200_000])), dice.randrange(100_000))
            if dice.random() < 0.2:
                os.fsync(fd)
    finally:
        os.close(fd)


def read(root: Path, dice: random.Random) -> None:
    fd = os.open(some(root, dice), os.O_RDONLY)
    try:
        for _ in range(3):
            os.pread(fd, 300_000, dice.randrange(50_000))
            os.fstat(fd)
    finally:
        os.close(fd)


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
    """Of a file that only this actor makes shorter: behind the end of others' would be a SIGBUS."""
    path = root / "mapped"
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 200_000) as memory:
        at = dice.randrange(199_000)
        memory[at : at + 1000] = dice.randbytes(1000)
        if dice.random() < 0.3:
            memory.flush()
        bytes(memory)


def overwrite_mapped(root: Path, dice: random.Random) -> None:
    fd = os.open(root / "mapped", os.O_WRONLY)
    try:
        os.pwrite(fd, dice.randbytes(5000), dice.randrange(190_000))
    finally:
        os.close(fd)


STEPS = (write, read, look, browse, move, replace, remove, cut, map_pages, overwrite_mapped)


@pytest.mark.parametrize("session", ["native", "pyfuse3"])
def test_nothing_hangs(session: str) -> None:
    options = (f"session={session}", f"session={session}")
    site = TwoMounts(mount_options=options, master_arguments=["--sync-interval", "-1"])
    try:
        site.start()
        stress(site)
    except BaseException:
        site.expects_clean_end = False
        site.close()
        raise
    wrong = site.close()
    assert not wrong, "\n\n".join(wrong)


def stress(site: TwoMounts) -> None:
    roots = [mount / "stress" for mount in site.mounts]
    roots[0].mkdir()
    (roots[0] / "mapped").write_bytes(bytes(200_000))
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
    assert not failures
    print({actor.name: actor.count for actor in actors})
    for name in (*NAMES, "mapped"):
        contents = [(root / name).read_bytes() if (root / name).exists() else b"" for root in roots]
        assert contents[0] == contents[1], name


def stacks(site: TwoMounts) -> str:
    """Of all daemons, in their logs; then they are killed, so that nothing waits for ever."""
    for daemon in site.daemons:
        os.kill(daemon.pid, signal.SIGUSR2)
    time.sleep(2)
    texts = [f"--- {daemon.name}\n{daemon.log_text()[-6000:]}" for daemon in site.daemons]
    for daemon in reversed(site.daemons):
        daemon.kill()
    return "\n".join(texts)
