"""Random operations by many threads on one real mount with a cache that is far too small, against a
model of every file; then every byte, on the mount and in the under storage.

`SEEDS=20 STEPS=500 pytest tests/fuse/test_fuse_stress.py` looks further.
"""

from __future__ import annotations

import mmap
import os
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from daemons import LocalDaemon

SEEDS = int(os.environ.get("SEEDS", "1"))
STEPS = int(os.environ.get("STEPS", "120"))
MIB = 1 << 20
MAX_BYTES = 3 * MIB
WRITERS = 3
READERS = 2
COLD_FILES = 8


class Inode:
    """What one file must hold. `before` and `after` differ while an operation is under way."""

    def __init__(self, data: bytes = b"") -> None:
        self.before = bytearray(data)
        self.after = self.before
        self.sequence = 0
        """Odd while an operation is under way."""
        self.lock = threading.Lock()

    def change(self, after: bytearray, operation: Callable[[], None]) -> None:
        with self.lock:
            self.after = after
            self.sequence += 1
        operation()
        with self.lock:
            self.before = after
            self.sequence += 1

    def look(self) -> tuple[int, bytearray, bytearray]:
        with self.lock:
            return self.sequence, self.before, self.after


class Writer:
    """The only one that changes its files; it checks what it reads exactly."""

    def __init__(self, root: Path, number: int, rng: random.Random, shown: dict[str, Inode]) -> None:
        self.root = root
        self.rng = rng
        self.names = [f"w{number}-{letter}" for letter in "abc"]
        self.files: dict[str, Inode] = {}
        self.open: list[tuple[int, Inode, bool]] = []
        """(descriptor, file, O_APPEND)"""
        self.shown = shown
        """Name -> file, for readers."""

    def place(self, size: int) -> int:
        near = self.rng.choice([0, size, MIB, 2 * MIB, 4096])
        places = [self.rng.randrange(size + 1), near, near + self.rng.randrange(-9, 9), size + 5000]
        return min(max(0, self.rng.choice(places)), MAX_BYTES)

    def steps(self, count: int) -> None:
        choices = [self.create, self.reopen, self.write, self.write, self.write, self.read, self.truncate]
        choices += [self.close, self.close, self.rename, self.unlink, self.map, self.sync, self.check]
        for _ in range(count):
            self.rng.choice(choices)()
        while self.open:
            self.close()

    def some(self) -> tuple[int, Inode, bool] | None:
        return self.rng.choice(self.open) if self.open else None

    def create(self) -> None:
        name = self.rng.choice(self.names)
        append = self.rng.choice([0, 0, os.O_APPEND])
        if name in self.files:
            file = self.files[name]
            opened: list[int] = []
            flags = os.O_RDWR | os.O_TRUNC | append
            file.change(bytearray(), lambda: opened.append(os.open(self.root / name, flags)))
            self.open.append((opened[0], file, bool(append)))
            return
        descriptor = os.open(self.root / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | append, 0o644)
        file = self.files[name] = self.shown[name] = Inode()
        self.open.append((descriptor, file, bool(append)))

    def reopen(self) -> None:
        if self.files and len(self.open) < 5:
            name = self.rng.choice(sorted(self.files))
            append = self.rng.choice([0, 0, os.O_APPEND])
            self.open.append((os.open(self.root / name, os.O_RDWR | append), self.files[name], bool(append)))

    def write(self) -> None:
        if (found := self.some()) is None:
            return
        descriptor, file, is_append = found
        data = self.rng.randbytes(self.rng.choice([1, 100, 4096, 70_000, 300_000]))
        if self.rng.random() < 0.15:
            data = bytes(len(data))
        old = file.before
        offset = len(old) if is_append else self.place(len(old))
        if offset > MAX_BYTES:
            return
        new = bytearray(old)
        new.extend(bytes(max(0, offset - len(new))))
        new[offset : offset + len(data)] = data

        def operation() -> None:
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset + done)

        file.change(new, operation)

    def read(self) -> None:
        if (found := self.some()) is None:
            return
        descriptor, file, _ = found
        offset, size = self.place(len(file.before)), self.rng.choice([1, 4096, 200_000, MAX_BYTES])
        self.compare(os.pread(descriptor, size, offset), file.before[offset : offset + size], offset)
        assert os.fstat(descriptor).st_size == len(file.before)

    @staticmethod
    def compare(found: bytes, wanted: bytes | bytearray, offset: int = 0) -> None:
        if found != wanted:
            at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), -1)
            raise AssertionError(f"{len(found)} bytes instead of {len(wanted)}, first wrong {offset} + {at}")

    def truncate(self) -> None:
        if (found := self.some()) is None:
            return
        descriptor, file, _ = found
        size = self.rng.choice([0, self.place(len(file.before)), self.place(len(file.before))])
        new = file.before[:size] + bytes(max(0, size - len(file.before)))
        file.change(bytearray(new), lambda: os.ftruncate(descriptor, size))

    def map(self) -> None:
        """Change some bytes by a shared mapping."""
        if (found := self.some()) is None or not found[1].before:
            return
        descriptor, file, _ = found
        new = bytearray(file.before)
        offset = self.rng.randrange(len(new))
        data = self.rng.randbytes(self.rng.choice([1, 5000, 100_000]))[: len(new) - offset]
        new[offset : offset + len(data)] = data

        def operation() -> None:
            with mmap.mmap(descriptor, 0) as memory:
                self.compare(memory[:], file.before)
                memory[offset : offset + len(data)] = data
                memory.flush()

        file.change(new, operation)

    def sync(self) -> None:
        if (found := self.some()) is not None:
            os.fsync(found[0])

    def close(self) -> None:
        if self.open:
            descriptor, _, _ = self.open.pop(self.rng.randrange(len(self.open)))
            os.close(descriptor)

    def rename(self) -> None:
        if self.files:
            old, new = self.rng.choice(sorted(self.files)), self.rng.choice(self.names)
            os.rename(self.root / old, self.root / new)
            self.files[new] = self.files.pop(old)
            self.shown.pop(old, None)
            self.shown[new] = self.files[new]

    def unlink(self) -> None:
        if self.files:
            name = self.rng.choice(sorted(self.files))
            os.unlink(self.root / name)
            del self.files[name]
            self.shown.pop(name, None)

    def check(self) -> None:
        if self.files:
            name = self.rng.choice(sorted(self.files))
            self.compare((self.root / name).read_bytes(), self.files[name].before)


def read_others(root: Path, rng: random.Random, shown: dict[str, Inode], ended: threading.Event) -> None:
    """Whoever reads while one change is made gets each byte as it was before or after it."""
    while not ended.is_set():
        name, file = rng.choice(list(shown.items()))
        try:
            descriptor = os.open(root / name, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            if os.fstat(descriptor).st_ino and shown.get(name) is not file:
                continue  # Another file has the name, or may have had when it was opened.
            for _ in range(4):
                look_at(descriptor, rng, file)
        finally:
            os.close(descriptor)


def look_at(descriptor: int, rng: random.Random, file: Inode) -> None:
    first, before, after = file.look()
    offset = rng.randrange(max(1, len(before)))
    found = os.pread(descriptor, rng.choice([4096, 200_000, MAX_BYTES]), offset)
    last, _, _ = file.look()
    if last - first > first % 2:
        return  # More than the one change was made meanwhile.
    wanted = [text[offset : offset + len(found)] for text in (before, after)]
    if found in wanted:
        return
    assert len(found) <= max(len(text) for text in wanted)
    for at, byte in enumerate(found):
        # Bytes between the end and what is written behind it are zeros for a while.
        assert any(byte == (text[at] if at < len(text) else 0) for text in wanted), f"at {offset} + {at}"


def stress(local: LocalDaemon, seed: int) -> list[Writer]:
    root = local.mount
    cold = {f"cold{n}": Inode(random.Random(n).randbytes((n + 1) * 500_000)) for n in range(COLD_FILES)}
    for name, file in cold.items():
        (local.ufs_dir / name).write_bytes(file.before)
    shown = dict(cold)
    ended = threading.Event()
    wrong: list[BaseException] = []

    def guarded(function: Callable[..., None], *arguments: object) -> threading.Thread:
        def run() -> None:
            try:
                function(*arguments)
            except BaseException as exc:
                wrong.append(exc)
                ended.set()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def free() -> None:
        while not ended.is_set():
            local.fs("free", "-R", str(root))
            ended.wait(0.5)

    writers = [Writer(root, n, random.Random(seed * 100 + n), shown) for n in range(WRITERS)]
    writing = [guarded(writer.steps, STEPS) for writer in writers]
    others = [
        guarded(read_others, root, random.Random(seed * 100 + 50 + n), shown, ended) for n in range(READERS)
    ]
    others.append(guarded(free))
    for thread in writing:
        thread.join()
    ended.set()
    for thread in others:
        thread.join()
    for writer in writers:
        for descriptor, _, _ in writer.open:
            with suppress(OSError):
                os.close(descriptor)
    if wrong:
        raise wrong[0]
    return writers


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("tiers", [["MEM:{base}/mem:16MB", "SSD:{base}/ssd:24MB"], ["SSD:{base}/ssd:32MB"]])
def test_random_operations(local_daemon: Callable[..., LocalDaemon], tiers: list[str], seed: int) -> None:
    local = local_daemon(tiers=tiers, arguments=["--sync-interval", "1s"])
    writers = stress(local, seed)
    wanted = {name: file.before for writer in writers for name, file in writer.files.items()}
    for number in range(COLD_FILES):
        wanted[f"cold{number}"] = bytearray(random.Random(number).randbytes((number + 1) * 500_000))
    assert set(os.listdir(local.mount)) == set(wanted)
    for name, data in wanted.items():
        Writer.compare((local.mount / name).read_bytes(), data)
    local.wait_persisted()
    assert {name for name in os.listdir(local.ufs_dir) if not name.startswith(".")} == set(wanted)
    for name, data in wanted.items():
        Writer.compare((local.ufs_dir / name).read_bytes(), data)
    local.fs("free", "-R", str(local.mount))
    for name, data in wanted.items():
        Writer.compare((local.mount / name).read_bytes(), data)
