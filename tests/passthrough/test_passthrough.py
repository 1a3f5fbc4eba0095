"""The kernel reads and writes slabs itself, on a real mount: what it may do alone, and that nothing else
shows a difference."""

from __future__ import annotations

import fcntl
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import LocalDaemon
from kernel_io import MIB, Mapping, frozen, opened, require_passthrough
from servers import wait_until


def pattern(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture(scope="module")
def site() -> Iterator[LocalDaemon]:
    require_passthrough()
    site = LocalDaemon(session="native", tiers=["SSD:{base}/ssd:8GB"])
    try:
        yield site.start()
    finally:
        wrong = site.close()
        assert not wrong, "\n\n".join(wrong)


@pytest.fixture
def here(site: LocalDaemon, request: pytest.FixtureRequest) -> Path:
    path = site.mount / "".join(char if char.isalnum() else "_" for char in request.node.name)
    path.mkdir()
    return path


def stored(site: LocalDaemon, path: Path) -> Path:
    return site.ufs_dir / path.relative_to(site.mount)


def is_stored(site: LocalDaemon, path: Path, data: bytes) -> bool:
    try:
        return stored(site, path).read_bytes() == data
    except FileNotFoundError:
        return False


def test_new_file_is_written_without_the_daemon(site: LocalDaemon, here: Path) -> None:
    data = pattern(5 * MIB + 17)
    path = here / "file"
    with opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
        os.pwrite(descriptor, b"x", 0)  # before the first one the kernel asks for file capabilities
        with frozen(site.daemon):
            assert os.write(descriptor, data) == len(data)
            assert os.pread(descriptor, 100, MIB) == data[MIB : MIB + 100]
            os.pwrite(descriptor, b"xyz", 4)
        assert os.fstat(descriptor).st_size == path.stat().st_size == len(data)
    data = data[:4] + b"xyz" + data[7:]
    assert path.read_bytes() == data
    wait_until(lambda: is_stored(site, path, data), "the upload")


def test_cached_file_is_read_without_the_daemon(site: LocalDaemon, here: Path) -> None:
    data = pattern(3 * MIB + 5)
    wait_until(stored(site, here).exists, "the directory")
    stored(site, here).joinpath("file").write_bytes(data)
    path = here / "file"
    wait_until(path.exists, "the name")
    assert path.read_bytes() == data  # through the daemon: it comes into the cache only now
    with opened(path, os.O_RDONLY) as descriptor, opened(path, os.O_RDONLY) as other, frozen(site.daemon):
        assert os.pread(descriptor, len(data), 0) == data
        mapping = Mapping(other, len(data))
        assert mapping.read(MIB, 1000) == data[MIB : MIB + 1000]
        mapping.close()


def test_file_that_is_not_cached_is_read_all_the_same(site: LocalDaemon, here: Path) -> None:
    """And while it is open that way, every other open is answered so that the kernel takes it."""
    data = pattern(4 * MIB)
    wait_until(stored(site, here).exists, "the directory")
    stored(site, here).joinpath("file").write_bytes(data)
    path = here / "file"
    wait_until(path.exists, "the name")
    with opened(path, os.O_RDONLY) as first:
        assert os.pread(first, 10, 0) == data[:10]
        assert path.read_bytes() == data
        with opened(path, os.O_RDWR) as second:
            os.pwrite(second, b"changed", 3)
            assert os.pread(first, 20, 0) == data[:3] + b"changed" + data[10:20]
    with opened(path, os.O_RDONLY) as third, frozen(site.daemon):
        assert os.pread(third, 20, 0) == data[:3] + b"changed" + data[10:20]


@pytest.mark.parametrize("reader_flags", [os.O_RDONLY, os.O_RDWR])
def test_readers_see_each_change_of_the_same_mount(site: LocalDaemon, here: Path, reader_flags: int) -> None:
    path = here / "file"
    path.write_bytes(b"before" * 1000)
    with opened(path, reader_flags) as reader:
        with opened(path, os.O_WRONLY) as writer:
            os.pwrite(writer, b"AFTER!", 0)
            assert os.pread(reader, 12, 0) == b"AFTER!before"
            os.ftruncate(writer, 6)
            assert os.pread(reader, 12, 0) == b"AFTER!"
        with opened(path, os.O_WRONLY | os.O_APPEND) as appender:
            os.write(appender, b"more")
            assert os.pread(reader, 12, 0) == b"AFTER!more"
        os.truncate(path, 3)
        assert os.pread(reader, 12, 0) == b"AFT"
        path.write_bytes(b"emptied, then this")
        assert os.pread(reader, 100, 0) == b"emptied, then this"
        os.truncate(path, 0)
        assert os.pread(reader, 100, 0) == b""
        path.write_bytes(b"last")
        assert os.pread(reader, 100, 0) == b"last"
        assert os.fstat(reader).st_size == path.stat().st_size == 4
    assert path.read_bytes() == b"last"
    wait_until(lambda: is_stored(site, path, b"last"), "the upload")


def test_append_goes_to_the_end_of_all_writers(site: LocalDaemon, here: Path) -> None:
    path = here / "log"
    with (
        opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as first,
        opened(path, os.O_WRONLY | os.O_APPEND) as second,
        opened(path, os.O_RDWR) as third,
    ):
        os.write(first, b"000 ")
        with frozen(site.daemon):
            for number in range(1, 100):
                os.write(first if number % 2 else second, b"%03d " % number)
            os.pwrite(third, b"####", 0)
        assert os.pread(first, 8, 0) == b"####001 "
    assert path.read_bytes() == b"####" + b"".join(b"%03d " % number for number in range(1, 100))


def test_times_and_sizes(site: LocalDaemon, here: Path) -> None:
    path = here / "file"
    path.write_bytes(b"old")
    os.utime(path, ns=(1_000_000_000, 2_000_000_000))
    assert path.stat().st_mtime_ns == 2_000_000_000
    with opened(path, os.O_RDWR) as descriptor:
        assert os.fstat(descriptor).st_mtime_ns == 2_000_000_000  # opening alone changes nothing
        before = time.time_ns()
        os.pwrite(descriptor, b"newer", 10)
        found = path.stat()
        assert found.st_size == 15
        assert before - 20_000_000 <= found.st_mtime_ns <= time.time_ns()
        os.utime(descriptor, ns=(3_000_000_000, 4_000_000_000))
        assert path.stat().st_mtime_ns == 4_000_000_000
    assert path.stat().st_mtime_ns == 4_000_000_000
    assert path.stat().st_size == 15


def test_opening_for_writing_alone_uploads_nothing(site: LocalDaemon, here: Path) -> None:
    path = here / "file"
    path.write_bytes(b"content" * 1000)
    wait_until(lambda: is_stored(site, path, b"content" * 1000), "the upload")
    before, times = stored(site, path).stat(), path.stat()
    for flags in (os.O_RDWR, os.O_WRONLY, os.O_WRONLY | os.O_APPEND):
        with opened(path, flags):
            pass
    time.sleep(1.5)
    after = stored(site, path).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert path.read_bytes() == b"content" * 1000
    with opened(path, os.O_RDONLY) as descriptor, frozen(site.daemon):
        assert os.pread(descriptor, 7, 0) == b"content"


def test_mapping_outlives_the_last_close(site: LocalDaemon, here: Path) -> None:
    path = here / "file"
    data = bytearray(pattern(2 * MIB))
    path.write_bytes(data)
    wait_until(lambda: is_stored(site, path, bytes(data)), "the upload")
    with opened(path, os.O_RDWR) as descriptor:
        mapping = Mapping(descriptor, len(data), is_writable=True)
    time.sleep(0.5)
    mapping.write(MIB, b"through the mapping")
    data[MIB : MIB + 19] = b"through the mapping"
    assert path.read_bytes() == data
    with opened(path, os.O_RDONLY) as reader:
        mapping.write(5, b"again")
        data[5:10] = b"again"
        assert os.pread(reader, 10, 0) == data[:10]
    mapping.close()
    wait_until(lambda: is_stored(site, path, bytes(data)), "the upload of what was mapped")
    assert path.read_bytes() == data


def test_read_only_mapping_keeps_its_pages(site: LocalDaemon, here: Path) -> None:
    path = here / "file"
    data = pattern(3 * MIB)
    path.write_bytes(data)
    wait_until(lambda: is_stored(site, path, data), "the upload")
    with opened(path, os.O_RDONLY) as descriptor:
        mapping = Mapping(descriptor, len(data))
    site.fs("free", "/" + str(path.relative_to(site.mount)))
    time.sleep(1.5)
    assert mapping.read(0, len(data)) == data
    mapping.close()
    assert path.read_bytes() == data


def test_copied_descriptor_writes_after_a_close(site: LocalDaemon, here: Path) -> None:
    """FLUSH says nothing of other descriptors of the same open file."""
    path = here / "file"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    copy = os.dup(descriptor)
    os.write(descriptor, b"first ")
    os.close(descriptor)
    assert path.read_bytes() == b"first "
    os.write(copy, b"second")
    assert path.read_bytes() == b"first second"
    os.close(copy)
    wait_until(lambda: is_stored(site, path, b"first second"), "the upload")


def test_unlinked_and_replaced_while_open(site: LocalDaemon, here: Path) -> None:
    first, second = here / "first", here / "second"
    first.write_bytes(b"first")
    second.write_bytes(b"second")
    with opened(first, os.O_RDWR) as gone, opened(second, os.O_RDONLY) as replaced:
        first.unlink()
        os.pwrite(gone, b"FIRST", 0)
        assert os.pread(gone, 10, 0) == b"FIRST"
        other = here / "other"
        other.write_bytes(b"other")
        other.rename(second)
        assert os.pread(replaced, 10, 0) == b"second"
        assert second.read_bytes() == b"other"
        assert os.fstat(gone).st_nlink == os.fstat(replaced).st_nlink == 0


def test_holes_and_large_offsets(site: LocalDaemon, here: Path) -> None:
    path = here / "sparse"
    with opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
        os.pwrite(descriptor, b"end", 5 << 30)
        assert os.pread(descriptor, 10, (5 << 30) - 5) == bytes(5) + b"end"
        assert os.fstat(descriptor).st_size == (5 << 30) + 3
        os.ftruncate(descriptor, MIB)
        os.pwrite(descriptor, b"x", 0)
    assert path.read_bytes() == b"x" + bytes(MIB - 1)


@pytest.mark.parametrize(("mode", "left"), [(0o6777, 0o777), (0o4666, 0o666), (0o2666, 0o2666)])
@pytest.mark.parametrize("how", ["write", "truncate", "empty"])
def test_set_user_id_goes_with_a_write(site: LocalDaemon, here: Path, mode: int, left: int, how: str) -> None:
    path = here / "program"
    path.write_bytes(b"x")
    site.base.chmod(0o711)
    here.chmod(0o777)
    path.chmod(mode)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with opened(path, os.O_WRONLY | (os.O_TRUNC if how == "empty" else 0)) as descriptor:
                if how == "truncate":
                    os.ftruncate(descriptor, 5)
                elif how == "write":
                    os.write(descriptor, b"y")
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert path.stat().st_mode & 0o7777 == left


def test_random_operations_against_a_model(site: LocalDaemon, here: Path) -> None:
    """Several handles of one file, opened and closed at random, in all modes."""
    seed = int(os.environ.get("PASSTHROUGH_SEED", "0")) or random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    path, model = here / "file", bytearray()
    path.touch()
    handles: list[int] = []
    for _ in range(1500):
        offset = rng.randrange(2 * MIB)
        match rng.randrange(9):
            case 0 if len(handles) < 5:
                flags = rng.choice([os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_TRUNC])
                handles.append(os.open(path, flags))
                if flags & os.O_TRUNC:
                    model.clear()
            case 1 if handles:
                os.close(handles.pop(rng.randrange(len(handles))))
            case 2:
                size = rng.choice([0, offset, len(model) // 2])
                os.truncate(path, size)
                del model[size:]
                model.extend(bytes(size - len(model)))
            case 3:
                assert path.stat().st_size == len(model)
            case 4:
                data = rng.randbytes(rng.choice([1, 4096, 50_000]))
                with opened(path, os.O_WRONLY | os.O_APPEND) as descriptor:
                    os.write(descriptor, data)
                model.extend(data)
            case 5 if rng.random() < 0.03:
                site.fs("free", "/" + str(path.relative_to(site.mount)))
            case _ if handles:
                descriptor = rng.choice(handles)
                assert os.pread(descriptor, 70_000, offset) == model[offset : offset + 70_000]
                if rng.random() < 0.5:
                    data = rng.randbytes(rng.choice([1, 4096, 70_000]))
                    try:
                        written = os.pwrite(descriptor, data, offset)
                    except OSError:
                        continue  # opened for reading
                    assert written == len(data)
                    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
                        offset = len(model)  # pwrite(2) on Linux appends, too
                    model.extend(bytes(max(0, offset - len(model))))
                    model[offset : offset + len(data)] = data
    for descriptor in handles:
        os.close(descriptor)
    assert path.read_bytes() == model
    wait_until(lambda: is_stored(site, path, bytes(model)), "the upload")
