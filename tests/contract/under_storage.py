"""What every under storage must do: subclass `UnderStorageContract` with the fixtures `store` (an empty
one) and `outside` (the same place by other means). Nobody overrides a test; a store differs only by its
`capabilities`."""

from __future__ import annotations

import errno
import os
import stat as stat_bits
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import pytest

from alluxiofuse.errors import UfsChangedError, UfsError, UfsExistsError, UfsNotFoundError
from alluxiofuse.ufs.base import TEMP_PREFIX, PutCancelled, UfsAttrs, UfsEntry, UnderStorage

ATTRS = UfsAttrs(mode=0o640, uid=os.geteuid(), gid=os.getegid(), mtime_ns=1_600_000_000_123_456_789)
ODD_NAMES = [
    b"with space",
    b" lead and trail ",
    b"100%",
    b"a%2Fb%20c",
    "\u00fcml\u00e4ut-\u65e5\u672c\U0001f600".encode(),
    b"plus+and&eq=;:@,$!'()",
    b'quote"star*[x]{y}~^`|<>#?',
    b"...",
    b".hidden",
    b"-dash",
    b"tilde~",
    b"n" * 255,
    ("\u00e9" * 127).encode(),
]
CONTROL_NAMES = [b"new\nline", b"tab\there", b"bell\x07", b"\x7f"]


class Outside(ABC):
    """The store seen and changed by something else than the connector."""

    @abstractmethod
    def write(self, path: bytes, data: bytes) -> None: ...

    @abstractmethod
    def read(self, path: bytes) -> bytes: ...

    @abstractmethod
    def leftovers(self) -> list[str]:
        """Half-written things: temporary files, unfinished uploads."""


def put(
    store: UnderStorage,
    path: bytes,
    data: bytes,
    attrs: UfsAttrs = ATTRS,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> UfsEntry:
    fd = os.memfd_create("source")
    try:
        os.pwrite(fd, data, 0)
        os.lseek(fd, 3, os.SEEK_SET)  # the offset plays no part
        entry = store.put(path, fd, len(data), attrs, is_cancelled)
        assert os.lseek(fd, 0, os.SEEK_CUR) == 3
        return entry
    finally:
        os.close(fd)


def names(store: UnderStorage, path: bytes = b"", limit: int = 1000) -> list[bytes]:
    found: list[bytes] = []
    token = None
    while True:
        page = store.list(path, token, limit)
        found += [entry.path for entry in page.entries]
        token = page.next_token
        if token is None:
            return found


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def pattern(size: int, seed: int = 1) -> bytes:
    block = bytes((i * 7 + seed) % 251 for i in range(251 * 16))
    return (block * (size // len(block) + 1))[:size]


class UnderStorageContract:
    # --- put, stat, read ----------------------------------------------------------------------

    def test_put_then_stat_read_list(self, store: UnderStorage, outside: Outside) -> None:
        made = put(store, b"a/b/c.csv", b"hello")
        seen = store.stat(b"a/b/c.csv")
        assert made.path == seen.path == b"a/b/c.csv"
        assert seen.is_file
        assert seen.size == made.size == 5
        assert seen.fingerprint == made.fingerprint != b""
        (listed,) = store.list(b"a/b").entries
        assert listed == seen
        assert bytes(store.read(b"a/b/c.csv", 0, 5, made.fingerprint)) == b"hello"
        assert outside.read(b"a/b/c.csv") == b"hello"
        assert store.stat(b"a").is_dir
        assert names(store) == [b"a"]

    def test_empty_file(self, store: UnderStorage) -> None:
        made = put(store, b"empty", b"")
        assert store.stat(b"empty").size == 0
        assert store.stat(b"empty").is_file
        assert bytes(store.read(b"empty", 0, 10, made.fingerprint)) == b""
        assert bytes(store.read(b"empty", 0, 10)) == b""

    def test_replace(self, store: UnderStorage, outside: Outside) -> None:
        old = put(store, b"f", b"old content")
        new = put(store, b"f", b"new")
        assert new.fingerprint != old.fingerprint
        assert outside.read(b"f") == b"new"
        with pytest.raises(UfsChangedError):
            store.read(b"f", 0, 3, old.fingerprint)
        assert names(store) == [b"f"]

    def test_same_size_replaced_outside_is_noticed(self, store: UnderStorage, outside: Outside) -> None:
        old = put(store, b"f", b"aaaa")
        outside.write(b"f", b"bbbb")
        now = store.stat(b"f")
        assert now.fingerprint != old.fingerprint
        with pytest.raises(UfsChangedError):
            store.read(b"f", 0, 4, old.fingerprint)
        assert bytes(store.read(b"f", 0, 4, now.fingerprint)) == b"bbbb"

    def test_fingerprint_is_stable(self, store: UnderStorage, outside: Outside) -> None:
        outside.write(b"d/f", b"x")
        first = store.stat(b"d/f")
        assert store.stat(b"d/f") == first
        assert store.list(b"d").entries == [first]

    def test_foreign_fingerprint(self, store: UnderStorage) -> None:
        put(store, b"f", b"data")
        for wrong in (b"", b"nonsense", b"\xff\x00:4", b"0" * 32 + b":4"):
            with pytest.raises(UfsChangedError):
                store.read(b"f", 0, 4, wrong)

    @pytest.mark.parametrize(
        ("offset", "length"),
        [(0, 1), (0, 1000), (999, 1), (999, 100), (0, 5000), (1000, 1), (5000, 10), (10, 0), (123, 456)],
    )
    def test_ranges(self, store: UnderStorage, offset: int, length: int) -> None:
        data = pattern(1000)
        made = put(store, b"f", data)
        expected = data[offset : offset + length]
        assert bytes(store.read(b"f", offset, length, made.fingerprint)) == expected
        assert bytes(store.read(b"f", offset, length)) == expected

    def test_missing(self, store: UnderStorage) -> None:
        put(store, b"there/f", b"x")
        for path in (
            b"nope",
            b"no/such/file",
            b"there/nope",
            b"there/f/below",
            b"ther",
            b"there/"[:-1] + b"x",
        ):
            with pytest.raises(UfsNotFoundError):
                store.stat(path)
            with pytest.raises(UfsNotFoundError):
                store.read(path, 0, 1)
            with pytest.raises(UfsNotFoundError):
                store.copy(path, b"copy")
            with pytest.raises(UfsNotFoundError):
                store.rename(path, b"moved")
            with pytest.raises(UfsNotFoundError):
                store.set_attrs(path, ATTRS)
        assert names(store) == [b"there"]

    def test_reading_a_directory(self, store: UnderStorage) -> None:
        put(store, b"d/f", b"x")
        with pytest.raises(UfsError) as caught:
            store.read(b"d", 0, 1)
        assert caught.value.errno == errno.EISDIR

    def test_big_file_in_parts(self, store: UnderStorage, outside: Outside) -> None:
        data = pattern((12 << 20) + 12345)
        made = put(store, b"big", data)
        assert made.fingerprint == store.stat(b"big").fingerprint
        assert outside.read(b"big") == data
        assert bytes(store.read(b"big", 5 << 20, 6 << 20, made.fingerprint)) == data[5 << 20 : 11 << 20]
        assert outside.leftovers() == []

    def test_sparse_file(self, store: UnderStorage, outside: Outside) -> None:
        size = (8 << 20) + 5
        fd = os.memfd_create("sparse")
        try:
            os.ftruncate(fd, size)
            os.pwrite(fd, b"middle", 4 << 20)
            store.put(b"sparse", fd, size, ATTRS)
        finally:
            os.close(fd)
        expected = bytes(4 << 20) + b"middle" + bytes(size - (4 << 20) - 6)
        assert outside.read(b"sparse") == expected

    def test_only_size_bytes_are_stored(self, store: UnderStorage, outside: Outside) -> None:
        fd = os.memfd_create("longer")
        try:
            os.pwrite(fd, b"0123456789", 0)
            store.put(b"f", fd, 4, ATTRS)
            assert outside.read(b"f") == b"0123"
            with pytest.raises(UfsError):
                store.put(b"f", fd, 11, ATTRS)
        finally:
            os.close(fd)
        assert outside.read(b"f") == b"0123"
        assert outside.leftovers() == []

    # --- names -----------------------------------------------------------------------------------

    def test_odd_names(self, store: UnderStorage, outside: Outside) -> None:
        for name in ODD_NAMES:
            made = put(store, b"odd/" + name, name)
            assert bytes(store.read(b"odd/" + name, 0, 1000, made.fingerprint)) == name
            assert outside.read(b"odd/" + name) == name
        assert sorted(names(store, b"odd")) == sorted(b"odd/" + name for name in ODD_NAMES)

    def test_odd_directories(self, store: UnderStorage) -> None:
        for name in ODD_NAMES:
            put(store, b"odd/" + name + b"/f", b"1")
            assert names(store, b"odd/" + name) == [b"odd/" + name + b"/f"]
            assert store.stat(b"odd/" + name).is_dir
        assert sorted(names(store, b"odd")) == sorted(b"odd/" + name for name in ODD_NAMES)

    def test_control_characters_in_names(self, store: UnderStorage, outside: Outside) -> None:
        for name in CONTROL_NAMES:
            made = put(store, name, name)
            assert bytes(store.read(name, 0, 100, made.fingerprint)) == name
            assert bytes(store.read(name, 1, 2)) == name[1:3]
            assert outside.read(name) == name

    def test_name_too_long(self, store: UnderStorage) -> None:
        with pytest.raises(UfsError) as caught:
            put(store, b"n" * 256, b"")
        assert caught.value.errno == errno.ENAMETOOLONG

    def test_not_utf8_is_stored_or_refused(self, store: UnderStorage) -> None:
        refused: UfsError | None = None
        try:
            put(store, b"\xff\xfe", b"x")
        except UfsError as error:
            refused = error
        if refused is None:
            assert names(store) == [b"\xff\xfe"]
            return
        assert refused.errno == errno.EILSEQ
        assert names(store) == []
        store.delete(b"\xff\xfe")  # can't be there: no error

    @pytest.mark.parametrize("path", [b"/etc", b"../x", b"a/../b", b"a//b", b"a/", b".", b"a/.", b"a\0b"])
    def test_bad_paths_are_refused(self, store: UnderStorage, path: bytes) -> None:
        calls: list[Callable[[], object]] = [
            lambda: store.stat(path),
            lambda: store.list(path),
            lambda: store.read(path, 0, 1),
            lambda: put(store, path, b"x"),
            lambda: store.mkdir(path, ATTRS),
            lambda: store.set_attrs(path, ATTRS),
            lambda: store.rename(path, b"y"),
            lambda: store.copy(path, b"y"),
            lambda: store.delete(path),
        ]
        for call in calls:
            with pytest.raises(UfsError) as caught:
                call()
            assert caught.value.errno == errno.EINVAL

    def test_the_place_itself(self, store: UnderStorage) -> None:
        root = store.stat(b"")
        assert root.path == b""
        assert root.is_dir
        assert store.mkdir(b"", ATTRS).is_dir
        with pytest.raises(UfsError):
            store.delete(b"")
        with pytest.raises(UfsError):
            put(store, b"", b"x")
        assert names(store) == []

    def test_reserved_names(self, store: UnderStorage, outside: Outside) -> None:
        with pytest.raises(UfsError):
            put(store, b"d/" + TEMP_PREFIX + b"x", b"")

    # --- visible only when complete ------------------------------------------------------------

    def test_reader_sees_old_or_new(self, store: UnderStorage) -> None:
        size = 300_000
        put(store, b"f", b"a" * size)
        stop = threading.Event()
        torn: list[str] = []

        def read() -> None:
            while not stop.is_set():
                entry = store.stat(b"f")
                try:
                    data = bytes(store.read(b"f", 0, size, entry.fingerprint))
                except UfsChangedError:
                    continue
                if len(data) != size or len(set(data)) != 1:
                    torn.append(f"{len(data)} bytes of {set(data)}")

        reader = threading.Thread(target=read)
        reader.start()
        try:
            for turn in range(20):
                put(store, b"f", bytes([98 + turn % 20]) * size)
        finally:
            stop.set()
            reader.join()
        assert torn == []

    def test_cancel_leaves_nothing(self, store: UnderStorage, outside: Outside) -> None:
        put(store, b"f", b"old")
        data = pattern((11 << 20) + 1)
        for allowed in range(100):
            asked = 0

            def is_cancelled(limit: int = allowed) -> bool:
                nonlocal asked
                asked += 1
                return asked > limit

            try:
                put(store, b"f", data, is_cancelled=is_cancelled)
                break
            except PutCancelled:
                assert outside.read(b"f") == b"old"
                assert names(store) == [b"f"]
                assert outside.leftovers() == []
        assert allowed >= 1, "is_cancelled must be asked"
        assert outside.read(b"f") == data

    def test_cancel_of_a_small_one(self, store: UnderStorage, outside: Outside) -> None:
        with pytest.raises(PutCancelled):
            put(store, b"small", b"x", is_cancelled=lambda: True)
        assert names(store) == []
        assert outside.leftovers() == []

    # --- listing -------------------------------------------------------------------------------

    def test_listing_in_pages(self, store: UnderStorage, outside: Outside) -> None:
        files = [b"many/f%04d" % i for i in range(2500)]
        source = os.memfd_create("one")

        def write(part: list[bytes]) -> None:
            for path in part:
                store.put(path, source, 0, ATTRS)

        workers = [threading.Thread(target=write, args=(files[i::4],)) for i in range(4)]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            os.close(source)
        outside.write(b"many/dir/x", b"")
        expected = [b"many/dir", *files]
        assert names(store, b"many") == expected
        assert names(store, b"many", limit=700) == expected
        first = store.list(b"many", None, 100)
        assert len(first.entries) == 100 or first.next_token is None
        store.delete_many(files)
        assert names(store, b"many") == [b"many/dir"]

    def test_listing_is_one_level(self, store: UnderStorage) -> None:
        for path in (b"a/1", b"a/b/2", b"a/b/c/3", b"ab", b"a.txt"):
            put(store, path, b"")
        assert sorted(names(store)) == [b"a", b"a.txt", b"ab"]
        assert sorted(names(store, b"a")) == [b"a/1", b"a/b"]
        kinds = {entry.path: entry.is_dir for entry in store.list(b"a").entries}
        assert kinds == {b"a/1": False, b"a/b": True}

    def test_listing_a_missing_directory(self, store: UnderStorage) -> None:
        put(store, b"f", b"")
        if store.capabilities.has_directories:
            for path in (b"nope", b"f"):
                with pytest.raises(UfsNotFoundError):
                    store.list(path)
        else:
            assert names(store, b"nope") == []

    def test_temporary_names_are_hidden(self, store: UnderStorage, outside: Outside) -> None:
        if store.capabilities.has_directories:
            outside.write(b"d/" + TEMP_PREFIX + b"0123", b"half")
            assert names(store, b"d") == []
            store.delete(b"d")
            assert names(store) == []

    # --- directories and attributes ----------------------------------------------------------------

    def test_mkdir(self, store: UnderStorage) -> None:
        made = store.mkdir(b"x/y/z", ATTRS)
        assert made.is_dir
        assert made.path == b"x/y/z"
        assert store.mkdir(b"x/y/z", ATTRS).is_dir
        if store.capabilities.has_directories:
            assert store.stat(b"x/y/z").is_dir
            assert names(store, b"x/y/z") == []
            put(store, b"f", b"")
            with pytest.raises(UfsExistsError):
                store.mkdir(b"f", ATTRS)
            with pytest.raises(UfsError):
                put(store, b"x", b"over a directory")
            with pytest.raises(UfsError):
                put(store, b"f/g", b"below a file")
        else:
            assert names(store) == []

    def test_directory_fingerprint_changes_with_names(self, store: UnderStorage, outside: Outside) -> None:
        outside.write(b"d/one", b"")
        before = store.stat(b"d").fingerprint
        outside.write(b"d/two", b"")
        after = store.stat(b"d").fingerprint
        assert before == b"" or before != after

    def test_attributes(self, store: UnderStorage) -> None:
        made = put(store, b"f", b"x")
        directory = store.mkdir(b"d", ATTRS)
        changed = store.set_attrs(b"f", UfsAttrs(0o4711, ATTRS.uid, ATTRS.gid, -5_000_000_001))
        assert changed.path == b"f"
        assert bytes(store.read(b"f", 0, 1, changed.fingerprint)) == b"x"
        if store.capabilities.has_posix_attrs:
            for entry in (made, directory):
                assert stat_bits.S_IMODE(entry.mode) == ATTRS.mode
                assert entry.mtime_ns == ATTRS.mtime_ns
                assert (entry.uid, entry.gid) == (ATTRS.uid, ATTRS.gid)
            assert stat_bits.S_IMODE(changed.mode) == 0o4711
            assert changed.mtime_ns == -5_000_000_001
            seen = store.stat(b"f")
            assert (seen.mode, seen.mtime_ns) == (changed.mode, changed.mtime_ns)
        else:
            assert stat_bits.S_IMODE(made.mode) == stat_bits.S_IMODE(changed.mode) == 0

    def test_symlinks(self, store: UnderStorage) -> None:
        if not store.capabilities.has_symlinks:
            with pytest.raises(UfsError) as caught:
                store.symlink(b"l", b"target", ATTRS)
            assert caught.value.errno == errno.EOPNOTSUPP
            return
        made = store.symlink(b"d/l", b"../any\xffwhere", ATTRS)
        assert stat_bits.S_ISLNK(made.mode)
        assert made.target == b"../any\xffwhere"
        seen = store.stat(b"d/l")
        assert (seen.mode, seen.target, seen.mtime_ns) == (made.mode, made.target, ATTRS.mtime_ns)
        assert store.list(b"d").entries == [seen]
        assert store.symlink(b"d/l", b"other", ATTRS).target == b"other"
        put(store, b"d/l", b"now a file")
        assert store.stat(b"d/l").is_file
        store.symlink(b"d/l", b"x", ATTRS)
        store.delete(b"d/l")
        assert names(store, b"d") == []

    # --- rename, copy, delete ----------------------------------------------------------------------

    def test_rename(self, store: UnderStorage, outside: Outside) -> None:
        put(store, b"a", b"content")
        put(store, b"there/b", b"replaced")
        moved = store.rename(b"a", b"there/b")
        assert moved.path == b"there/b"
        assert moved.fingerprint == store.stat(b"there/b").fingerprint
        assert bytes(store.read(b"there/b", 0, 100, moved.fingerprint)) == b"content"
        assert names(store) == [b"there"]
        store.rename(b"there/b", b"new/parents/c")
        assert outside.read(b"new/parents/c") == b"content"
        assert store.rename(b"new/parents/c", b"new/parents/c").size == 7
        assert outside.read(b"new/parents/c") == b"content"

    def test_rename_of_a_tree(self, store: UnderStorage, outside: Outside) -> None:
        if not store.capabilities.has_atomic_rename:
            return
        put(store, b"t/a/1", b"1")
        put(store, b"t/2", b"2")
        store.mkdir(b"empty", ATTRS)
        assert store.rename(b"t", b"empty").is_dir
        assert outside.read(b"empty/a/1") == b"1"
        with pytest.raises(UfsNotFoundError):
            store.stat(b"t")
        put(store, b"full/x", b"")
        with pytest.raises(UfsError) as caught:
            store.rename(b"empty", b"full")
        assert caught.value.errno in (errno.ENOTEMPTY, errno.EEXIST)
        with pytest.raises(UfsError):
            store.rename(b"empty", b"empty/a/below")

    def test_copy(self, store: UnderStorage, outside: Outside) -> None:
        data = pattern(100_000)
        put(store, b"a", data)
        made = store.copy(b"a", b"deep/b")
        assert made.path == b"deep/b"
        assert made.size == len(data)
        assert made.fingerprint == store.stat(b"deep/b").fingerprint
        assert outside.read(b"deep/b") == outside.read(b"a") == data
        put(store, b"a", b"changed")
        assert outside.read(b"deep/b") == data
        store.copy(b"a", b"deep/b")
        assert outside.read(b"deep/b") == b"changed"
        for name in (b"a b%+&.txt", "\u00fc".encode()):
            put(store, name, b"odd")
            store.copy(name, b"copy of " + name)
            assert outside.read(b"copy of " + name) == b"odd"

    def test_delete(self, store: UnderStorage) -> None:
        put(store, b"d/f", b"")
        put(store, b"d/g", b"")
        if store.capabilities.has_directories:
            with pytest.raises(UfsError) as caught:
                store.delete(b"d")
            assert caught.value.errno == errno.ENOTEMPTY
        store.delete(b"d/f")
        store.delete(b"d/f")
        store.delete(b"no/such/thing")
        assert names(store, b"d") == [b"d/g"]
        store.delete_many([b"d/g", b"d/nope", b"d"])
        with pytest.raises(UfsNotFoundError):
            store.stat(b"d/g")
        with pytest.raises(UfsNotFoundError):
            store.stat(b"d")

    # --- the rest ----------------------------------------------------------------------------------

    def test_check_and_close(self, store: UnderStorage) -> None:
        store.check()
        store.check()
        store.close()
        store.close()

    def test_many_threads(self, store: UnderStorage) -> None:
        failed: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for turn in range(5):
                    path = b"shared/%d-%d" % (number, turn)
                    data = pattern(2000 + turn, number)
                    made = put(store, path, data)
                    assert bytes(store.read(path, 0, 5000, made.fingerprint)) == data
                    assert path in names(store, b"shared")
                    store.delete(path)
            except BaseException as error:  # shown by the main thread
                failed.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []

    def test_no_descriptor_leaks(self, store: UnderStorage) -> None:
        def round_trip() -> None:
            made = put(store, b"d/f", b"data")
            store.stat(b"d/f")
            store.list(b"d")
            store.read(b"d/f", 0, 4, made.fingerprint)
            store.copy(b"d/f", b"d/g")
            store.rename(b"d/g", b"d/h")
            for failing in (
                lambda: store.stat(b"nope/x"),
                lambda: store.read(b"d/f", 0, 4, b"other"),
                lambda: put(store, b"d/" + b"n" * 300, b""),
                lambda: put(store, b"d/c", b"x", is_cancelled=lambda: True),
                lambda: store.rename(b"d/none", b"e/f"),
                lambda: store.set_attrs(b"d/none", ATTRS),
            ):
                with pytest.raises((UfsError, PutCancelled)):
                    failing()
            store.delete_many([b"d/h", b"d/f"])

        round_trip()
        before = open_fds()
        for _ in range(5):
            round_trip()
        assert open_fds() <= before

    def test_nothing_is_shown_that_is_secret(self, store: UnderStorage) -> None:
        with pytest.raises(UfsNotFoundError) as caught:
            store.stat(b"missing")
        for text in (str(caught.value), repr(store), store.uri):
            assert "secret" not in text.lower()
