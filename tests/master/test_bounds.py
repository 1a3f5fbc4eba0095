"""Values at and beyond their bounds, in process, where nothing checks them on the way: the answer is the
system call's errno or a clamped value, and whatever is stored can be sent over the wire again."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from namespace_world import KERNEL, World

from alluxiofuse.errors import AuthError, FsError
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.master.peers import NOBODY, as_peer, caller_of
from alluxiofuse.rpc.base import Peer
from alluxiofuse.wire import codec
from alluxiofuse.wire.master_ops import (
    BeginWrite,
    DirPage,
    GetAttr,
    Lookup,
    Mkdir,
    Mknod,
    SetAttr,
    Symlink,
    Unlink,
)
from alluxiofuse.wire.types import SUPERUSER, Attr, Caller

LAST_NS, FIRST_NS = (1 << 63) - 1, -(1 << 63)


def run(tmp_path: Path, test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(30):
            world = World(tmp_path)
            try:
                await test(world)
                world.validate()
                # What a client at the other end of a socket does with it.
                page = world.namespace.readdir(KERNEL, ROOT_INO, b"", 1000)
                assert codec.decode(codec.encode(page), DirPage) == page
            finally:
                world.store.close()

    trio.run(main)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (LAST_NS, LAST_NS),
        (LAST_NS + 1, LAST_NS),
        (10**19, LAST_NS),
        (1 << 200, LAST_NS),
        (FIRST_NS, FIRST_NS),
        (FIRST_NS - 1, FIRST_NS),
        (-(1 << 200), FIRST_NS),
    ],
)
def test_times_are_clamped(tmp_path: Path, given: int, kept: int) -> None:
    async def test(world: World) -> None:
        made = world.changes.mkdir(Mkdir(KERNEL, 0, ROOT_INO, b"d", 0o755))
        attr = world.changes.setattr(SetAttr(KERNEL, 0, made.ino, atime_ns=given, mtime_ns=given))
        assert (attr.atime_ns, attr.mtime_ns) == (kept, kept)
        assert codec.decode(codec.encode(attr), Attr) == attr

    run(tmp_path, test)


def test_modes_devices_and_owners(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        who = Caller(0xFFFF_FFFE, 0xFFFF_FFFE, None)
        made = world.changes.mkdir(Mkdir(who, 0, ROOT_INO, b"d", 0xFFFF_FFFF))
        assert (made.mode, made.uid) == (stat.S_IFDIR | 0o1777, 0xFFFF_FFFE)
        attr = world.changes.setattr(SetAttr(KERNEL, 0, made.ino, mode=0xFFFF_FFFF))
        assert attr.mode == stat.S_IFDIR | 0o7777
        device = world.changes.mknod(Mknod(who, 0, ROOT_INO, b"n", stat.S_IFCHR | 0o777, 0xFFFF_FFFF))
        assert device.rdev == 0xFFFF_FFFF
        for change in (
            SetAttr(KERNEL, 0, made.ino, uid=0xFFFF_FFFF),
            SetAttr(KERNEL, 0, made.ino, gid=0xFFFF_FFFF),
        ):
            with pytest.raises(FsError) as caught:
                world.changes.setattr(change)
            assert caught.value.errno == errno.EINVAL

    run(tmp_path, test)


def test_names_and_targets(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        for name, code in (
            (b"n" * 256, errno.ENAMETOOLONG),
            (b"", errno.EINVAL),
            (b"..", errno.EINVAL),
            (b"a/b", errno.EINVAL),
            (b"a\0b", errno.EINVAL),
        ):
            requests: list[tuple[Callable[[Any], Any], Any]] = [
                (world.changes.mkdir, Mkdir(KERNEL, 0, ROOT_INO, name, 0o755)),
                (world.changes.unlink, Unlink(KERNEL, 0, ROOT_INO, name)),
                (world.changes.symlink, Symlink(KERNEL, 0, ROOT_INO, name, b"x")),
            ]
            for operation, request in requests:
                with pytest.raises(FsError) as caught:
                    operation(request)
                assert caught.value.errno == code, (operation, name)
        world.changes.symlink(Symlink(KERNEL, 0, ROOT_INO, b"n" * 255, b"t" * 4095))
        for target, code in ((b"t" * 4096, errno.ENAMETOOLONG), (b"a\0b", errno.EINVAL)):
            with pytest.raises(FsError) as caught:
                world.changes.symlink(Symlink(KERNEL, 0, ROOT_INO, b"other", target))
            assert caught.value.errno == code

    run(tmp_path, test)


def test_for_whom_a_stranger_speaks() -> None:
    stranger = Peer("stranger", is_trusted=False, is_authenticated=False, can_pass_fds=False, uid=4242)
    request = Lookup(SUPERUSER, ROOT_INO, b"x")
    asked = as_peer(stranger, request)
    assert (asked.who.uid, asked.who.groups) == (4242, [])
    assert request.who == SUPERUSER, "requests are shared in process: never changed in place"
    assert as_peer(stranger, GetAttr(ROOT_INO)) == GetAttr(ROOT_INO)
    with pytest.raises(AuthError, match="sessions"):
        as_peer(stranger, BeginWrite(1, 2, 3, True))
    stranger.uid = None
    assert caller_of(stranger) == NOBODY
    stranger.uid = os.geteuid()
    me = caller_of(stranger)
    assert me.groups is not None
    assert me.gid in me.groups
