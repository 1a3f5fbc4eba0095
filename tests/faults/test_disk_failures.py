"""Disks of a running daemon that fail, and come back: no restart."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from daemons import MIB, LocalDaemon, require_fuse
from power import Disk, require_disks
from servers import wait_until


def turn_readonly(disk: Disk) -> None:
    """As the kernel does when it finds a filesystem damaged."""
    source = subprocess.run(
        ["findmnt", "-no", "SOURCE", str(disk.top)], check=True, capture_output=True, text=True
    ).stdout.strip()
    subprocess.run(["mount", "-o", "remount,errors=remount-ro", str(disk.top)], check=True)
    trigger = Path("/sys/fs/ext4", Path(source).name, "trigger_fs_error")
    if not trigger.exists():
        pytest.skip("this kernel can't pretend that an ext4 is damaged")
    trigger.write_text("1")


def go_away(disk: Disk) -> None:
    """Unmounted by force; what is still open there stays usable, as the kernel has it."""
    subprocess.run(["umount", "--lazy", str(disk.top)], check=True)


FAILURES: dict[str, tuple[Callable[[Disk], None], Callable[[Disk], None]]] = {
    "EIO": (Disk.cut, Disk.remount),
    "gone": (go_away, Disk.mount),
    "read-only": (turn_readonly, Disk.remount),
}
"""Name -> how it comes, how it goes."""


COLD = os.urandom(3 * MIB)
"""A file that is in the under storage from the start."""


@contextmanager
def running(place: Path, tiers: list[str], state: str = "", **env: str) -> Iterator[tuple[LocalDaemon, Disk]]:
    """A daemon that uses a disk of its own ("{disk}") for tiers, or for the state below it."""
    require_fuse()
    require_disks()
    disk = Disk(place, "disk", 192 * MIB)
    site = LocalDaemon(tiers=[one.replace("{disk}", str(disk.top)) for one in tiers], env=env)
    try:
        if state:
            (disk.top / state).mkdir()
            site.state.symlink_to(disk.top / state)
        (site.ufs_dir / "cold").write_bytes(COLD)
        yield site.start(), disk
    finally:
        site.daemon.kill() if state else None
        site.expects_clean_end = not state
        wrong = site.close()
        disk.close()
    assert not wrong, "\n".join(wrong)


def troubles(site: LocalDaemon) -> list[str]:
    [worker] = site.report()["workers"]
    return [one for tier in worker["tiers"] for one in tier["troubles"]]


def outcome(call: Callable[[], Any]) -> int:
    """The errno of a call, 0 when it works."""
    try:
        call()
    except OSError as exc:
        return exc.errno or -1
    return 0


def write_durably(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@pytest.mark.parametrize("name", FAILURES)
def test_a_tier_directory_fails(tmp_path: Path, name: str) -> None:
    fail, mend = FAILURES[name]
    tiers = ["SSD:{disk}/ssd:64MB", "HDD:{base}/hdd:64MB"]
    with running(tmp_path, tiers, ALLUXIOFUSE_MASTER_PERSIST_DELAY_S="1000s") as (site, disk):
        clean, dirty, other = os.urandom(3 * MIB), os.urandom(2 * MIB), os.urandom(2 * MIB)
        (site.mount / "clean").write_bytes(clean)
        site.wait_persisted("/clean")
        write_durably(site.mount / "dirty", dirty)
        with open(site.mount / "clean", "rb") as held:
            fail(disk)
            # Somebody has to notice; then it is out of use.
            wait_until(
                lambda: outcome(lambda: write_durably(site.mount / "new", other)) == 0, "others are used"
            )
            assert (site.mount / "new").read_bytes() == other
            if name == "read-only":
                assert (site.mount / "dirty").read_bytes() == dirty
            wait_until(lambda: str(disk.top) in "".join(troubles(site)), "the report says it")
            assert "OUT OF USE" in site.cli("admin", "report", "--master", site.address).stdout
            assert held.read() == clean, "what the under storage has is had from there"
        assert (site.mount / "clean").read_bytes() == clean
        if name != "read-only":
            assert outcome((site.mount / "dirty").read_bytes) == errno.EIO
        mend(disk)
        wait_until(lambda: not troubles(site), "it is in use again")
        assert (site.mount / "dirty").read_bytes() == dirty
        assert (site.mount / "new").read_bytes() == other
        site.wait_persisted()
        assert (site.ufs_dir / "dirty").read_bytes() == dirty
        write_durably(site.mount / "after", other)
        assert len(list((disk.top / "ssd/slabs").glob("*/*"))) > 1


def fill(disk: Disk) -> None:
    with open(disk.top / "ballast", "wb") as file:
        left = os.statvfs(disk.top)
        os.posix_fallocate(file.fileno(), 0, (left.f_bavail - 64) * left.f_frsize)


@pytest.mark.parametrize(
    ("fail", "number"), [(fill, errno.ENOSPC), (turn_readonly, errno.EROFS)], ids=["full", "read-only"]
)
def test_the_state_directory_can_not_be_written(
    tmp_path: Path, fail: Callable[[Disk], None], number: int
) -> None:
    """The master's and the worker's. What is cached is read, what is not too; changes fail with one
    clear error. With room it goes on by itself; a filesystem that has to be unmounted needs a restart."""
    with running(tmp_path, ["SSD:{base}/ssd:64MB"], state="state") as (site, disk):
        cached = os.urandom(3 * MIB)
        (site.mount / "cached").write_bytes(cached)
        assert (site.mount / "cold").stat().st_size == len(COLD)
        site.wait_persisted()
        fail(disk)

        def write(at: int) -> int:
            return outcome(lambda: write_durably(site.mount / f"new{at}", bytes(100)))

        numbers = iter(range(100_000))
        wait_until(lambda: write(next(numbers)) == number, "the disk is full")
        assert (site.mount / "cached").read_bytes() == cached
        assert (site.mount / "cold").read_bytes() == COLD
        assert outcome(lambda: os.rename(site.mount / "cached", site.mount / "moved")) == number
        if fail is fill:
            (disk.top / "ballast").unlink()
        else:
            site.kill()
            disk.remount()
            site.daemon.start()
        wait_until(lambda: write(next(numbers)) == 0, "it can be written again")
        assert (site.mount / "cached").read_bytes() == cached
        os.rename(site.mount / "cached", site.mount / "moved")
        write_durably(site.mount / "after", cached)
        site.wait_persisted()
        assert (site.ufs_dir / "after").read_bytes() == cached
        assert (site.ufs_dir / "moved").read_bytes() == cached
