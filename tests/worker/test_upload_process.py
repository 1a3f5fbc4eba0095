"""The upload process, driven directly: real process, real files, real sockets."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from alluxiofuse.errors import AlluxioFuseError, UfsUnavailableError
from alluxiofuse.ufs.base import PutCancelled, UfsAttrs
from alluxiofuse.ufs.local import LocalUnderStorage
from alluxiofuse.ufs.upload_process import Cancellation, UploadProcess
from alluxiofuse.wire.types import MountInfo

ATTRS = UfsAttrs(0o640, os.geteuid(), os.getegid(), 1_600_000_000_123_456_789)


class World:
    def __init__(self, process: UploadProcess, root: Path) -> None:
        self.process = process
        self.root = root
        self.mount = MountInfo(1, b"/", str(root), False, 1.0, {})

    async def put(self, name: str, content: bytes, cancellation: Cancellation | None = None) -> bytes:
        source = self.root.parent / "source"
        source.write_bytes(content)
        fd = os.open(source, os.O_RDONLY)
        try:
            return await self.process.put(
                self.mount, name.encode(), fd, len(content), ATTRS, cancellation or Cancellation()
            )
        finally:
            os.close(fd)

    @property
    def pid(self) -> int:
        assert self.process._running is not None
        return self.process._running.process.pid


@asynccontextmanager
async def world(tmp_path: Path) -> AsyncIterator[World]:
    root = tmp_path / "ufs"
    root.mkdir()
    process = UploadProcess(2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.run)
        yield World(process, root)
        nursery.cancel_scope.cancel()


def run(tmp_path: Path, test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(30):
            async with world(tmp_path) as w:
                await test(w)

    before = set(os.listdir("/proc/self/fd"))
    trio.run(main)
    assert set(os.listdir("/proc/self/fd")) == before


def test_put_is_there_with_its_attributes_and_fingerprint(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        fingerprint = await w.put("a/b", b"x" * 5000)
        assert (w.root / "a/b").read_bytes() == b"x" * 5000
        stat = (w.root / "a/b").stat()
        assert (stat.st_mode & 0o7777, stat.st_mtime_ns) == (0o640, ATTRS.mtime_ns)
        assert fingerprint == LocalUnderStorage(str(w.root)).stat(b"a/b").fingerprint

    run(tmp_path, body)


def test_many_at_once(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        async with trio.open_nursery() as nursery:
            for i in range(200):
                nursery.start_soon(w.put, f"d{i % 3}/f{i}", b"y" * 1000)
        assert sum(1 for path in w.root.rglob("f*") if path.stat().st_size == 1000) == 200

    run(tmp_path, body)


def test_error_of_the_store_arrives_as_it_was(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        (w.root / "dir").mkdir()
        (w.root / "dir/below").touch()
        with pytest.raises(AlluxioFuseError) as caught:
            await w.put("dir", b"z")
        assert caught.value.code.startswith("ufs")
        await w.put("other", b"z")

    run(tmp_path, body)


def test_cancelled_put_leaves_the_old_content(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        await w.put("f", b"old")
        cancellation = Cancellation()
        cancellation.cancel()
        with pytest.raises(PutCancelled):
            await w.put("f", b"n" * (64 << 20), cancellation)
        assert (w.root / "f").read_bytes() == b"old"
        assert os.listdir(w.root) == ["f"]

    run(tmp_path, body)


def test_killed_process_fails_its_puts_and_comes_back(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        await w.put("first", b"1")
        pid = w.pid
        os.kill(pid, signal.SIGSTOP)
        failures: list[UfsUnavailableError] = []

        async def doomed() -> None:
            try:
                await w.put("doomed", b"2")
            except UfsUnavailableError as exc:
                failures.append(exc)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(doomed)
            await trio.testing.wait_all_tasks_blocked(0.05)
            os.kill(pid, signal.SIGKILL)
        assert failures
        await w.put("second", b"3")
        assert w.pid != pid
        assert (w.root / "second").read_bytes() == b"3"

    run(tmp_path, body)


def test_a_process_that_can_not_be_started_is_said_to_be_the_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a failure of the tier directory whose file was to be uploaded."""

    async def body(w: World) -> None:
        with monkeypatch.context() as patched:
            patched.setattr("sys.executable", str(tmp_path / "nothing"))
            with pytest.raises(UfsUnavailableError, match="can't be started"):
                await w.put("f", b"1")
        await w.put("f", b"2")
        assert (w.root / "f").read_bytes() == b"2"

    run(tmp_path, body)
