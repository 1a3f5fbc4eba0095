"""From mounting to unmounting: signals, crashes, options, and who caches what."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import Cluster, LocalDaemon, mount_lines

from alluxiofuse.errors import UserError
from alluxiofuse.fuse.mountpoint import find_mount, mount_at, prepare, umount

WAIT_S = 30.0


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not in {WAIT_S:.0f} s: {what}"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts(local_daemon: Callable[..., LocalDaemon], number: signal.Signals) -> None:
    daemon = local_daemon()
    (daemon.mount / "file").write_text("kept")
    assert daemon.stop(number) == 0
    assert not mount_lines(daemon.mount)
    assert os.listdir(daemon.mount) == []
    daemon.daemon.start()
    assert (daemon.mount / "file").read_text() == "kept"


def test_unmounting_from_outside_ends_the_daemon(local_daemon: Callable[..., LocalDaemon]) -> None:
    daemon = local_daemon()
    umount(str(daemon.mount))
    assert daemon.daemon.wait() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may abort a connection")
def test_an_aborted_connection_ends_the_daemon_and_leaves_no_mount(
    local_daemon: Callable[..., LocalDaemon],
) -> None:
    daemon = local_daemon()
    descriptor = os.open(daemon.mount, os.O_RDONLY)
    try:
        with pytest.raises(UserError, match="is in use"):
            umount(str(daemon.mount), is_forced=True)
    finally:
        os.close(descriptor)
    assert daemon.daemon.wait() == 0
    assert not mount_lines(daemon.mount)


def test_a_busy_mount_is_not_unmounted_but_detached_by_a_signal(
    local_daemon: Callable[..., LocalDaemon],
) -> None:
    daemon = local_daemon()
    descriptor = os.open(daemon.mount / "file", os.O_WRONLY | os.O_CREAT)
    try:
        os.write(descriptor, b"written before the signal")
        with pytest.raises(UserError, match=r"is in use.*fuser"):
            umount(str(daemon.mount))
        assert daemon.stop() == 0
        assert not mount_lines(daemon.mount)
        with pytest.raises(OSError) as caught:
            os.fstat(descriptor)
        assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    finally:
        with contextlib.suppress(OSError):  # nobody is there to flush to
            os.close(descriptor)
    daemon.daemon.start()
    assert (daemon.mount / "file").read_bytes() == b"written before the signal"


def test_what_a_crash_leaves_is_cleared_by_the_next_start(local_daemon: Callable[..., LocalDaemon]) -> None:
    daemon = local_daemon()
    (daemon.mount / "file").write_text("kept")
    daemon.expects_clean_end = False
    daemon.daemon.kill()
    with pytest.raises(OSError) as caught:
        os.listdir(daemon.mount)
    assert caught.value.errno == errno.ENOTCONN
    daemon.daemon.start()
    assert "cleared away" in daemon.daemon.log_text()
    assert len(mount_lines(daemon.mount)) == 1
    assert (daemon.mount / "file").read_text() == "kept"


def test_a_mounted_directory_is_not_mounted_again(shared_local: LocalDaemon) -> None:
    with pytest.raises(UserError, match="already an alluxiofuse mount"):
        prepare(str(shared_local.mount))


def test_a_path_below_a_real_mount_is_found(shared_local: LocalDaemon, here: Path) -> None:
    place = find_mount(here / "not" / "there")
    assert place is not None
    assert place.mount.path == os.fsencode(shared_local.mount)
    assert place.inside == b"/" + os.fsencode(here.name) + b"/not/there"
    assert find_mount(shared_local.ufs_dir) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may set it")
def test_read_ahead_is_raised(shared_local: LocalDaemon) -> None:
    mount = mount_at(str(shared_local.mount))
    assert mount is not None
    assert int(Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb").read_text()) >= 1024


def test_a_read_only_mount(local_daemon: Callable[..., LocalDaemon]) -> None:
    daemon = local_daemon()
    (daemon.mount / "file").write_text("x")
    assert daemon.stop() == 0
    daemon.daemon.arguments += ["-o", "ro,noexec,attr_timeout=0"]
    daemon.daemon.start()
    assert (daemon.mount / "file").read_text() == "x"
    attempts: list[Callable[[], object]] = [
        lambda: (daemon.mount / "file").write_text("y"),
        lambda: (daemon.mount / "new").touch(),
        lambda: (daemon.mount / "file").unlink(),
        lambda: (daemon.mount / "file").chmod(0o600),
    ]
    for attempt in attempts:
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EROFS


def test_unwritten_pages_of_a_shared_mapping_survive_the_end(
    local_daemon: Callable[..., LocalDaemon],
) -> None:
    """A program that ends with a dirty mapping: the kernel writes it back before the unmount."""
    daemon = local_daemon()
    path = daemon.mount / "file"
    path.write_bytes(bytes(100_000))
    script = (
        "import mmap, sys\nfile = open(sys.argv[1], 'r+b')\nview = mmap.mmap(file.fileno(), 0)\n"
        "view[50_000:50_006] = b'mapped'\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    assert path.read_bytes()[50_000:50_006] == b"mapped"
    daemon.restart()
    assert path.read_bytes()[50_000:50_006] == b"mapped"


class TestTwoMountsOfOneCluster:
    """What one mount changes the other one shows, though both let the kernel cache."""

    @pytest.fixture
    def pair(self, cluster: Callable[..., Cluster]) -> tuple[Path, Path]:
        made = cluster(workers=1)
        second = made.base / "second"
        second.mkdir()
        made.add_mount(second)
        return made.mount, second

    def test_changes_are_seen(self, pair: tuple[Path, Path]) -> None:
        first, second = pair
        assert not (second / "file").exists()  # now cached as not existing
        (first / "file").write_text("one")
        eventually((second / "file").exists, "the new name")
        assert (second / "file").read_text() == "one"
        (first / "file").write_text("two, longer")
        eventually(lambda: (second / "file").read_text() == "two, longer", "the new content")
        (first / "file").chmod(0o600)
        eventually(lambda: (second / "file").stat().st_mode & 0o777 == 0o600, "the new mode")
        os.setxattr(first / "file", "user.a", b"x")
        eventually(lambda: os.listxattr(second / "file") == ["user.a"], "the attribute")
        (first / "file").rename(first / "moved")
        eventually(lambda: os.listdir(second) == ["moved"], "the new name in the listing")
        eventually(lambda: not (second / "file").exists(), "that the old name is gone")
        assert (second / "moved").read_text() == "two, longer"
        (first / "moved").unlink()
        eventually(lambda: not (second / "moved").exists(), "the removal")
        (second / "dir").mkdir()
        eventually((first / "dir").is_dir, "the directory")

    def test_an_open_sees_the_last_close(self, pair: tuple[Path, Path]) -> None:
        """Close-to-open, without waiting for news of the change."""
        first, second = pair
        (first / "file").write_text("start")
        eventually((second / "file").exists, "the file")
        for number in range(100):
            text = f"{number:03}" * (number + 1)
            (first / "file").write_text(text)
            assert (second / "file").read_text() == text

    def test_reading_what_the_other_is_writing(self, pair: tuple[Path, Path]) -> None:
        """`tail -f` on another machine: everybody goes to the file's home while it is open."""
        first, second = pair
        path = first / "log"
        path.touch()
        eventually((second / "log").exists, "the file")
        with path.open("ab", buffering=0) as writer, (second / "log").open("rb", buffering=0) as reader:
            for number in range(30):
                writer.write(b"%09d\n" % number)
                assert os.fstat(reader.fileno()).st_size == (number + 1) * 10
                assert os.pread(reader.fileno(), 100, number * 10) == b"%09d\n" % number
            os.ftruncate(writer.fileno(), 5)
            assert os.fstat(reader.fileno()).st_size == 5
            assert os.pread(reader.fileno(), 100, 0) == b"00000"

    def test_replacing_a_file_that_the_other_opens_never_fails_it(self, pair: tuple[Path, Path]) -> None:
        first, second = pair
        (first / "file").write_text("0")
        eventually((second / "file").exists, "the file")
        for number in range(100):
            (first / "next").write_text(f"{number}")
            os.rename(first / "next", first / "file")
            assert (second / "file").read_text().isdigit()

    def test_both_go_on_after_the_master_was_killed(self, cluster: Callable[..., Cluster]) -> None:
        made = cluster(workers=1)
        made.expects_clean_end = False
        second = made.base / "second"
        second.mkdir()
        made.add_mount(second)
        first = made.mount
        for number in range(20):
            (first / f"{number}").write_text("before")
        eventually(lambda: len(os.listdir(second)) == 20, "the files")
        assert not (second / "later").exists()
        with open(second / "0") as file:
            made.master.kill()
            made.master.start()
            (first / "later").write_text("after")
            (first / "0").write_text("after, and longer")
            os.unlink(first / "1")
            eventually((second / "later").exists, "the new name")
            eventually(lambda: (second / "0").read_text() == "after, and longer", "the new content")
            eventually(lambda: not (second / "1").exists(), "the removal")
            assert file.read() in ("before", "after, and longer")

    def test_many_changes_at_once(self, pair: tuple[Path, Path]) -> None:
        first, second = pair
        (first / "dir").mkdir()
        for number in range(500):
            (first / "dir" / f"{number}").write_text("x")
        eventually(lambda: (second / "dir").exists() and len(os.listdir(second / "dir")) == 500, "all files")
        assert all((second / "dir" / f"{number}").stat().st_size == 1 for number in range(500))
        subprocess.run(["rm", "-rf", str(second / "dir")], check=True)
        eventually(lambda: not (first / "dir").exists(), "that all are gone")


def test_a_subtree_is_mounted_as_a_root(cluster: Callable[..., Cluster]) -> None:
    made = cluster(workers=1)
    (made.mount / "a" / "b").mkdir(parents=True)
    (made.mount / "a" / "b" / "file").write_text("x")
    directory = made.base / "sub"
    directory.mkdir()
    made.add_mount(directory, "/a/b")
    assert directory.stat().st_ino == 1
    assert os.listdir(directory) == ["file"]
    (directory / "file").write_text("from below")
    (directory / "new").mkdir()
    eventually((made.mount / "a" / "b" / "new").is_dir, "the new directory")
    assert (made.mount / "a" / "b" / "file").read_text() == "from below"
    os.chmod(directory, 0o700)
    eventually(lambda: (made.mount / "a" / "b").stat().st_mode & 0o777 == 0o700, "the mode of the root")


@pytest.mark.skipif(os.geteuid() != 0, reason="mount(8) needs root")
def test_mount_8_through_mount_fuse(cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    """`mount -t fuse PROGRAM#SOURCE DIR` runs the program with SOURCE DIR -o OPTIONS, and waits."""
    made = cluster(workers=1)
    (made.mount / "file").write_text("x")
    program = tmp_path / "alluxiofuse-test"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m alluxiofuse.cli.main "$@"\n')
    program.chmod(0o755)
    directory = made.base / "by-mount"
    directory.mkdir()
    command = ["mount", "-t", "fuse", f"{program}#{made.address}", str(directory)]
    failed = subprocess.run([*command, "-o", "frobnicate"], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "frobnicate" in failed.stderr
    subprocess.run([*command, "-o", "ro,_netdev,nofail"], check=True, timeout=60)
    try:
        assert (directory / "file").read_text() == "x"
        with pytest.raises(OSError, match="Read-only"):
            (directory / "new").touch()
    finally:
        subprocess.run(["umount", str(directory)], check=True)
    assert os.listdir(directory) == []
