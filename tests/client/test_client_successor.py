"""A client that takes over from one that died: its session, its open files, and what was carried out for
requests that come again."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
from client_world import HERE, IN_PROCESS, ROOT, TCP, UNIX, Client, World, in_world

from alluxiofuse.client.intents import APPEND, REMOTE_APPEND, asked_by
from alluxiofuse.errors import AlluxioFuseError, FsError
from alluxiofuse.fuse.memory import HandleRecord, Memory, make
from alluxiofuse.ids import ROOT_INO

REQUEST = 77
"""Number of a program's request."""


@pytest.fixture
def memory_fd() -> Iterator[int]:
    fd = make()
    yield fd
    os.close(fd)


@asynccontextmanager
async def life(world: World, fd: int) -> AsyncIterator[tuple[Client, Memory]]:
    """One process of a client, which ends as by a kill, with request REQUEST under way."""
    memory = Memory(fd)
    async with world.client(intents=memory) as client:
        memory.begin(REQUEST)
        asked_by.set(REQUEST)
        yield client, memory
        client.fs.leave()
        for content in client.fs._contents.values():
            for slab in (content.slab, None if content.writing is None else content.writing.slab):
                if slab is not None:
                    slab.drop()  # As the end of a process closes it.
    memory.close()
    asked_by.set(0)


async def _ino(client: Client) -> int:
    return (await client.fs.lookup(ROOT, ROOT_INO, b"file")).ino


CHANGES: dict[str, Callable[[Client], Awaitable[object]]] = {
    "create": lambda c: c.fs.create(ROOT, ROOT_INO, b"new", 0o644, os.O_RDWR | os.O_EXCL),
    "mkdir": lambda c: c.fs.mkdir(ROOT, ROOT_INO, b"new", 0o755),
    "mknod": lambda c: c.fs.mknod(ROOT, ROOT_INO, b"new", 0o10644),
    "symlink": lambda c: c.fs.symlink(ROOT, ROOT_INO, b"new", b"target"),
    "unlink": lambda c: c.fs.unlink(ROOT, ROOT_INO, b"file"),
    "rmdir": lambda c: c.fs.rmdir(ROOT, ROOT_INO, b"directory"),
    "rename": lambda c: c.fs.rename(ROOT, ROOT_INO, b"file", ROOT_INO, b"new", 1),
}


@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
@pytest.mark.parametrize("name", list(CHANGES))
def test_a_change_whose_answer_died_is_not_done_again(memory_fd: int, kind: str, name: str) -> None:
    async def test(world: World) -> None:
        async with life(world, memory_fd) as (client, memory):
            memory.end(REQUEST)
            await client.put(b"file", b"content")
            await client.fs.mkdir(ROOT, ROOT_INO, b"directory", 0o755)
            session = client.fs.session_id
            memory.begin(REQUEST)
            await CHANGES[name](client)
        async with life(world, memory_fd) as (client, memory):
            assert client.fs.session_id == session
            await CHANGES[name](client)  # No EEXIST, no ENOENT.
            memory.end(REQUEST)
            memory.begin(REQUEST)
            with pytest.raises(FsError) as caught:
                await CHANGES[name](client)  # Another request: done, so it fails.
            assert caught.value.errno in (errno.EEXIST, errno.ENOENT)

    in_world(kind)(test)


def test_a_change_that_was_not_carried_out_is(memory_fd: int) -> None:
    async def test(world: World) -> None:
        async with life(world, memory_fd) as (client, _memory):
            with pytest.raises(FsError):
                await client.fs.rmdir(ROOT, ROOT_INO, b"new")
        async with life(world, memory_fd) as (client, _memory):
            await client.fs.mkdir(ROOT, ROOT_INO, b"new", 0o755)
            await client.fs.rmdir(ROOT, ROOT_INO, b"new")

    in_world(UNIX)(test)


def test_when_the_session_is_gone_it_is_said_that_nothing_is_known(memory_fd: int) -> None:
    async def test(world: World) -> None:
        async with life(world, memory_fd) as (client, _memory):
            await client.fs.mkdir(ROOT, ROOT_INO, b"new", 0o755)
            session = client.fs.session_id
        await trio.sleep(2.5)
        async with life(world, memory_fd) as (client, _memory):
            assert client.fs.session_id != session
            with pytest.raises(AlluxioFuseError) as caught:
                await client.fs.mkdir(ROOT, ROOT_INO, b"new", 0o755)
            assert caught.value.errno == errno.EIO

    in_world(UNIX, master={"session_lease_s": 0.5})(test)


def test_a_slot_in_doubt_is_nobody_elses(memory_fd: int) -> None:
    async def test(world: World) -> None:
        async with life(world, memory_fd) as (client, memory):
            await client.fs.mkdir(ROOT, ROOT_INO, b"new", 0o755)
        async with life(world, memory_fd) as (client, memory):
            asked_by.set(REQUEST + 1)
            memory.begin(REQUEST + 1)
            for number in range(5):
                await client.fs.mkdir(ROOT, ROOT_INO, b"%d" % number, 0o755)
            memory.end(REQUEST + 1)
            asked_by.set(REQUEST)
            await client.fs.mkdir(ROOT, ROOT_INO, b"new", 0o755)
            memory.end(REQUEST)
            await client.fs.mkdir(ROOT, ROOT_INO, b"more", 0o755)

    in_world(UNIX)(test)


RECORD = b"a record that may be cut anywhere\n"


@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX])
@pytest.mark.parametrize("done", [0, 1, 20, len(RECORD)])
@pytest.mark.parametrize("size", [len(RECORD), 300_000])
def test_of_an_append_only_what_is_missing_is_appended(
    memory_fd: int, kind: str, done: int, size: int
) -> None:
    record = RECORD * (size // len(RECORD))
    done *= size // len(RECORD)

    async def test(world: World) -> None:
        async with life(world, memory_fd) as (client, memory):
            file = await client.create(b"file", os.O_WRONLY | os.O_APPEND)
            await file.write(0, b"before\n")
            memory.end(REQUEST)
            memory.begin(REQUEST)
            memory.note(APPEND, file.ino, 7)
            asked_by.set(0)
            if done:
                await file.write(0, record[:done])  # As far as it came.
            fh = memory.add_handle(HandleRecord(file.ino, os.O_WRONLY | os.O_APPEND))
        async with life(world, memory_fd) as (client, memory):
            ((former, handle),) = memory.former_handles
            assert former == fh
            file = await client.fs.reopen(handle.ino, handle.flags)
            assert await file.write(0, record) == len(record)
            memory.end(REQUEST)
            await file.write(0, b"after\n")
            await client.close(file)
            assert await client.get(b"file") == b"before\n" + record + b"after\n"

    in_world(kind)(test)


def test_an_append_behind_which_others_appended_is_found(memory_fd: int) -> None:
    async def test(world: World) -> None:
        async with life(world, memory_fd) as (client, memory):
            file = await client.create(b"file", os.O_WRONLY | os.O_APPEND)
            memory.note(APPEND, file.ino, 0)
            asked_by.set(0)
            await file.write(0, b"another's\n" + RECORD)
        async with life(world, memory_fd) as (client, memory):
            file = await client.fs.reopen(file.ino, os.O_WRONLY | os.O_APPEND)
            assert await file.write(0, RECORD) == len(RECORD)
            await client.close(file)
            assert await client.get(b"file") == b"another's\n" + RECORD

    in_world(UNIX)(test)


@pytest.mark.parametrize("was_done", [True, False])
def test_an_append_through_a_worker_happens_once(memory_fd: int, was_done: bool) -> None:
    async def test(world: World) -> None:
        async with life(world, memory_fd) as (client, memory):
            file = await client.create(b"file", os.O_WRONLY | os.O_APPEND)
            await file.write(0, b"before\n")
            memory.end(REQUEST)
            memory.begin(REQUEST)
            if was_done:
                await file.write(0, RECORD)
            else:
                writing = file._content.writing
                assert writing is not None
                memory.note(REMOTE_APPEND, writing.container, writing._append_number + 1)
        async with life(world, memory_fd) as (client, memory):
            file = await client.fs.reopen(file.ino, os.O_WRONLY | os.O_APPEND)
            assert await file.write(0, RECORD) == len(RECORD)
            memory.end(REQUEST)
            await file.write(0, b"after\n")
            await client.close(file)
            assert await client.get(b"file") == b"before\n" + RECORD + b"after\n"

    in_world(TCP, worker={"hostname": "elsewhere"})(test)


@pytest.mark.parametrize("kind", [UNIX, TCP])
def test_what_was_written_and_not_closed_is_sealed_by_the_successor(memory_fd: int, kind: str) -> None:
    """Also pages of which the worker was told nothing: their checksums are right afterwards."""
    size = 3 << 20

    async def test(world: World) -> None:
        async with life(world, memory_fd) as (client, memory):
            await client.put(b"file", bytes(size))
            file = await client.open(b"file", os.O_RDWR)
            await file.write(1 << 20, RECORD)
            memory.add_handle(HandleRecord(file.ino, os.O_RDWR))
        async with life(world, memory_fd) as (client, memory):
            file = await client.fs.reopen(file.ino, os.O_RDWR)
            await file.write(0, RECORD)
            await client.close(file)
        await world.stop_worker()
        await world.start_worker(hostname=HERE)  # It verifies what it has.
        async with world.client() as client:
            expected = bytearray(size)
            expected[: len(RECORD)] = expected[1 << 20 : (1 << 20) + len(RECORD)] = RECORD
            assert await client.get(b"file") == bytes(expected)

    in_world(kind)(test)


def test_an_unlinked_file_that_is_open_lives_on(memory_fd: int) -> None:
    async def test(world: World) -> None:
        async with life(world, memory_fd) as (client, memory):
            await client.put(b"file", b"content")
            file = await client.open(b"file")
            memory.add_handle(HandleRecord(file.ino, os.O_RDONLY))
            await client.fs.unlink(ROOT, ROOT_INO, b"file")
        async with life(world, memory_fd) as (client, memory):
            again = await client.fs.reopen(file.ino, os.O_RDONLY)
            assert bytes(await again.read(0, 100)) == b"content"
            await again.release()
            await trio.sleep(0.2)
            with pytest.raises(AlluxioFuseError):
                await client.fs.open(ROOT, file.ino)

    in_world(UNIX)(test)
