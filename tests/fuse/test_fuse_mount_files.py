"""Contents of files on a real mount."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MIB = 1 << 20


def raises(code: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda exc: exc.errno == code)


@contextmanager
def opened(path: Path, flags: int, mode: int = 0o644) -> Iterator[int]:
    descriptor = os.open(path, flags, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def pattern(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, MIB - 1, MIB, MIB + 1, 5 * MIB + 17])
def test_what_was_written_is_read(here: Path, size: int) -> None:
    data = pattern(size)
    path = here / "file"
    path.write_bytes(data)
    assert path.stat().st_size == size
    assert path.read_bytes() == data
    with opened(path, os.O_RDONLY) as descriptor:
        assert os.pread(descriptor, 100, max(0, size - 50)) == data[max(0, size - 50) :]
        assert os.pread(descriptor, 100, size) == b""
        assert os.pread(descriptor, 100, size + 5000) == b""


def test_random_writes_and_reads_against_a_model(here: Path) -> None:
    rng = random.Random(7)
    model = bytearray()
    with opened(here / "file", os.O_RDWR | os.O_CREAT) as descriptor:
        for _ in range(300):
            offset = rng.randrange(3 * MIB)
            match rng.randrange(5):
                case 0 | 1:
                    data = rng.randbytes(rng.choice([1, 100, 4096, 70_000]))
                    assert os.pwrite(descriptor, data, offset) == len(data)
                    model.extend(bytes(max(0, offset - len(model))))
                    model[offset : offset + len(data)] = data
                case 2:
                    os.ftruncate(descriptor, offset)
                    del model[offset:]
                    model.extend(bytes(max(0, offset - len(model))))
                case 3:
                    assert os.pread(descriptor, 50_000, offset) == model[offset : offset + 50_000]
                case 4:
                    assert os.fstat(descriptor).st_size == len(model)
    assert (here / "file").read_bytes() == model


def test_append_ignores_the_offset(here: Path) -> None:
    path = here / "log"
    with (
        opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as first,
        opened(path, os.O_WRONLY | os.O_APPEND) as second,
    ):
        os.write(first, b"one ")
        os.write(second, b"two ")
        os.lseek(first, 0, os.SEEK_SET)
        os.write(first, b"three")
    assert path.read_bytes() == b"one two three"
    with path.open("ab") as file:
        file.write(b"!")
    assert path.read_bytes() == b"one two three!"


def test_truncating_while_it_is_open_elsewhere(here: Path) -> None:
    path = here / "file"
    path.write_bytes(b"old content")
    with opened(path, os.O_RDWR) as first:
        with opened(path, os.O_WRONLY | os.O_TRUNC) as second:
            assert os.fstat(first).st_size == 0
            assert os.pread(first, 100, 0) == b""
            os.write(second, b"new")
            assert os.pread(first, 100, 0) == b"new"
        os.pwrite(first, b"er", 3)
    assert path.read_bytes() == b"newer"


def test_truncate_by_path_grows_and_shrinks(here: Path) -> None:
    path = here / "file"
    path.write_bytes(b"0123456789")
    os.truncate(path, 5)
    assert path.read_bytes() == b"01234"
    os.truncate(path, 3 * MIB)
    assert path.stat().st_size == 3 * MIB
    assert path.read_bytes() == b"01234" + bytes(3 * MIB - 5)
    os.truncate(path, 0)
    assert path.read_bytes() == b""


def test_a_hole_reads_as_zeros(here: Path) -> None:
    path = here / "sparse"
    with opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
        os.pwrite(descriptor, b"end", 20 * MIB)
        assert os.pread(descriptor, 10, 10 * MIB) == bytes(10)
    assert path.stat().st_size == 20 * MIB + 3
    with opened(path, os.O_RDONLY) as descriptor:
        assert os.pread(descriptor, 8, 20 * MIB - 5) == bytes(5) + b"end"
        assert os.pread(descriptor, MIB, 0) == bytes(MIB)


def test_a_file_without_a_name_lives_while_it_is_open(here: Path) -> None:
    path = here / "file"
    with opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
        os.write(descriptor, b"before")
        path.unlink()
        os.pwrite(descriptor, b" after", 6)
        assert os.pread(descriptor, 100, 0) == b"before after"
        assert os.fstat(descriptor).st_nlink == 0
        assert os.fstat(descriptor).st_size == 12
        os.ftruncate(descriptor, 3)
        os.fchmod(descriptor, 0o600)
        os.fsync(descriptor)
        path.write_bytes(b"another")
        assert os.pread(descriptor, 100, 0) == b"bef"
    assert path.read_bytes() == b"another"


def test_a_replaced_file_can_be_read_by_who_has_it_open(here: Path) -> None:
    path = here / "file"
    path.write_bytes(b"old")
    with opened(path, os.O_RDONLY) as descriptor:
        (here / "new").write_bytes(b"the new one")
        os.rename(here / "new", path)
        assert os.pread(descriptor, 100, 0) == b"old"
    assert path.read_bytes() == b"the new one"


def test_renaming_what_is_being_written(here: Path) -> None:
    with opened(here / "a", os.O_WRONLY | os.O_CREAT) as descriptor:
        os.write(descriptor, b"first ")
        os.rename(here / "a", here / "b")
        os.write(descriptor, b"second")
    assert (here / "b").read_bytes() == b"first second"


def test_readers_see_what_is_being_written(here: Path) -> None:
    path = here / "file"
    with opened(path, os.O_WRONLY | os.O_CREAT) as writer, opened(path, os.O_RDONLY) as reader:
        for number in range(50):
            os.write(writer, b"%09d\n" % number)
            assert os.fstat(reader).st_size == path.stat().st_size == (number + 1) * 10
            assert os.pread(reader, 10, number * 10) == b"%09d\n" % number


def test_many_readers_while_it_is_written(here: Path) -> None:
    path = here / "file"
    data = pattern(4 * MIB)
    wrong: list[int] = []
    stop = threading.Event()

    def read() -> None:
        with opened(path, os.O_RDONLY) as descriptor:
            while not stop.is_set():
                size = os.fstat(descriptor).st_size
                got = os.pread(descriptor, 65536, max(0, size - 65536))
                if got != data[max(0, size - 65536) :][: len(got)]:
                    wrong.append(size)

    path.touch()
    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    try:
        with opened(path, os.O_WRONLY) as writer:
            for offset in range(0, len(data), 100_000):
                os.pwrite(writer, data[offset : offset + 100_000], offset)
    finally:
        stop.set()
        for reader in readers:
            reader.join(60)
    assert not wrong
    assert path.read_bytes() == data


def test_writers_of_parts_in_parallel(here: Path) -> None:
    path = here / "file"
    data = pattern(4 * MIB)
    path.touch()

    def write(part: int) -> None:
        with opened(path, os.O_WRONLY) as descriptor:
            for offset in range(part * MIB, (part + 1) * MIB, 65536):
                os.pwrite(descriptor, data[offset : offset + 65536], offset)

    writers = [threading.Thread(target=write, args=(part,)) for part in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert path.read_bytes() == data


def test_mmap_reads_and_writes(here: Path) -> None:
    path = here / "file"
    data = bytearray(pattern(3 * MIB + 100))
    path.write_bytes(data)
    with (
        opened(path, os.O_RDWR) as descriptor,
        mmap.mmap(descriptor, len(data), mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as view,
    ):
        assert view[:] == data
        view[MIB : MIB + 5] = b"mmap!"
        data[MIB : MIB + 5] = b"mmap!"
        view.flush()
        assert os.pread(descriptor, 5, MIB) == b"mmap!"
        view[0:3] = b"end"
        data[0:3] = b"end"
    assert path.read_bytes() == data
    with (
        opened(path, os.O_RDONLY) as descriptor,
        mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as view,
    ):
        assert view[:] == data


def test_copy_on_the_mount(here: Path) -> None:
    data = pattern(2 * MIB + 5)
    (here / "from").write_bytes(data)
    subprocess.run(["cp", "--reflink=auto", str(here / "from"), str(here / "to")], check=True)
    assert (here / "to").read_bytes() == data
    with opened(here / "from", os.O_RDONLY) as source, opened(here / "to2", os.O_WRONLY | os.O_CREAT) as to:
        copied = 0
        while copied < len(data):
            copied += os.copy_file_range(source, to, len(data) - copied)
    assert (here / "to2").read_bytes() == data


def test_direct_io(here: Path) -> None:
    data = pattern(MIB)
    (here / "file").write_bytes(data)
    with (
        opened(here / "file", os.O_RDONLY | os.O_DIRECT) as descriptor,
        mmap.mmap(-1, 65536) as buffer,
    ):
        assert os.preadv(descriptor, [buffer], 4096) == 65536
        assert buffer[:] == data[4096 : 4096 + 65536]


def test_fsync_of_files_and_directories(here: Path) -> None:
    with opened(here / "file", os.O_WRONLY | os.O_CREAT) as descriptor:
        os.write(descriptor, b"x")
        os.fdatasync(descriptor)
        os.fsync(descriptor)
    with opened(here, os.O_RDONLY) as descriptor:
        os.fsync(descriptor)
    subprocess.run(["sync", "--file-system", str(here)], check=True)


def test_modes_of_opening(here: Path) -> None:
    path = here / "file"
    with raises(errno.ENOENT):
        os.open(path, os.O_RDONLY)
    with opened(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY) as descriptor:
        os.write(descriptor, b"x")
        with raises(errno.EBADF):
            os.read(descriptor, 1)
    with raises(errno.EEXIST):
        os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    with opened(path, os.O_RDONLY) as descriptor, raises(errno.EBADF):
        os.write(descriptor, b"x")
    with opened(path, os.O_CREAT | os.O_RDONLY) as descriptor:
        assert os.read(descriptor, 5) == b"x"


def test_duplicated_descriptors_share_the_file(here: Path) -> None:
    path = here / "file"
    with opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
        other = os.dup(descriptor)
        os.write(descriptor, b"one")
        os.close(other)  # flushes; the file stays open
        os.write(descriptor, b"two")
        assert path.read_bytes() == b"onetwo"
    assert path.read_bytes() == b"onetwo"


def test_programs_run_from_the_mount(here: Path) -> None:
    script = here / "script"
    script.write_text("#!/bin/sh\necho from the mount\n")
    script.chmod(0o755)
    assert subprocess.run([str(script)], capture_output=True, text=True, check=True).stdout == (
        "from the mount\n"
    )
    binary = here / "true"
    binary.write_bytes(Path("/bin/true").read_bytes())
    binary.chmod(0o755)
    assert subprocess.run([str(binary)], check=True).returncode == 0


def test_locks_between_programs(here: Path) -> None:
    path = here / "lock"
    path.touch()
    attempt = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'r+')\n"
        "try: getattr(fcntl, sys.argv[2])(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: sys.exit(9)\n"
    )
    for kind, function in (("flock", fcntl.flock), ("lockf", fcntl.lockf)):
        command = [sys.executable, "-c", attempt, str(path), kind]
        with path.open("r+") as file:
            function(file, fcntl.LOCK_EX)
            assert subprocess.run(command, check=False).returncode == 9
        assert subprocess.run(command, check=False).returncode == 0


def test_a_large_file_survives_a_round_trip(here: Path) -> None:
    digest = hashlib.sha256()
    with (here / "big").open("wb") as file:
        for seed in range(48):
            chunk = pattern(MIB, seed)
            digest.update(chunk)
            file.write(chunk)
    with (here / "big").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").digest() == digest.digest()


@pytest.mark.parametrize("size", [100, 3 * 4096, 2 * MIB + 5000])
def test_mappings_of_a_file_opened_for_append(here: Path, size: int) -> None:
    """The kernel writes mapped pages back by any handle, also one that appends."""
    model = bytearray(pattern(size))
    (here / "f").write_bytes(model)
    with opened(here / "f", os.O_RDWR | os.O_APPEND) as descriptor:
        for number in range(3):
            with mmap.mmap(descriptor, 0) as memory:
                at = len(model) * number // 3
                memory[at : at + 20] = model[at : at + 20] = pattern(20, number)
                memory.flush()
            assert os.fstat(descriptor).st_size == len(model)
            model += b"appended"
            assert os.write(descriptor, b"appended") == 8
            assert (here / "f").read_bytes() == model
