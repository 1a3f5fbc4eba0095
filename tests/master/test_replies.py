"""Once is enough: repeated requests, and requests that come by a connection that was given up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from master_world import KERNEL, Running, run, running

from alluxiofuse.errors import BadRequestError, SessionExpiredError
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.rpc.inprocess import InProcess
from alluxiofuse.wire.master_ops import Create, Mkdir, Open, OpenSession, Release, Rmdir, Unlink, Watch
from alluxiofuse.wire.messages import Request, request_id


def _is_open(r: Running, ino: int) -> int:
    sessions = r.master.sessions
    return sessions.open_inos(r.client.session_id).count(ino)


def test_a_request_that_comes_again_gets_its_first_answer(tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "ufs").mkdir()
        async with running(tmp_path) as r:
            session = r.client.session_id
            mkdir = Mkdir(KERNEL, session, ROOT_INO, b"d", 0o755, request_id(3, 1))
            first = await r.connection.call(mkdir)
            # Something else in between, in another slot.
            await r.connection.call(Rmdir(KERNEL, session, ROOT_INO, b"d", request_id(4, 2)))
            assert (await r.connection.call(mkdir)).ino == first.ino
            assert r.master.replies.repeated_count == 1
            # The slot is used again: the answer before it is needed no more.
            await r.connection.call(Mkdir(KERNEL, session, ROOT_INO, b"d", 0o755, request_id(3, 3)))
            with pytest.raises(BadRequestError, match="later one"):
                await r.connection.call(mkdir)

    run(test)


def test_a_refusal_is_looked_at_anew(tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "ufs").mkdir()
        async with running(tmp_path) as r:
            session = r.client.session_id
            rmdir = Rmdir(KERNEL, session, ROOT_INO, b"d", request_id(0, 1))
            with pytest.raises(Exception, match="No such file"):
                await r.connection.call(rmdir)
            await r.connection.call(Mkdir(KERNEL, session, ROOT_INO, b"d", 0o755))
            await r.connection.call(rmdir)
            await r.connection.call(rmdir)
            assert r.master.replies.repeated_count == 1

    run(test)


def test_a_create_that_comes_again_counts_as_one_open_file(tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "ufs").mkdir()
        async with running(tmp_path) as r:
            session, home = r.client.session_id, r.client.worker.worker_id
            create = Create(KERNEL, session, ROOT_INO, b"f", 0o644, True, home, request_id(0, 1))
            ino = (await r.connection.call(create)).attr.ino
            newer = InProcess(r.master.service)
            await newer.call(OpenSession("test", "here", session, []))  # The answer was not heard.
            assert _is_open(r, ino) == 0
            again = await newer.call(create)
            assert (again.attr.ino, again.is_new, again.layout.home) == (ino, True, home)
            assert _is_open(r, ino) == 1
            # So it outlives its name.
            await newer.call(Unlink(KERNEL, session, ROOT_INO, b"f", request_id(0, 2)))
            await newer.call(Open(KERNEL, session, ino, False))
            await newer.aclose()

    run(test)


def test_what_still_comes_by_an_earlier_connection_is_refused(tmp_path: Path) -> None:
    """A request that was on its way for long must not be carried out after its repetition."""

    async def test() -> None:
        (tmp_path / "ufs").mkdir()
        async with running(tmp_path) as r:
            session = r.client.session_id
            made = await r.connection.call(Mkdir(KERNEL, session, ROOT_INO, b"d", 0o755))
            await r.connection.call(Open(KERNEL, session, made.ino, False))
            newer = InProcess(r.master.service)
            await newer.call(OpenSession("test", "here", session, [made.ino]))
            all_late: list[Request[Any]] = [
                Rmdir(KERNEL, session, ROOT_INO, b"d", request_id(0, 1)),
                Rmdir(KERNEL, session, ROOT_INO, b"d"),
                Release(session, [made.ino]),
                Open(KERNEL, session, made.ino, False),
                Watch(session, 0, 0),
            ]
            for late in all_late:
                with pytest.raises(SessionExpiredError, match="another connection"):
                    await r.connection.call(late)
            assert r.master.sessions.refused_count == 5
            assert _is_open(r, made.ino) == 1
            await newer.call(Rmdir(KERNEL, session, ROOT_INO, b"d", request_id(0, 1)))
            await newer.aclose()

    run(test)
