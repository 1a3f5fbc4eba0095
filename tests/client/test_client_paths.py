"""Path helpers and the blocking facade."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from pathlib import Path

import pytest
import trio
from client_world import IN_PROCESS, ROOT, TCP, UNIX, World, in_world, until

from alluxiofuse.client.blocking import connect
from alluxiofuse.client.connect import open_filesystem
from alluxiofuse.client.paths import Paths, Usage
from alluxiofuse.errors import FsError, UnavailableError, UserError


def test_paths() -> None:
    async def test(world: World) -> None:
        async with world.client() as client:
            paths = client.paths
            await paths.mkdir("/a/b/c", parents=True)
            await paths.mkdir("/a/b/c", parents=True)
            with pytest.raises(FsError) as caught:
                await paths.mkdir("/a/b")
            assert caught.value.errno == errno.EEXIST
            await paths.write_bytes("/a/one", b"1")
            await paths.write_bytes("/a/b/two", b"22")
            await paths.write_bytes("//a//b/./c/three", b"333")
            assert [place async for place, _ in paths.walk("/a")] == [
                b"/a", b"/a/b", b"/a/b/c", b"/a/b/c/three", b"/a/b/two", b"/a/one",
            ]  # fmt: skip
            assert await paths.du("/") == Usage(6, 3, 4)
            assert [entry.name for entry in await paths.list("/a")] == [b"b", b"one"]
            with pytest.raises(FsError):
                await paths.list("/a/one")
            assert await paths.exists("/a/one")
            assert not await paths.exists("/a/one/below")
            await paths.rename("/a/one", "/a/uno")
            await paths.copy("/a", "/copy", recursive=True)
            assert await paths.read_bytes("/copy/b/c/three") == b"333"
            with pytest.raises(FsError):
                await paths.copy("/a", "/a/b/inside", recursive=True)
            with pytest.raises(FsError):
                await paths.copy("/a/uno", "/a/uno")
            assert await paths.read_bytes("/a/uno") == b"1"
            with pytest.raises(FsError) as caught:
                await paths.remove("/a")
            assert caught.value.errno == errno.ENOTEMPTY
            assert await paths.remove("/a", recursive=True) == 6
            assert not await paths.exists("/a")
            with pytest.raises(FsError):
                await paths.open("relative")

    in_world(IN_PROCESS)(test)


def test_copies_in_and_out() -> None:
    async def test(world: World) -> None:
        local = world.base / "local"
        (local / "sub").mkdir(parents=True)
        data = os.urandom(5 << 20)
        (local / "large").write_bytes(data)
        (local / "sub" / "small").write_bytes(b"small")
        (local / "sub" / "script").write_bytes(b"#!")
        (local / "sub" / "script").chmod(0o755)
        (local / "sub" / "link").symlink_to("small")
        async with world.client() as client:
            done: list[int] = []
            assert await client.paths.copy_in(str(local), "/in", recursive=True, progress=done.append) == sum(
                done
            )
            assert sum(done) == len(data) + 7
            assert await client.paths.read_bytes("/in/large") == data
            assert await client.paths.read_bytes("/in/sub/link") == b"small"
            assert (await client.paths.stat("/in/sub/script")).mode & 0o777 == 0o755
            out = world.base / "out"
            await client.paths.copy_out("/in", str(out), recursive=True)
            assert (out / "large").read_bytes() == data
            assert (out / "sub" / "link").read_bytes() == b"small"
            assert os.readlink(out / "sub" / "link") == "small"
            await client.paths.copy_in(str(local / "large"), "/again")
            await client.paths.copy_out("/again", str(out / "again"))
            assert (out / "again").read_bytes() == data
            with pytest.raises(FileNotFoundError):
                await client.paths.copy_in(str(local / "missing"), "/missing")

    in_world(IN_PROCESS)(test)


@pytest.mark.parametrize("kind", [IN_PROCESS, TCP])
def test_load_fills_the_cache(kind: str) -> None:
    async def test(world: World) -> None:
        data = os.urandom(5 << 20)
        (world.ufs / "d").mkdir()
        (world.ufs / "d" / "x").write_bytes(data)
        (world.ufs / "d" / "y").write_bytes(b"y")
        async with world.client() as client:
            done: list[int] = []
            assert await client.paths.load("/d", progress=done.append) == Usage(len(data) + 1, 2, 1)
            assert sum(done) == len(data) + 1
            slabs = world.workers["w1"].worker.slabs
            assert slabs is not None
            assert sum(slab.present == slab.all_pages for slab in slabs.by_container.values()) == 2
            assert await client.paths.read_bytes("/d/x") == data

    in_world(kind)(test)


def test_open_filesystem_by_address() -> None:
    async def test(world: World) -> None:
        address = f"unix:{world.base / 'm.sock'}"
        async with open_filesystem(address, name="by address") as fs:
            paths = Paths(fs, ROOT)
            await paths.write_bytes("/f", b"data")
            assert await paths.read_bytes("/f") == b"data"
        with pytest.raises(FsError) as caught:
            async with open_filesystem(address) as fs:
                await Paths(fs, ROOT).read_bytes("/missing")
        assert caught.value.errno == errno.ENOENT
        with pytest.raises(ZeroDivisionError):
            async with open_filesystem(address):
                raise ZeroDivisionError

    in_world(UNIX)(test)


def test_nobody_answers() -> None:
    async def main() -> None:
        from alluxiofuse.config import ClientConfig

        with trio.fail_after(20), tempfile.TemporaryDirectory() as directory:
            with pytest.raises(UnavailableError):
                async with open_filesystem(f"unix:{directory}/none", config=ClientConfig(patience_s=0.1)):
                    pass
            with pytest.raises(UserError):
                async with open_filesystem("::::"):
                    pass

    trio.run(main)


def _use_blocking(address: str, base: Path) -> None:
    with connect(address, name="blocking") as fs:
        fs.mkdir("/d")
        with fs.open("/d/f", "wb") as file:
            for number in range(1000):
                file.write(b"%04d" % number)
        assert fs.stat("/d/f").size == 4000
        with fs.open("/d/f") as file:
            assert file.read(8) == b"00000001"
            file.seek(-4, os.SEEK_END)
            assert file.read() == b"0999"
        with fs.open("/d/f", "r+b") as file:
            file.seek(4)
            file.write(b"XXXX")
            file.truncate(12)
        with fs.open("/d/f", "ab") as file:
            file.write(b"end")
        assert fs.read_bytes("/d/f") == b"0000XXXX0002end"
        with pytest.raises(FileExistsError):
            fs.open("/d/f", "xb")
        with pytest.raises(FileNotFoundError):
            fs.open("/d/missing")
        with pytest.raises(UserError):
            fs.open("/d/f", "r")
        raw = fs.open("/d/f", "rb", buffering=0)
        raw.close()
        with pytest.raises(ValueError):
            raw.read(1)
        threads = [threading.Thread(target=fs.write_bytes, args=(f"/d/{n}", b"x" * n)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [entry.name for entry in fs.list("/d")] == [b"%d" % n for n in range(8)] + [b"f"]
        assert fs.du("/d").file_count == 9
        assert len(list(fs.walk("/"))) == 11
        fs.copy_out("/d/f", str(base / "out"))
        fs.copy_in(str(base / "out"), "/in")
        fs.rename("/in", "/moved")
        assert fs.exists("/moved")
        assert fs.remove("/d", recursive=True) == 10
    fs.close()
    with pytest.raises(FsError):
        fs.stat("/")


def test_blocking_facade() -> None:
    async def test(world: World) -> None:
        address = f"unix:{world.base / 'm.sock'}"
        await trio.to_thread.run_sync(_use_blocking, address, world.base)
        await until(lambda: (world.ufs / "moved").exists())

    in_world(UNIX)(test)
