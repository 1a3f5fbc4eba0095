"""Real daemons for tests, as subprocesses: `alluxiofuse local`, and clusters of separate processes.

Use the fixtures `local_daemon` and `cluster` of conftest.py; they stop what they started and fail
the test when something does not end cleanly.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 120.0
PROGRAM = [sys.executable, "-m", "alluxiofuse.cli.main"]
MIB = 1 << 20
SESSION = os.environ.get("TEST_SESSION", "")
"""Which FUSE session the mounts use, where a test does not say: native, pyfuse3; "" the default."""
SITES: list[Path] = []
"""Directories of all sites that this process made."""


def require_fuse() -> None:
    """Skips the test where FUSE can't be used; fails it with CI=true."""
    reason = ""
    if not os.path.exists("/dev/fuse"):
        reason = "no /dev/fuse on this machine"
    elif os.geteuid() != 0 and shutil.which("fusermount3") is None:
        reason = "not root and no fusermount3"
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def clean_environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours, without settings that would change what a daemon does."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ALLUXIOFUSE_", "AWS_", "S3_"))
    }
    return {**kept, "AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nonexistent", **(changes or {})}


def run_cli(
    *arguments: str | os.PathLike[str],
    check: bool = True,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    stdin: bytes | None = None,
    timeout_s: float = COMMAND_TIMEOUT_S,
) -> subprocess.CompletedProcess[str]:
    """Run `alluxiofuse ARGUMENTS`. With `check` AssertionError (with its stderr) unless it exits 0."""
    command = [*PROGRAM, *(os.fspath(one) for one in arguments)]
    done = subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        env=clean_environment(env),
        cwd=cwd,
        timeout=timeout_s,
        check=False,
    )
    result = subprocess.CompletedProcess(
        command, done.returncode, os.fsdecode(done.stdout), os.fsdecode(done.stderr)
    )
    if check:
        assert done.returncode == 0, f"{arguments}: exit code {done.returncode}\n{result.stderr}"
    return result


def mount_lines(directory: str | Path) -> list[str]:
    """The lines of /proc/self/mountinfo for a mount point."""
    wanted = os.fspath(directory).replace(" ", "\\040")
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if line.split(" ")[4] == wanted]


class Daemon:
    """One process of ours that prints a line beginning with "ready"."""

    def __init__(
        self, name: str, arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.arguments = list(arguments)
        self.log = log
        self.env = dict(env or {})
        self.prefix: list[str] = []
        """Put before the command: a program that runs it, or becomes it."""
        self.ready_line = ""
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def start(self, *, wait: bool = True) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, *PROGRAM, *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=clean_environment(self.env),
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> str:
        """The ready line; AssertionError with the log when it does not come."""
        assert self.process is not None
        assert self.process.stdout is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.explain_hang()
                    raise AssertionError(f"{self.name} was not ready in time:\n{self.log_text()[-6000:]}")
                chunk = os.read(self.process.stdout.fileno(), 4096)
                if not chunk:
                    code = self.process.wait(STOP_TIMEOUT_S)
                    raise AssertionError(f"{self.name} exited with {code}:\n{self.log_text()[-6000:]}")
                line += chunk
        self.ready_line = line.decode()
        assert self.ready_line.startswith("ready"), self.ready_line
        return self.ready_line

    def explain_hang(self) -> None:
        """Have it print its stacks into the log, then end it."""
        if self.is_running:
            os.kill(self.pid, signal.SIGUSR2)
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert self.process is not None
                self.process.wait(1.0)
            self.kill()

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Its exit code; AssertionError with its stacks when it does not end."""
        assert self.process is not None
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.explain_hang()
            raise AssertionError(
                f"{self.name} did not end in {timeout_s:.0f} s:\n{self.log_text()[-12000:]}"
            ) from None
        self._close()
        return code

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end; its exit code."""
        if self.is_running:
            os.kill(self.pid, number)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL. Idempotent."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._close()

    def _close(self) -> None:
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()


class Site:
    """A temporary place with a mount point, and commands that talk to its master."""

    def __init__(self) -> None:
        # Short: Unix sockets take 107 bytes of path.
        self.base = Path(tempfile.mkdtemp(prefix="af-"))
        SITES.append(self.base)
        self.mount = self.base / "mnt"
        self.mount.mkdir()
        self.mounts = [self.mount]
        """All places where something may be mounted."""
        self.env: dict[str, str] = {}
        self.daemons: list[Daemon] = []
        self.expects_clean_end = True
        """False: a test kills things, so that exit codes and left-over mounts say nothing."""

    @property
    def address(self) -> str:
        """For --master."""
        raise NotImplementedError

    @property
    def secret_arguments(self) -> list[str]:
        return []

    def cli(self, *arguments: str | os.PathLike[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return run_cli(*arguments, **options)

    def fs(self, command: str, *arguments: str | os.PathLike[str], **options: Any) -> str:
        """Standard output of `alluxiofuse fs COMMAND --master ... ARGUMENTS`."""
        done = self.cli(
            "fs", command, "--master", self.address, *self.secret_arguments, *arguments, **options
        )
        return done.stdout

    def fs_json(self, command: str, *arguments: str | os.PathLike[str]) -> Any:
        return json.loads(self.fs(command, "--json", *arguments))

    def report(self) -> dict[str, Any]:
        """`admin report --json`."""
        done = self.cli("admin", "report", "--json", "--master", self.address, *self.secret_arguments)
        found = json.loads(done.stdout)
        assert isinstance(found, dict)
        return found

    def wait_persisted(self, path: str = "/") -> None:
        """Until everything below `path` is in the under storage."""
        self.fs("persist", "--timeout", "60s", path)

    def close(self) -> list[str]:
        """End everything, newest first; what was wrong with it, one text each."""
        wrong = []
        for daemon in reversed(self.daemons):
            if daemon.process is None:
                continue
            was_running = daemon.is_running
            try:
                code = daemon.stop() if was_running else daemon.wait()
            except AssertionError as exc:
                wrong.append(str(exc))
                continue
            if code != 0 and self.expects_clean_end:
                wrong.append(f"{daemon.name} ended with {code}:\n{daemon.log_text()[-4000:]}")
            if "Traceback (most recent call last)" in daemon.log_text() and self.expects_clean_end:
                wrong.append(f"{daemon.name} logged a traceback:\n{daemon.log_text()[-6000:]}")
        for place in self.mounts:
            for line in mount_lines(place):
                if self.expects_clean_end:
                    wrong.append(f"still mounted: {line}")
                subprocess.run(["umount", "--lazy", str(place)], check=False)
        if not wrong:
            shutil.rmtree(self.base, ignore_errors=True)
        return wrong


def mount_arguments(session: str, others: str) -> list[str]:
    """Without a keeper unless that is asked for: tests kill the process that they started, and mean the
    daemon."""
    found = [f"session={session}"] if session else []
    found += ["keeper=off"] if "keeper=" not in others else []
    found += [others] if others else []
    return ["-o", ",".join(found)] if found else []


class LocalDaemon(Site):
    """`alluxiofuse local`: `.mount`, `.ufs_dir` (a local under storage), `.state`, `.fs(...)`."""

    def __init__(
        self,
        ufs: str | Path | None = None,
        *,
        tiers: Sequence[str] | None = None,
        options: Mapping[str, str] | None = None,
        mount_options: str = "",
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        session: str = SESSION,
    ) -> None:
        """`ufs` None: a new directory. `tiers` None: one SSD tier of 1 GB; "{base}" in a tier is the
        site's directory; empty: what the program takes by default. `options`: of the under storage,
        secrets go through the environment."""
        super().__init__()
        self.state = self.base / "state"
        self.ufs_dir = self.base / "ufs"
        self.env = dict(env or {})
        if ufs is None:
            self.ufs_dir.mkdir()
        elif "://" not in str(ufs):
            self.ufs_dir = Path(ufs)
        self.ufs = str(self.ufs_dir if ufs is None else ufs)
        command = ["local", "--ufs", self.ufs, "--mount", str(self.mount), "--state", str(self.state)]
        for tier in ["SSD:{base}/ssd:1GB"] if tiers is None else tiers:
            command += ["--tier", tier.format(base=self.base)]
        for number, (name, value) in enumerate((options or {}).items()):
            self.env[f"TEST_UFS_OPTION_{number}"] = value
            command += ["--option", f"{name}=env:TEST_UFS_OPTION_{number}"]
        command += mount_arguments(session, mount_options)
        self.daemon = Daemon("local", [*command, *arguments], self.base / "log", self.env)
        self.daemons = [self.daemon]

    @property
    def address(self) -> str:
        return str(self.state)

    def start(self) -> LocalDaemon:
        require_fuse()
        self.daemon.start()
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        return self.daemon.stop(number)

    def kill(self) -> None:
        """SIGKILL, and clear the dead mount away as a user would."""
        self.expects_clean_end = False
        self.daemon.kill()
        subprocess.run(["umount", "--lazy", str(self.mount)], check=False, capture_output=True)

    def restart(self) -> None:
        """A clean stop and a new start on the same state."""
        assert self.stop() == 0, self.daemon.log_text()[-4000:]
        self.daemon.start()


class Cluster(Site):
    """Master, workers and a mount as processes of their own, with TCP on free ports."""

    def __init__(
        self,
        ufs: str | Path | None = None,
        *,
        workers: int = 2,
        secret: bool = False,
        tier: str = "SSD:{base}/ssd{number}:1GB",
        mount_options: str = "",
        master_arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        """`tier`: "{base}" and "{number}" are put in. Workers carry hostnames of their own ("w1",
        "w2"...), so that none is local to the client unless a test says so by `hostnames`."""
        super().__init__()
        self.env = dict(env or {})
        self.ufs_dir = self.base / "ufs"
        if ufs is None:
            self.ufs_dir.mkdir()
        self.ufs = str(self.ufs_dir if ufs is None else ufs)
        self.secret_file = self.base / "secret" if secret else None
        if self.secret_file is not None:
            self.secret_file.touch(mode=0o600)
            self.secret_file.write_text(secrets.token_hex(32))
        self.dialled = ""
        """What workers and mounts that start from now on are given as the master's address; "": its own."""
        self._tier = tier
        self._mount_options = mount_options
        self.master = self._daemon(
            "master",
            [
                "master",
                "--state",
                str(self.base / "master"),
                "--ufs",
                self.ufs,
                "--port",
                "0",
                *master_arguments,
            ],
        )
        self.workers: list[Daemon] = []
        self.client: Daemon | None = None
        self._worker_count = workers

    @property
    def secret_arguments(self) -> list[str]:
        return [] if self.secret_file is None else ["--secret-file", str(self.secret_file)]

    @property
    def address(self) -> str:
        """HOST:PORT, from the master's ready line."""
        return next(word for word in self.master.ready_line.split() if ":" in word and word[-1].isdigit())

    def _daemon(self, name: str, arguments: list[str]) -> Daemon:
        daemon = Daemon(name, [*arguments, *self.secret_arguments], self.base / f"{name}.log", self.env)
        self.daemons.append(daemon)
        return daemon

    def start(self) -> Cluster:
        require_fuse()
        self.master.start()
        # Restarted, it comes back on the same port.
        place = self.master.arguments.index("--port") + 1
        self.master.arguments[place] = self.address.rpartition(":")[2]
        for _ in range(self._worker_count):
            self.add_worker()
        self.client = self.add_mount()
        return self

    def make_worker(self, hostname: str | None = None) -> Daemon:
        """One more, not started."""
        number = len(self.workers) + 1
        arguments = [
            "worker",
            "--master",
            self.dialled or self.address,
            "--state",
            str(self.base / f"worker{number}"),
        ]
        arguments += ["--port", "0", "--hostname", hostname or f"w{number}"]
        arguments += ["--tier", self._tier.format(base=self.base, number=number)]
        worker = self._daemon(f"worker{number}", arguments)
        self.workers.append(worker)
        return worker

    def add_worker(self, hostname: str | None = None) -> Daemon:
        worker = self.make_worker(hostname)
        worker.start()
        return worker

    def add_mount(self, directory: Path | None = None, path: str = "") -> Daemon:
        where = directory or self.mount
        arguments = ["mount", "--foreground", f"{self.dialled or self.address}{path}", str(where)]
        arguments += mount_arguments(SESSION, self._mount_options)
        mount = self._daemon(f"mount-{where.name}", arguments)
        mount.start()
        return mount
