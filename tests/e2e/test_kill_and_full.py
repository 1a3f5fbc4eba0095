"""kill -9 in the middle of the work, and tiers that are too small for it."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import MIB, LocalDaemon, mount_lines
from servers import wait_until
from trees import assert_same, run

Start = Callable[..., LocalDaemon]

WRITER = textwrap.dedent("""
    import hashlib, os, random, sys
    top, seed = sys.argv[1], int(sys.argv[2])
    dice = random.Random(seed)
    for number in range(100_000):
        directory = f"{top}/d{dice.randrange(5)}"
        name = f"{directory}/f{number}"
        data = dice.randbytes(dice.choice((0, 10, 4096, 70_000, 1_500_000)))
        try:
            os.makedirs(directory, exist_ok=True)
            with open(name, "wb") as file:
                file.write(data)
                if dice.random() < 0.1:
                    file.flush()
                    os.fsync(file.fileno())
            what = dice.random()
            if what < 0.15:
                os.rename(name, name + ".renamed")
                name += ".renamed"
            elif what < 0.3:
                with open(name, "ab") as file:
                    file.write(b"appended")
                data += b"appended"
            elif what < 0.4:
                os.unlink(name)
                data = None
        except OSError:
            break
        digest = "gone" if data is None else hashlib.sha256(data).hexdigest()
        print(digest, name[len(top) + 1:], flush=True)
    """)
"""Prints one line for each file of which everything has been acknowledged."""


def acknowledged(lines: list[str]) -> dict[str, str]:
    return {name: digest for digest, _, name in (line.partition(" ") for line in lines)}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_while_it_writes(local_daemon: Start, seed: int) -> None:
    site = local_daemon()
    site.expects_clean_end = False
    dice = random.Random(seed)
    lines: list[str] = []
    known: dict[str, str] = {}
    for life in range(2):
        top = site.mount / f"life{life}"
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(top), str(seed * 10 + life)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(dice.randrange(20, 250))]
            site.daemon.kill()
            lines += writer.stdout.read().splitlines()
            assert writer.wait(60) == 0
        found = acknowledged([line.rstrip("\n") for line in lines])
        known |= {f"life{life}/{name}": digest for name, digest in found.items()}
        assert mount_lines(site.mount), "the kill left a dead mount"
        site.daemon.start()
        for name, digest in known.items():
            path = site.mount / name
            if digest == "gone":
                assert not path.exists(), name
            else:
                assert hashlib.sha256(path.read_bytes()).hexdigest() == digest, name
    run("find", site.mount, "-type", "f", "-exec", "cat", "{}", "+")
    wait_until(lambda: site.report()["persist_pending_count"] == 0, "the persist log is empty")
    assert site.report()["persist_failing"] == []
    assert_same(site.mount, site.ufs_dir)
    assert len(mount_lines(site.mount)) == 1
    (site.mount / "after").write_text("it goes on")
    site.wait_persisted()
    assert (site.ufs_dir / "after").read_text() == "it goes on"


def test_no_room_and_room_again(local_daemon: Start, tmp_path: Path) -> None:
    """What can't be written back (nothing may be put there) fills the only tier."""
    site = local_daemon(tiers=["SSD:{base}/ssd:32MB"], arguments=["--log-level", "info"])
    kept = os.urandom(5 * MIB)
    (site.mount / "kept").write_bytes(kept)
    with open(site.mount / "huge", "wb", buffering=0) as file:

        def write_all() -> None:
            while True:
                file.write(kept)

        with pytest.raises(OSError) as caught:
            write_all()
    assert caught.value.errno == errno.ENOSPC
    done = subprocess.run(
        ["cp", "/dev/stdin", str(site.mount / "copied")],
        input=os.urandom(40 * MIB),
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert b"No space left on device" in done.stderr
    assert (site.mount / "kept").read_bytes() == kept, "the filesystem goes on"
    run("rm", "-f", site.mount / "huge", site.mount / "copied")
    again = os.urandom(20 * MIB)
    (site.mount / "again").write_bytes(again)
    assert (site.mount / "again").read_bytes() == again
    site.wait_persisted()
    assert (site.ufs_dir / "again").read_bytes() == again
    for number in range(6):
        (site.mount / f"more{number}").write_bytes(again)
        site.wait_persisted()
    assert (site.mount / "more0").read_bytes() == again, "evicted meanwhile"


def test_files_larger_than_all_tiers_are_read(local_daemon: Start, tmp_path: Path) -> None:
    with open(tmp_path / "large", "wb") as file:
        for _ in range(80):
            file.write(os.urandom(MIB))
    site = local_daemon(tmp_path, tiers=["MEM:{base}/mem:16MB", "SSD:{base}/ssd:32MB"])
    for _ in range(2):
        run("cmp", tmp_path / "large", site.mount / "large")
    with open(site.mount / "large", "rb") as one, open(tmp_path / "large", "rb") as two:
        for offset in (79 * MIB, 3, 40 * MIB - 1):
            assert os.pread(one.fileno(), 5000, offset) == os.pread(two.fileno(), 5000, offset)
        (site.mount / "small").write_bytes(b"x" * 3 * MIB)  # while the other is open
    site.wait_persisted()
    assert (tmp_path / "small").stat().st_size == 3 * MIB
