"""Programs that check what they get, to run on a mount whose daemon is killed meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import sqlite3
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

BLOCK = 64 << 10


def block_of(number: int) -> bytes:
    """What belongs into block `number`."""
    return hashlib.sha256(number.to_bytes(8, "big")).digest() * (BLOCK // 32)


class Load:
    """`work` runs in a thread, round after round, until `end`; then `verify`. Any error fails the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.directory.mkdir()
        self.rounds = 0
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name=type(self).__name__)

    def start(self) -> None:
        self.prepare()
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.work()
                self.rounds += 1
        except BaseException as exc:
            self.error = exc

    def end(self, timeout_s: float = 60.0) -> None:
        self._stop.set()
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"{self._thread.name} hangs"
        if self.error is not None:
            raise AssertionError(f"{self._thread.name}, round {self.rounds}: {self.error!r}") from self.error
        assert self.rounds, self._thread.name
        self.verify()

    def prepare(self) -> None: ...

    def work(self) -> None: ...

    def verify(self) -> None: ...


class Reads(Load):
    """One descriptor, from the start to the end and again."""

    def prepare(self) -> None:
        self.path = self.directory / "data"
        self.count = 400
        with open(self.path, "wb") as file:
            for number in range(self.count):
                file.write(block_of(number))
        self.fd = os.open(self.path, os.O_RDONLY)

    def work(self) -> None:
        for number in range(self.count):
            assert os.pread(self.fd, BLOCK, number * BLOCK) == block_of(number), number

    def verify(self) -> None:
        os.close(self.fd)


class Writes(Load):
    """Blocks of one open file, fsynced now and then."""

    def prepare(self) -> None:
        self.path = self.directory / "data"
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self.blocks: dict[int, int] = {}
        self.random = random.Random(1)

    def work(self) -> None:
        place, number = self.random.randrange(300), self.random.randrange(1 << 30)
        assert os.pwrite(self.fd, block_of(number), place * BLOCK) == BLOCK
        self.blocks[place] = number
        if self.rounds % 10 == 0:
            os.fsync(self.fd)
        place = self.random.choice(list(self.blocks))
        assert os.pread(self.fd, BLOCK, place * BLOCK) == block_of(self.blocks[place]), place

    def verify(self) -> None:
        os.close(self.fd)
        with open(self.path, "rb") as file:
            for place, number in self.blocks.items():
                assert os.pread(file.fileno(), BLOCK, place * BLOCK) == block_of(number), place


class Appends(Load):
    """Records of several sizes, each of which must be there once, in order and whole."""

    flags = os.O_WRONLY

    def prepare(self) -> None:
        self.path = self.directory / "log"
        self.fd = os.open(self.path, self.flags | os.O_CREAT | os.O_APPEND, 0o644)
        self.random = random.Random(2)
        self.sizes: list[int] = []

    @staticmethod
    def record(number: int, size: int) -> bytes:
        return (b"%09d " % number) * (size // 10) + b"%09d\n" % number

    def work(self) -> None:
        time.sleep(0.005)  # The tier has room for so much only.
        size = self.random.choice([20, 1000, 5000] * 10 + [200_000])
        record = self.record(self.rounds, size)
        assert os.write(self.fd, record) == len(record)
        self.sizes.append(size)

    def verify(self) -> None:
        os.close(self.fd)
        with open(self.path, "rb") as file:
            for number, size in enumerate(self.sizes):
                record = self.record(number, size)
                assert file.read(len(record)) == record, f"record {number} of {len(self.sizes)}"
            assert file.read() == b""


class ManyAppends(Load):
    """Several threads append to one file."""

    count = 3

    def prepare(self) -> None:
        self.path = self.directory / "log"
        self.written = [0] * self.count
        self.fds = [os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for _ in range(self.count)]

    def append(self, who: int) -> None:
        for _ in range(5):
            record = b"%d %d\n" % (who, self.written[who])
            assert os.write(self.fds[who], record) == len(record)
            self.written[who] += 1

    def work(self) -> None:
        errors = run_together([partial(self.append, who) for who in range(self.count)])
        assert not errors, errors

    def verify(self) -> None:
        for fd in self.fds:
            os.close(fd)
        found: list[list[int]] = [[] for _ in range(self.count)]
        for line in self.path.read_bytes().splitlines():
            writer, number = line.split()
            found[int(writer)].append(int(number))
        for who in range(self.count):
            assert found[who] == list(range(self.written[who])), who


def run_together(calls: list[Callable[[], None]]) -> list[BaseException]:
    errors: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return errors


class Names(Load):
    """Each call is carried out once: what would fail the second time does not."""

    def work(self) -> None:
        here = self.directory / str(self.rounds)
        here.mkdir()
        fd = os.open(here / "a", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(fd, b"content")
        os.close(fd)
        os.link(here / "a", here / "b")
        os.symlink("a", here / "s")
        os.mkfifo(here / "fifo")
        os.rename(here / "b", here / "c")
        os.setxattr(here / "a", "user.x", b"1", os.XATTR_CREATE)
        os.removexattr(here / "a", "user.x")
        os.truncate(here / "a", 3)
        os.chmod(here / "a", 0o600)
        assert sorted(os.listdir(here)) == ["a", "c", "fifo", "s"]
        assert (here / "c").read_bytes() == b"con"
        assert os.stat(here / "c").st_nlink == 2
        for name in ("a", "c", "fifo", "s"):
            os.unlink(here / name)
        here.rmdir()

    def verify(self) -> None:
        assert os.listdir(self.directory) == []


class Database(Load):
    """Transactions of sqlite."""

    def prepare(self) -> None:
        self.rows = 0
        self.base = sqlite3.connect(
            self.directory / "base", check_same_thread=False, isolation_level=None, timeout=30
        )
        self.base.execute("create table t (n integer primary key, blob blob)")

    def work(self) -> None:
        self.base.execute("begin")
        for _ in range(5):
            self.base.execute("insert into t values (?, ?)", (self.rows, block_of(self.rows)[:500]))
            self.rows += 1
        self.base.execute("commit")

    def verify(self) -> None:
        self.base.close()
        with contextlib.closing(sqlite3.connect(self.directory / "base")) as base:
            assert base.execute("pragma integrity_check").fetchall() == [("ok",)]
            assert base.execute("select count(*), max(n) from t").fetchone() == (self.rows, self.rows - 1)


class Archives(Load):
    """tar x of a tree, compared, rm -r."""

    def __init__(self, directory: Path, outside: Path) -> None:
        super().__init__(directory)
        self.archive = outside / "tree.tar"
        self.tree = outside / "tree"

    def prepare(self) -> None:
        for number in range(80):
            place = self.tree / f"d{number % 12}" / f"e{number % 3}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"f{number}").write_bytes(block_of(number)[: number * 97])
        with tarfile.open(self.archive, "w") as archive:
            archive.add(self.tree, "tree")

    def work(self) -> None:
        self.run("tar", "-C", str(self.directory), "-xf", str(self.archive))
        self.run("diff", "-r", str(self.tree), str(self.directory / "tree"))
        self.run("rm", "-r", str(self.directory / "tree"))

    @staticmethod
    def run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, check=False, timeout=120)
        assert done.returncode == 0, (command, done.stderr)

    def verify(self) -> None:
        shutil.rmtree(self.tree)


class Listings(Load):
    """A large directory is read while names come and go: those that stay are listed once."""

    count = 2000

    def prepare(self) -> None:
        self.names = {f"entry-{number:05d}" for number in range(self.count)}
        for name in self.names:
            (self.directory / name).touch()

    def work(self) -> None:
        found = list(self.slowly())
        stay = [name for name in found if name in self.names]
        assert len(stay) == len(set(stay)), "listed twice"
        assert set(stay) == self.names, "left out"

    def slowly(self) -> Iterator[str]:
        with os.scandir(self.directory) as entries:
            for number, entry in enumerate(entries):
                if number % 300 == 0:
                    # Before the position that is read next: the count of entries is not the place.
                    (self.directory / f"aa-{number}").touch()
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(self.directory / f"aa-{number - 600}")
                    time.sleep(0.02)
                yield entry.name
