"""Daemons that stop and come back under open files, and under storages that change."""

from __future__ import annotations

import errno
import os
import threading

import pytest
from client_world import IN_PROCESS, ROOT, TCP, UNIX, World, in_world, until

from alluxiofuse.errors import AlluxioFuseError, StaleError, UnavailableError
from alluxiofuse.ids import PAGE_BYTES, ROOT_INO
from alluxiofuse.master.store import u64
from alluxiofuse.master.ufs_loader import UfsLoader
from alluxiofuse.ufs.base import UfsAttrs, UfsEntry
from alluxiofuse.ufs.local import LocalUnderStorage
from alluxiofuse.wire import master_ops

SECRET = b"0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_without_a_worker_files_can_be_read_not_written(kind: str) -> None:
    async def test(world: World) -> None:
        data = os.urandom(2 * PAGE_BYTES + 5)
        (world.ufs / "there").write_bytes(data)
        (world.ufs / "dir").mkdir()
        async with world.client() as client:
            assert await client.get(b"there") == data
            file = await client.open(b"there")
            assert bytes(await file.read(PAGE_BYTES - 3, 10)) == data[PAGE_BYTES - 3 :][:10]
            await file.release()
            with pytest.raises(UnavailableError, match="no worker is running"):
                await client.create(b"new")
            file = await client.open(b"there", os.O_RDWR)
            with pytest.raises(UnavailableError, match="no worker"):
                await file.write(0, b"x")
            await client.close(file)
            assert await client.get(b"there") == data

    in_world(kind, worker={}, secret=SECRET if kind == TCP else None)(test)


@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_a_reader_goes_on_when_its_worker_stops(kind: str) -> None:
    async def test(world: World) -> None:
        data = os.urandom(3 * PAGE_BYTES)
        (world.ufs / "f").write_bytes(data)
        async with world.client(patience_s=0.5) as client:
            file = await client.open(b"f")
            assert bytes(await file.read(0, 100)) == data[:100]
            await world.stop_worker()
            assert bytes(await file.read(2 * PAGE_BYTES, 100)) == data[2 * PAGE_BYTES :][:100]
            assert bytes(await file.read(0, len(data))) == data
            await file.release()

    in_world(kind)(test)


@pytest.mark.parametrize("kind", [UNIX, TCP])
def test_the_worker_restarts_under_open_files(kind: str) -> None:
    async def test(world: World) -> None:
        async with world.client(patience_s=20.0) as client:
            await client.put(b"sealed", b"sealed before")
            reader = await client.open(b"sealed")
            assert bytes(await reader.read(0, 6)) == b"sealed"
            file = await client.create(b"f")
            await file.write(0, b"before ")
            await world.stop_worker()
            part = await world.start_worker()
            client.rejoin(part)
            await file.write(7, b"after")
            assert bytes(await file.read(0, 100)) == b"before after"
            assert bytes(await reader.read(0, 100)) == b"sealed before"
            await reader.release()
            await client.close(file)
            assert await client.get(b"f") == b"before after"
            await until(lambda: (world.ufs / "f").exists())

    in_world(kind)(test)


@pytest.mark.parametrize("kind", [UNIX, TCP])
def test_the_worker_seals_by_itself_while_we_are_away(kind: str) -> None:
    async def test(world: World) -> None:
        async with world.client(patience_s=20.0) as client:
            file = await client.create(b"f")
            await file.write(0, b"before ")
            await world.stop_worker()
            part = await world.start_worker(session_grace_s=0.0)
            client.rejoin(part)
            await until(lambda: part.worker.slabs is not None and part.worker.slabs.dirty_bytes > 0)
            await file.write(7, b"after")
            assert bytes(await file.read(0, 100)) == b"before after"
            await client.close(file)
            assert await client.get(b"f") == b"before after"

    in_world(kind)(test)


def test_a_writer_whose_worker_stays_away_gets_an_error() -> None:
    async def test(world: World) -> None:
        async with world.client(patience_s=0.3) as client:
            file = await client.create(b"f")
            await file.write(0, b"data")
            await world.stop_worker()
            with pytest.raises(AlluxioFuseError) as caught:
                await file.write(4, b"more")
            assert caught.value.errno == errno.EIO
            with pytest.raises(AlluxioFuseError):
                await file.fsync()
            with pytest.raises(AlluxioFuseError):
                await file.flush()
            await file.release()

    in_world(UNIX)(test)


@pytest.mark.parametrize("kind", [UNIX, TCP])
def test_the_master_restarts_under_open_files(kind: str) -> None:
    async def test(world: World) -> None:
        async with world.client(patience_s=20.0) as client:
            await client.put(b"gone", b"unlinked while open")
            orphan = await client.open(b"gone")
            await client.fs.unlink(ROOT, ROOT_INO, b"gone")
            file = await client.create(b"f")
            await file.write(0, b"before ")
            await world.stop_master()
            await file.write(7, b"during ")
            assert bytes(await file.read(0, 100)) == b"before during "
            await world.start_master()
            await file.write(14, b"after")
            await client.close(file)
            assert await client.get(b"f") == b"before during after"
            assert bytes(await orphan.read(0, 100)) == b"unlinked while open"
            await orphan.release()
            await until(lambda: (world.ufs / "f").exists())
            await until(lambda: client.fs.is_watch_healthy)

    in_world(kind)(test)


def test_a_session_that_expired_is_replaced() -> None:
    async def test(world: World) -> None:
        async with world.client() as client:
            file = await client.create(b"f")
            await file.write(0, b"data")
            reader = await client.open(b"f")
            old = client.fs.session_id
            await client.fs.ask_master(master_ops.CloseSession(old))
            await file.write(4, b" more")
            await client.close(file)
            assert client.fs.session_id != old
            assert bytes(await reader.read(0, 100)) == b"data more"
            await client.fs.unlink(ROOT, ROOT_INO, b"f")
            assert bytes(await reader.read(0, 100)) == b"data more"
            await reader.release()

    in_world(UNIX)(test)


def test_a_file_replaced_in_the_under_storage() -> None:
    async def test(world: World) -> None:
        old, new = b"o" * (2 * PAGE_BYTES), b"n" * (2 * PAGE_BYTES + 10)
        (world.ufs / "f").write_bytes(old)
        async with world.client() as client:
            has_read = await client.open(b"f")
            assert bytes(await has_read.read(0, 10)) == b"o" * 10
            has_not = await client.open(b"f")
            (world.ufs / "f.new").write_bytes(new)
            os.rename(world.ufs / "f.new", world.ufs / "f")
            with pytest.raises(StaleError):
                await has_read.read(PAGE_BYTES, 10)
            with pytest.raises(StaleError):
                await has_read.read(0, 10)
            assert bytes(await has_not.read(0, len(new) + 1)) == new
            assert has_not.attr.size == len(new)
            await has_read.release()
            await has_not.release()
            assert await client.get(b"f") == new

    in_world(IN_PROCESS, worker={"read_ahead_bytes": 0})(test)


@pytest.mark.parametrize("kind", [IN_PROCESS, TCP])
def test_attributes_that_are_being_set_do_not_replace_a_file(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local directory's fingerprint has the ctime in it: after our own chmod was done there, and before
    the master has noted it, a reader meets another version of the same bytes."""
    is_asked = threading.Event()
    set_attrs, refresh = LocalUnderStorage.set_attrs, UfsLoader.source_changed

    def slowly(self: LocalUnderStorage, path: bytes, attrs: UfsAttrs) -> UfsEntry:
        entry = set_attrs(self, path, attrs)
        assert is_asked.wait(30)
        return entry

    async def noted_before(self: UfsLoader, ino: int, container: int) -> None:
        is_asked.set()
        await until(lambda: self._store.get("persist", b"s" + u64(ino)) is None)
        await refresh(self, ino, container)

    async def test(world: World) -> None:
        (world.ufs / "f").write_bytes(bytes(PAGE_BYTES) + b"end")
        async with world.client() as client:
            file = await client.open(b"f")
            monkeypatch.setattr(LocalUnderStorage, "set_attrs", slowly)
            monkeypatch.setattr(UfsLoader, "source_changed", noted_before)
            await client.fs.setattr(ROOT, file.ino, mode=0o600)
            await until(lambda: (world.ufs / "f").stat().st_mode & 0o777 == 0o600)
            assert bytes(await file.read(PAGE_BYTES, 10)) == b"end"
            assert is_asked.is_set()
            assert not any(await file.read(0, 10))
            await client.close(file)

    in_world(kind)(test)


def test_another_worker_serves_what_the_under_storage_has() -> None:
    async def test(world: World) -> None:
        data = os.urandom(2 * PAGE_BYTES)
        (world.ufs / "f").write_bytes(data)
        await world.start_worker("w2", hostname="elsewhere")
        async with world.client(patience_s=2.0) as client:
            assert await client.get(b"f") == data
            await world.stop_worker("w1")
            assert await client.get(b"f") == data
            await client.put(b"new", b"goes to the other one")
            assert await client.get(b"new") == b"goes to the other one"

    in_world(TCP)(test)


def test_idle_slabs_are_few_and_given_back() -> None:
    async def test(world: World) -> None:
        async with world.client(max_cached_slabs=4) as client:
            for number in range(20):
                await client.put(b"%d" % number, b"data")
                assert await client.get(b"%d" % number) == b"data"
            slabs = world.workers["w1"].worker.slabs
            assert slabs is not None
            await until(lambda: len(slabs.locks) <= 4)
        await until(lambda: not slabs.locks)

    in_world(IN_PROCESS)(test)
