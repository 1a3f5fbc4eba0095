"""A whole master over a real directory, end to end through its connection."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import trio
import trio.testing
from master_world import KERNEL, run, running, until

from alluxiofuse.config import MasterConfig
from alluxiofuse.errors import AlluxioFuseError, FsError, StateError, UfsError, UserError
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.master.master import Master
from alluxiofuse.rpc.base import Peer
from alluxiofuse.rpc.service import HandlerTable
from alluxiofuse.wire.master_ops import (
    CloseSession,
    CommitContent,
    Create,
    Link,
    Lookup,
    Mkdir,
    Open,
    ReadDir,
    ReadLink,
    RegisterWorker,
    Release,
    Rename,
    Rmdir,
    SessionHeartbeat,
    SetAttr,
    StatFs,
    Symlink,
    SyncMetadata,
    Unlink,
    WaitPersisted,
    Watch,
)
from alluxiofuse.wire.types import EVENT_ENTRY, PERSISTED, SUPERUSER, Event, WorkerAddress


def fill(ufs: Path) -> None:
    (ufs / "d" / "e").mkdir(parents=True)
    (ufs / "d" / "f").write_bytes(b"four")
    (ufs / "d" / "link").symlink_to("f")
    (ufs / "d" / "e" / "empty").touch()


def test_what_is_in_the_under_storage_is_found_by_looking(tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "ufs").mkdir()
        fill(tmp_path / "ufs")
        async with running(tmp_path) as r:
            attr = await r.client.attr(b"/d/f")
            assert (attr.size, attr.persistence) == (4, PERSISTED)
            opened = await r.connection.call(Open(KERNEL, r.client.session_id, attr.ino, False))
            assert opened.layout.source is not None
            assert (opened.layout.source.path, opened.layout.source.size) == (b"d/f", 4)
            d = await r.client.attr(b"/d")
            page = await r.connection.call(ReadDir(SUPERUSER, d.ino, b"", 100))
            assert [e.name for e in page.entries] == [b"e", b"f", b"link"]
            link = page.entries[2].attr
            assert await r.connection.call(ReadLink(link.ino)) == b"f"
            assert (await r.client.attr(b"/d/link")).ino == attr.ino
            with pytest.raises(FsError) as caught:
                await r.client.lookup(d.ino, b"nothing")
            assert caught.value.errno == errno.ENOENT
            r.validate()

    run(test)


def test_what_is_written_arrives_as_plain_files(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as r:
            call, session = r.connection.call, r.client.session_id
            d = (await call(Mkdir(KERNEL, session, ROOT_INO, b"d", 0o750))).ino
            attr = await r.client.write(d, b"f", b"hello")
            await call(Symlink(KERNEL, session, d, b"s", b"f"))
            assert await call(WaitPersisted(attr.ino, attr.container, 10))
            assert (r.ufs / "d" / "f").read_bytes() == b"hello"
            # The upload may have made the directory, before its own entry gives it its mode.
            await until(lambda: stat.S_IMODE((r.ufs / "d").stat().st_mode) == 0o750)
            await until(lambda: os.path.lexists(r.ufs / "d" / "s"))
            assert (await r.client.lookup(d, b"f")).persistence == PERSISTED
            # Change, rename and remove, over and over: it ends as the namespace is.
            for round_ in range(5):
                attr = await r.client.write(d, b"f", b"round %d" % round_)
                await call(Rename(KERNEL, session, d, b"f", ROOT_INO, b"g", 0))
                await call(Rename(KERNEL, session, ROOT_INO, b"g", d, b"f", 0))
                await r.client.write(ROOT_INO, b"gone", b"x")
                await call(Unlink(KERNEL, session, ROOT_INO, b"gone"))
                r.validate()
            await call(Unlink(KERNEL, session, d, b"s"))
            assert await call(WaitPersisted(attr.ino, attr.container, 10))
            await until(lambda: sorted(os.listdir(r.ufs)) == ["d"] and os.listdir(r.ufs / "d") == ["f"])
            assert (r.ufs / "d" / "f").read_bytes() == b"round 4"
            await call(Unlink(KERNEL, session, d, b"f"))
            await call(Rmdir(KERNEL, session, ROOT_INO, b"d"))
            await until(lambda: os.listdir(r.ufs) == [])
            r.validate()

    run(test)


def test_a_restart_keeps_everything_and_finishes_what_was_begun(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path, persist_delay_s=3600) as r:
            session = r.client.session_id
            d = (await r.connection.call(Mkdir(KERNEL, session, ROOT_INO, b"d", 0o755))).ino
            f = await r.client.write(d, b"f", b"hello")
            await r.connection.call(Link(KERNEL, session, f.ino, ROOT_INO, b"hard"))
            cluster_id = r.master.cluster_id
            assert os.listdir(r.ufs) == []
        async with running(tmp_path) as r:
            assert r.master.cluster_id == cluster_id
            attr = await r.client.attr(b"/hard")
            assert (attr.ino, attr.size, attr.nlink) == (f.ino, 5, 2)
            assert await r.connection.call(WaitPersisted(attr.ino, attr.container, 10))
            assert (r.ufs / "d" / "f").read_bytes() == b"hello"
            r.validate()

    run(test)


def test_changes_outside_are_seen_when_asked_for_always(tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "ufs").mkdir()
        fill(tmp_path / "ufs")
        async with running(tmp_path, sync_interval_s=0) as r:
            before = await r.client.attr(b"/d/f")
            (r.ufs / "d" / "f").write_bytes(b"longer than before")
            after = await r.client.attr(b"/d/f")
            assert (after.ino, after.size) == (before.ino, 18)
            assert after.container != before.container
            (r.ufs / "d" / "new").write_bytes(b"x")
            (r.ufs / "d" / "link").unlink()
            page = await r.connection.call(ReadDir(SUPERUSER, (await r.client.attr(b"/d")).ino, b"", 100))
            assert [e.name for e in page.entries] == [b"e", b"f", b"new"]
            # What exists outside already is not created over.
            (r.ufs / "taken").mkdir()
            with pytest.raises(FsError) as caught:
                await r.connection.call(Mkdir(KERNEL, 0, ROOT_INO, b"taken", 0o755))
            assert caught.value.errno == errno.EEXIST
            r.validate()

    run(test)


def test_an_open_file_can_be_read_after_its_last_name_is_gone(tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "ufs").mkdir()
        fill(tmp_path / "ufs")
        async with running(tmp_path) as r:
            call, session = r.connection.call, r.client.session_id
            d, f = await r.client.attr(b"/d"), await r.client.attr(b"/d/f")
            await call(Open(KERNEL, session, f.ino, False))
            await call(Unlink(KERNEL, session, d.ino, b"f"))
            await call(Unlink(KERNEL, session, d.ino, b"link"))
            await until(lambda: not os.path.lexists(r.ufs / "d" / "link"))
            opened = await call(Open(KERNEL, session, f.ino, False))
            assert opened.layout.source is not None
            assert (r.ufs / os.fsdecode(opened.layout.source.path)).read_bytes() == b"four"
            r.validate()
            await call(Release(session, [f.ino, f.ino]))
            await until(lambda: not (r.ufs / "d" / "f").exists())
            r.validate()

    run(test)


def test_the_under_storage_follows_the_primary_name(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as r:
            call, session = r.connection.call, r.client.session_id
            f = await r.client.write(ROOT_INO, b"a", b"bytes")
            await call(Link(KERNEL, session, f.ino, ROOT_INO, b"b"))
            assert await call(WaitPersisted(f.ino, f.container, 10))
            assert os.listdir(r.ufs) == ["a"]
            await call(Unlink(KERNEL, session, ROOT_INO, b"a"))
            await until(lambda: os.listdir(r.ufs) == ["b"])
            await call(SetAttr(KERNEL, session, f.ino, mode=0o600))
            await until(lambda: stat.S_IMODE((r.ufs / "b").stat().st_mode) == 0o600)
            # Replacing the only name by another file, which was there before.
            g = await r.client.write(ROOT_INO, b"g", b"other")
            assert await call(WaitPersisted(g.ino, g.container, 10))
            await call(Rename(KERNEL, session, ROOT_INO, b"g", ROOT_INO, b"b", 0))
            await until(lambda: os.listdir(r.ufs) == ["b"] and (r.ufs / "b").read_bytes() == b"other")
            r.validate()

    run(test)


def test_sessions_and_watching(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as r:
            answers = []

            async def watch() -> None:
                answers.append(await r.connection.call(Watch(r.client.session_id, start, 20)))

            start = (await r.connection.call(Watch(r.client.session_id, 0, 0))).seq
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                await trio.testing.wait_all_tasks_blocked()
                await r.connection.call(Mkdir(KERNEL, 99, ROOT_INO, b"d", 0o755))
            assert answers[0].events == [Event(EVENT_ENTRY, ROOT_INO, b"d")]
            await r.connection.call(SyncMetadata())
            usage = await r.connection.call(StatFs())
            assert (usage.capacity_bytes, usage.available_bytes) == (1 << 30, 1 << 30)
            await r.connection.call(CloseSession(r.client.session_id))
            with pytest.raises(AlluxioFuseError) as caught:
                await r.connection.call(SessionHeartbeat(r.client.session_id))
            assert caught.value.code == "session_expired"

    run(test)


def test_a_peer_that_is_not_trusted_speaks_only_for_itself(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as r:
            await r.connection.call(Mkdir(KERNEL, 0, ROOT_INO, b"d", 0o700))
            d = (await r.client.attr(b"/d")).ino
            table = HandlerTable(r.master.service)
            stranger = Peer(
                "stranger", is_trusted=False, is_authenticated=False, can_pass_fds=False, uid=4242
            )
            for who in (KERNEL, SUPERUSER):
                with pytest.raises(FsError) as caught:
                    table.run_decoded(stranger, Lookup(who, d, b"x"), b"")
                assert caught.value.errno == errno.EACCES
            address = WorkerAddress(0, "h", "h", 1, "")
            with pytest.raises(AlluxioFuseError) as refused:
                table.run_decoded(stranger, RegisterWorker("some-worker", address, [], "1"), b"")
            assert refused.value.code == "auth"

    run(test)


def test_bad_state_directories(tmp_path: Path) -> None:
    def config(state: Path, ufs: Path | str = tmp_path / "ufs") -> MasterConfig:
        return MasterConfig(state_dir=str(state), ufs=str(ufs))

    async def test() -> None:
        (tmp_path / "ufs").mkdir()
        (tmp_path / "other").mkdir()
        first = Master(config(tmp_path / "state"))
        with pytest.raises(UserError, match="in use"):
            Master(config(tmp_path / "state"))
        first.close()
        first.close()
        with pytest.raises(UserError, match="other"):
            Master(config(tmp_path / "state", tmp_path / "other"))
        Master(config(tmp_path / "state", "")).close()
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        (foreign / "something").touch()
        with pytest.raises(StateError, match="other files"):
            Master(config(foreign))
        with pytest.raises(StateError, match="not a directory"):
            Master(config(foreign / "something"))
        with pytest.raises(UserError, match="state directory"):
            Master(MasterConfig())

    run(test)


def test_a_first_start_that_fails_leaves_nothing_to_mind(tmp_path: Path) -> None:
    async def test() -> None:
        state = tmp_path / "state"
        with pytest.raises((UfsError, UserError)):
            Master(MasterConfig(state_dir=str(state), ufs=str(tmp_path / "a" / "b" / "c")))
        with pytest.raises(UserError, match="under storage"):
            Master(MasterConfig(state_dir=str(state)))
        (tmp_path / "ufs").mkdir()
        Master(MasterConfig(state_dir=str(state), ufs=str(tmp_path / "ufs"))).close()
        assert stat.S_IMODE(state.stat().st_mode) == 0o700

    run(test)


def test_a_new_file_whose_writing_is_given_up_is_persisted_empty(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as r:
            session, worker = r.client.session_id, r.worker.worker_id
            made = await r.connection.call(Create(KERNEL, session, ROOT_INO, b"f", 0o644, True, worker))
            await r.client.write(ROOT_INO, b"later", b"data")
            await until((r.ufs / "later").exists)  # So the persister has seen f, which is being written.
            assert not (r.ufs / "f").exists()
            ino, container = made.attr.ino, made.layout.container
            await r.connection.call(CommitContent(session, ino, container, 0, 0, False, is_abandoned=True))
            await until((r.ufs / "f").exists)
            r.validate()

    run(test)
