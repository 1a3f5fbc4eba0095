"""Operations without a kernel, on a real client, master and worker in this process."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyfuse3
import pytest
import trio

from alluxiofuse.cli.assembly import worker_id_of
from alluxiofuse.cli.lifecycle import running
from alluxiofuse.client.filesystem import FileSystem
from alluxiofuse.client.workers import WorkerPool
from alluxiofuse.config import ClientConfig, DirectoryConfig, MasterConfig, TierConfig, WorkerConfig
from alluxiofuse.fuse.operations import Operations
from alluxiofuse.master.master import Master
from alluxiofuse.rpc.inprocess import InProcess
from alluxiofuse.rpc.security import Security
from alluxiofuse.wire.types import SUPERUSER
from alluxiofuse.worker.worker import Worker

TIMEOUT_S = 60
CTX = pyfuse3.RequestContext()  # uid 0, gid 0


@dataclass
class Listing:
    """Takes what readdir replies, as the kernel's buffer does: `room` entries at a time."""

    room: int = 1000
    entries: list[tuple[bytes, int, int]] = field(default_factory=list)
    """Name, inode, position behind it."""

    def take(
        self, token: pyfuse3.ReaddirToken, name: bytes, entry: pyfuse3.EntryAttributes, position: int
    ) -> bool:
        if self.room == 0:
            return False
        self.room -= 1
        self.entries.append((name, entry.st_ino, position))
        return True

    @property
    def names(self) -> list[bytes]:
        return [name for name, _, _ in self.entries if name not in (b".", b"..")]


class Forgotten:
    """The kernel's side of invalidations."""

    def __init__(self) -> None:
        self.inodes: list[int] = []

    def invalidate_inode(self, inode: int, attr_only: bool = False) -> None:
        assert attr_only  # within a handler nothing else is allowed
        self.inodes.append(inode)

    def invalidate_entry(self, inode_p: int, name: bytes) -> None:
        raise AssertionError("not within a handler")


@dataclass
class World:
    fs: FileSystem
    other: FileSystem
    """Another client of the same master."""
    ops: Operations
    listing: Listing
    kernel: Forgotten

    async def list_all(self, handle: int, room: int, start: int = 0) -> Listing:
        """The whole directory, `room` entries a request."""
        found = Listing()
        position = start
        while True:
            self.listing.room, self.listing.entries = room, []
            await self.ops.readdir(handle, position, pyfuse3.ReaddirToken())
            if not self.listing.entries:
                return found
            found.entries += self.listing.entries
            position = self.listing.entries[-1][2]

    async def heard_of(self, since: int, key: int | tuple[int, bytes]) -> None:
        """Until the news of a change has arrived; `run` bounds it."""
        while self.ops.view.changes.is_current(since, key):  # noqa: ASYNC110 - the view has no event
            await trio.sleep(0.01)

    async def write_file(self, parent: int, name: bytes, data: bytes) -> int:
        info, entry = await self.ops.create(parent, name, 0o644, os.O_WRONLY, CTX)
        assert await self.ops.write(info.fh, 0, data) == len(data)
        await self.ops.flush(info.fh)
        await self.ops.release(info.fh)
        return entry.st_ino


@asynccontextmanager
async def world(base: Path, root: bytes = b"") -> AsyncIterator[World]:
    (base / "ufs").mkdir()
    tiers = [TierConfig(alias="SSD", directories=[DirectoryConfig(str(base / "ssd"), 1 << 28)])]
    master = Master(MasterConfig(state_dir=str(base / "master"), ufs=str(base / "ufs"), port=-1))
    worker_config = WorkerConfig(state_dir=str(base / "worker"), tiers=tiers, port=-1)
    async with (
        running(master.run),
        running((worker := Worker(worker_config, InProcess(master.service, "worker"), hostname="here")).run),
    ):
        worker_id = await worker_id_of(worker)

        def client(name: str) -> FileSystem:
            connection = InProcess(master.service, name)
            pool = WorkerPool(
                connection,
                hostname="here",
                security=Security(),
                patience_s=10,
                in_process={worker_id: InProcess(worker.service, name)},
            )
            return FileSystem(connection, pool, ClientConfig(), name=name, hostname="here")

        fs, other = client("one"), client("two")
        async with running(fs.run), running(other.run):
            root_ino = (await fs.mkdir(SUPERUSER, 1, root, 0o755)).ino if root else 1
            listing, kernel = Listing(), Forgotten()
            operations = Operations(
                fs, root_ino=root_ino, cache_limit_s=1000.0, kernel=kernel, reply_entry=listing.take
            )
            fs.set_listener(operations.view)
            yield World(fs, other, operations, listing, kernel)
            for handle in operations.files.values():
                await handle.file.release()


def run(tmp_path: Path, body: Callable[[World], Awaitable[None]], root: bytes = b"") -> None:
    async def main() -> None:
        with trio.fail_after(TIMEOUT_S):
            async with world(tmp_path, root) as made:
                await body(made)

    trio.run(main)


def raises(code: int) -> pytest.RaisesExc[pyfuse3.FUSEError]:
    return pytest.raises(pyfuse3.FUSEError, check=lambda exc: exc.errno == code)


def test_create_write_read(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        ino = await w.write_file(1, b"file", b"content")
        entry = await w.ops.lookup(1, b"file", CTX)
        assert (entry.st_ino, entry.st_size) == (ino, 7)
        info = await w.ops.open(ino, os.O_RDONLY, CTX)
        assert bytes(await w.ops.read(info.fh, 0, 100)) == b"content"
        assert bytes(await w.ops.read(info.fh, 3, 2)) == b"te"
        await w.ops.flush(info.fh)
        await w.ops.release(info.fh)
        assert len(w.ops.files) == 0
        with raises(errno.EBADF):
            await w.ops.read(info.fh, 0, 1)

    run(tmp_path, body)


def test_names_that_do_not_exist_are_cached(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        await w.ops.getattr(1, CTX)
        answer = await w.ops.lookup(1, b"none", CTX)
        assert answer.st_ino == 0
        assert answer.entry_timeout > 0
        with raises(errno.ENAMETOOLONG):
            await w.ops.lookup(1, b"x" * 256, CTX)

    run(tmp_path, body)


def test_an_inode_that_is_gone_is_stale(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        ino = (await w.ops.mknod(1, b"file", stat.S_IFREG | 0o644, 0, CTX)).st_ino  # nobody has it open
        await w.ops.unlink(1, b"file", CTX)
        for call in (
            lambda: w.ops.open(ino, os.O_RDONLY, CTX),
            lambda: w.ops.getattr(ino, CTX),
            lambda: w.ops.listxattr(ino, CTX),
            lambda: w.ops.readlink(ino, CTX),
            lambda: w.ops.getattr(999_999, CTX),
        ):
            with raises(errno.ESTALE):
                await call()

    run(tmp_path, body)


def test_listing_bit_by_bit(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        names = sorted(b"%d" % number for number in range(50))
        for name in names:
            await w.ops.mknod(1, name, stat.S_IFREG | 0o644, 0, CTX)
        for room in (1, 3, 1000):
            handle = await w.ops.opendir(1, CTX)
            found = await w.list_all(handle, room)
            assert [name for name, _, _ in found.entries[:2]] == [b".", b".."]
            assert found.names == names
            positions = [position for _, _, position in found.entries]
            assert positions == sorted(set(positions))
            middle = found.entries[20][2]
            assert (await w.list_all(handle, room, middle)).entries == found.entries[21:]
            await w.ops.releasedir(handle)
        assert len(w.ops.dirs) == 0

    run(tmp_path, body)


def test_rewinding_reads_anew(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        handle = await w.ops.opendir(1, CTX)
        assert (await w.list_all(handle, 10)).names == []
        await w.ops.mkdir(1, b"new", 0o755, CTX)
        assert (await w.list_all(handle, 10)).names == [b"new"]
        await w.ops.releasedir(handle)

    run(tmp_path, body)


def test_dot_and_dot_dot_can_be_looked_up(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        directory = await w.ops.mkdir(1, b"d", 0o755, CTX)
        assert (await w.ops.lookup(directory.st_ino, b".", CTX)).st_ino == directory.st_ino
        assert (await w.ops.lookup(directory.st_ino, b"..", CTX)).st_ino == 1
        assert (await w.ops.lookup(1, b"..", CTX)).st_ino == 1

    run(tmp_path, body)


def test_opening_other_content_voids_what_the_kernel_knows(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        ino = await w.write_file(1, b"file", b"one")
        await w.ops.lookup(1, b"file", CTX)
        theirs = await w.other.open(SUPERUSER, ino, os.O_WRONLY | os.O_TRUNC)
        await theirs.write(0, b"longer than before")
        await theirs.flush()
        await theirs.release()
        w.kernel.inodes.clear()
        info = await w.ops.open(ino, os.O_RDONLY, CTX)
        assert w.kernel.inodes == [ino]
        assert not info.keep_cache
        assert bytes(await w.ops.read(info.fh, 0, 100)) == b"longer than before"

    run(tmp_path, body)


def test_changes_of_others_reach_the_view(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        before = w.ops.view.changes.now
        made = await w.other.mkdir(SUPERUSER, 1, b"theirs", 0o755)
        await w.heard_of(before, (1, b"theirs"))
        assert (await w.ops.lookup(1, b"theirs", CTX)).st_ino == made.ino

    run(tmp_path, body)


def test_attribute_names_are_asked_for_once(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        ino = await w.write_file(1, b"file", b"x")
        asked = 0
        ask = w.fs.listxattr

        async def counted(ino: int) -> list[bytes]:
            nonlocal asked
            asked += 1
            return await ask(ino)

        w.fs.listxattr = counted  # type: ignore[method-assign]
        for _ in range(3):
            with raises(errno.ENODATA):
                await w.ops.getxattr(ino, b"security.capability", CTX)
        assert asked <= 1
        await w.ops.setxattr(ino, b"user.a", b"v", CTX)
        assert await w.ops.getxattr(ino, b"user.a", CTX) == b"v"
        assert await w.ops.listxattr(ino, CTX) == [b"user.a"]
        await w.ops.removexattr(ino, b"user.a", CTX)
        assert await w.ops.listxattr(ino, CTX) == []
        before = asked
        now = w.ops.view.changes.now
        await w.other.setxattr(SUPERUSER, ino, b"user.theirs", b"v")
        await w.heard_of(now, ino)
        assert await w.ops.getxattr(ino, b"user.theirs", CTX) == b"v"
        assert asked == before + 1
        with raises(errno.EOPNOTSUPP):
            await w.ops.getxattr(ino, b"system.posix_acl_access", CTX)

    run(tmp_path, body)


def test_rename_flags(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        await w.write_file(1, b"a", b"a")
        await w.write_file(1, b"b", b"b")
        with raises(errno.EINVAL):
            await w.ops.rename(1, b"a", 1, b"b", pyfuse3.RENAME_EXCHANGE, CTX)
        with raises(errno.EEXIST):
            await w.ops.rename(1, b"a", 1, b"b", pyfuse3.RENAME_NOREPLACE, CTX)
        await w.ops.rename(1, b"a", 1, b"b", 0, CTX)
        assert (await w.ops.lookup(1, b"a", CTX)).st_ino == 0

    run(tmp_path, body)


def test_flush_all_commits_what_is_open(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        info, entry = await w.ops.create(1, b"file", 0o644, os.O_WRONLY, CTX)
        await w.ops.write(info.fh, 0, b"written")
        await w.ops.flush_all()
        theirs = await w.other.open(SUPERUSER, entry.st_ino)
        assert bytes(await theirs.read(0, 100)) == b"written"
        await theirs.release()

    run(tmp_path, body)


def test_a_subtree_as_root(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        root = await w.ops.getattr(1, CTX)
        assert root.st_ino == 1
        assert w.ops.view.root_ino != 1
        ino = await w.write_file(1, b"inside", b"x")
        attr = await w.fs.lookup(SUPERUSER, w.ops.view.root_ino, b"inside")
        assert attr.ino == ino
        handle = await w.ops.opendir(1, CTX)
        assert [(name, ino) for name, ino, _ in (await w.list_all(handle, 5)).entries] == [
            (b".", 1),
            (b"..", 1),
            (b"inside", ino),
        ]
        await w.ops.releasedir(handle)

    run(tmp_path, body, root=b"sub")


def test_statfs(tmp_path: Path) -> None:
    async def body(w: World) -> None:
        numbers = await w.ops.statfs(CTX)
        assert numbers.f_blocks * numbers.f_frsize == 1 << 28
        assert 0 < numbers.f_bavail <= numbers.f_blocks

    run(tmp_path, body)


def test_going_back_in_a_large_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last pages of an open directory are held; who goes back further gets, from there on, what
    is there now, nothing of it twice and nothing left out."""
    monkeypatch.setattr("alluxiofuse.client.filesystem.DIR_PAGE_ENTRIES", 7)

    def names(*gone: int, start: int = 0) -> list[bytes]:
        return [b"f%02d" % number for number in range(start, 40) if number not in gone]

    async def body(w: World) -> None:
        for name in names():
            await w.fs.mknod(SUPERUSER, 1, name, 0o644)
        handle = await w.ops.opendir(1, CTX)
        behind: dict[bytes, int] = {}

        async def read_on(position: int, room: int = 100) -> list[bytes]:
            w.listing.room, w.listing.entries = room, []
            await w.ops.readdir(handle, position, pyfuse3.ReaddirToken())
            behind.update((name, after) for name, _, after in w.listing.entries)
            return w.listing.names

        assert await read_on(0, 3) == [b"f00"]
        while await read_on(max(behind.values()), 3):
            pass
        assert sorted(behind) == [b".", b"..", *names()]
        held = w.ops.dirs.get(handle)._pages
        assert sum(len(page.entries) for page in held) <= 14
        assert await read_on(behind[b"f36"]) == names(start=37)  # within what is held
        await w.fs.unlink(SUPERUSER, 1, b"f05")
        await w.fs.unlink(SUPERUSER, 1, b"f20")
        assert await read_on(behind[b"f10"]) == names(20, start=11)
        assert await read_on(behind[b"f03"], 4) == [b"f04", b"f06", b"f07", b"f08"]
        assert await read_on(behind[b"f08"]) == names(20, start=9)
        assert await read_on(0) == names(5, 20)
        await w.ops.releasedir(handle)

    run(tmp_path, body)
