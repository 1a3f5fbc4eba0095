"""What two mounts of one namespace promise each other: an open after a close shows all of it, at once."""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path

from seen import KIB, follows, see, shows, times
from servers import wait_until


def test_an_open_after_a_close_sees_bytes_size_and_times(pair: tuple[Path, Path]) -> None:
    author, other = pair[0] / "f", pair[1] / "f"
    dice = random.Random(1)
    author.write_bytes(b"")
    wait_until(other.exists, "the name")
    data = bytearray()

    def overwrite(fd: int) -> None:
        at = dice.randrange(len(data) + 1)
        text = dice.randbytes(dice.choice([1, 4096, 70_000]))
        os.pwrite(fd, text, at)
        data[at : at + len(text)] = text

    def append(fd: int) -> None:
        text = dice.randbytes(dice.choice([1, 4096, 5000]))
        os.pwrite(fd, text, len(data))
        data.extend(text)

    def cut(fd: int) -> None:
        size = dice.randrange(len(data) + 5000)
        os.ftruncate(fd, size)
        data[size:] = bytes(max(0, size - len(data)))

    def begin_anew(fd: int) -> None:
        os.ftruncate(fd, 0)
        data.clear()
        append(fd)

    with open(other, "rb") as kept:
        for step in range(60):
            fd = os.open(author, os.O_RDWR)
            for _ in range(dice.choice([1, 1, 3])):
                dice.choice([overwrite, overwrite, append, cut, begin_anew])(fd)
            if step % 5 == 0:
                os.utime(fd, ns=(step, 10**18 + step))
            os.close(fd)
            with open(other, "rb") as file:
                found = os.fstat(file.fileno())
                assert found.st_size == len(data)
                assert file.read() == data
            assert (found.st_mtime_ns, found.st_ctime_ns) == times(author)
            assert step % 5 or found.st_mtime_ns == 10**18 + step
            follows(kept.fileno(), bytes(data))


def test_the_page_cache_never_shows_old_bytes(pair: tuple[Path, Path]) -> None:
    """Same size, changed in place by turns, while it is mapped and open on both sides."""
    here, there = pair[0] / "f", pair[1] / "f"
    size = 300 * KIB
    here.write_bytes(bytes(size))
    wait_until(there.exists, "the name")
    with open(here, "rb") as one, open(there, "rb") as two:
        maps = [mmap.mmap(file.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ) for file in (one, two)]
        for turn in range(1, 41):
            author, other = (here, there) if turn % 2 else (there, here)
            pattern = bytes([turn]) * size
            fd = os.open(author, os.O_WRONLY)
            os.pwrite(fd, pattern, 0)
            os.close(fd)
            see(other, pattern)
            see(author, pattern)
        for one_map in maps:
            shows(one_map, 0, pattern)
            one_map.close()


def test_pages_of_a_file_that_both_wrote_are_not_kept(pair: tuple[Path, Path]) -> None:
    """Who wrote half of it knows only that half, whoever closed last."""
    author, other = pair[0] / "f", pair[1] / "f"
    for turn in range(20):
        first = os.open(author, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.pwrite(first, b"a" * 8 * KIB, 0)
        wait_until(other.exists, "the name")
        second = os.open(other, os.O_RDWR)
        os.pwrite(second, b"b" * 4 * KIB, 0)
        for fd in (first, second) if turn % 2 else (second, first):
            os.close(fd)
        for path in (author, other):
            see(path, b"b" * 4 * KIB + b"a" * 4 * KIB)


def test_a_file_that_was_created_and_not_written_shows_what_the_other_writes(pair: tuple[Path, Path]) -> None:
    author, other = pair[0] / "f", pair[1] / "f"
    fd = os.open(author, os.O_RDWR | os.O_CREAT, 0o644)
    wait_until(other.exists, "the name")
    writer = os.open(other, os.O_WRONLY)
    os.pwrite(writer, b"from the other", 0)
    see(author, b"from the other")
    wait_until(lambda: os.pread(fd, 100, 0) == b"from the other", "what is open follows")
    wait_until(lambda: os.fstat(fd).st_size == 14, "its size")
    os.close(fd)
    os.pwrite(writer, b"!", 14)
    os.close(writer)
    see(author, b"from the other!")


def test_reading_while_the_other_writes(pair: tuple[Path, Path]) -> None:
    author, other = pair[0] / "f", pair[1] / "f"
    with open(author, "wb", buffering=0) as writer:
        wait_until(other.exists, "the name")
        with open(other, "rb", buffering=0) as reader:
            written = b""
            for number in range(30):
                writer.write(b"%04d" % number)
                written += b"%04d" % number
                see(other, written)
                follows(reader.fileno(), written)
            writer.seek(0)
            writer.write(b"IN-PLACE")
            written = b"IN-PLACE" + written[8:]
            see(other, written)
            follows(reader.fileno(), written)


def test_the_times_before_and_after_a_close_are_the_same(pair: tuple[Path, Path]) -> None:
    """Programs remember what fstat said before they closed it, to see later whether it changed."""
    author, other = pair[0] / "f", pair[1] / "f"
    for _ in range(3):
        with open(author, "wb") as file:
            file.write(b"data")
            file.flush()
            before = os.fstat(file.fileno())
        assert times(author) == (before.st_mtime_ns, before.st_ctime_ns)
        wait_until(lambda: other.exists() and times(other) == times(author), "the other agrees")
