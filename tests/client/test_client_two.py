"""Two clients on one master: close-to-open, change notices, a file that both write."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

import pytest
from client_world import IN_PROCESS, ROOT, TCP, UNIX, Client, World, in_world, until

from alluxiofuse.ids import ROOT_INO

Test = Callable[[Client, Client], Awaitable[None]]


class Recorder:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.attrs: list[int] = []
        self.data: list[int] = []
        self.entries: list[tuple[int, bytes]] = []
        self.reset_count = 0

    def attr_changed(self, ino: int) -> None:
        self.attrs.append(ino)

    def data_changed(self, ino: int) -> None:
        self.data.append(ino)

    def entry_changed(self, parent: int, name: bytes) -> None:
        self.entries.append((parent, name))

    def reset(self) -> None:
        self.reset_count += 1


@pytest.fixture(params=[IN_PROCESS, UNIX, TCP])
def with_clients(request: pytest.FixtureRequest) -> Callable[[Test], None]:
    def run(test: Test) -> None:
        async def in_this(world: World) -> None:
            async with world.client("one") as one, world.client("two") as two:
                await test(one, two)

        in_world(request.param)(in_this)

    return run


def test_close_to_open(with_clients: Callable[[Test], None]) -> None:
    async def test(one: Client, two: Client) -> None:
        for number in range(10):
            await one.put(b"f", b"version %d" % number)
            assert await two.get(b"f") == b"version %d" % number
            await two.put(b"f", b"answer %d" % number)
            assert await one.get(b"f") == b"answer %d" % number

    with_clients(test)


def test_changes_are_told_to_the_other_only(with_clients: Callable[[Test], None]) -> None:
    async def test(one: Client, two: Client) -> None:
        seen, own = Recorder(), Recorder()
        two.fs.set_listener(seen)
        one.fs.set_listener(own)
        await one.put(b"f", b"data")
        ino = (await one.fs.lookup(ROOT, ROOT_INO, b"f")).ino
        await until(lambda: (ROOT_INO, b"f") in seen.entries)
        await until(lambda: ino in seen.data)
        await one.fs.setattr(ROOT, ino, mode=0o600)
        await until(lambda: ino in seen.attrs)
        await one.fs.rename(ROOT, ROOT_INO, b"f", ROOT_INO, b"g")
        await until(lambda: (ROOT_INO, b"g") in seen.entries)
        assert not own.entries
        assert ino not in own.data
        assert one.fs.is_watch_healthy

    with_clients(test)


def test_reading_what_the_other_is_writing(with_clients: Callable[[Test], None]) -> None:
    async def test(one: Client, two: Client) -> None:
        writer = await one.create(b"live")
        await writer.write(0, b"first")
        reader = await two.open(b"live")
        assert bytes(await reader.read(0, 100)) == b"first"
        await writer.write(5, b" second")
        assert bytes(await reader.read(0, 100)) == b"first second"
        assert (await two.fs.getattr(writer.ino)).size == 12
        await writer.truncate(3)
        assert bytes(await reader.read(0, 100)) == b"fir"
        await one.close(writer)
        assert bytes(await reader.read(0, 100)) == b"fir"
        await reader.release()

    with_clients(test)


def test_an_open_reader_follows_a_later_writer(with_clients: Callable[[Test], None]) -> None:
    async def test(one: Client, two: Client) -> None:
        seen = Recorder()
        two.fs.set_listener(seen)
        await one.put(b"f", b"old old")
        reader = await two.open(b"f")
        assert bytes(await reader.read(0, 100)) == b"old old"
        writer = await one.open(b"f", os.O_RDWR)
        await writer.write(0, b"new content")
        await one.close(writer)
        count = len(seen.data)
        await until(lambda: len(seen.data) > 0 and len(seen.data) >= count)
        with_deadline = bytearray()

        async def is_new() -> bool:
            with_deadline[:] = await reader.read(0, 100)
            return bytes(with_deadline) == b"new content"

        await until(is_new)
        await reader.release()

    with_clients(test)


def test_both_write_one_file(with_clients: Callable[[Test], None]) -> None:
    async def test(one: Client, two: Client) -> None:
        first = await one.create(b"both")
        await first.write(0, b"1111")
        second = await two.open(b"both", os.O_RDWR)
        await second.write(4, b"2222")
        assert bytes(await first.read(0, 100)) == b"11112222"
        await one.close(first)
        assert bytes(await second.read(0, 100)) == b"11112222"
        await second.write(8, b"3333")
        await two.close(second)
        assert await one.get(b"both") == b"111122223333"
        assert (await one.fs.lookup(ROOT, ROOT_INO, b"both")).home == 0

    with_clients(test)


def test_appends_of_both_are_whole(with_clients: Callable[[Test], None]) -> None:
    async def test(one: Client, two: Client) -> None:
        first = await one.create(b"log", os.O_WRONLY | os.O_APPEND)
        second = await two.open(b"log", os.O_WRONLY | os.O_APPEND)
        for number in range(30):
            await (first, second)[number % 2].write(0, b"%03d" % number)
        await one.close(first)
        await two.close(second)
        assert await two.get(b"log") == b"".join(b"%03d" % number for number in range(30))

    with_clients(test)


def test_a_time_that_is_set_while_the_other_writes(with_clients: Callable[[Test], None]) -> None:
    async def test(one: Client, two: Client) -> None:
        file = await one.create(b"f")
        await file.write(0, b"before")
        await two.fs.setattr(ROOT, file.ino, mtime_ns=12345)
        assert (await two.fs.getattr(file.ino)).mtime_ns == 12345
        await file.write(6, b" and after")
        shown = await two.fs.getattr(file.ino)
        assert (shown.size, shown.mtime_ns > 12345) == (16, True)
        await file.flush()
        await file.release()

    with_clients(test)


def test_unlinked_by_the_other_while_open(with_clients: Callable[[Test], None]) -> None:
    async def test(one: Client, two: Client) -> None:
        await one.put(b"f", b"still here")
        reader = await two.open(b"f")
        await one.fs.unlink(ROOT, ROOT_INO, b"f")
        assert bytes(await reader.read(0, 100)) == b"still here"
        await reader.release()

    with_clients(test)


def test_a_client_that_vanishes_leaves_what_it_wrote() -> None:
    async def test(world: World) -> None:
        async with world.client("stays") as stays:
            async with world.client("leaves") as leaves:
                file = await leaves.create(b"f")
                await file.write(0, b"written, never closed")
            assert await stays.get(b"f") == b"written, never closed"
            assert (await stays.fs.lookup(ROOT, ROOT_INO, b"f")).home == 0

    in_world(UNIX)(test)
