"""Files through the client on a real master and worker: what POSIX says, over every transport."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Callable

import pytest
from client_world import IN_PROCESS, ROOT, TCP, UNIX, Client, World, in_world, until

from alluxiofuse.errors import AlluxioFuseError, FsError, NoSpaceError
from alluxiofuse.ids import PAGE_BYTES, ROOT_INO

Test = Callable[[Client], Awaitable[None]]


@pytest.fixture(params=[IN_PROCESS, UNIX, TCP])
def with_client(request: pytest.FixtureRequest) -> Callable[[Test], None]:
    def run(test: Test) -> None:
        async def in_this(world: World) -> None:
            async with world.client() as client:
                await test(client)

        in_world(request.param)(in_this)

    return run


def test_write_close_read(with_client: Callable[[Test], None]) -> None:
    async def test(client: Client) -> None:
        file = await client.create(b"a")
        assert await file.write(0, b"hello ") == 6
        assert await file.write(6, b"world") == 5
        assert file.attr.size == 11
        assert bytes(await file.read(0, 100)) == b"hello world"
        assert (await client.fs.getattr(file.ino)).size == 11
        await client.close(file)
        attr = await client.fs.lookup(ROOT, ROOT_INO, b"a")
        assert (attr.size, attr.home) == (11, 0)
        assert await client.get(b"a") == b"hello world"
        await until(lambda: (client.world.ufs / "a").exists())
        await until(lambda: (client.world.ufs / "a").read_bytes() == b"hello world")

    with_client(test)


def test_an_empty_file_needs_no_bytes(with_client: Callable[[Test], None]) -> None:
    async def test(client: Client) -> None:
        file = await client.create(b"empty")
        assert bytes(await file.read(0, 10)) == b""
        await client.close(file)
        assert await client.get(b"empty") == b""
        await until(lambda: (client.world.ufs / "empty").exists())

    with_client(test)


def test_overwrite_in_place_and_append(with_client: Callable[[Test], None]) -> None:
    async def test(client: Client) -> None:
        await client.put(b"f", b"0123456789")
        file = await client.open(b"f", os.O_RDWR)
        assert file.attr.size == 10
        await file.write(3, b"abc")
        assert bytes(await file.read(0, 20)) == b"012abc6789"
        await client.close(file)
        assert await client.get(b"f") == b"012abc6789"
        file = await client.open(b"f", os.O_WRONLY | os.O_APPEND)
        await file.write(0, b"XY")
        await client.close(file)
        assert await client.get(b"f") == b"012abc6789XY"

    with_client(test)


def test_two_appenders_never_overwrite_each_other(with_client: Callable[[Test], None]) -> None:
    async def test(client: Client) -> None:
        one = await client.create(b"log", os.O_WRONLY | os.O_APPEND)
        two = await client.open(b"log", os.O_WRONLY | os.O_APPEND)
        for number in range(20):
            await (one, two)[number % 2].write(0, b"%02d;" % number)
        await client.close(one)
        await client.close(two)
        assert await client.get(b"log") == b"".join(b"%02d;" % number for number in range(20))

    with_client(test)


def test_sparse_and_truncate(with_client: Callable[[Test], None]) -> None:
    async def test(client: Client) -> None:
        file = await client.create(b"sparse")
        await file.write(3 * PAGE_BYTES + 5, b"end")
        assert file.attr.size == 3 * PAGE_BYTES + 8
        assert bytes(await file.read(PAGE_BYTES, 10)) == bytes(10)
        await file.truncate(5)
        assert bytes(await file.read(0, 100)) == bytes(5)
        await file.truncate(2 * PAGE_BYTES)
        assert file.attr.size == 2 * PAGE_BYTES
        assert bytes(await file.read(2 * PAGE_BYTES - 2, 100)) == bytes(2)
        await client.close(file)
        assert await client.get(b"sparse") == bytes(2 * PAGE_BYTES)

    with_client(test)


def test_truncate_by_path_and_o_trunc(with_client: Callable[[Test], None]) -> None:
    async def test(client: Client) -> None:
        await client.put(b"t", b"x" * 5000)
        ino = (await client.fs.lookup(ROOT, ROOT_INO, b"t")).ino
        assert (await client.fs.setattr(ROOT, ino, size=4000)).size == 4000
        assert await client.get(b"t") == b"x" * 4000
        assert (await client.fs.setattr(ROOT, ino, size=6000)).size == 6000
        assert await client.get(b"t") == b"x" * 4000 + bytes(2000)
        reader = await client.open(b"t")
        assert len(await reader.read(0, 10000)) == 6000
        file = await client.open(b"t", os.O_WRONLY | os.O_TRUNC)
        assert file.attr.size == 0
        assert bytes(await reader.read(0, 10000)) == b""
        await file.write(0, b"new")
        assert bytes(await reader.read(0, 10000)) == b"new"
        await client.close(file)
        await reader.release()
        assert await client.get(b"t") == b"new"
        assert (await client.fs.setattr(ROOT, ino, size=0)).size == 0
        assert await client.get(b"t") == b""

    with_client(test)


def test_explicit_mtime_wins_over_earlier_writes_only(with_client: Callable[[Test], None]) -> None:
    async def test(client: Client) -> None:
        file = await client.create(b"old")
        await file.write(0, b"data")
        await client.fs.setattr(ROOT, file.ino, mtime_ns=10**18, atime_ns=5, file=file)
        assert file.attr.mtime_ns == 10**18
        await client.close(file)
        attr = await client.fs.lookup(ROOT, ROOT_INO, b"old")
        assert (attr.mtime_ns, attr.size, attr.atime_ns) == (10**18, 4, 5)
        file = await client.open(b"old", os.O_WRONLY)
        await client.fs.setattr(ROOT, file.ino, mtime_ns=2 * 10**18, file=file)
        await file.write(0, b"more")
        assert file.attr.mtime_ns not in (10**18, 2 * 10**18)
        await client.close(file)
        attr = await client.fs.lookup(ROOT, ROOT_INO, b"old")
        assert attr.mtime_ns not in (10**18, 2 * 10**18)
        # Before 1970, and after the last flush but before the release.
        file = await client.open(b"old", os.O_WRONLY)
        await file.write(0, b"x")
        await file.flush()
        await client.fs.setattr(ROOT, file.ino, mtime_ns=-5)
        await file.flush()
        await file.release()
        assert (await client.fs.lookup(ROOT, ROOT_INO, b"old")).mtime_ns == -5

    with_client(test)


def test_several_handles_share_one_file(with_client: Callable[[Test], None]) -> None:
    async def test(client: Client) -> None:
        one = await client.create(b"shared")
        two = await client.open(b"shared", os.O_RDWR)
        await one.write(0, b"one")
        assert bytes(await two.read(0, 10)) == b"one"
        await one.flush()  # two is still open for writing: told to the master, not sealed
        assert (await client.fs.getattr(one.ino)).size == 3
        await two.write(3, b"two")
        assert bytes(await one.read(0, 10)) == b"onetwo"
        await one.release()
        await client.close(two)
        assert (await client.fs.lookup(ROOT, ROOT_INO, b"shared")).home == 0
        assert await client.get(b"shared") == b"onetwo"

    with_client(test)


def test_writing_goes_on_after_a_flush(with_client: Callable[[Test], None]) -> None:
    async def test(client: Client) -> None:
        file = await client.create(b"dup")
        expected = b""
        for number in range(5):
            await file.write(len(expected), b"%d" % number * 1000)
            expected += b"%d" % number * 1000
            await file.flush()
            assert bytes(await file.read(0, 10_000)) == expected
        await file.release()
        assert await client.get(b"dup") == expected

    with_client(test)


def test_rename_and_unlink_while_open(with_client: Callable[[Test], None]) -> None:
    async def test(client: Client) -> None:
        file = await client.create(b"x")
        await file.write(0, b"before")
        await client.fs.rename(ROOT, ROOT_INO, b"x", ROOT_INO, b"y")
        await file.write(6, b" after")
        await client.fs.unlink(ROOT, ROOT_INO, b"y")
        await file.write(0, b"BEFORE")
        assert bytes(await file.read(0, 100)) == b"BEFORE after"
        await file.flush()
        assert bytes(await file.read(0, 100)) == b"BEFORE after"
        assert file.attr.nlink in (0, 1)
        await file.release()
        with pytest.raises(FsError) as caught:
            await client.fs.lookup(ROOT, ROOT_INO, b"y")
        assert caught.value.errno == errno.ENOENT

    with_client(test)


def test_replaced_by_rename_while_open(with_client: Callable[[Test], None]) -> None:
    async def test(client: Client) -> None:
        await client.put(b"target", b"old")
        await client.put(b"source", b"new")
        file = await client.open(b"target")
        await client.fs.rename(ROOT, ROOT_INO, b"source", ROOT_INO, b"target")
        assert bytes(await file.read(0, 10)) == b"old"
        await file.release()
        assert await client.get(b"target") == b"new"

    with_client(test)


def test_large_file_in_pieces(with_client: Callable[[Test], None]) -> None:
    data = os.urandom(10 * PAGE_BYTES + 123)

    async def test(client: Client) -> None:
        file = await client.create(b"large")
        step = 700_001
        for offset in range(0, len(data), step):
            assert await file.write(offset, memoryview(data)[offset : offset + step]) > 0
        await client.close(file)
        assert await client.get(b"large") == data
        file = await client.open(b"large")
        assert (
            bytes(await file.read(5 * PAGE_BYTES - 7, 2 * PAGE_BYTES))
            == data[5 * PAGE_BYTES - 7 :][: 2 * PAGE_BYTES]
        )
        assert bytes(await file.read(0, 1 << 30)) == data
        assert bytes(await file.read(len(data) - 3, 100)) == data[-3:]
        assert bytes(await file.read(len(data), 100)) == b""
        await file.release()

    with_client(test)


def test_cold_files_come_from_the_under_storage(with_client: Callable[[Test], None]) -> None:
    data = os.urandom(3 * PAGE_BYTES + 17)

    async def test(client: Client) -> None:
        (client.world.ufs / "cold").write_bytes(data)
        file = await client.open(b"cold")
        assert bytes(await file.read(2 * PAGE_BYTES + 5, 10)) == data[2 * PAGE_BYTES + 5 :][:10]
        assert bytes(await file.read(0, len(data) + 10)) == data
        await file.release()
        file = await client.open(b"cold", os.O_RDWR)
        await file.write(PAGE_BYTES, b"changed")
        await client.close(file)
        expected = data[:PAGE_BYTES] + b"changed" + data[PAGE_BYTES + 7 :]
        assert await client.get(b"cold") == expected
        await until(lambda: (client.world.ufs / "cold").read_bytes() == expected)

    with_client(test)


def test_open_flags(with_client: Callable[[Test], None]) -> None:
    async def test(client: Client) -> None:
        await client.put(b"f", b"data")
        with pytest.raises(FsError) as caught:
            await client.create(b"f", os.O_WRONLY | os.O_EXCL)
        assert caught.value.errno == errno.EEXIST
        file = await client.create(b"f", os.O_WRONLY | os.O_TRUNC)
        assert file.attr.size == 0
        with pytest.raises(FsError) as caught:
            await file.read(0, 1)
        assert caught.value.errno == errno.EBADF
        await client.close(file)
        file = await client.open(b"f")
        with pytest.raises(FsError):
            await file.write(0, b"x")
        await client.close(file)
        with pytest.raises(FsError):
            await file.read(0, 1)
        _, file = await client.fs.create(ROOT, ROOT_INO, b"readonly", 0o400, os.O_RDONLY)
        await client.close(file)
        assert stat.S_IMODE((await client.fs.lookup(ROOT, ROOT_INO, b"readonly")).mode) == 0o400

    with_client(test)


def test_names_links_xattrs(with_client: Callable[[Test], None]) -> None:
    async def test(client: Client) -> None:
        fs = client.fs
        directory = await fs.mkdir(ROOT, ROOT_INO, b"dir", 0o755)
        await fs.symlink(ROOT, directory.ino, b"link", b"../target")
        link = await fs.lookup(ROOT, directory.ino, b"link")
        assert await fs.readlink(link.ino) == b"../target"
        await client.put(b"target", b"bytes")
        attrs = await fs.resolve(ROOT, b"/dir/link", True)
        assert attrs[-1].size == 5
        ino = attrs[-1].ino
        assert (await fs.link(ROOT, ino, directory.ino, b"hard")).nlink == 2
        await fs.mknod(ROOT, directory.ino, b"pipe", stat.S_IFIFO | 0o600)
        assert [entry.name for entry in await fs.list_dir(ROOT, directory.ino)] == [b"hard", b"link", b"pipe"]
        assert (await fs.unlink(ROOT, ROOT_INO, b"target")).nlink == 1
        assert await client.paths.read_bytes("/dir/hard") == b"bytes"
        await fs.setxattr(ROOT, ino, b"user.a", b"1")
        assert await fs.getxattr(ROOT, ino, b"user.a") == b"1"
        assert await fs.listxattr(ino) == [b"user.a"]
        await fs.removexattr(ROOT, ino, b"user.a")
        with pytest.raises(AlluxioFuseError) as caught:
            await fs.getxattr(ROOT, ino, b"user.a")
        assert caught.value.errno == errno.ENODATA
        with pytest.raises(FsError) as refused:
            await fs.rmdir(ROOT, ROOT_INO, b"dir")
        assert refused.value.errno == errno.ENOTEMPTY
        await fs.access(ROOT, ino, 4)
        assert (await fs.statfs()).capacity_bytes > 0
        await fs.sync_names()

    with_client(test)


def test_fsync(with_client: Callable[[Test], None]) -> None:
    async def test(client: Client) -> None:
        file = await client.create(b"f")
        await file.fsync()
        await file.write(0, b"durable")
        await file.fsync(True)
        await file.write(7, b"!")
        await file.fsync()
        await client.close(file)
        file = await client.open(b"f")
        assert bytes(await file.read(0, 10)) == b"durable!"
        await file.fsync()
        await file.release()

    with_client(test)


def test_keep_cache(with_client: Callable[[Test], None]) -> None:
    async def test(client: Client) -> None:
        file = await client.create(b"f")
        await file.write(0, b"data")
        await client.close(file)
        for _ in range(2):
            file = await client.open(b"f")
            assert file.keep_cache  # our own writes went through the kernel
            await file.release()
        async with client.world.client("other") as other:
            writer = await other.open(b"f", os.O_WRONLY)
            await writer.write(0, b"DATA")
            await other.close(writer)
        file = await client.open(b"f")
        assert not file.keep_cache
        assert bytes(await file.read(0, 10)) == b"DATA"
        await file.release()
        file = await client.open(b"f")
        assert file.keep_cache
        await file.release()

    with_client(test)


def test_many_files_and_pages_of_entries(with_client: Callable[[Test], None]) -> None:
    async def test(client: Client) -> None:
        names = [b"%04d" % number for number in range(300)]
        for name in names:
            await client.put(name, name)
        entries = await client.fs.list_dir(ROOT, ROOT_INO)
        assert [entry.name for entry in entries] == names
        assert all(entry.attr.size == 4 for entry in entries)
        for name in names[::50]:
            assert await client.get(name) == name

    with_client(test)


def test_no_space(request: pytest.FixtureRequest) -> None:
    async def test(world: World) -> None:
        async with world.client() as client:
            file = await client.create(b"big")
            chunk = bytes(range(256)) * 1024
            written = 0

            async def fill() -> None:
                nonlocal written
                while written < 64 << 20:
                    written += await file.write(written, chunk)

            with pytest.raises(NoSpaceError):
                await fill()
            assert written > PAGE_BYTES
            # It stays usable: what was written is there, and can be shortened and closed.
            assert bytes(await file.read(0, 256)) == chunk[:256]
            await file.truncate(1000)
            await file.write(0, b"fits")
            await client.close(file)
            assert (await client.get(b"big"))[:4] == b"fits"

    in_world(IN_PROCESS, worker={"quota": 4 << 20})(test)


def test_overwriting_what_does_not_fit_leaves_the_old_content() -> None:
    async def test(world: World) -> None:
        data = os.urandom(8 << 20)
        (world.ufs / "large").write_bytes(data)
        async with world.client() as client:
            file = await client.open(b"large", os.O_RDWR)
            with pytest.raises(NoSpaceError):
                await file.write(5, b"x")
            await client.close(file)
            assert await client.get(b"large") == data

    in_world(IN_PROCESS, worker={"quota": 4 << 20})(test)


def test_cache_through_waits_for_the_under_storage() -> None:
    async def test(world: World) -> None:
        async with world.client(write_type="CACHE_THROUGH") as client:
            await client.put(b"through", b"there at once")
            assert (world.ufs / "through").read_bytes() == b"there at once"

    in_world(IN_PROCESS, master={"persist_delay_s": 30.0})(test)


def test_fsync_without_a_durable_tier_means_the_under_storage() -> None:
    async def test(world: World) -> None:
        async with world.client() as client:
            file = await client.create(b"f")
            await file.write(0, b"in memory")
            await file.fsync()
            assert (world.ufs / "f").read_bytes() == b"in memory"
            await file.write(0, b"IN")
            await client.close(file)
            assert await client.get(b"f") == b"IN memory"

    in_world(IN_PROCESS, worker={"tier": "MEM"}, master={"persist_delay_s": 30.0})(test)


@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_more_files_than_room(kind: str) -> None:
    """What is persisted makes room for what is new; what was evicted is read again."""

    async def test(world: World) -> None:
        async with world.client() as client:
            contents = {b"%d" % number: os.urandom(1_000_000) for number in range(30)}
            for name, data in contents.items():
                await client.put(name, data)
            for name, data in contents.items():
                assert await client.get(name) == data

    in_world(kind, worker={"quota": 6 << 20})(test)
