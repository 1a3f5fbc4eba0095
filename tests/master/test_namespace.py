"""Rules of the namespace that a comparison with a real directory does not reach."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from namespace_world import KERNEL, World
from test_sessions import run

from alluxiofuse.errors import AlluxioFuseError, FsError, StaleError
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.wire.master_ops import (
    RENAME_NOREPLACE,
    Create,
    Link,
    Mkdir,
    Mknod,
    Open,
    Rename,
    Rmdir,
    SetAttr,
    SetXattr,
    Symlink,
    Unlink,
)
from alluxiofuse.wire.types import EVENT_ATTR, EVENT_ENTRY, SUPERUSER, Attr, Caller, Event

USER = Caller(1001, 1001, [])


def mkdir(world: World, parent: int, name: bytes, who: Caller = KERNEL) -> int:
    return world.changes.mkdir(Mkdir(who, 0, parent, name, 0o755)).ino


def touch(world: World, parent: int, name: bytes, who: Caller = KERNEL) -> int:
    return world.changes.mknod(Mknod(who, 0, parent, name, stat.S_IFREG | 0o644, 0)).ino


def fails(code: int, function: Callable[[], object]) -> None:
    with pytest.raises(AlluxioFuseError) as caught:
        function()
    assert caught.value.errno == code


def mount(world: World, ino: int, mount_id: int) -> None:
    """Make a directory a mount point, as far as the namespace is concerned."""
    tx = world.store.transaction()
    record = world.tree.record(tx, ino)
    record.mount_id = mount_id
    tx.put_inode(ino, record)
    tx.commit()


def test_names(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        for name in (b".", b"..", b"", b"a/b", b"a\0b"):
            fails(errno.EINVAL, lambda name=name: mkdir(world, ROOT_INO, name))  # type: ignore[misc]
            fails(errno.EINVAL, lambda name=name: world.namespace.lookup(KERNEL, ROOT_INO, name))  # type: ignore[misc]
        fails(errno.ENAMETOOLONG, lambda: mkdir(world, ROOT_INO, b"x" * 256))
        assert mkdir(world, ROOT_INO, b"x" * 255) > ROOT_INO
        every = bytes(c for c in range(1, 256) if c != ord("/"))
        assert touch(world, ROOT_INO, every) > ROOT_INO
        assert world.namespace.lookup(KERNEL, ROOT_INO, every).nlink == 1
        world.validate()

    run(tmp_path, test)


def test_an_inode_that_is_gone_is_stale_and_its_number_is_never_used_again(tmp_path: Path) -> None:
    async def test(world: World) -> World:
        ino = touch(world, ROOT_INO, b"f")
        world.changes.unlink(Unlink(KERNEL, 0, ROOT_INO, b"f"))
        for operation in (
            lambda: world.namespace.getattr(ino),
            lambda: world.namespace.lookup(KERNEL, ino, b"x"),
            lambda: world.changes.setattr(SetAttr(KERNEL, 0, ino, mode=0)),
            lambda: world.content.open(Open(KERNEL, world.session(), ino, False)),
            lambda: mkdir(world, ino, b"x"),
        ):
            with pytest.raises(StaleError):
                operation()
        world = world.reopen()
        assert touch(world, ROOT_INO, b"g") > ino
        return world

    run(tmp_path, test)


def test_mount_points_stay_where_they_are(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        a, m = mkdir(world, ROOT_INO, b"a"), mkdir(world, ROOT_INO, b"m")
        mount(world, m, 2)
        inside = touch(world, m, b"inside")
        assert world.namespace.getattr(inside).mount_id == 2
        outside = touch(world, a, b"outside")
        rename = world.changes.rename
        fails(errno.EXDEV, lambda: rename(Rename(KERNEL, 0, m, b"inside", a, b"x", 0)))
        fails(errno.EXDEV, lambda: world.changes.link(Link(KERNEL, 0, outside, m, b"x")))
        fails(errno.EBUSY, lambda: rename(Rename(KERNEL, 0, ROOT_INO, b"m", ROOT_INO, b"x", 0)))
        fails(errno.EBUSY, lambda: rename(Rename(KERNEL, 0, ROOT_INO, b"a", ROOT_INO, b"m", 0)))
        world.changes.unlink(Unlink(KERNEL, 0, m, b"inside"))
        fails(errno.EBUSY, lambda: world.changes.rmdir(Rmdir(KERNEL, 0, ROOT_INO, b"m")))
        world.validate()

    run(tmp_path, test)


def test_a_readonly_mount(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        ino, session = touch(world, ROOT_INO, b"f"), world.session()
        world.mounts.readonly.add(world.namespace.getattr(ino).mount_id)
        changes = world.changes
        for operation in (
            lambda: mkdir(world, ROOT_INO, b"d"),
            lambda: changes.unlink(Unlink(KERNEL, 0, ROOT_INO, b"f")),
            lambda: changes.rename(Rename(KERNEL, 0, ROOT_INO, b"f", ROOT_INO, b"g", 0)),
            lambda: changes.link(Link(KERNEL, 0, ino, ROOT_INO, b"g")),
            lambda: changes.symlink(Symlink(KERNEL, 0, ROOT_INO, b"s", b"f")),
            lambda: changes.setattr(SetAttr(KERNEL, 0, ino, mode=0o600)),
            lambda: world.xattrs.set(SetXattr(KERNEL, 0, ino, b"user.a", b"", 0)),
            lambda: world.content.create(Create(KERNEL, session, ROOT_INO, b"n", 0o644, False, 0)),
            lambda: world.content.open(Open(KERNEL, session, ino, True)),
            lambda: world.namespace.access(SUPERUSER, ino, 2),
        ):
            fails(errno.EROFS, operation)
        fails(errno.EEXIST, lambda: mkdir(world, ROOT_INO, b"f"))
        assert world.content.open(Open(KERNEL, session, ino, False)).attr.ino == ino

    run(tmp_path, test)


def test_rename_flags_and_hard_links_of_itself(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        a, b = touch(world, ROOT_INO, b"a"), touch(world, ROOT_INO, b"b")
        world.changes.link(Link(KERNEL, 0, a, ROOT_INO, b"a2"))

        def rename(old: bytes, new: bytes, flags: int = 0) -> object:
            return world.changes.rename(Rename(KERNEL, 0, ROOT_INO, old, ROOT_INO, new, flags))

        fails(errno.EEXIST, lambda: rename(b"a", b"b", RENAME_NOREPLACE))
        fails(errno.EINVAL, lambda: rename(b"a", b"b", 2))
        rename(b"a", b"a2")
        assert world.namespace.lookup(KERNEL, ROOT_INO, b"a").nlink == 2, "same file: nothing happens"
        rename(b"b", b"a")
        assert world.namespace.lookup(KERNEL, ROOT_INO, b"a").ino == b
        assert world.namespace.getattr(a).nlink == 1
        world.validate()

    run(tmp_path, test)


def test_readdir_in_pages_sees_every_name_once(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        directory = mkdir(world, ROOT_INO, b"d")
        names = [b"%03d" % i for i in range(25)] + [b"\xff\xfe"]
        for name in names:
            touch(world, directory, name)
        touch(world, ROOT_INO, b"other")
        found, after = [], b""
        while True:
            page = world.namespace.readdir(KERNEL, directory, after, 7)
            found += [entry.name for entry in page.entries]
            if page.is_last:
                break
            after = found[-1]
        assert found == names

    run(tmp_path, test)


def test_resolve(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        d = mkdir(world, ROOT_INO, b"d")
        e = mkdir(world, d, b"e")
        f = touch(world, e, b"f")
        for name, target in ((b"rel", b"../d/e"), (b"abs", b"/d/e/f"), (b"loop", b"loop")):
            world.changes.symlink(Symlink(KERNEL, 0, d, name, target))

        def way(path: bytes, follow: bool = True) -> list[int]:
            return [a.ino for a in world.namespace.resolve(KERNEL, path, follow)]

        assert way(b"/") == way(b"") == [ROOT_INO]
        assert way(b"/d//e/./f") == [ROOT_INO, d, e, f]
        assert way(b"/d/e/../../../d/e") == [ROOT_INO, d, e]
        assert way(b"/d/rel/f") == [ROOT_INO, d, e, f]
        assert way(b"/d/abs") == [ROOT_INO, d, e, f]
        assert stat.S_ISLNK(world.namespace.resolve(KERNEL, b"/d/abs", False)[-1].mode)
        fails(errno.ENOTDIR, lambda: way(b"/d/abs/"))
        fails(errno.ENOTDIR, lambda: way(b"/d/e/f/x"))
        fails(errno.ELOOP, lambda: way(b"/d/loop"))
        fails(errno.ENOENT, lambda: way(b"/d/nothing/x"))
        world.changes.setattr(SetAttr(KERNEL, 0, d, mode=0o700))
        with pytest.raises(FsError) as caught:
            world.namespace.resolve(USER, b"/d/e", True)
        assert caught.value.errno == errno.EACCES

    run(tmp_path, test)


def test_others_are_told_what_changed(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        d = mkdir(world, ROOT_INO, b"d")
        f = touch(world, d, b"f")
        start = world.events.seq
        world.changes.rename(Rename(KERNEL, 7, d, b"f", ROOT_INO, b"g", 0))
        told = (await world.events.watch(1, start, 0)).events
        assert told == [Event(EVENT_ENTRY, d, b"f"), Event(EVENT_ENTRY, ROOT_INO, b"g"), Event(EVENT_ATTR, f)]
        assert (await world.events.watch(7, start, 0)).events == []

    run(tmp_path, test)


def test_times_before_1970_and_every_change_moves_ctime(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        ino = touch(world, ROOT_INO, b"f")

        def changed(function: Callable[[], object]) -> Attr:
            before = world.namespace.getattr(ino).ctime_ns
            function()
            after = world.namespace.getattr(ino)
            assert after.ctime_ns > before
            return after

        def set_(**fields: int) -> Attr:
            return world.changes.setattr(SetAttr(KERNEL, 0, ino, **fields))  # type: ignore[arg-type]

        assert changed(lambda: set_(mtime_ns=-5, atime_ns=-(10**18))).mtime_ns == -5
        assert changed(lambda: set_(mode=0o600)).mode == stat.S_IFREG | 0o600
        changed(lambda: world.changes.link(Link(KERNEL, 0, ino, ROOT_INO, b"g")))
        changed(lambda: world.changes.unlink(Unlink(KERNEL, 0, ROOT_INO, b"f")))
        changed(lambda: world.changes.rename(Rename(KERNEL, 0, ROOT_INO, b"g", ROOT_INO, b"h", 0)))
        changed(lambda: world.xattrs.set(SetXattr(KERNEL, 0, ino, b"user.a", b"1", 0)))

    run(tmp_path, test)


def test_devices_need_root_and_directories_need_mkdir(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        changes = world.changes
        changes.setattr(SetAttr(KERNEL, 0, ROOT_INO, mode=0o777))
        device = os.makedev(1, 3)
        node = stat.S_IFCHR | 0o644
        fails(errno.EPERM, lambda: changes.mknod(Mknod(USER, 0, ROOT_INO, b"n", node, device)))
        assert changes.mknod(Mknod(SUPERUSER, 0, ROOT_INO, b"n", node, device)).rdev == device
        fails(errno.EPERM, lambda: changes.mknod(Mknod(KERNEL, 0, ROOT_INO, b"d", stat.S_IFDIR | 0o755, 0)))
        fails(errno.EINVAL, lambda: changes.mknod(Mknod(KERNEL, 0, ROOT_INO, b"d", stat.S_IFLNK | 0o755, 0)))

    run(tmp_path, test)
