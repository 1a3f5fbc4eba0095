"""Random operations on the namespace and on a real directory: same results, same errnos."""

from __future__ import annotations

import os
import random
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from namespace_world import World

from alluxiofuse.errors import AlluxioFuseError
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.wire.master_ops import (
    BeginWrite,
    CommitContent,
    Create,
    GetXattr,
    Link,
    Mkdir,
    Mknod,
    Open,
    Release,
    RemoveXattr,
    Rename,
    Rmdir,
    SetAttr,
    SetXattr,
    Symlink,
    Unlink,
)
from alluxiofuse.wire.types import Attr, Caller

NAMES = [b"a", b"b", b"c", b"d\xff"]
CALLERS = [Caller(0, 0, []), Caller(1001, 1001, [1002]), Caller(1003, 1002, [1002]), Caller(1004, 1004, [])]
MODES = [0o777, 0o755, 0o1777, 0o2775, 0o700, 0o640, 0o6711, 0o4755, 0o2755, 0o3770]


@pytest.fixture
def real() -> Iterator[bytes]:
    """An empty directory on a filesystem with user xattrs, where permissions are the kernel's."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108
    directory = tempfile.mkdtemp(dir=base)
    Path(directory).chmod(0o755)
    yield os.fsencode(directory)
    shutil.rmtree(directory)


@contextmanager
def acting(who: Caller) -> Iterator[None]:
    """The whole process as `who` (effective ids only); nothing else may run meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    groups = os.getgroups()
    os.setgroups(who.groups or [])
    os.setegid(who.gid)
    os.seteuid(who.uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


class Pair:
    """One namespace and one real directory, changed in step."""

    def __init__(self, world: World, real: bytes, rng: random.Random) -> None:
        self.world = world
        self.real = real
        self.rng = rng
        self.done = 0
        self.worker = 0
        self.session = 0
        self.held: list[int] = []

    # --- both sides of one operation -----------------------------------------------------------------

    def parent_of(self, who: Caller, path: bytes) -> tuple[int, bytes]:
        directory, _, name = path.rpartition(b"/")
        parent = self.world.namespace.resolve(who, directory + b"/", True)[-1].ino
        self.world.namespace.access(who, parent, 1)  # as the kernel on its walk
        return parent, name

    def ino_of(self, who: Caller, path: bytes) -> int:
        return self.world.namespace.resolve(who, path, False)[-1].ino

    def both(self, what: str, who: Caller, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
        try:
            mine: object = ours()
        except AlluxioFuseError as exc:
            mine = exc.errno
        else:
            mine = 0 if not isinstance(mine, bytes) else mine
        with acting(who):
            try:
                expected: object = theirs()
            except OSError as exc:
                expected = exc.errno
            else:
                expected = 0 if not isinstance(expected, bytes) else expected
        assert mine == expected, f"{what} as {who}: {mine!r}, a real directory says {expected!r}"
        self.done += mine == 0

    def path(self) -> bytes:
        return b"/".join(self.rng.choice(NAMES) for _ in range(self.rng.choice([1, 1, 2, 2, 3])))

    def at(self, path: bytes) -> bytes:
        return self.real + b"/" + path

    # --- operations ----------------------------------------------------------------------------------

    def mkdir(self, who: Caller, path: bytes) -> None:
        mode = self.rng.choice(MODES)

        def ours() -> None:
            self.world.changes.mkdir(Mkdir(who, self.session, *self.parent_of(who, path), mode))

        self.both(f"mkdir {path!r} {mode:o}", who, ours, lambda: os.mkdir(self.at(path), mode))

    def create(self, who: Caller, path: bytes) -> None:
        mode = self.rng.choice(MODES)

        def ours() -> None:
            req = Create(who, self.session, *self.parent_of(who, path), mode, True, self.worker)
            created = self.world.content.create(req)
            ino, container = created.attr.ino, created.layout.container
            assert created.is_new
            assert created.layout.home == self.worker
            self.world.content.commit_content(commit(self.session, ino, container))
            if self.rng.random() < 0.7:
                self.world.content.release(Release(self.session, [ino]))
            else:
                self.held.append(ino)

        def theirs() -> None:
            os.close(os.open(self.at(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))

        self.both(f"create {path!r} {mode:o}", who, ours, theirs)

    def mknod(self, who: Caller, path: bytes) -> None:
        mode = stat.S_IFIFO | self.rng.choice(MODES)

        def ours() -> None:
            self.world.changes.mknod(Mknod(who, self.session, *self.parent_of(who, path), mode, 0))

        self.both(f"mknod {path!r}", who, ours, lambda: os.mknod(self.at(path), mode))

    def symlink(self, who: Caller, path: bytes) -> None:
        target = self.rng.choice([b"a", b"./b", b"c/a", b"nowhere"])

        def ours() -> None:
            self.world.changes.symlink(Symlink(who, self.session, *self.parent_of(who, path), target))

        self.both(f"symlink {path!r} -> {target!r}", who, ours, lambda: os.symlink(target, self.at(path)))

    def link(self, who: Caller, path: bytes) -> None:
        source = self.path()
        if who.uid:  # protected_hardlinks is a setting of the machine
            return

        def ours() -> None:
            ino = self.ino_of(who, source)
            self.world.changes.link(Link(who, self.session, ino, *self.parent_of(who, path)))

        def theirs() -> None:
            os.link(self.at(source), self.at(path), follow_symlinks=False)

        self.both(f"link {source!r} {path!r}", who, ours, theirs)

    def unlink(self, who: Caller, path: bytes) -> None:
        def ours() -> None:
            self.world.changes.unlink(Unlink(who, self.session, *self.parent_of(who, path)))

        self.both(f"unlink {path!r}", who, ours, lambda: os.unlink(self.at(path)))

    def rmdir(self, who: Caller, path: bytes) -> None:
        def ours() -> None:
            self.world.changes.rmdir(Rmdir(who, self.session, *self.parent_of(who, path)))

        self.both(f"rmdir {path!r}", who, ours, lambda: os.rmdir(self.at(path)))

    def rename(self, who: Caller, path: bytes) -> None:
        target = self.path()

        def ours() -> None:
            source, goal = self.parent_of(who, path), self.parent_of(who, target)
            self.world.changes.rename(Rename(who, self.session, *source, *goal, 0))

        self.both(f"rename {path!r} {target!r}", who, ours, lambda: os.rename(self.at(path), self.at(target)))

    def chmod(self, who: Caller, path: bytes) -> None:
        mode = self.rng.choice(MODES)

        def ours() -> None:
            ino = self.world.namespace.resolve(who, path, True)[-1].ino
            self.world.changes.setattr(SetAttr(who, self.session, ino, mode=mode))

        self.both(f"chmod {path!r} {mode:o}", who, ours, lambda: os.chmod(self.at(path), mode))

    def chown(self, who: Caller, path: bytes) -> None:
        uid, gid = self.rng.choice([None, 0, 1001, 1003]), self.rng.choice([None, 0, 1001, 1002])
        if uid is None and gid is None:
            return

        def ours() -> None:
            ino = self.ino_of(who, path)
            self.world.changes.setattr(SetAttr(who, self.session, ino, uid=uid, gid=gid))

        def theirs() -> None:
            os.lchown(self.at(path), -1 if uid is None else uid, -1 if gid is None else gid)

        self.both(f"chown {path!r} {uid}:{gid}", who, ours, theirs)

    def utimens(self, who: Caller, path: bytes) -> None:
        at = self.rng.choice([None, -5_000_000_001, 1_700_000_000_123_456_789])

        def ours() -> None:
            ino = self.ino_of(who, path)
            is_now = at is None
            req = SetAttr(
                who, self.session, ino, None, None, None, at, at, atime_now=is_now, mtime_now=is_now
            )
            self.world.changes.setattr(req)

        def theirs() -> None:
            times = None if at is None else (at, at)
            os.utime(self.at(path), ns=times, follow_symlinks=False) if times else os.utime(
                self.at(path), None, follow_symlinks=False
            )

        self.both(f"utimens {path!r} {at}", who, ours, theirs)

    def setxattr(self, who: Caller, path: bytes) -> None:
        name, flags = (
            self.rng.choice([b"user.a", b"user.b", b"trusted.t", b"security.s"]),
            self.rng.choice([0, 1, 2]),
        )

        def ours() -> None:
            self.world.xattrs.set(SetXattr(who, self.session, self.ino_of(who, path), name, b"v", flags))

        def theirs() -> None:
            os.setxattr(self.at(path), name, b"v", flags, follow_symlinks=False)

        self.both(f"setxattr {path!r} {name!r} {flags}", who, ours, theirs)

    def getxattr(self, who: Caller, path: bytes) -> None:
        name = self.rng.choice([b"user.a", b"user.b", b"trusted.t", b"security.s"])

        def ours() -> bytes:
            return self.world.xattrs.get(GetXattr(who, self.ino_of(who, path), name))

        self.both(
            f"getxattr {path!r} {name!r}",
            who,
            ours,
            lambda: os.getxattr(self.at(path), name, follow_symlinks=False),
        )

    def removexattr(self, who: Caller, path: bytes) -> None:
        name = self.rng.choice([b"user.a", b"user.b", b"trusted.t"])

        def ours() -> None:
            self.world.xattrs.remove(RemoveXattr(who, self.session, self.ino_of(who, path), name))

        def theirs() -> None:
            os.removexattr(self.at(path), name, follow_symlinks=False)

        self.both(f"removexattr {path!r} {name!r}", who, ours, theirs)

    def hold(self) -> None:
        """Open a file, or release one, so that some removals leave orphans."""
        if self.held and self.rng.random() < 0.6:
            ino = self.held.pop(self.rng.randrange(len(self.held)))
            self.world.content.release(Release(self.session, [ino]))
            return
        try:
            ino = self.ino_of(CALLERS[0], self.path())
            self.world.content.open(Open(CALLERS[0], self.session, ino, False))
            self.held.append(ino)
            layout = self.world.content.begin_write(BeginWrite(self.session, ino, self.worker, True))
            if self.rng.random() < 0.8:
                self.world.content.commit_content(commit(self.session, ino, layout.container))
        except AlluxioFuseError:
            return

    # --- comparing -----------------------------------------------------------------------------------

    def compare(self) -> None:
        assert self.tree_of(ROOT_INO, b"") == real_tree(self.real)

    def tree_of(self, ino: int, path: bytes) -> dict[bytes, tuple[object, ...]]:
        found: dict[bytes, tuple[object, ...]] = {}
        page = self.world.namespace.readdir(CALLERS[0], ino, b"", 10_000)
        assert page.is_last
        for entry in page.entries:
            at = path + b"/" + entry.name
            found[at] = shown(entry.attr, sorted(self.world.xattrs.list(entry.attr.ino)))
            if stat.S_ISDIR(entry.attr.mode):
                found |= self.tree_of(entry.attr.ino, at)
        return found


def commit(session: int, ino: int, container: int) -> CommitContent:
    return CommitContent(session, ino, container, 0, 0, True)


def shown(a: Attr, xattrs: list[bytes]) -> tuple[object, ...]:
    mode = a.mode if not stat.S_ISLNK(a.mode) else stat.S_IFLNK
    size = a.size if stat.S_ISLNK(a.mode) else 0
    return mode, a.nlink, a.uid, a.gid, size, tuple(xattrs)


def real_tree(root: bytes) -> dict[bytes, tuple[object, ...]]:
    found: dict[bytes, tuple[object, ...]] = {}
    for directory, directories, files in os.walk(root):
        for name in directories + files:
            at = directory + b"/" + name
            s = os.lstat(at)
            names = sorted(os.fsencode(n) for n in os.listxattr(at, follow_symlinks=False))
            mode = s.st_mode if not stat.S_ISLNK(s.st_mode) else stat.S_IFLNK
            size = s.st_size if stat.S_ISLNK(s.st_mode) else 0
            found[at[len(root) :]] = (mode, s.st_nlink, s.st_uid, s.st_gid, size, tuple(names))
    return found


OPERATIONS = [
    Pair.mkdir, Pair.mkdir, Pair.create, Pair.create, Pair.mknod, Pair.symlink, Pair.link, Pair.link,
    Pair.unlink, Pair.rmdir, Pair.rename, Pair.rename, Pair.rename, Pair.chmod, Pair.chown, Pair.utimens,
    Pair.setxattr, Pair.getxattr, Pair.removexattr,
]  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("is_root_only", [True, False])
def test_like_a_real_directory(tmp_path: Path, real: bytes, seed: int, is_root_only: bool) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to act as several users")
    rng = random.Random(seed)
    old_umask = os.umask(0)

    async def main() -> None:
        pair = Pair(World(tmp_path / "meta"), real, rng)
        start_life(pair)
        who = CALLERS[0]
        pair.both("chmod /", who, lambda: chmod_root(pair, 0o1777), lambda: os.chmod(real, 0o1777))  # noqa: S103
        for step in range(500):
            operation = rng.choice(OPERATIONS)
            operation(pair, who if is_root_only else rng.choice([who, who, *CALLERS]), pair.path())
            if rng.random() < 0.2:
                pair.hold()
            if step % 10 == 0:
                pair.world.validate()
                pair.compare()
            if step == 250:
                pair.world = pair.world.reopen(close_stale_sessions=True)
                start_life(pair)
                pair.world.content.sweep()
                pair.world.validate()
        pair.compare()
        assert pair.done > 20
        pair.world.store.close()

    try:
        trio.run(main)
    finally:
        os.umask(old_umask)


def chmod_root(pair: Pair, mode: int) -> None:
    pair.world.changes.setattr(SetAttr(CALLERS[0], pair.session, ROOT_INO, mode=mode))


def start_life(pair: Pair) -> None:
    """After (re)opening: nobody has anything open, one worker is there."""
    pair.held.clear()
    pair.session = pair.world.session()
    pair.worker = pair.world.worker()[0]
