"""`alluxiofuse local` as a process: ready, signals, unmounting, restarts, neighbours."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import PROGRAM, LocalDaemon, mount_lines, run_cli
from servers import free_ports, wait_until

from alluxiofuse.cli.tiers import default_mem_directory
from alluxiofuse.fuse.mountpoint import mounts

Start = Callable[..., LocalDaemon]


def test_ready_write_and_a_clean_end(local_daemon: Start) -> None:
    site = local_daemon()
    assert site.daemon.ready_line.startswith("ready: ")
    assert str(site.mount) in site.daemon.ready_line
    (site.mount / "a").mkdir()
    (site.mount / "a/hello.txt").write_text("hello\n")
    assert (site.mount / "a/hello.txt").read_text() == "hello\n"
    site.wait_persisted()
    assert (site.ufs_dir / "a/hello.txt").read_text() == "hello\n"
    for name in ("master.sock", "worker.sock"):
        assert (site.state / name).stat().st_mode & 0o777 == 0o600
    assert site.stop() == 0
    assert mount_lines(site.mount) == []
    assert not list(site.state.glob("*.sock"))
    assert list(site.mount.iterdir()) == []


def test_what_was_there_is_seen(local_daemon: Start, tmp_path: Path) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/data.bin").write_bytes(os.urandom(3 << 20))
    site = local_daemon(tmp_path)
    assert (site.mount / "deep/er/data.bin").read_bytes() == (tmp_path / "deep/er/data.bin").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unmounts_and_exits_0(local_daemon: Start, number: int) -> None:
    site = local_daemon()
    (site.mount / "x").write_text("x")
    assert site.stop(number) == 0
    assert mount_lines(site.mount) == []


def test_a_signal_while_a_program_uses_the_mount(local_daemon: Start) -> None:
    site = local_daemon()
    fd = os.open(site.mount / "open", os.O_WRONLY | os.O_CREAT)
    try:
        os.write(fd, b"half")
        assert site.stop() == 0
        assert mount_lines(site.mount) == []
    finally:
        with contextlib.suppress(OSError):  # the filesystem is gone
            os.close(fd)
    site.daemon.start()
    assert (site.mount / "open").read_bytes() == b"half"


def test_unmounted_from_outside_it_ends(local_daemon: Start) -> None:
    site = local_daemon()
    with (site.mount / "x").open("w") as file:
        file.write("x")
        done = run_cli("umount", site.mount, check=False)
        assert done.returncode == 2
        assert f"{site.mount} is in use" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    run_cli("umount", site.mount)
    assert site.daemon.wait() == 0
    assert mount_lines(site.mount) == []


def test_a_restart_keeps_everything(local_daemon: Start) -> None:
    site = local_daemon()
    (site.mount / "dir").mkdir(mode=0o750)
    (site.mount / "dir/file").write_bytes(b"x" * 100_000)
    os.link(site.mount / "dir/file", site.mount / "dir/hard")
    os.symlink("file", site.mount / "dir/soft")
    before = {name: os.lstat(site.mount / "dir" / name) for name in ("file", "hard", "soft", ".")}
    site.restart()
    for name, old in before.items():
        new = os.lstat(site.mount / "dir" / name)
        assert (new.st_mode, new.st_size, new.st_mtime_ns, new.st_nlink) == (
            old.st_mode,
            old.st_size,
            old.st_mtime_ns,
            old.st_nlink,
        )
    assert (site.mount / "dir/soft").read_bytes() == b"x" * 100_000


def test_the_under_storage_is_remembered(local_daemon: Start) -> None:
    site = local_daemon()
    (site.mount / "x").write_text("x")
    assert site.stop() == 0
    place = site.daemon.arguments.index("--ufs")
    del site.daemon.arguments[place : place + 2]
    site.daemon.start()
    assert (site.mount / "x").read_text() == "x"


def test_two_beside_each_other(local_daemon: Start) -> None:
    first, second = local_daemon(), local_daemon()
    (first.mount / "x").write_text("first")
    (second.mount / "x").write_text("second")
    assert (first.mount / "x").read_text() == "first"
    assert run_cli("fs", "cat", first.mount / "x").stdout == "first"
    assert run_cli("fs", "cat", second.mount / "x").stdout == "second"
    done = run_cli("fs", "ls", "/", check=False)
    assert done.returncode == 2
    assert "--master" in done.stderr


def test_default_tiers_and_the_end_of_the_memory_tier(local_daemon: Start) -> None:
    site = local_daemon(tiers=(), arguments=["--hints"])
    (site.mount / "x").write_bytes(b"x" * 1_000_000)
    site.wait_persisted()
    tiers = site.report()["workers"][0]["tiers"]
    assert [tier["alias"] for tier in tiers] in (["MEM", "SSD"], ["SSD"])
    assert f"ls -l {site.mount}" in site.daemon.log_text()
    memory = default_mem_directory(site.state)
    assert memory.is_dir() == (len(tiers) == 2)
    assert site.stop() == 0
    assert not memory.exists()
    assert (site.state / "cache").is_dir()


def test_after_a_kill_the_next_start_clears_the_dead_mount(local_daemon: Start) -> None:
    site = local_daemon()
    (site.mount / "x").write_text("kept")
    site.wait_persisted()
    site.expects_clean_end = False
    site.daemon.kill()
    assert mount_lines(site.mount)
    site.daemon.start()
    assert (site.mount / "x").read_text() == "kept"
    assert "crashed daemon" in site.daemon.log_text()
    assert len(mount_lines(site.mount)) == 1


def test_paths_below_the_mount_need_no_master(local_daemon: Start) -> None:
    site = local_daemon()
    (site.mount / "dir").mkdir()
    (site.mount / "dir/x").write_text("text")
    assert run_cli("fs", "cat", "x", cwd=site.mount / "dir").stdout == "text"
    assert run_cli("fs", "ls", cwd=site.mount / "dir").stdout == "x\n"
    assert run_cli("fs", "ls", "..", cwd=site.mount / "dir").stdout == "dir\n"
    if sum(mount.is_ours for mount in mounts()) == 1:
        assert run_cli("fs", "ls", "/dir").stdout == "x\n", "the only mount of this machine"
    assert run_cli("fs", "cat", "/dir/x", env={"ALLUXIOFUSE_MASTER": f"unix:{site.state}/master.sock"}).stdout


def test_listening_on_tcp_too(local_daemon: Start) -> None:
    (port,) = free_ports(1)
    site = local_daemon(arguments=["--tcp", f"127.0.0.1:{port}"])
    (site.mount / "x").write_bytes(b"x" * 3_000_000)
    done = run_cli("fs", "cat", "--master", f"127.0.0.1:{port}", "/x")
    assert done.stdout == "x" * 3_000_000
    (worker,) = site.report()["workers"]
    assert worker["address"].startswith("127.0.0.1:")


def test_mount_options(local_daemon: Start) -> None:
    site = local_daemon(mount_options="ro,noatime")
    with pytest.raises(OSError, match="Read-only"):
        (site.mount / "x").write_text("x")
    assert "noatime" in mount_lines(site.mount)[0]


def test_a_program_that_stops_reading_is_no_error(local_daemon: Start) -> None:
    site = local_daemon()
    (site.mount / "big").write_bytes(b"line\n" * 2_000_000)
    command = shlex.join([*PROGRAM, "fs", "cat", str(site.mount / "big")])
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "line\n"
    assert done.stderr == ""


def test_ctrl_c_of_a_command(local_daemon: Start) -> None:
    site = local_daemon()
    os.kill(site.daemon.pid, signal.SIGSTOP)  # it accepts a connection and does not answer
    try:
        process = subprocess.Popen(
            [*PROGRAM, "fs", "ls", "--master", site.address, "/"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        wait_until(lambda: has_unix_peer(process.pid), "it talks to the master")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert [text.strip() for text in process.communicate()] == [b"", b""]
    finally:
        os.kill(site.daemon.pid, signal.SIGCONT)


@pytest.mark.parametrize("entry", ["-m", "-c"])
def test_ctrl_c_while_code_is_made(entry: str, tmp_path: Path) -> None:
    """A signal that comes while a dataclass is built, say, is remembered by the interpreter, which then
    kills itself at its end."""
    program = tmp_path / "interrupted.py"
    program.write_text(
        "import click\n"
        "from alluxiofuse.cli import main\n"
        "@click.command()\n"
        "def command():\n"
        "    exec('raise KeyboardInterrupt')\n"
        "main.cli.add_command(command, 'fs')\n"
        "main.Commands.get_command = lambda self, ctx, name: command\n"
        "main.main(['fs'])\n"
    )
    how = ["-m", "interrupted"] if entry == "-m" else ["-c", program.read_text()]
    done = subprocess.run([sys.executable, *how], cwd=tmp_path, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (130, b"", b"")


def has_unix_peer(pid: int) -> bool:
    """The process has a socket open."""
    try:
        links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
    except OSError:
        return False
    return sum(link.startswith("socket:") for link in links) >= 3  # two of trio's own, one to the master


def test_what_was_just_written_is_in_the_under_storage_when_it_has_stopped(
    local_daemon: Callable[..., LocalDaemon],
) -> None:
    daemon = local_daemon()
    for i in range(50):
        (daemon.mount / f"f{i}").write_text(f"text {i}")
    daemon.stop()
    assert {path.name: path.read_text() for path in daemon.ufs_dir.iterdir()} == {
        f"f{i}": f"text {i}" for i in range(50)
    }
