"""The power fails at random moments; what was synced is there, and the rest is a prefix.

`FAULTS_POWER_CUTS` is how many cuts each kind gets (else a few of some kinds), `FAULTS_SEED` repeats a
run, as far as processes repeat themselves.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemons import LocalDaemon, require_fuse
from power import Disk, Writeback, require_disks
from power_oracle import Oracle
from power_work import Work
from servers import wait_until

CUTS = int(os.environ.get("FAULTS_POWER_CUTS", "2"))
IS_LONG = "FAULTS_POWER_CUTS" in os.environ
SEED = int(os.environ.get("FAULTS_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 31)
LAYOUTS = {
    "one_disk": (["a"], "a", ["SSD:{a}/ssd:200MB"]),
    "two_disks": (["a", "b"], "a", ["SSD:{b}/ssd:200MB"]),
    "tiers": (["a", "b"], "a", ["SSD:{a}/ssd:16MB", "HDD:{b}/hdd:400MB"]),
}
"""Name -> disks, the one with the state directory, the tiers."""
UPLOADS = {"never": "1000s", "soon": "20ms", "through": "20ms"}
"""Name -> persist_delay. The under storage is on neither disk."""


class Machine:
    """One `local` daemon whose state directory and tiers are on disks of their own."""

    def __init__(self, place: Path, layout: str, uploads: str) -> None:
        names, state, tiers = LAYOUTS[layout]
        self.disks: dict[str, Disk] = {}
        try:
            for name in names:
                self.disks[name] = Disk(place, name)
            tops = {name: disk.top for name, disk in self.disks.items()}
            self.site = LocalDaemon(
                tiers=[tier.format(**tops) for tier in tiers],
                mount_options="write_type=CACHE_THROUGH" if uploads == "through" else "",
                env={
                    "ALLUXIOFUSE_MASTER_PERSIST_DELAY_S": UPLOADS[uploads],
                    "ALLUXIOFUSE_CLIENT_PATIENCE_S": "1500ms",
                    "ALLUXIOFUSE_WORKER_SESSION_GRACE_S": "10ms",
                },
            )
        except BaseException:
            self._close_disks()
            raise
        (tops[state] / "state").mkdir()
        self.site.state.symlink_to(tops[state] / "state")
        self.site.expects_clean_end = False

    def start(self) -> None:
        self.site.daemon.start()

    def wait_recovered(self) -> None:
        """Until what was open for writing is sealed, and the master knows."""

        def is_recovered() -> bool:
            [worker] = self.site.report()["workers"]
            names = ("open_slabs", "untold_seals")
            return all(worker["counters"].get(name) == 0 for name in names)

        wait_until(is_recovered, "what was open is sealed")

    def fail(self, names: list[str], end_programs: Callable[[], None]) -> None:
        """Everything that happens on this machine stops at one moment; some of the disks lose what
        was not written to them. Afterwards the disks are mounted again: programs must be gone by then, whose
        open files may be those of a disk."""
        pids = [self.site.daemon.pid, *_children(self.site.daemon.pid)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for name in names:
            self.disks[name].cut()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.site.daemon.kill()
        subprocess.run(["umount", "--lazy", str(self.site.mount)], check=False, capture_output=True)
        end_programs()
        for disk in self.disks.values():
            disk.remount()

    def close(self) -> list[str]:
        self.site.daemon.kill()
        subprocess.run(["umount", "--lazy", str(self.site.mount)], check=False, capture_output=True)
        self._close_disks()
        return self.site.close()

    def _close_disks(self) -> None:
        for disk in self.disks.values():
            disk.close()


def _children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def machine(place: Path, layout: str, uploads: str) -> Iterator[Machine]:
    require_fuse()
    require_disks()
    one = Machine(place, layout, uploads)
    try:
        yield one
    finally:
        wrong = one.close()
    assert not wrong, "\n".join(wrong)


class Worker(threading.Thread):
    """Works until the power is gone."""

    def __init__(self, work: Work) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.count = 0
        self.is_over = False
        """An error is expected from now on."""
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.is_over:
                self.work.step()
                self.count += 1
        except OSError as exc:
            if not self.is_over:
                self.failure = exc
        except BaseException as exc:
            if not self.is_over:
                self.failure = exc


def run_until_cut(one: Machine, oracle: Oracle, dice: random.Random, *, is_synchronous: bool) -> list[str]:
    """One life: work, then the failure of some disks. Answers which."""
    work = Work(one.site.mount, oracle, dice, is_synchronous=is_synchronous)
    worker = Worker(work)
    wanted = dice.randrange(5, 80)
    names = sorted(one.disks)
    cut = [name for name in names if dice.random() < 0.7] or [dice.choice(names)]

    def end() -> None:
        worker.join(60)
        assert not worker.is_alive(), "a program hangs though its filesystem is gone"
        work.close()

    with Writeback(list(one.disks.values()), dice.randrange(1 << 30)) as writeback:
        worker.start()
        deadline = time.monotonic() + 60
        while worker.count < wanted and worker.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(dice.random() * 0.05)
        writeback.stop()
        worker.is_over = True
        one.fail(cut, end)
    if worker.failure is not None:
        raise AssertionError(f"{worker.failure!r}\n{one.site.daemon.log_text()[-4000:]}") from worker.failure
    return cut


KINDS = [(layout, uploads) for layout in LAYOUTS for uploads in UPLOADS]
FEW = [("one_disk", "never"), ("two_disks", "through"), ("tiers", "soon")]


@pytest.mark.parametrize(("layout", "uploads"), KINDS if IS_LONG else FEW)
def test_power_failure(tmp_path: Path, layout: str, uploads: str) -> None:
    seed = SEED
    dice = random.Random(f"{seed} {layout} {uploads}")
    with machine(tmp_path, layout, uploads) as one:
        oracle = Oracle()
        one.start()
        for number in range(CUTS):
            cut = run_until_cut(one, oracle, dice, is_synchronous=uploads == "through")
            one.start()
            one.wait_recovered()
            note = f"FAULTS_SEED={seed}, cut {number + 1} of {cut}"
            try:
                lost = oracle.after_failure(one.site.mount)
            except AssertionError as exc:
                raise AssertionError(f"{note}: {exc}\n{one.site.daemon.log_text()[-3000:]}") from None
            print(f"{note}: {len(oracle.tree)} names, {len(lost)} unsynced files lost")
            for path in lost:
                oracle.change(f"unlink {path}", lambda tree, path=path: tree.pop(path))  # type: ignore[misc]
                os.unlink(one.site.mount / path)
                oracle.done()
