"""For how long the kernel is told to believe what."""

import stat

import pytest

from alluxiofuse.fuse.invalidation import Invalidator
from alluxiofuse.fuse.view import KernelView
from alluxiofuse.wire.types import Attr

LIMIT_S = 100.0


class Health:
    is_healthy = True


def attr(
    ino: int, *, mode: int = stat.S_IFREG | 0o644, cache_s: float = 50.0, container: int = 7, home: int = 0
) -> Attr:
    return Attr(
        ino=ino,
        mode=mode,
        nlink=1,
        uid=1000,
        gid=1001,
        rdev=0,
        size=1025,
        atime_ns=-1,
        mtime_ns=-1_500_000_000,
        ctime_ns=3,
        btime_ns=4,
        container=container,
        home=home,
        persistence=0,
        mount_id=1,
        cache_s=cache_s,
    )


class Recorder:
    """In place of pyfuse3's notifications."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def invalidate_inode(self, inode: int, attr_only: bool = False) -> None:
        self.calls.append(("attr" if attr_only else "data", inode))

    def invalidate_entry(self, inode_p: int, name: bytes) -> None:
        self.calls.append(("entry", inode_p, name))


@pytest.fixture
def view() -> KernelView:
    health = Health()
    made = KernelView(1, LIMIT_S, lambda: health.is_healthy)
    made.health = health  # type: ignore[attr-defined]
    return made


def told(view: KernelView) -> list[tuple[object, ...]]:
    """Run what was ordered; for a view that `connected` has prepared."""
    invalidator, recorder = view.test  # type: ignore[attr-defined]
    invalidator.start()
    assert invalidator.wait_idle(10)
    invalidator.close()
    assert invalidator.join(10)
    return list(recorder.calls)


def connected(view: KernelView) -> KernelView:
    recorder = Recorder()
    invalidator = Invalidator(recorder, view.reset)
    view.connect(invalidator)
    view.test = invalidator, recorder  # type: ignore[attr-defined]
    return view


def test_attributes_are_the_inodes(view: KernelView) -> None:
    out = view.entry(attr(5), 1, b"a", view.changes.now)
    assert (out.st_ino, out.st_size, out.st_blocks, out.st_uid, out.st_gid) == (5, 1025, 3, 1000, 1001)
    assert (out.st_atime_ns, out.st_mtime_ns, out.st_ctime_ns) == (-1, -1_500_000_000, 3)


def test_timeouts_are_the_masters_bounded_by_the_limit(view: KernelView) -> None:
    now = view.changes.now
    assert view.entry(attr(5), 1, b"a", now).entry_timeout == 50
    assert view.entry(attr(5, cache_s=1e9), 1, b"a", now).attr_timeout == LIMIT_S
    assert view.entry(attr(5, cache_s=-1.0), 1, b"a", now).attr_timeout == 0


def test_without_news_of_changes_nothing_is_cached(view: KernelView) -> None:
    view.health.is_healthy = False  # type: ignore[attr-defined]
    out = view.entry(attr(5), 1, b"a", view.changes.now)
    assert (out.entry_timeout, out.attr_timeout) == (0, 0)
    assert view.negative(1, b"b", view.changes.now).entry_timeout == 0


def test_attributes_of_a_file_being_written_are_asked_for_each_time(view: KernelView) -> None:
    out = view.entry(attr(5, home=3), 1, b"a", view.changes.now)
    assert (out.entry_timeout, out.attr_timeout) == (50, 0)


def test_an_answer_that_a_change_has_overtaken_is_not_cached(view: KernelView) -> None:
    since = view.changes.now
    view.entry_changed(1, b"a")
    view.attr_changed(6)
    assert view.entry(attr(5), 1, b"a", since).entry_timeout == 0
    assert view.entry(attr(5), 1, b"a", since).attr_timeout == 50
    assert view.entry(attr(6), 1, b"b", since).attr_timeout == 0
    assert view.negative(1, b"a", since).entry_timeout == 0


def test_a_name_that_does_not_exist_is_cached_as_long_as_its_directory(view: KernelView) -> None:
    now = view.changes.now
    assert view.negative(1, b"a", now).entry_timeout == 0  # nothing is known of the directory yet
    view.attributes(attr(1, mode=stat.S_IFDIR | 0o755, cache_s=20), now)
    answer = view.negative(1, b"a", now)
    assert (answer.st_ino, answer.entry_timeout) == (0, 20)


def test_the_kernel_is_told_only_of_what_it_knows(view: KernelView) -> None:
    connected(view)
    view.entry(attr(5), 1, b"a", view.changes.now)
    view.attr_changed(5)
    view.data_changed(5)
    view.data_changed(6)
    view.entry_changed(6, b"x")
    view.entry_changed(1, b"b")
    assert told(view) == [("attr", 5), ("data", 5), ("entry", 1, b"b"), ("attr", 1)]


def test_forgetting_counts_lookups(view: KernelView) -> None:
    for _ in range(3):
        view.entry(attr(5), 1, b"a", view.changes.now)
    view.forget(5, 2)
    assert view.knows(5)
    view.forget(5, 1)
    assert not view.knows(5)
    view.forget(5, 1)


def test_a_reset_voids_the_names_of_the_root_and_every_inode(view: KernelView) -> None:
    connected(view)
    now = view.changes.now
    view.entry(attr(5), 1, b"a", now)
    view.entry(attr(6), 5, b"b", now)
    view.negative(1, b"none", now)
    view.reset()
    calls = told(view)
    assert {call for call in calls if call[0] == "entry"} == {("entry", 1, b"a"), ("entry", 1, b"none")}
    assert {call for call in calls if call[0] == "data"} == {("data", 5), ("data", 6)}
    assert view.entry(attr(5), 1, b"a", now).entry_timeout == 0


def test_a_subtree_is_the_kernels_root() -> None:
    view = connected(KernelView(77, LIMIT_S, lambda: True))
    assert view.ours(1) == 77
    assert view.kernels(77) == 1
    assert view.attributes(attr(77), view.changes.now).st_ino == 1
    view.entry_changed(77, b"x")
    assert told(view) == [("entry", 1, b"x"), ("attr", 1)]
