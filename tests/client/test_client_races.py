"""Two clients at the same moment: joining, sealing and emptying one file."""

from __future__ import annotations

import os
import random
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from client_world import IN_PROCESS, ROOT, TCP, UNIX, Client, World, in_world, until

from alluxiofuse.client import reading
from alluxiofuse.client.writing import Writing
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.wire import master_ops as ops
from alluxiofuse.wire.types import Attr
from alluxiofuse.worker import checksums
from alluxiofuse.worker.slab import CLEAN
from alluxiofuse.worker.worker import Worker


@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_emptying_what_the_other_writes(kind: str) -> None:
    async def test(world: World) -> None:
        async with world.client("one") as one, world.client("two") as two:
            for number in range(10):
                writer = await one.create(b"f%d" % number)
                other = await two.open(b"f%d" % number, os.O_RDWR)
                await writer.write(0, b"to be emptied")
                emptied = await two.open(b"f%d" % number, os.O_RDWR | os.O_TRUNC)
                assert bytes(await writer.read(0, 100)) == b""
                await other.write(0, b"new")
                for client, file in ((one, writer), (two, other), (two, emptied)):
                    await client.close(file)
                assert await one.get(b"f%d" % number) == b"new"
                assert await two.get(b"f%d" % number) == b"new"

    in_world(kind)(test)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_one_of_the_versions_wins_whole(kind: str, seed: int) -> None:
    """Both replace a file at once; it ends as some mixture at worst of whole writes, sealed, the
    same for both, and in the under storage."""

    async def test(world: World) -> None:
        rng = random.Random(seed)
        async with world.client("one") as one, world.client("two") as two:

            async def replace(client: Client, letter: bytes) -> None:
                for _ in range(20):
                    await client.put(b"f", letter * 1000)
                    if rng.random() < 0.3:
                        await trio.sleep(0.001)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(replace, one, b"1")
                nursery.start_soon(replace, two, b"2")
            found = await one.get(b"f")
            assert found in (b"1" * 1000, b"2" * 1000)
            assert await two.get(b"f") == found
            attr: Attr = await one.paths.stat("/f")
            assert (attr.size, attr.home) == (1000, 0)

    in_world(kind)(test)


@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_what_another_sealed_and_began_anew_is_seen_before_the_news_of_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a file is open for writing here, in which nothing was written here."""

    async def test(world: World) -> None:
        async with world.client("one") as one, world.client("two") as two:
            idle = await one.create(b"f")
            monkeypatch.setattr(one.fs, "changed", lambda event: None)
            await two.close(await two.open(b"f", os.O_RDWR | os.O_TRUNC))
            writer = await two.open(b"f", os.O_RDWR)
            await writer.write(0, b"x" * 1000)
            ino = writer.attr.ino
            assert (await one.fs.lookup(ROOT, ROOT_INO, b"f")).size == 1000
            assert (await one.fs.getattr(ino)).size == 1000
            reader = await one.open(b"f")
            assert (await one.fs.getattr(ino)).size == 1000
            assert bytes(await reader.read(0, 2000)) == b"x" * 1000
            await idle.write(1000, b"y")
            assert bytes(await writer.read(0, 2000)) == b"x" * 1000 + b"y"
            for client, file in ((one, idle), (two, writer)):
                await client.close(file)
            await reader.release()
            assert await one.get(b"f") == await two.get(b"f") == b"x" * 1000 + b"y"

    in_world(kind)(test)


@pytest.mark.parametrize("is_set", [False, True])
@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_the_time_of_a_file_while_its_zeros_are_made_holes(
    kind: str, is_set: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the last write, or the one that was set since."""

    async def test(world: World) -> None:
        async with world.client("one") as one, world.client("two") as two:
            file = await one.create(b"f")
            await file.write(0, bytes(1 << 20))
            if is_set:
                await two.fs.setattr(ROOT, file.attr.ino, mtime_ns=12345)
            written_ns = (await one.fs.getattr(file.attr.ino)).mtime_ns
            punch, punched, looked = checksums.punch_pages, threading.Event(), threading.Event()

            def slowly(fd: int, pages: int) -> None:
                times = os.fstat(fd)
                os.utime(fd)
                punched.set()
                assert looked.wait(20)
                os.utime(fd, ns=(times.st_atime_ns, times.st_mtime_ns))
                punch(fd, pages)

            monkeypatch.setattr(checksums, "punch_pages", slowly)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.close, file)
                await until(punched.is_set)
                for client in (one, two):
                    assert (await client.fs.getattr(file.attr.ino)).mtime_ns == written_ns
                looked.set()
            assert (await two.fs.getattr(file.attr.ino)).mtime_ns == written_ns

    in_world(kind)(test)


@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX])
def test_renamed_between_the_masters_word_and_the_workers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The under storage moved the bytes that a writer was about to have fetched."""

    async def test(world: World) -> None:
        async with world.client("one") as one, world.client("two") as two:
            (world.ufs / "f").write_bytes(b"old bytes")
            file = await one.open(b"f", os.O_RDWR)
            begin = Writing.begin

            async def moved_before(writing: Writing, *arguments: Any) -> None:
                monkeypatch.undo()
                await two.fs.rename(ROOT, ROOT_INO, b"f", ROOT_INO, b"g")
                await until((world.ufs / "g").exists)
                await begin(writing, *arguments)

            monkeypatch.setattr(Writing, "begin", moved_before)
            await file.write(0, b"new")
            await one.close(file)
            assert await two.get(b"g") == b"new bytes"

    in_world(kind)(test)


@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_read_while_it_is_another_content_each_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the bytes are is out of date at every attempt, as often as the other writes."""

    async def test(world: World) -> None:
        async with world.client("one") as one, world.client("two") as two:
            await one.put(b"f", b"0" * 1000)
            file = await two.open(b"f")
            read_sealed, numbers = reading._Attempts._read_sealed, iter(range(1, 15))

            async def replaced_before(*arguments: Any) -> Any:
                if (number := next(numbers, 0)) > 0:
                    changed = await one.open(b"f", os.O_RDWR)
                    await changed.write(0, b"%d" % (number % 10) * 1000)
                    await one.close(changed)
                return await read_sealed(*arguments)

            monkeypatch.setattr(reading._Attempts, "_read_sealed", replaced_before)
            assert bytes(await file.read(0, 2000)) == b"4" * 1000
            await file.release()

    in_world(kind, master={"persist_delay_s": 60.0})(test)


def test_read_while_another_task_begins_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        async with world.client("one") as one:
            await one.put(b"f", b"old bytes")
            reader, writer = await one.open(b"f"), await one.open(b"f", os.O_RDWR)
            read_sealed = reading._Attempts._read_sealed

            async def written_before(*arguments: Any) -> Any:
                monkeypatch.undo()
                await writer.write(0, b"new")
                return await read_sealed(*arguments)

            monkeypatch.setattr(reading._Attempts, "_read_sealed", written_before)
            assert bytes(await reader.read(0, 100)) == b"new bytes"
            await one.close(writer)
            await reader.release()

    in_world(TCP, master={"persist_delay_s": 60.0})(test)


@pytest.mark.parametrize("offset", [2, 4])
def test_read_while_another_task_seals(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another client wrote behind our end is there too, whichever comes to the worker first."""

    async def test(world: World) -> None:
        async with world.client("one") as one, world.client("two") as two:
            file = await one.create(b"f")
            await file.write(0, b"ours")
            joined = await two.open(b"f", os.O_RDWR)
            await joined.write(4, b"theirs")
            await two.close(joined)
            read_remote = Writing._read_remote

            async def sealed_before(*arguments: Any) -> Any:
                monkeypatch.undo()
                await file.flush()
                return await read_remote(*arguments)

            monkeypatch.setattr(Writing, "_read_remote", sealed_before)
            assert bytes(await file.read(offset, 100)) == b"ourstheirs"[offset:]
            await one.close(file)

    in_world(TCP, master={"persist_delay_s": 60.0})(test)


@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_others_are_two_writings_further_when_one_begins(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The container that the master gave us was joined, written, sealed and changed again before the worker
    heard of us."""

    async def test(world: World) -> None:
        async with world.client("one") as one, world.client("two") as two:
            await one.put(b"f", b"old old old")
            file = await one.open(b"f", os.O_RDWR)
            begin = Writing.begin

            async def overtaken(writing: Writing, *arguments: Any) -> None:
                monkeypatch.undo()
                for offset in (0, 4):
                    other = await two.open(b"f", os.O_RDWR)
                    await other.write(offset, b"two")
                    await two.close(other)
                await begin(writing, *arguments)

            monkeypatch.setattr(Writing, "begin", overtaken)
            await file.write(8, b"one")
            await one.close(file)
            assert await one.get(b"f") == await two.get(b"f") == b"two two one"

    in_world(kind, master={"persist_delay_s": 60.0})(test)


def holds(path: Path, data: bytes) -> bool:
    return path.exists() and path.read_bytes() == data


def evicted(worker: Worker, container: int) -> bool:
    slabs = worker.slabs
    assert slabs is not None
    slab = slabs.get(container)
    if slab is not None and slab.state == CLEAN and slab.is_idle:
        slabs.drop(slab)
    return slabs.get(container) is None


@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
@pytest.mark.parametrize("is_closed_only", [False, True])
def test_what_was_sealed_by_another_is_forgotten_before_one_begins(kind: str, is_closed_only: bool) -> None:
    """The master gave a container to who created the file; another client wrote to it and closed it, it was
    uploaded and evicted: the worker knows nothing of it when the first one begins."""

    async def test(world: World) -> None:
        async with world.client("one") as one, world.client("two") as two:
            file = await one.create(b"f")
            other = await two.open(b"f", os.O_RDWR | os.O_TRUNC)
            await other.write(0, b"theirs")
            await two.close(other)
            container = (await two.fs.getattr(file.ino)).container
            await until(partial(holds, world.ufs / "f", b"theirs"))
            two.fs._core.slabs.drop_idle()
            await two.fs._core.slabs.send_detaches()
            await until(partial(evicted, world.workers["w1"].worker, container))
            if not is_closed_only:
                await file.write(0, b"ours")
            await one.close(file)
            wanted = b"theirs" if is_closed_only else b"oursrs"
            assert await two.get(b"f") == await one.get(b"f") == wanted

    in_world(kind)(test)


@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_reads_beside_one_that_asks_where_the_content_is_now(kind: str) -> None:
    """They too wait for what the master says: the kernel would keep old bytes for good."""

    async def test(world: World) -> None:
        async with world.client("one") as one, world.client("two") as two:
            (world.ufs / "f").write_bytes(b"old")
            file = await two.open(b"f")
            assert bytes(await file.read(0, 3)) == b"old"
            content = two.fs._contents[file.ino]
            await one.put(b"f", b"new")
            await until(lambda: content.is_stale)
            found: list[bytes] = []

            async def read() -> None:
                found.append(bytes(await file.read(0, 3)))

            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(read)
            assert found == [b"new"] * 4
            await two.close(file)

    in_world(kind)(test)


def test_an_open_that_news_overtook() -> None:
    """What the master said before the news is not believed, though nobody had the file open then."""

    async def test(world: World) -> None:
        async with world.client("one") as one, world.client("two") as two:
            await one.put(b"f", b"old")
            call = two.fs._session.call

            async def slow(request: Any, **options: Any) -> Any:
                answer = await call(request, **options)
                if isinstance(request, ops.Open):
                    heard = two.fs._core.changes.now
                    await one.put(b"f", b"new")
                    await until(lambda: two.fs._core.changes.now > heard)
                return answer

            two.fs._session.call = slow  # type: ignore[method-assign]
            file = await two.open(b"f")
            two.fs._session.call = call  # type: ignore[method-assign]
            await until(lambda: two.fs._contents[file.ino].is_stale)
            assert bytes(await file.read(0, 3)) == b"new"
            await two.close(file)

    in_world(TCP)(test)
