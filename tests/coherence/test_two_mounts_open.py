"""What is open or mapped on one mount while the other changes it."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from pathlib import Path

import pytest
from seen import KIB, see, shows
from servers import wait_until
from two_mounts import TwoMounts


@pytest.mark.parametrize("size", [100, 300 * KIB])
def test_a_file_that_is_replaced_stays_readable(pair: tuple[Path, Path], size: int) -> None:
    author, other = pair
    old, new = os.urandom(size), os.urandom(size)
    (author / "f").write_bytes(old)
    wait_until((other / "f").exists, "the name")
    with open(other / "f", "rb") as reader, open(other / "f", "rb") as late:
        assert reader.read(10) == old[:10]
        (author / "new").write_bytes(new)
        os.rename(author / "new", author / "f")
        wait_until(lambda: (other / "f").stat().st_ino != os.fstat(reader.fileno()).st_ino, "the new file")
        see(other / "f", new)
        assert reader.read() == old[10:]
        assert late.read() == old
        wait_until(lambda: os.fstat(reader.fileno()).st_nlink == 0, "it has no name")


def test_a_file_that_is_removed_stays_usable(pair: tuple[Path, Path]) -> None:
    author, other = pair
    (author / "f").write_bytes(b"old content")
    wait_until((other / "f").exists, "the name")
    with open(other / "f", "r+b", buffering=0) as file:
        os.unlink(author / "f")
        wait_until(lambda: not (other / "f").exists(), "the name is gone")
        assert file.read() == b"old content"
        file.write(b", more")
        assert os.pread(file.fileno(), 100, 0) == b"old content, more"
        os.fsync(file.fileno())
        (author / "f").write_bytes(b"another")
        assert os.pread(file.fileno(), 100, 0) == b"old content, more"
    see(other / "f", b"another")


def test_a_file_that_is_cut_ends_there(pair: tuple[Path, Path]) -> None:
    author, other = pair
    (author / "f").write_bytes(b"x" * 10_000)
    wait_until((other / "f").exists, "the name")
    with open(other / "f", "rb", buffering=0) as reader:
        assert len(reader.read(8192)) == 8192
        os.truncate(author / "f", 5000)
        wait_until(lambda: os.fstat(reader.fileno()).st_size == 5000, "the size")
        assert reader.read(8192) == b""
        assert os.pread(reader.fileno(), 8192, 4000) == b"x" * 1000
        os.truncate(author / "f", 9000)
        wait_until(lambda: os.pread(reader.fileno(), 8192, 4000) == b"x" * 1000 + bytes(4000), "a hole")


def test_mappings_follow_a_change_in_place(pair: tuple[Path, Path]) -> None:
    author, other = pair[0] / "f", pair[1] / "f"
    size = 100 * KIB
    author.write_bytes(b"a" * size)
    wait_until(other.exists, "the name")
    with open(other, "rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as memory:
        assert memory[:] == b"a" * size
        for letter in b"bcd":
            text = bytes([letter]) * 10
            fd = os.open(author, os.O_RDWR)
            os.pwrite(fd, text, 50_000)
            if letter == ord("c"):
                os.fsync(fd)
                shows(memory, 50_000, text)
            os.close(fd)
            shows(memory, 50_000, text)
        assert memory[:50_000] == b"a" * 50_000


def test_a_mapping_that_is_written_reaches_the_other(pair: tuple[Path, Path]) -> None:
    author, other = pair[0] / "f", pair[1] / "f"
    author.write_bytes(bytes(20_000))
    wait_until(other.exists, "the name")
    with open(author, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[5000:5010] = b"0123456789"
        memory.flush()
        see(other, bytes(5000) + b"0123456789" + bytes(14_990))


def test_a_directory_that_the_other_removes_is_gone_for_who_is_in_it(pair: tuple[Path, Path]) -> None:
    author, other = pair
    (author / "d").mkdir()
    wait_until((other / "d").exists, "the name")
    fd = os.open(other / "d", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.rmdir(author / "d")
        wait_until(lambda: not (other / "d").exists(), "the name is gone")
        with pytest.raises(OSError) as caught:
            os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        assert caught.value.errno in (errno.ENOENT, errno.ESTALE)
    finally:
        os.close(fd)


def test_what_was_replaced_is_still_there_when_its_object_is_not(
    site: TwoMounts, pair: tuple[Path, Path]
) -> None:
    """Uploaded, replaced while it is open on the other machine, which has never read it, and the new one
    uploaded over it: then it is read, and changed in place."""
    author, other = pair
    name = "/" + author.name + "/f"
    (author / "f").write_bytes(b"old content")
    site.wait_persisted(name)
    wait_until((other / "f").exists, "the name")
    with open(other / "f", "r+b", buffering=0) as reader, open(other / "f", "r+b", buffering=0) as writer:
        (author / "new").write_bytes(b"new content")
        os.rename(author / "new", author / "f")
        place = site.ufs_dir / author.name / "f"
        wait_until(lambda: place.read_bytes() == b"new content", "the new one is uploaded")
        assert reader.read() == b"old content"
        writer.write(b"OLD")
        assert os.pread(reader.fileno(), 100, 0) == b"OLD content"
    see(other / "f", b"new content")


def test_what_was_replaced_or_removed_and_is_cached_nowhere_stays(
    site: TwoMounts, pair: tuple[Path, Path]
) -> None:
    """No worker has it, or only its first page; others take its place in the under storage."""
    author, other = pair
    name = "/" + author.name
    data = {path: os.urandom(3 << 20) for path in ("cold", "partly", "removed", "d/removed")}
    (author / "d").mkdir()
    for path, content in data.items():
        (author / path).write_bytes(content)
        site.wait_persisted(f"{name}/{path}")
    wait_until((other / "d" / "removed").exists, "the names")
    site.fs("free", "-R", str(author))
    opened = {path: open(other / path, "r+b", buffering=0) for path in data}  # noqa: SIM115
    try:
        assert os.pread(opened["partly"].fileno(), 4096, 0) == data["partly"][:4096]
        for path in ("cold", "partly"):
            (author / "new").write_bytes(b"new content")
            os.rename(author / "new", author / path)
        os.unlink(author / "removed")
        (author / "removed").write_bytes(b"another")
        subprocess.run(["rm", "-r", author / "d"], check=True, timeout=60)
        (author / "d").write_bytes(b"a file now")
        place = site.ufs_dir / author.name
        wanted = {"cold": b"new content", "partly": b"new content", "removed": b"another", "d": b"a file now"}
        wait_until(
            lambda: all((place / path).is_file() and (place / path).read_bytes() == content
                        for path, content in wanted.items()), "the new ones are uploaded"
        )  # fmt: skip
        for path, file in opened.items():
            os.pwrite(file.fileno(), b"changed", 1 << 20)
            changed = data[path][: 1 << 20] + b"changed" + data[path][(1 << 20) + 7 :]
            assert os.pread(file.fileno(), 4 << 20, 0) == changed, path
    finally:
        for file in opened.values():
            file.close()
    wait_until(lambda: not list(site.ufs_dir.glob(".alluxiofuse-*")), "nothing is left over")


def test_a_file_is_read_on_while_its_object_is_renamed(site: TwoMounts, pair: tuple[Path, Path]) -> None:
    """Where it has never been read the bytes come from the under storage."""
    author, other = pair
    name = "/" + author.name
    data = os.urandom(3 << 20)
    (author / "f0").write_bytes(data)
    site.wait_persisted(name)
    wait_until((other / "f0").exists, "the name")
    site.fs("free", "-R", str(author))
    with open(other / "f0", "rb", buffering=0) as reader:
        for turn in range(3):
            assert os.pread(reader.fileno(), 4096, turn << 20) == data[turn << 20 :][:4096]
            os.rename(author / f"f{turn}", author / f"f{turn + 1}")
            wait_until((site.ufs_dir / author.name / f"f{turn + 1}").exists, "its object is renamed")
