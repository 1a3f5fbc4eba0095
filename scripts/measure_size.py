#!/usr/bin/env python3
"""Measure a namespace of a million files: `measure_size.py --files 1000000 --in-one 200000 WORK`.

Starts `alluxiofuse local` on a directory below WORK (needs some 10 KB of disk and 2 inodes a file there)
and prints one line for each step: seconds, CPU seconds and memory of the daemon. Everything is removed
at the end unless `--keep`. Some of its functions serve `tests/faults/test_size.py` too.

Seconds include what else the machine does; the CPU seconds do not, and so judge better.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

PER_DIRECTORY = 1000
"""Files in each small directory."""
BIG = "big"
"""The one directory with very many files."""
_TICKS = os.sysconf("SC_CLK_TCK")


# --- processes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """Of one process, now."""

    rss_bytes: int
    peak_bytes: int
    cpu_s: float
    fd_count: int


def usage(pid: int) -> Usage:
    status = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        status[name] = value
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return Usage(
        int(status["VmRSS"].split()[0]) << 10,
        int(status["VmHWM"].split()[0]) << 10,
        (int(fields[11]) + int(fields[12])) / _TICKS,
        len(os.listdir(f"/proc/{pid}/fd")),
    )


def disk_bytes(directory: Path) -> int:
    """Allocated, of all files below."""
    total = 0
    for above, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(above, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # RocksDB compacted it away
    return total


# --- trees --------------------------------------------------------------------------------------------


def paths(root: Path, files: int, in_one: int) -> Iterator[tuple[Path, int]]:
    """(directory, number of files in it) of a tree with `files` files, `in_one` of them in one."""
    yield root / BIG, in_one
    left, number = files - in_one, 0
    while left > 0:
        yield root / f"part{number // 100:03d}" / f"dir{number % 100:02d}", min(left, PER_DIRECTORY)
        left -= PER_DIRECTORY
        number += 1


def make_tree(root: Path, files: int, in_one: int, content: bytes) -> None:
    """By plain system calls; an empty `content` makes empty files."""
    for directory, count in paths(root, files, in_one):
        directory.mkdir(parents=True, exist_ok=True)
        at = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for number in range(count):
                fd = os.open(f"file-{number:06d}.bin", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=at)
                if content:
                    os.write(fd, content)
                os.close(fd)
        finally:
            os.close(at)


def count_files(root: Path) -> int:
    """By `find`, as people do."""
    found = subprocess.run(["find", str(root), "-type", "f"], stdout=subprocess.PIPE, check=True)
    return found.stdout.count(b"\n")


def list_recursively(root: Path) -> int:
    """Lines of `ls -lR`."""
    found = subprocess.run(["ls", "-lR", str(root)], stdout=subprocess.PIPE, check=True)
    return found.stdout.count(b"\n")


def list_with_attributes(directory: Path) -> int:
    count = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            entry.stat(follow_symlinks=False)
            count += 1
    return count


def drop_kernel_caches() -> None:
    """Names and inodes too; as root only."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("2")
    except OSError:
        pass


# --- the daemon ---------------------------------------------------------------------------------------


class Local:
    """One `alluxiofuse local` on `base`/ufs, mounted at `base`/mnt."""

    def __init__(self, base: Path, arguments: tuple[str, ...] = ()) -> None:
        self.base, self.ufs, self.mount, self.state = base, base / "ufs", base / "mnt", base / "state"
        self.arguments = arguments
        self.process: subprocess.Popen[bytes] | None = None
        for directory in (self.ufs, self.mount):
            directory.mkdir(parents=True, exist_ok=True)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> float:
        """Seconds until the mount answered."""
        began = time.monotonic()
        with open(self.base / "log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "alluxiofuse.cli.main", "local"),
                    *("--ufs", str(self.ufs), "--mount", str(self.mount), "--state", str(self.state)),
                    *("--tier", f"SSD:{self.base}/ssd:20GB", *self.arguments),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith(b"ready"):
            raise RuntimeError(f"it did not start: {(self.base / 'log').read_text()[-2000:]}")
        return time.monotonic() - began

    def stop(self) -> float:
        began = time.monotonic()
        self._end(signal.SIGTERM)
        return time.monotonic() - began

    def kill(self) -> None:
        self._end(signal.SIGKILL)
        subprocess.run(["umount", "--lazy", str(self.mount)], check=False, stderr=subprocess.DEVNULL)

    def _end(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def report(self) -> dict[str, object]:
        command = [sys.executable, "-m", "alluxiofuse.cli.main", "admin", "report", "--json"]
        done = subprocess.run([*command, "--master", str(self.state)], stdout=subprocess.PIPE, check=True)
        found: dict[str, object] = json.loads(done.stdout)
        return found

    def wait_persisted(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not self.report()["persist_pending_count"]:
                return True
            time.sleep(2)
        return False


def interrupted_removal(directory: Path, after_s: float) -> float:
    """`rm -r` that is interrupted by Ctrl-C after a while; seconds until it had ended."""
    process = subprocess.Popen(["rm", "-r", str(directory)], stderr=subprocess.DEVNULL)
    try:
        process.wait(after_s)
        return 0.0
    except subprocess.TimeoutExpired:
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait()
        return time.monotonic() - began


# --- the measurement ----------------------------------------------------------------------------------


@dataclass
class Step:
    name: str
    seconds: float
    cpu_s: float
    rss_mb: float
    peak_mb: float
    note: str = ""


class Log:
    """Prints each step as it ends."""

    def __init__(self, local: Local, out: Path | None) -> None:
        self._local = local
        self._out = out
        self.steps: list[Step] = []

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        notes: list[str] = []
        is_running = self._local.process is not None
        before = usage(self._local.pid).cpu_s if is_running else 0.0
        began = time.monotonic()
        yield notes
        seconds = time.monotonic() - began
        now = usage(self._local.pid) if self._local.process is not None else Usage(0, 0, before, 0)
        step = Step(
            name,
            round(seconds, 2),
            round(now.cpu_s - (before if is_running else 0.0), 2),
            round(now.rss_bytes / 1e6, 1),
            round(now.peak_bytes / 1e6, 1),
            "; ".join(notes),
        )
        self.steps.append(step)
        print(
            f"{step.name:44} {step.seconds:8.2f} s  daemon: {step.cpu_s:7.2f} s CPU, {step.rss_mb:6.0f} MB"
            f" (peak {step.peak_mb:6.0f})  {step.note}",
            flush=True,
        )
        if self._out is not None:
            self._out.write_text(json.dumps([asdict(one) for one in self.steps], indent=1))


def first_answer(local: Local) -> float:
    began = time.monotonic()
    for name in os.listdir(local.mount):
        os.stat(local.mount / name)
    return time.monotonic() - began


def restarts(log: Log, local: Local, what: str) -> None:
    with log.step(f"stop, {what}") as notes:
        notes.append(f"{local.stop():.1f} s")
    for kind in ("stop", "kill -9"):
        with log.step(f"start after {kind}, {what}") as notes:
            notes.append(f"ready in {local.start():.1f} s, first answer {first_answer(local):.2f} s")
        if kind == "stop":
            local.kill()
    time.sleep(10)  # RocksDB puts in order what it read from its log
    with log.step(f"10 s idle, {what}"):
        time.sleep(10)


def loaded(log: Log, local: Local, files: int, in_one: int, content: bytes) -> None:
    """A tree that was there before."""
    with log.step(f"{files} files made in the under storage"):
        make_tree(local.ufs, files, in_one, content)
    with log.step("first start") as notes:
        notes.append(f"ready in {local.start():.1f} s")
    big = local.mount / BIG
    for name in ("first", "second, at once", "third, kernel caches dropped"):
        if name.startswith("third"):
            drop_kernel_caches()
        with log.step(f"listing {in_one} with attributes, {name}"):
            assert list_with_attributes(big) == in_one
    for what in ("first", "second"):
        with log.step(f"find, {what}"):
            assert count_files(local.mount) == files
    with log.step("ls -lR"):
        list_recursively(local.mount)
    state = disk_bytes(local.state / "master")
    with log.step("state on disk") as notes:
        notes.append(f"{state / 1e6:.0f} MB, {state / files:.0f} bytes a file")
    with log.step("admin report"):
        local.report()
    restarts(log, local, f"{files} loaded")


def created(log: Log, local: Local, files: int, in_one: int, content: bytes) -> None:
    """A tree made through the mount."""
    if local.process is None:
        local.start()
    with log.step(f"{files} files of {len(content)} bytes created") as notes:
        make_tree(local.mount, files, in_one, content)
        notes.append(f"{local.report()['persist_pending']} to be persisted")
    with log.step(f"listing {in_one} with attributes"):
        assert list_with_attributes(local.mount / BIG) == in_one
    with log.step("find"):
        assert count_files(local.mount) == files
    with log.step("all persisted"):
        local.wait_persisted(3600)
    restarts(log, local, f"{files} created")


def cached(log: Log, local: Local, content: bytes) -> None:
    """Every file's bytes at the worker, as if all had been read; put there by the worker's own code."""
    from alluxiofuse.config import DirectoryConfig, TierConfig, WorkerConfig
    from alluxiofuse.master.store import Store
    from alluxiofuse.worker import checksums, recovery
    from alluxiofuse.worker.slabs import Slabs

    local.stop()
    tiers = [TierConfig(alias="SSD", directories=[DirectoryConfig(str(local.base / "ssd"), 20 << 30)])]
    with log.step("every file cached") as notes:
        store = Store(local.state / "master" / "meta")
        opened = recovery.open_storage(WorkerConfig(state_dir=str(local.state / "worker"), tiers=tiers))
        slabs = Slabs(opened.tiers, opened.index)
        checksum, count = checksums.checksum(content), 0
        for key, _ in store.scan("inode", b""):
            record = store.inode(int.from_bytes(key, "big"))
            if record is not None and record.container and record.size == len(content):
                slab = slabs.create(record.container, record.size, opened.tiers.directories[0])
                os.pwrite(slabs.fds.for_writing(slab), content, 0)
                slabs.reserve(slab, len(content))
                slabs.add_pages(slab, 0, [checksum], len(content))
                count += 1
        slabs.fds.close()
        opened.close()
        store.close()
        notes.append(f"{count} slabs")
    with log.step("index on disk") as notes:
        index = disk_bytes(local.state / "worker")
        notes.append(f"{index / 1e6:.0f} MB, {index / max(1, count):.0f} bytes a slab")
    with log.step("first start with them") as notes:
        notes.append(f"ready in {local.start():.1f} s, first answer {first_answer(local):.2f} s")
    with log.step("all reported") as notes:
        while local.report()["workers"][0]["container_count"] < count:  # type: ignore[index]
            time.sleep(1)
        notes.append(f"{usage(local.pid).fd_count} descriptors")
    restarts(log, local, f"{count} cached")


def pending(log: Log, local: Local, files: int, in_one: int) -> None:
    """A persist log of so many entries: empty files, made at the master while nothing is uploaded."""
    import trio

    from alluxiofuse.config import MasterConfig
    from alluxiofuse.master.master import Master
    from alluxiofuse.rpc.inprocess import InProcess
    from alluxiofuse.wire.master_ops import Mkdir, Mknod, OpenSession
    from alluxiofuse.wire.types import SUPERUSER

    async def make() -> None:
        config = MasterConfig(
            state_dir=str(local.state / "master"), ufs=str(local.ufs), port=-1, persist_delay_s=1e6
        )
        master = Master(config)
        async with trio.open_nursery() as nursery:
            await nursery.start(master.run)
            client = InProcess(master.service, "measure")
            session_id = (await client.call(OpenSession("measure", "here"))).session_id
            at: dict[Path, int] = {Path("."): 1}
            for directory, count in paths(Path("."), files, in_one):
                for above in (*reversed(directory.parents), directory):
                    if above not in at:
                        name = os.fsencode(above.name)
                        made = await client.call(Mkdir(SUPERUSER, session_id, at[above.parent], name, 0o755))
                        at[above] = made.ino
                for number in range(count):
                    name = b"file-%06d.bin" % number
                    request = Mknod(SUPERUSER, session_id, at[directory], name, 0o100644, 0)
                    await client.call(request)
                await trio.lowlevel.checkpoint()
            # No clean end: as kill -9 leaves it.
            os._exit(0)

    if not local.state.exists():
        local.start()
    local.stop()
    with log.step(f"{files} changes pending, then kill -9"):
        child = os.fork()
        if not child:
            trio.run(make)
        _, status = os.waitpid(child, 0)
        assert status == 0
    for kind in ("kill -9", "kill -9 again"):
        with log.step(f"start after {kind}, {files} pending") as notes:
            notes.append(f"ready in {local.start():.1f} s, first answer {first_answer(local):.2f} s")
        with log.step("10 s of persisting") as notes:
            time.sleep(10)
            began = time.monotonic()
            os.stat(local.mount / BIG / f"file-{in_one // 2:06d}.bin")
            notes.append(f"a stat {time.monotonic() - began:.3f} s")
            notes.append(f"{local.report()['persist_pending_count']} left")
        local.kill()


def safety(log: Log, local: Local) -> None:
    """What fsync costs, in the daemon's CPU time too. Uploads are part of it and go on beside."""
    if local.process is None:
        local.start()
    data, count = os.urandom(4096), 1000
    top = local.mount / "safety"
    top.mkdir()
    at = os.open(top, os.O_RDONLY | os.O_DIRECTORY)

    def create(name: str, is_synced: bool) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=at)
        os.write(fd, data)
        if is_synced:
            os.fsync(fd)
        os.close(fd)
        if is_synced:
            os.fsync(at)

    for is_synced in (False, True):
        what = "fsync of each" if is_synced else "no fsync"
        for name in ("files created", "writes of 4 KiB"):
            fd = os.open("written", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=at)
            with log.step(f"{count} {name}, {what}") as notes:
                before, began = usage(local.pid).cpu_s, time.monotonic()
                for number in range(count):
                    if name == "files created":
                        create(f"{number}-{is_synced}", is_synced)
                    else:
                        os.pwrite(fd, data, number % 256 * len(data))
                        if is_synced:
                            os.fsync(fd)
                cpu_s = usage(local.pid).cpu_s - before
                rate = count / (time.monotonic() - began)
                notes.append(f"{rate:.0f} a second, {cpu_s / count * 1e6:.0f} us CPU each")
            os.close(fd)
            local.wait_persisted(600)
    os.close(at)
    shutil.rmtree(top)


def removed(log: Log, local: Local, files: int, in_one: int) -> None:
    for name in (BIG, "."):
        top = local.mount / name
        tops = [top] if name != "." else [one for one in local.mount.iterdir() if one.name != BIG]
        for one in tops:
            with log.step(f"rm -r {one.name}, interrupted") as notes:
                notes.append(f"ended {interrupted_removal(one, 3.0):.2f} s after Ctrl-C")
            with log.step(f"rm -r {one.name}"):
                subprocess.run(["rm", "-rf", str(one)], check=True)
                assert not one.exists()
    with log.step("removed from the under storage too"):
        local.wait_persisted(3600)
        left = count_files(local.ufs)
        assert not left, left
    restarts(log, local, "all removed")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path, help="an existing directory; a new one is made in it")
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--in-one", type=int, default=200_000, help="how many of them in one directory")
    parser.add_argument("--bytes", type=int, default=100, help="of each file")
    parser.add_argument(
        "--only",
        default="loaded,cached,removed",
        help="of loaded, cached, created, removed, safety; pending, with a new --keep",
    )
    parser.add_argument("--keep", type=Path, help="use this directory, and leave everything there")
    parser.add_argument("--json", type=Path, help="write the steps there too")
    options = parser.parse_args(arguments)
    base = options.keep or Path(tempfile.mkdtemp(prefix="af-size-", dir=options.work))
    local = Local(base)
    log = Log(local, options.json)
    content = bytes(range(256)) * (options.bytes // 256 + 1)
    wanted = options.only.split(",")
    try:
        if local.state.exists():
            local.start()
        sizes = (options.files, options.in_one)
        if "loaded" in wanted:
            loaded(log, local, *sizes, content[: options.bytes])
        if "created" in wanted:
            created(log, local, *sizes, content[: options.bytes])
        if "cached" in wanted:
            cached(log, local, content[: options.bytes])
        if "pending" in wanted:
            pending(log, local, *sizes)
        if "safety" in wanted:
            safety(log, local)
        if "removed" in wanted:
            removed(log, local, *sizes)
        local.stop()
    finally:
        local.kill()
        if options.keep is None:
            shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
