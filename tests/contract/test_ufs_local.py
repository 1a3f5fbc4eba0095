"""The local connector: the contract, staying inside, fingerprints, and real full or read-only media."""

from __future__ import annotations

import ctypes
import errno
import os
import stat as stat_bits
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import wait_until
from under_storage import ATTRS, Outside, UnderStorageContract, names, pattern, put

import alluxiofuse.ufs.beneath as beneath
import alluxiofuse.ufs.local as local
from alluxiofuse.errors import UfsError, UfsNotFoundError, UfsPermissionError, UfsUnavailableError
from alluxiofuse.ufs.base import TEMP_PREFIX, UfsAttrs
from alluxiofuse.ufs.file_copy import copy_range, segments
from alluxiofuse.ufs.local import LocalUnderStorage

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts, or changes its user")


class OutsideDirectory(Outside):
    def __init__(self, root: Path) -> None:
        self.root = os.fsencode(root)

    def write(self, path: bytes, data: bytes) -> None:
        full = os.path.join(self.root, path)
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(full, "wb") as out:
            out.write(data)

    def read(self, path: bytes) -> bytes:
        with open(os.path.join(self.root, path), "rb") as source:
            return source.read()

    def leftovers(self) -> list[str]:
        found = []
        for _, _, files in os.walk(self.root):
            found += [os.fsdecode(name) for name in files if name.startswith(TEMP_PREFIX)]
        return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "place"


@pytest.fixture
def store(place: Path) -> LocalUnderStorage:
    found = LocalUnderStorage(str(place), is_synced=False)
    found.check()
    return found


@pytest.fixture
def outside(store: LocalUnderStorage, place: Path) -> OutsideDirectory:
    return OutsideDirectory(place)


class StaysInside:
    """Attempts to leave the directory through symlinks."""

    @pytest.fixture
    def elsewhere(self, tmp_path: Path, store: LocalUnderStorage, place: Path) -> Path:
        found = tmp_path / "elsewhere"
        found.mkdir()
        (found / "secret").write_text("secret")
        (place / "link").symlink_to(found)
        (place / "file").symlink_to(found / "secret")
        (place / "up").symlink_to("..")
        (place / "dangling").symlink_to(found / "made")
        return found

    def test_nothing_is_reached_through_a_symlink(self, store: LocalUnderStorage, elsewhere: Path) -> None:
        before = os.stat(elsewhere / "secret")
        for path in (b"link/secret", b"up/elsewhere/secret", b"link/sub/x"):
            for call in self._calls(store, path):
                with pytest.raises(UfsError):
                    call()
        for path in (b"link", b"up", b"file", b"dangling"):
            with pytest.raises(UfsError):
                store.read(path, 0, 10)
            with pytest.raises(UfsNotFoundError):
                store.list(path)
            with pytest.raises(UfsError):
                store.copy(path, b"copy")
            store.set_attrs(path, UfsAttrs(0o777, 0, 0, 5))
            assert stat_bits.S_ISLNK(store.stat(path).mode)
        put(store, b"file", b"new")
        put(store, b"dangling", b"new")
        store.delete_many([b"link/secret", b"link", b"up"])
        assert os.listdir(elsewhere) == ["secret"]
        after = os.stat(elsewhere / "secret")
        assert (after.st_mode, after.st_mtime_ns, after.st_size) == (
            before.st_mode,
            before.st_mtime_ns,
            before.st_size,
        )
        assert sorted(names(store)) == [b"dangling", b"file"]

    @staticmethod
    def _calls(store: LocalUnderStorage, path: bytes) -> list[Callable[[], object]]:
        return [
            lambda: store.stat(path),
            lambda: store.read(path, 0, 10),
            lambda: store.list(path),
            lambda: store.copy(path, b"copy"),
            lambda: store.rename(path, b"moved"),
            lambda: put(store, path, b"x"),
            lambda: store.mkdir(path, ATTRS),
            lambda: store.symlink(path, b"t", ATTRS),
            lambda: store.set_attrs(path, ATTRS),
        ]

    def test_directory_swapped_for_a_symlink_meanwhile(
        self, store: LocalUnderStorage, place: Path, elsewhere: Path
    ) -> None:
        (place / "d").mkdir()
        (place / "s").symlink_to(elsewhere)
        stop = threading.Event()

        libc = ctypes.CDLL(None)
        here, there = os.fsencode(place / "d"), os.fsencode(place / "s")

        def swap() -> None:
            while not stop.is_set():
                assert libc.renameat2(-100, here, -100, there, 2) == 0  # RENAME_EXCHANGE

        swapper = threading.Thread(target=swap)
        swapper.start()
        try:
            for turn in range(300):
                for call in (
                    lambda turn=turn: put(store, b"d/f%d" % (turn % 3), b"x"),
                    lambda: store.set_attrs(b"d/secret", ATTRS),
                    lambda: store.delete(b"d/secret"),
                    lambda: store.read(b"d/secret", 0, 1),
                ):
                    try:
                        call()
                    except UfsError:
                        continue
        finally:
            stop.set()
            swapper.join()
        assert os.listdir(elsewhere) == ["secret"]


class TestLocal(UnderStorageContract, StaysInside):
    pass


class TestLocalWithoutOpenat2(UnderStorageContract, StaysInside):
    """Old kernels and strict containers: the component-wise walk."""

    @pytest.fixture(autouse=True)
    def _walk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(local, "open_beneath", beneath._walk)


def test_special_files_are_shown_and_never_opened(store: LocalUnderStorage, place: Path) -> None:
    os.mkfifo(place / "fifo")
    seen = store.stat(b"fifo")
    assert stat_bits.S_ISFIFO(seen.mode)
    with pytest.raises(UfsError):
        store.read(b"fifo", 0, 1)
    store.delete(b"fifo")
    assert names(store) == []


def test_change_in_the_same_tick_is_noticed(store: LocalUnderStorage, place: Path) -> None:
    target = place / "f"
    for turn in range(20):
        target.write_bytes(b"a%03d" % turn)
        by_list = turn % 2 == 0
        old = store.list(b"").entries[0] if by_list else store.stat(b"f")
        target.write_bytes(b"b%03d" % turn)
        os.utime(target, ns=(old.mtime_ns, old.mtime_ns))
        assert store.stat(b"f").fingerprint != old.fingerprint


def test_young_directory_has_no_fingerprint(store: LocalUnderStorage, place: Path) -> None:
    (place / "d").mkdir()
    young = store.stat(b"d").fingerprint
    old_enough: list[bytes] = [b""]

    def settled() -> bool:
        old_enough[0] = store.stat(b"d").fingerprint
        return bool(old_enough[0])

    wait_until(settled, "the directory is old enough", 5)
    assert young in (b"", old_enough[0])
    (place / "d" / "new").touch()
    assert store.stat(b"d").fingerprint != old_enough[0]


def test_paths_longer_than_the_kernel_takes_at_once(store: LocalUnderStorage) -> None:
    path = b"/".join([b"d" * 200] * 30)
    made = put(store, path, b"deep")
    assert store.stat(path).fingerprint == made.fingerprint
    assert bytes(store.read(path, 0, 10, made.fingerprint)) == b"deep"
    store.rename(path, path + b"x")
    assert names(store, path.rpartition(b"/")[0]) == [path + b"x"]
    store.delete(path + b"x")


def test_kinds_that_do_not_fit(store: LocalUnderStorage) -> None:
    """None of these may look like a source that is gone."""
    put(store, b"file", b"")
    store.mkdir(b"dir", ATTRS)
    calls: list[Callable[[], object]] = [
        lambda: store.rename(b"dir", b"file"),
        lambda: store.rename(b"dir", b"file/below"),
        lambda: store.copy(b"file", b"file/below"),
        lambda: put(store, b"file/a/b", b""),
        lambda: store.mkdir(b"file/a", ATTRS),
        lambda: store.symlink(b"file/a", b"t", ATTRS),
    ]
    for call in calls:
        with pytest.raises(UfsError) as caught:
            call()
        assert not isinstance(caught.value, UfsNotFoundError)
        assert caught.value.errno == errno.ENOTDIR


@needs_root
def test_rename_between_nested_mounts_is_refused(store: LocalUnderStorage, place: Path) -> None:
    put(store, b"f", b"x")
    (place / "nested").mkdir()
    target = str(place / "nested")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", target], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no mounts here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(UfsError) as caught:
            store.rename(b"f", b"nested/f")
        assert caught.value.errno == errno.EXDEV
        store.copy(b"f", b"nested/f")
        assert names(store, b"nested") == [b"nested/f"]
    finally:
        subprocess.run(["umount", target], check=True)


def test_hard_links_renamed_over_each_other(store: LocalUnderStorage, place: Path) -> None:
    put(store, b"a", b"same")
    os.link(place / "a", place / "b")
    store.rename(b"a", b"b")
    assert names(store) == [b"b"]


def test_holes_stay_holes(store: LocalUnderStorage, place: Path, tmp_path: Path) -> None:
    size = 64 << 20
    with open(tmp_path / "sparse", "w+b") as source:
        source.truncate(size)
        os.pwrite(source.fileno(), b"x" * 4096, 32 << 20)
        if len(list(segments(source.fileno(), size))) != 1:
            pytest.skip("this filesystem does not tell where holes are")
        store.put(b"sparse", source.fileno(), size, ATTRS)
    seen = os.stat(place / "sparse")
    assert seen.st_size == size
    assert seen.st_blocks * 512 < 1 << 20


def test_copy_between_filesystems(tmp_path: Path) -> None:
    """memfd (tmpfs) to disk: copy_file_range refuses, sendfile takes over."""
    data = pattern((17 << 20) + 1)
    source = os.memfd_create("s")
    try:
        os.pwrite(source, data, 0)
        with open(tmp_path / "t", "w+b") as target:
            copy_range(source, target.fileno(), len(data), lambda: None)
        assert (tmp_path / "t").read_bytes() == data
    finally:
        os.close(source)


def test_synced_store_works_too(tmp_path: Path) -> None:
    store = LocalUnderStorage(str(tmp_path / "p"))
    store.check()
    put(store, b"a/b", b"x")
    store.rename(b"a/b", b"c/d")
    store.mkdir(b"e", ATTRS)
    store.delete_many([b"c/d", b"a", b"c", b"e"])
    assert names(store) == []


def test_check(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UfsError, match="not a directory"):
        LocalUnderStorage(str(tmp_path / "file")).check()
    with pytest.raises(UfsNotFoundError, match="neither it nor"):
        LocalUnderStorage(str(tmp_path / "no" / "such")).check()
    LocalUnderStorage(str(tmp_path / "new")).check()
    assert (tmp_path / "new").is_dir()


def test_missing_place_is_not_an_empty_one(store: LocalUnderStorage, place: Path) -> None:
    put(store, b"f", b"")
    place.rename(place.with_name("away"))
    for call in (
        lambda: store.stat(b"f"),
        lambda: store.list(b""),
        lambda: store.delete(b"f"),
        lambda: put(store, b"g", b""),
    ):
        with pytest.raises(UfsUnavailableError, match="gone"):
            call()
    place.with_name("away").rename(place)
    assert store.stat(b"f").is_file


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    target = tmp_path / "tmpfs"
    target.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0755", "tmpfs", str(target)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no mounts here: {mounted.stderr.strip()}")
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


@needs_root
def test_full_and_read_only_medium(small_tmpfs: Path) -> None:
    store = LocalUnderStorage(str(small_tmpfs))
    store.check()
    put(store, b"f", b"old")
    with pytest.raises(UfsError) as full:
        put(store, b"f", pattern(2 << 20))
    assert full.value.errno == errno.ENOSPC
    assert OutsideDirectory(small_tmpfs).leftovers() == []
    assert bytes(store.read(b"f", 0, 10)) == b"old"
    subprocess.run(["mount", "-o", "remount,ro", str(small_tmpfs)], check=True)
    for call in (
        lambda: put(store, b"f", b"x"),
        lambda: store.mkdir(b"d", ATTRS),
        lambda: store.delete(b"f"),
        lambda: store.rename(b"f", b"g"),
        lambda: store.set_attrs(b"f", ATTRS),
    ):
        with pytest.raises(UfsError) as frozen:
            call()
        assert frozen.value.errno == errno.EROFS
    assert bytes(store.read(b"f", 0, 10)) == b"old"


@needs_root
def test_unmounted_medium_is_not_an_empty_one(small_tmpfs: Path) -> None:
    store = LocalUnderStorage(str(small_tmpfs))
    (small_tmpfs / "sub").mkdir()
    inner = LocalUnderStorage(str(small_tmpfs / "sub"))
    inner.check()
    store.check()
    put(store, b"f", b"")
    subprocess.run(["umount", str(small_tmpfs)], check=True)
    try:
        for gone in (store, inner):
            with pytest.raises(UfsUnavailableError):
                gone.list(b"")
    finally:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(small_tmpfs)], check=True)


@needs_root
def test_without_permission(store: LocalUnderStorage, place: Path, tmp_path: Path) -> None:
    put(store, b"private", b"x", UfsAttrs(0o600, 0, 0, 0))
    (place / "closed").mkdir(mode=0o700)
    (place / "closed" / "f").touch()
    for directory in (place, *place.parents):
        if directory == Path("/tmp"):  # noqa: S108 - where pytest's directories begin
            break
        directory.chmod(0o755)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            for call in (
                lambda: put(store, b"new", b"x"),
                lambda: store.read(b"private", 0, 1),
                lambda: store.list(b"closed"),
                lambda: store.stat(b"closed/f"),
                lambda: store.delete(b"private"),
                lambda: store.set_attrs(b"private", ATTRS),
                lambda: store.mkdir(b"d", ATTRS),
            ):
                with pytest.raises(UfsPermissionError):
                    call()
            assert store.stat(b"private").size == 1
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sorted(names(store)) == [b"closed", b"private"]
