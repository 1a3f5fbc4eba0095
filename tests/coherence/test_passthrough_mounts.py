"""Two mounts whose kernels read and write slabs themselves, each at the worker of its own machine."""

from __future__ import annotations

import mmap
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from servers import wait_until
from two_mounts import TwoMounts

MIB = 1 << 20


@pytest.fixture(scope="module")
def site() -> Iterator[TwoMounts]:
    options = ("session=native", "session=native")
    found = TwoMounts(mount_options=options, master_arguments=["--sync-interval", "-1"])
    try:
        yield found.start()
    finally:
        wrong = found.close()
    assert not wrong, "\n\n".join(wrong)


@pytest.fixture(params=[0, 1], ids=["first", "second"])
def pair(site: TwoMounts, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A file as both mounts show it: that of its author, and that of the other."""
    name = f"{request.node.originalname}-{request.param}"
    mine, theirs = site.mounts[request.param] / name, site.mounts[1 - request.param] / name
    mine.write_bytes(b"before" * 100_000)
    wait_until(theirs.exists, "the other mount sees the name")
    return mine, theirs


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_reader_sees_what_the_other_mount_changes(pair: tuple[Path, Path]) -> None:
    """It stays open all the time: the home is where its kernel reads."""
    mine, theirs = pair
    with opened(mine, os.O_RDONLY) as reader:
        with opened(theirs, os.O_RDWR) as writer:
            os.pwrite(writer, b"AFTER!", 0)
            assert os.pread(reader, 12, 0) == b"AFTER!before"
            os.ftruncate(writer, 6)
            assert os.pread(reader, 12, 0) == b"AFTER!"
        with opened(theirs, os.O_WRONLY | os.O_APPEND) as appender:
            os.write(appender, b"more")
            assert os.pread(reader, 12, 0) == b"AFTER!more"
        theirs.write_bytes(b"anew")
        assert os.pread(reader, 12, 0) == b"anew"
    assert mine.read_bytes() == theirs.read_bytes() == b"anew"


@pytest.mark.parametrize("is_by_name", [False, True], ids=["descriptor", "name"])
def test_reader_of_what_its_own_mount_emptied_sees_what_the_other_makes_of_it(
    pair: tuple[Path, Path], is_by_name: bool
) -> None:
    """The other mount has had it open while it was written here, and has not asked what came of that."""
    mine, theirs = pair
    with opened(mine, os.O_RDWR) as emptier, opened(mine, os.O_RDONLY) as reader:
        os.pwrite(emptier, b"AFTER!", 0)
        with opened(theirs, os.O_RDWR | os.O_APPEND) as other:
            os.ftruncate(emptier, 0)
            os.close(os.dup(emptier))
            emptier_gone = os.open(os.devnull, os.O_RDONLY)
            os.dup2(emptier_gone, emptier)  # The last descriptor of the writer.
            os.close(emptier_gone)
            if is_by_name:
                os.truncate(theirs, 6000)
            else:
                os.ftruncate(other, 6000)
            wait_until(lambda: os.pread(reader, 7000, 0) == bytes(6000), "the reader sees it")
            os.write(other, b"more")
            wait_until(lambda: os.pread(reader, 7000, 0) == bytes(6000) + b"more", "the reader sees more")
    assert mine.read_bytes() == theirs.read_bytes() == bytes(6000) + b"more"


def test_both_read_and_one_writes(pair: tuple[Path, Path]) -> None:
    mine, theirs = pair
    assert theirs.read_bytes() == b"before" * 100_000
    with opened(mine, os.O_RDONLY) as first, opened(theirs, os.O_RDONLY):
        with opened(mine, os.O_WRONLY) as writer:
            os.pwrite(writer, b"AFTER!", 0)
        assert os.pread(first, 12, 0) == b"AFTER!before"
        with opened(theirs, os.O_RDONLY) as again:
            assert os.pread(again, 12, 0) == b"AFTER!before"
            assert os.fstat(again).st_size == 600_000
    assert theirs.read_bytes()[:6] == b"AFTER!"


def test_emptying_what_is_mapped_by_a_direct_open(pair: tuple[Path, Path]) -> None:
    """What the other mount's worker alone has can't be passed on here, and is opened past the page cache to
    be appended to; an emptied file could be passed on, but for the mapping."""
    mine, theirs = pair
    for number in range(10):
        theirs.write_bytes(b"%06d" % number * 1000)
        with opened(mine, os.O_RDWR | os.O_APPEND) as appender:
            with mmap.mmap(appender, 6000, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
                assert mapping[:6] == b"%06d" % number
                with opened(mine, os.O_RDWR | os.O_TRUNC) as again:
                    os.pwrite(again, b"anew" * 10, 0)
                    assert mapping[:4] == b"anew"
            assert os.write(appender, b"more") == 4
        assert mine.read_bytes() == theirs.read_bytes() == b"anew" * 10 + b"more"


def test_both_write_one_file(pair: tuple[Path, Path]) -> None:
    mine, theirs = pair
    with opened(mine, os.O_RDWR) as first, opened(theirs, os.O_RDWR) as second:
        for number in range(50):
            os.pwrite(first, b"%05d" % number, 10 * number)
            assert os.pread(second, 5, 10 * number) == b"%05d" % number
            os.pwrite(second, b"%05d" % number, 10 * number + 5)
            assert os.pread(first, 10, 10 * number) == b"%05d%05d" % (number, number)
        os.ftruncate(second, 500)
        assert os.fstat(first).st_size == os.fstat(second).st_size == 500
    expected = b"".join(b"%05d%05d" % (number, number) for number in range(50))
    assert mine.read_bytes() == theirs.read_bytes() == expected


def test_appends_of_both_are_all_there(pair: tuple[Path, Path]) -> None:
    mine, theirs = pair
    mine.write_bytes(b"")

    def append(path: Path, letter: bytes) -> None:
        with opened(path, os.O_WRONLY | os.O_APPEND) as descriptor:
            for number in range(300):
                os.write(descriptor, b"%s%06d\n" % (letter, number))

    threads = [threading.Thread(target=append, args=one) for one in ((mine, b"a"), (theirs, b"b"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = theirs.read_bytes().splitlines()
    assert len(lines) == 600
    for letter in (b"a", b"b"):
        assert [line for line in lines if line[:1] == letter] == [b"%s%06d" % (letter, n) for n in range(300)]


def test_close_to_open_back_and_forth(pair: tuple[Path, Path]) -> None:
    rng = random.Random(5)
    model = bytearray(b"before" * 100_000)
    for number in range(60):
        path, other = pair if number % 2 else pair[::-1]
        data, offset = rng.randbytes(rng.choice([1, 5000, 70_000])), rng.randrange(len(model) + 1000)
        match rng.randrange(4):
            case 0:
                path.write_bytes(data)
                model = bytearray(data)
            case 1:
                with opened(path, os.O_WRONLY | os.O_APPEND) as descriptor:
                    os.write(descriptor, data)
                model += data
            case 2:
                os.truncate(path, offset)
                del model[offset:]
                model.extend(bytes(offset - len(model)))
            case 3:
                with opened(path, os.O_RDWR) as descriptor:
                    os.pwrite(descriptor, data, offset)
                model.extend(bytes(max(0, offset - len(model))))
                model[offset : offset + len(data)] = data
        with opened(other, os.O_RDONLY) as descriptor:
            assert os.fstat(descriptor).st_size == len(model)
            assert os.pread(descriptor, len(model) + 1, 0) == model
        assert path.read_bytes() == model
