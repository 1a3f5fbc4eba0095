"""Very many files: all are listed, memory stays in proportion, `rm -r` works and can be interrupted, and
a restart takes no longer. FAULTS_FILES=1000000 makes it a million, a fifth of them in one directory;
what that costs is in docs/performance.md (`scripts/measure_size.py`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import LocalDaemon
from servers import wait_until

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "scripts"))

from measure_size import BIG, count_files, list_with_attributes, make_tree, usage

FILES = int(os.environ.get("FAULTS_FILES", "12000"))
IN_ONE = FILES // 5 if FILES >= 100_000 else FILES // 2
CONTENT = b"content of a small file\n" * 4
BOUND_S = 60.0 + FILES / 50
"""For one step: a hang is what is looked for."""
BYTES_PER_FILE = 450
"""Of the daemon, for each inode that the kernel knows (measured: 335)."""
STORE_BYTES = 200 << 20
"""Most that RocksDB takes for what is not on the disk yet, some 1 KB for each new file."""


def names_below(top: Path) -> set[str]:
    found = set()
    for directory, below, files in os.walk(top):
        found |= {os.path.relpath(os.path.join(directory, name), top) for name in (*below, *files)}
    return found


def interrupt_removal(directory: Path) -> None:
    """Ctrl-C for `rm -r` once it has removed something."""
    watched = list(directory.iterdir())[:50]
    process = subprocess.Popen(["rm", "-r", str(directory)], stderr=subprocess.DEVNULL)
    try:
        wait_until(
            lambda: process.poll() is not None or not all(one.exists() for one in watched),
            "removals",
            BOUND_S,
        )
        process.send_signal(signal.SIGINT)
        process.wait(timeout=BOUND_S)
    finally:
        process.kill()
        process.wait()


def test_many_files(local_daemon: Callable[..., LocalDaemon]) -> None:
    site = local_daemon()
    make_tree(site.ufs_dir, FILES, IN_ONE, CONTENT)
    before = usage(site.daemon.pid)
    big = site.mount / BIG
    for _ in range(2):
        assert list_with_attributes(big) == IN_ONE
        assert count_files(site.mount) == FILES
    after = usage(site.daemon.pid)
    grown = after.rss_bytes - before.rss_bytes
    assert grown < BYTES_PER_FILE * FILES + min(1500 * FILES, STORE_BYTES) + (20 << 20)
    assert after.fd_count < before.fd_count + 100

    site.restart()
    assert list_with_attributes(big) == IN_ONE
    site.daemon.kill()
    subprocess.run(["umount", "--lazy", str(site.mount)], check=True)
    site.daemon.start()
    assert (big / f"file-{IN_ONE - 1:06d}.bin").read_bytes() == CONTENT
    assert count_files(site.mount) == FILES

    interrupt_removal(big)
    left = list_with_attributes(big)
    assert 0 < left < IN_ONE
    assert len(names_below(big)) == left
    removed = site.mount / "part000" / "dir00"
    subprocess.run(["rm", "-r", str(removed)], check=True, timeout=BOUND_S)
    assert not removed.exists()
    if FILES >= 100_000:
        subprocess.run(["rm", "-r", str(big)], check=True, timeout=BOUND_S)
    wait_until(lambda: not site.report()["persist_pending_count"], "all is removed", BOUND_S)
    assert names_below(site.ufs_dir) == names_below(site.mount)
    final = usage(site.daemon.pid)
    assert final.rss_bytes - before.rss_bytes < grown + (60 << 20)


@pytest.mark.parametrize("count", [min(FILES, 200_000) // 20])
def test_new_files_in_one_directory(local_daemon: Callable[..., LocalDaemon], count: int) -> None:
    """Made, listed meanwhile, and removed while they are still being uploaded."""
    site = local_daemon()
    (site.mount / BIG).mkdir()
    make_tree(site.mount, count, count, CONTENT)
    assert list_with_attributes(site.mount / BIG) == count
    subprocess.run(["rm", "-r", str(site.mount / BIG)], check=True, timeout=BOUND_S)
    wait_until(lambda: not site.report()["persist_pending_count"], "all is removed", BOUND_S)
    assert names_below(site.ufs_dir) == names_below(site.mount) == set()
