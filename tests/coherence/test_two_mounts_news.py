"""Names and attributes that change on one mount, as the other sees them."""

from __future__ import annotations

import os
import signal
import stat
import time
from functools import partial
from pathlib import Path

from seen import has_mode
from servers import wait_until
from two_mounts import TwoMounts


def test_names_and_attributes_follow(pair: tuple[Path, Path]) -> None:
    author, other = pair
    assert not (other / "f").exists()
    assert os.listdir(other) == []
    (author / "f").write_bytes(b"1")
    wait_until((other / "f").exists, "a name that did not exist")
    assert os.listdir(other) == ["f"]
    os.chmod(author / "f", 0o600)
    wait_until(lambda: stat.S_IMODE((other / "f").stat().st_mode) == 0o600, "its mode")
    os.rename(author / "f", author / "g")
    wait_until(lambda: os.listdir(other) == ["g"] and not (other / "f").exists(), "its new name")
    os.mkdir(author / "d")
    wait_until(lambda: other.stat().st_nlink == 3, "a directory")
    os.rename(author / "g", author / "d" / "g")
    wait_until(lambda: (other / "d" / "g").exists() and not (other / "g").exists(), "moved down")
    os.rename(author / "d", author / "e")
    wait_until(lambda: (other / "e" / "g").exists() and not (other / "d").exists(), "with its directory")
    os.unlink(author / "e" / "g")
    os.rmdir(author / "e")
    wait_until(lambda: os.listdir(other) == [] and not (other / "e").exists(), "all gone")


def test_what_is_known_is_known_without_the_master(site: TwoMounts, pair: tuple[Path, Path]) -> None:
    """Names, attributes and what does not exist are answered from memory until news comes: while the
    master is stopped, as nobody has told of a change, and at once when it goes on and something has."""
    author, other = pair
    for number in range(20):
        (author / f"f{number}").write_bytes(b"x" * number)
    wait_until(lambda: len(os.listdir(other)) == 20, "all names")
    wait_until(lambda: all((other / f"f{n}").stat().st_size == n for n in range(20)), "all sizes")
    assert not (other / "missing").exists()
    site.wait_persisted()  # What was just closed counts as being written for a moment, and is asked for.
    time.sleep(1)  # News of that may be under way, for as long as is promised.
    assert not (other / "missing").exists()
    wait_until(lambda: all((other / f"f{n}").stat().st_size == n for n in range(20)), "the attributes")
    os.kill(site.master.pid, signal.SIGSTOP)
    try:
        assert [(other / f"f{n}").stat().st_size for n in range(20)] == list(range(20))
        assert not (other / "missing").exists()
    finally:
        os.kill(site.master.pid, signal.SIGCONT)
    (author / "f1").write_bytes(b"longer than it was")
    (author / "missing").write_bytes(b"")
    wait_until(lambda: (other / "f1").stat().st_size == 18, "a size")
    wait_until((other / "missing").exists, "a name")


def test_news_come_soon(pair: tuple[Path, Path]) -> None:
    """Not a measurement: on a machine that has time it takes a few milliseconds, promised is a second."""
    author, other = pair[0] / "f", pair[1] / "f"
    author.write_bytes(b"")
    wait_until(other.exists, "the name")
    took = []
    for mode in range(0o600, 0o620):
        os.chmod(author, mode)
        began = time.monotonic()
        wait_until(partial(has_mode, other, mode), "a mode")
        took.append(time.monotonic() - began)
    print(f"news took {min(took) * 1000:.1f} to {max(took) * 1000:.1f} ms")
