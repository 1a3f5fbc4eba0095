"""The mount table and the management operations, by the handlers of a whole master."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from alluxiofuse.config import MasterConfig
from alluxiofuse.errors import FsError, StaleError, UfsError, UserError
from alluxiofuse.ids import ROOT_INO, ROOT_MOUNT_ID
from alluxiofuse.master.fsck import problems
from alluxiofuse.master.master import Master
from alluxiofuse.rpc.base import Peer
from alluxiofuse.wire import master_ops
from alluxiofuse.wire.messages import Request
from alluxiofuse.wire.types import Caller

ADMIN = Caller(0, 0, [])
TRUSTED = Peer("test", True, True, False)
STRANGER = Peer("stranger", False, False, False)


@asynccontextmanager
async def master(tmp_path: Path, **options: Any) -> AsyncIterator[Master]:
    (tmp_path / "data").mkdir(exist_ok=True)
    options = {"ufs": str(tmp_path / "data"), "sync_interval_s": 0.0, "persist_delay_s": 0.0, **options}
    with trio.fail_after(60):
        made = Master(MasterConfig(state_dir=str(tmp_path / "state"), **options))
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: made.run(task_status=task_status))
            yield made
            assert problems(made.store) == []
            nursery.cancel_scope.cancel()


async def call(made: Master, request: Request[Any], peer: Peer = TRUSTED) -> Any:
    answer = made.service.handlers[type(request)](peer, request, b"")
    return await answer if isinstance(answer, Awaitable) else answer


async def mount(made: Master, path: str, uri: Path | str, **options: Any) -> Any:
    request = master_ops.MountUfs(ADMIN, path.encode(), str(uri), False, 0.0, {})
    for name, value in options.items():
        setattr(request, name, value)
    return await call(made, request)


async def names(made: Master, path: str) -> list[bytes]:
    attrs = await call(made, master_ops.Resolve(ADMIN, path.encode()))
    page = await call(made, master_ops.ReadDir(ADMIN, attrs[-1].ino, b"", 1000))
    return [entry.name for entry in page.entries]


async def settle(made: Master) -> None:
    while not made.persister.is_idle():  # noqa: ASYNC110
        await trio.sleep(0.005)


def test_root_mount_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        async with master(tmp_path) as made:
            assert made.mounts.ids() == [ROOT_MOUNT_ID]
            assert made.mounts.mount_at(ROOT_INO) == ROOT_MOUNT_ID
        async with master(tmp_path, ufs="", sync_interval_s=None) as made:
            assert made.mounts.info(ROOT_MOUNT_ID, True).uri == str(tmp_path / "data")
            assert made.mounts.sync_interval_s(ROOT_MOUNT_ID) == 0.0
        with pytest.raises(UserError, match="elsewhere"):
            async with master(tmp_path, ufs=str(tmp_path / "elsewhere")):
                pass
        with pytest.raises(UserError, match="no under storage"):
            Master(MasterConfig(state_dir=str(tmp_path / "other")))

    trio.run(main)


def test_nested_mount(tmp_path: Path) -> None:
    async def main() -> None:
        other = tmp_path / "other"
        other.mkdir()
        (other / "file").write_bytes(b"1")
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "mnt").mkdir()
        async with master(tmp_path) as made:
            assert await names(made, "/") == [b"mnt"]
            assert await names(made, "/mnt") == []
            info = await mount(made, "/mnt", other)
            assert (info.path, info.uri) == (b"/mnt", str(other))
            await mount(made, "/new", other, is_readonly=True)
            assert await names(made, "/mnt") == await names(made, "/new") == [b"file"]
            assert await names(made, "/") == [b"mnt", b"new"]
            await settle(made)
            assert not (tmp_path / "data" / "new").exists()
            above = await call(made, master_ops.Resolve(ADMIN, b"/new"))
            with pytest.raises(FsError) as caught:
                await call(made, master_ops.Mkdir(ADMIN, 0, above[-1].ino, b"x", 0o755))
            assert caught.value.errno == errno.EROFS
            inside = await call(made, master_ops.Resolve(ADMIN, b"/mnt"))
            await call(made, master_ops.Mkdir(ADMIN, 0, inside[-1].ino, b"x", 0o755))
            await settle(made)
            assert (other / "x").is_dir()
            for path in (b"/mnt", b"/new"):
                await call(made, master_ops.UnmountUfs(ADMIN, path))
            await settle(made)
            assert await names(made, "/mnt") == []
            assert (tmp_path / "data" / "new").is_dir()
            assert sorted(p.name for p in other.iterdir()) == ["file", "x"]
            with pytest.raises(StaleError):
                await call(made, master_ops.GetMount(info.mount_id))

    trio.run(main)


def test_mounts_survive_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "other").mkdir()
        async with master(tmp_path) as made:
            await mount(made, "/m", tmp_path / "other", sync_interval_s=None)
        async with master(tmp_path) as made:
            found = await call(made, master_ops.ListMounts())
            assert [info.path for info in found] == [b"/", b"/m"]
            assert found[1].sync_interval_s == 1.0

    trio.run(main)


def test_refused(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "other").mkdir()
        (tmp_path / "data" / "full").mkdir(parents=True)
        (tmp_path / "data" / "full" / "file").touch()
        async with master(tmp_path) as made:
            with pytest.raises(UfsError):
                await mount(made, "/m", tmp_path / "no" / "such")
            with pytest.raises(UserError):
                await mount(made, "/m", "nonsense://x")
            await names(made, "/full")
            for path, code in (
                ("/full", errno.ENOTEMPTY),
                ("/full/file", errno.ENOTDIR),
                ("/", errno.EINVAL),
            ):
                with pytest.raises(FsError) as caught:
                    await mount(made, path, tmp_path / "other")
                assert caught.value.errno == code
            assert made.mounts.ids() == [ROOT_MOUNT_ID]
            request = master_ops.MountUfs(ADMIN, b"/m", str(tmp_path / "other"), False, 0.0, {})
            with pytest.raises(FsError):
                await call(made, request, STRANGER)
            with pytest.raises(FsError):
                await mount(made, "/m", tmp_path / "other", who=Caller(12345, 1, []))
            await mount(made, "/m", tmp_path / "other")
            (tmp_path / "third").mkdir()
            await mount(made, "/m/inner", tmp_path / "third")
            (tmp_path / "link").symlink_to(tmp_path / "other")
            for uri in ("other", "other/", "other/below", "link", "data/full", "."):
                with pytest.raises(FsError, match="overlaps") as caught:
                    await mount(made, "/again", f"{tmp_path}/{uri}")
                assert caught.value.errno == errno.EBUSY
            assert await names(made, "/") == [b"full", b"m"]
            for path, interval_s in (("/nul\0", 0.0), ("/m2", float("nan")), ("/m2", -3.0), ("/m2", 1e300)):
                with pytest.raises(FsError) as caught:
                    await mount(made, path, tmp_path / "fourth", sync_interval_s=interval_s)
                assert caught.value.errno == errno.EINVAL
            with pytest.raises(FsError) as caught:
                await call(made, master_ops.UnmountUfs(ADMIN, b"/m"))
            assert caught.value.errno == errno.EBUSY
            with pytest.raises(FsError) as caught:
                await call(made, master_ops.UnmountUfs(ADMIN, b"/"))
            assert caught.value.errno == errno.EBUSY

    trio.run(main)


def test_secret_options_are_for_peers_that_proved_themselves(tmp_path: Path) -> None:
    async def main() -> None:
        async with master(tmp_path) as made:
            record = made.mounts.record(ROOT_MOUNT_ID)
            assert record is not None
            record.options = {"secret_key": "hush", "region": "here"}
            request = master_ops.GetMount(ROOT_MOUNT_ID)
            assert (await call(made, request)).options == record.options
            assert (await call(made, request, STRANGER)).options == {"region": "here"}
            report = await call(made, master_ops.ReportState(), STRANGER)
            assert report.mounts[0].options == {"region": "here"}
            record.options = {}

    trio.run(main)


def test_sync_path_persist_and_locations(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "data" / "d" / "e").mkdir(parents=True)
        (tmp_path / "data" / "d" / "e" / "old").write_bytes(b"12345")
        async with master(tmp_path, sync_interval_s=-1.0) as made:
            assert await names(made, "/d/e") == [b"old"]
            (tmp_path / "data" / "d" / "e" / "new").touch()
            assert await names(made, "/d/e") == [b"old"]
            await call(made, master_ops.SyncPath(ADMIN, b"/d", True))
            assert await names(made, "/d/e") == [b"new", b"old"]
            (tmp_path / "data" / "d" / "third").touch()
            await call(made, master_ops.SyncPath(ADMIN, b"/d/third", False))
            assert await names(made, "/d") == [b"e", b"third"]
            found = await call(made, master_ops.Locations(ADMIN, b"/d/e/old"))
            assert found.ufs_uri.endswith("/data/d/e/old")
            assert found.layout.source is not None
            parent = (await call(made, master_ops.Resolve(ADMIN, b"/d")))[-1].ino
            await call(made, master_ops.Mknod(ADMIN, 0, parent, b"empty", 0o100644, 0))
            while await call(made, master_ops.Persist(ADMIN, b"/d")):  # noqa: ASYNC110
                await trio.sleep(0.005)
            assert (tmp_path / "data" / "d" / "empty").exists()
            freed = await call(made, master_ops.Free(ADMIN, b"/d", True))
            assert (freed.file_count, freed.dirty_count) == (3, 0)
            with pytest.raises(FsError):
                await call(made, master_ops.Free(ADMIN, b"/d", False))
            report = await call(made, master_ops.ReportState())
            assert report.persist_pending_count == 0
            assert report.persist_failing == []

    trio.run(main)


def test_a_listing_in_pages_is_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when its pages take longer than the sync interval: else a large directory never ends."""

    async def main() -> None:
        (tmp_path / "other").mkdir()
        for number in range(10):
            (tmp_path / "other" / f"f{number}").touch()
        async with master(tmp_path) as made:
            info = await mount(made, "/m", tmp_path / "other")  # always compared
            storage = made.mounts.storage(info.mount_id)
            asked: list[bytes] = []
            real = storage.list

            def listed(path: bytes, *arguments: Any, **options: Any) -> Any:
                asked.append(path)
                return real(path, *arguments, **options)

            monkeypatch.setattr(storage, "list", listed)
            top = (await call(made, master_ops.Resolve(ADMIN, b"/m")))[-1].ino
            for round_ in (1, 2):
                after, found = b"", []
                while True:
                    page = await call(made, master_ops.ReadDir(ADMIN, top, after, 3))
                    found += [entry.name for entry in page.entries]
                    if page.is_last:
                        break
                    after = found[-1]
                assert found == [b"f%d" % number for number in range(10)]
                assert len(asked) == round_

    trio.run(main)
