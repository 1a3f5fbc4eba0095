"""File ranges whose bytes are not in memory: they go through a thread, with the same result."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from rpc_world import Blob, Echo, misbehaving_service, open_fds, run, until

from alluxiofuse.errors import ConnectionLost
from alluxiofuse.rpc.base import FileRange
from alluxiofuse.rpc.client import connect_tcp
from alluxiofuse.rpc.filerange import is_in_memory, read_range
from alluxiofuse.rpc.security import Security
from alluxiofuse.rpc.server import serve_tcp

SIZE = 3 << 20


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[tuple[int, bytes]]:
    """A descriptor of a file that is on disk only, and its content."""
    content = os.urandom(SIZE)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, content)
    chill(fd)
    if is_in_memory(fd, 0, SIZE):
        os.close(fd)
        pytest.skip("this filesystem cannot tell what is in memory")
    yield fd, content
    os.close(fd)


def chill(fd: int) -> None:
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def test_cold_and_warm_are_told_apart(cold: tuple[int, bytes]) -> None:
    fd, content = cold
    assert os.pread(fd, SIZE, 0) == content
    assert is_in_memory(fd, 0, SIZE)
    assert is_in_memory(fd, 5, 0)
    chill(fd)
    assert not is_in_memory(fd, SIZE - 1, 1)


def test_read_of_a_cold_range(cold: tuple[int, bytes]) -> None:
    fd, content = cold

    async def main() -> None:
        assert await read_range(FileRange(fd, 1, SIZE - 1)) == content[1:]
        chill(fd)
        with pytest.raises(ConnectionLost, match="shorter"):
            await read_range(FileRange(fd, 1, SIZE))

    run(main)


def test_sendfile_of_a_cold_range(cold: tuple[int, bytes]) -> None:
    fd, content = cold

    async def main() -> None:
        async with misbehaving_service() as service, trio.open_nursery() as nursery:
            memory_fd, service.file_fd = service.file_fd, fd
            address = await nursery.start(partial(serve_tcp, service, "127.0.0.1", 0, security=Security()))
            connect: Any = partial(connect_tcp, nursery, "127.0.0.1", address.port, role="test")
            connection = await connect(security=Security())
            answer = await connection.exchange(Blob(0, SIZE, True))
            assert bytes(answer.payload) == content
            # Closed while the server is at it: nothing hangs, nothing is left.
            for _ in range(5):
                chill(fd)
                doomed = await connect(security=Security())
                with trio.move_on_after(0.002):
                    await doomed.exchange(Blob(0, SIZE, True))
                await doomed.aclose()
            await until(lambda: service.ranges_sent == service.ranges_given)
            assert (await connection.call(Echo("x"))).text == "x"
            service.file_fd = memory_fd
            nursery.cancel_scope.cancel()

    run(main)


def test_unreadable_descriptor(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"x")
    before = open_fds()

    async def main() -> None:
        with pytest.raises(ConnectionLost, match="could not be read"):
            await read_range(FileRange(fd, 0, 1))

    run(main)
    assert open_fds() == before
    os.close(fd)
