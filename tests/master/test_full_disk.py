"""The disk of the state directory is full, really: every change is refused with one clear error, nothing
half-done stays in memory, and as soon as there is room the master goes on."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from master_world import KERNEL, Client, StandIn

from alluxiofuse.config import MasterConfig
from alluxiofuse.errors import StateError
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.master.fsck import problems
from alluxiofuse.master.master import Master
from alluxiofuse.master.store import Store
from alluxiofuse.rpc.inprocess import InProcess
from alluxiofuse.wire.master_ops import (
    Create,
    Lookup,
    Mkdir,
    OpenSession,
    ReadDir,
    Release,
    SyncMetadata,
    Unlink,
)
from alluxiofuse.wire.messages import Request

MIB = 1 << 20
DISK_BYTES = 64 * MIB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of its own, 64 MiB large."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small tmpfs")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "small", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


class Ballast:
    """Fills a disk, to the last page or so, and gives the room back."""

    def __init__(self, disk: Path) -> None:
        self._path = disk / "ballast"

    def fill(self, *, but_bytes: int = 0) -> None:
        left = os.statvfs(self._path.parent)
        fd = os.open(self._path, os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            os.posix_fallocate(fd, 0, left.f_bavail * left.f_frsize - but_bytes)
        finally:
            os.close(fd)

    def drop(self) -> None:
        self._path.unlink()


def fill_up(store: Store) -> StateError:
    """Commit until one fails; its error."""
    for number in range(100_000):
        tx = store.transaction()
        tx.put("meta", b"filler" + number.to_bytes(4, "big"), os.urandom(4000))
        try:
            tx.commit()
        except StateError as exc:
            return exc
    raise AssertionError("the disk never filled up")


def test_a_store_on_a_full_disk(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(disk / "meta")
    tx = store.transaction()
    tx.put("meta", b"kept", b"1")
    tx.commit()
    ballast = Ballast(disk)
    ballast.fill(but_bytes=MIB)
    caplog.set_level(logging.ERROR)
    error = fill_up(store)
    assert error.errno == errno.ENOSPC
    assert "No space left on device" in error.message
    assert str(disk / "meta") in error.message
    # Nothing is written while it is so, also where there would be room by chance; reading goes on.
    called: list[int] = []
    tx = store.transaction()
    tx.put("meta", b"later", b"1")
    tx.after_commit(lambda: called.append(1))
    with pytest.raises(StateError):
        tx.commit()
    with pytest.raises(StateError):
        store.sync()
    assert called == []
    assert (store.get("meta", b"kept"), store.get("meta", b"later")) == (b"1", None)
    assert not store.heal()
    ballast.drop()
    with closing(cast(Generator[tuple[bytes, bytes], None, None], store.scan("meta", b""))) as reading:
        next(reading)
        assert not store.heal(), "it must not be closed under a reader"
    assert store.heal()
    assert (store.get("meta", b"kept"), store.get("meta", b"later")) == (b"1", None)
    tx.put("meta", b"later", b"2")
    tx.commit()
    store.sync()
    assert store.get("meta", b"later") == b"2"
    assert called == []
    store.close()
    again = Store(disk / "meta")
    assert (again.get("meta", b"kept"), again.get("meta", b"later")) == (b"1", b"2")
    again.close()
    assert len([one for one in caplog.records if "can't be written" in one.getMessage()]) == 1


def test_a_bug_does_not_look_like_a_full_disk(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(TypeError):
        store.commit("no batch")  # type: ignore[arg-type]
    assert not store.is_failed
    store.close()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - a state that nobody signals
        await trio.sleep(0.02)


def test_a_master_on_a_full_disk(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "ufs").mkdir()
    (tmp_path / "worker").mkdir()
    config = MasterConfig(state_dir=str(disk / "state"), ufs=str(tmp_path / "ufs"), persist_delay_s=0.05)

    async def life() -> None:
        master = Master(config, close_stale_sessions=True)
        async with trio.open_nursery() as nursery:
            await nursery.start(master.run)
            connection = InProcess(master.service)
            worker = StandIn(tmp_path / "worker", connection)
            await nursery.start(worker.run)
            session = (await connection.call(OpenSession("test", "here"))).session_id
            client = Client(connection, worker, session)
            await client.write(ROOT_INO, b"before", b"before")
            orphan = await connection.call(Create(KERNEL, session, ROOT_INO, b"orphan", 0o644, True, 0))
            await connection.call(Unlink(KERNEL, session, ROOT_INO, b"orphan"))

            ballast = Ballast(disk)
            ballast.fill(but_bytes=MIB)
            assert fill_up(master.store).errno == errno.ENOSPC
            create = Create(KERNEL, session, ROOT_INO, b"new", 0o644, True, worker.worker_id)
            mkdir = Mkdir(KERNEL, session, ROOT_INO, b"dir", 0o755)
            requests: list[Request[Any]] = [create, mkdir, SyncMetadata()]
            for request in requests:
                with pytest.raises(StateError) as caught:
                    await connection.call(request)
                assert caught.value.errno == errno.ENOSPC
            assert (await connection.call(Lookup(KERNEL, ROOT_INO, b"before"))).size == 6
            names = [
                entry.name for entry in (await connection.call(ReadDir(KERNEL, ROOT_INO, b"", 10))).entries
            ]
            assert names == [b"before"]
            # A release is taken: what it would have deleted is swept later.
            await connection.call(Release(session, [orphan.attr.ino]))
            assert master.store.inode(orphan.attr.ino) is not None

            ballast.drop()
            await until(lambda: not master.store.is_failed)
            await client.write(ROOT_INO, b"after", b"after")
            await until(lambda: (tmp_path / "ufs/after").exists() and (tmp_path / "ufs/before").exists())
            await until(lambda: master.store.inode(orphan.attr.ino) is None)
            await until(master.persister.is_idle)
            assert problems(master.store) == []
            nursery.cancel_scope.cancel()

    async def main() -> None:
        with trio.fail_after(60):
            await life()

    trio.run(main)
