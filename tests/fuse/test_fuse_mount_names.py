"""Names, directories, links and renames on a real mount."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest
from daemons import LocalDaemon


def raises(code: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda exc: exc.errno == code)


ODD_NAMES = [
    b"a b",
    b" ",
    b"\n",
    b"new\nline",
    b"\xff\xfe",
    b"\x01\x7f",
    "äöü€🙂".encode(),
    "a\u0308".encode(),
    "\u00e4".encode(),
    b"..a",
    b"...",
    b"-rf",
    b"a%2Fb",
    b"a\\b",
    b"*?[]",
    b"CON",
    b"~",
    b"x" * 255,
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=[ascii(name)[:20] for name in ODD_NAMES])
def test_any_bytes_are_a_name(here: Path, name: bytes) -> None:
    base = os.fsencode(here)
    path = base + b"/" + name
    with open(path, "xb") as file:
        file.write(name)
    assert os.listdir(base) == [name]
    assert Path(os.fsdecode(path)).read_bytes() == name
    os.rename(path, base + b"/other")
    os.mkdir(path)
    assert sorted(os.listdir(base)) == sorted([name, b"other"])
    os.rmdir(path)


def test_names_differ_by_case_and_normalisation(here: Path) -> None:
    for name in ("a", "A", "ä", "a\u0308"):
        (here / name).write_text(name)
    assert len(os.listdir(here)) == 4
    assert (here / "A").read_text() == "A"


def test_a_name_of_256_bytes_is_too_long(here: Path) -> None:
    path = here / ("x" * 256)
    (here / "file").touch()
    with raises(errno.ENAMETOOLONG):
        path.touch()
    with raises(errno.ENAMETOOLONG):
        path.mkdir()
    with raises(errno.ENAMETOOLONG):
        path.stat()
    with raises(errno.ENAMETOOLONG):
        (here / "file").rename(path)
    with raises(errno.ENAMETOOLONG):
        path.symlink_to("x")


def test_a_deep_tree(here: Path) -> None:
    path = here
    for number in range(60):
        path = path / f"directory {number}"
        path.mkdir()
    (path / "file").write_text("deep")
    assert (path / "file").read_text() == "deep"


def test_directories_count_their_links(here: Path) -> None:
    assert here.stat().st_nlink == 2
    (here / "a").mkdir()
    (here / "b").mkdir()
    (here / "file").touch()
    assert here.stat().st_nlink == 4
    (here / "a").rename(here / "b" / "a")
    assert here.stat().st_nlink == 3
    assert (here / "b").stat().st_nlink == 3
    (here / "b" / "a").rmdir()
    assert (here / "b").stat().st_nlink == 2


def test_a_directory_with_entries_stays(here: Path) -> None:
    (here / "d").mkdir()
    (here / "d" / "x").touch()
    with raises(errno.ENOTEMPTY):
        (here / "d").rmdir()
    (here / "e").mkdir()
    with raises(errno.ENOTEMPTY):
        (here / "e").rename(here / "d")
    (here / "d" / "x").unlink()
    (here / "e").rename(here / "d")
    assert os.listdir(here) == ["d"]


def test_wrong_kinds(here: Path) -> None:
    (here / "d").mkdir()
    (here / "f").touch()
    with raises(errno.ENOTDIR):
        (here / "f" / "x").touch()
    with raises(errno.EISDIR):
        (here / "d").unlink()
    with raises(errno.ENOTDIR):
        (here / "f").rmdir()
    with raises(errno.EISDIR):
        (here / "f").rename(here / "d")
    with raises(errno.ENOTDIR):
        (here / "d").rename(here / "f")
    with raises(errno.EINVAL):
        (here / "d").rename(here / "d" / "e")
    with raises(errno.EEXIST):
        (here / "d").mkdir()
    with raises(errno.EISDIR):
        os.open(here / "d", os.O_WRONLY)
    with raises(errno.ENOTDIR):
        os.open(here / "f", os.O_RDONLY | os.O_DIRECTORY)


def test_what_does_not_exist_can_be_made_afterwards(here: Path) -> None:
    path = here / "later"
    for _ in range(2):
        assert not path.exists()
        path.write_text("now")
        assert path.read_text() == "now"
        path.unlink()


def test_symlinks(here: Path) -> None:
    (here / "target").write_text("there")
    (here / "good").symlink_to("target")
    (here / "dangling").symlink_to("nowhere")
    (here / "loop").symlink_to("loop")
    long = "x" * 4000
    (here / "long").symlink_to(long)
    assert (here / "good").read_text() == "there"
    assert os.readlink(here / "dangling") == "nowhere"
    assert os.readlink(here / "long") == long
    info = os.lstat(here / "good")
    assert stat.S_ISLNK(info.st_mode)
    assert info.st_size == len("target")
    with raises(errno.ENOENT):
        (here / "dangling").read_text()
    with raises(errno.ELOOP):
        (here / "loop").read_text()
    with raises(errno.ELOOP):
        os.open(here / "good", os.O_RDONLY | os.O_NOFOLLOW)


def test_hard_links_are_one_file(here: Path) -> None:
    first, second = here / "first", here / "second"
    first.write_text("one")
    os.link(first, second)
    assert first.stat().st_ino == second.stat().st_ino
    assert first.stat().st_nlink == second.stat().st_nlink == 2
    second.write_text("changed")
    assert first.read_text() == "changed"
    first.unlink()
    assert second.stat().st_nlink == 1
    assert second.read_text() == "changed"
    with raises(errno.EEXIST):
        os.link(second, here / "second")
    with raises(errno.EPERM):
        os.link(here, here / "dir-link")


def test_renaming_one_hard_link_onto_another_does_nothing(here: Path) -> None:
    (here / "a").write_text("x")
    os.link(here / "a", here / "b")
    os.rename(here / "a", here / "b")
    assert sorted(os.listdir(here)) == ["a", "b"]


def test_rename_replaces(here: Path) -> None:
    (here / "old").write_text("old")
    (here / "new").write_text("new")
    ino = (here / "new").stat().st_ino
    (here / "new").rename(here / "old")
    assert os.listdir(here) == ["old"]
    assert (here / "old").read_text() == "new"
    assert (here / "old").stat().st_ino == ino


def test_rename_noreplace(here: Path) -> None:
    (here / "a").write_text("a")
    (here / "b").write_text("b")
    done = subprocess.run(
        ["mv", "--no-clobber", str(here / "a"), str(here / "b")], check=False, capture_output=True
    )
    assert (here / "b").read_text() == "b", done
    assert (here / "a").read_text() == "a"


def test_a_directory_renamed_takes_everything_with_it(here: Path) -> None:
    (here / "a" / "b").mkdir(parents=True)
    (here / "a" / "b" / "file").write_text("x")
    descriptor = os.open(here / "a" / "b", os.O_RDONLY)
    try:
        (here / "a").rename(here / "z")
        assert (here / "z" / "b" / "file").read_text() == "x"
        assert os.listdir(descriptor) == ["file"]
        assert not (here / "a").exists()
    finally:
        os.close(descriptor)


def test_fifos_and_sockets_are_kept(here: Path) -> None:
    os.mkfifo(here / "fifo", 0o640)
    assert stat.S_ISFIFO((here / "fifo").stat().st_mode)
    assert stat.S_IMODE((here / "fifo").stat().st_mode) == 0o640
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((here / "fifo").read_text()))
    reader.start()
    (here / "fifo").write_text("through the kernel")
    reader.join(30)
    assert got == ["through the kernel"]
    os.mknod(here / "socket", stat.S_IFSOCK | 0o600)
    assert stat.S_ISSOCK((here / "socket").stat().st_mode)
    os.mknod(here / "plain", stat.S_IFREG | 0o600)
    (here / "plain").write_text("x")


def test_ls_shows_dot_and_dot_dot_with_their_inodes(here: Path) -> None:
    (here / "d").mkdir()
    out = subprocess.run(["ls", "-ai", str(here / "d")], check=True, capture_output=True, text=True).stdout
    found = {line.split()[1]: int(line.split()[0]) for line in out.splitlines()}
    assert found == {".": (here / "d").stat().st_ino, "..": here.stat().st_ino}


def test_ten_thousand_entries(shared_local: LocalDaemon) -> None:
    names = [f"file-{number:05}" for number in range(10_000)]
    place = shared_local.ufs_dir / "ten thousand"
    place.mkdir()
    for name in names:
        (place / name).touch()
    directory = shared_local.mount / place.name
    try:
        while not directory.exists():  # until the sync interval is over; the run's timeout bounds it
            time.sleep(0.05)
        assert sorted(os.listdir(directory)) == names
        with os.scandir(directory) as entries:
            assert all(entry.is_file() and entry.stat().st_size == 0 for entry in entries)
        for name in names[:500]:
            os.unlink(directory / name)
        (directory / "new").touch()
        assert sorted(os.listdir(directory)) == [*names[500:], "new"]
    finally:
        shutil.rmtree(place, ignore_errors=True)  # removals of ours go on beside it


def test_listing_while_entries_come_and_go(here: Path) -> None:
    """POSIX: what is there all the time is listed exactly once; the rest may or may not be."""
    stable = {f"stable-{number}" for number in range(500)}
    for name in stable:
        (here / name).touch()
    stop = threading.Event()

    def churn() -> None:
        number = 0
        while not stop.is_set():
            path = here / f"brief-{number % 50}"
            path.touch()
            path.unlink()
            number += 1

    worker = threading.Thread(target=churn)
    worker.start()
    try:
        for _ in range(10):
            names = [name for name in os.listdir(here) if name.startswith("stable")]
            assert len(names) == len(stable)
            assert set(names) == stable
    finally:
        stop.set()
        worker.join(60)
    assert set(os.listdir(here)) == stable


def test_removing_while_listing_leaves_no_ghosts(here: Path) -> None:
    for number in range(1000):
        os.mknod(here / f"{number}")
    with os.scandir(here) as entries:
        for entry in entries:
            os.unlink(entry.path)
    assert os.listdir(here) == []
    assert not any((here / f"{number}").exists() for number in range(1000))


def test_attributes_changed_while_listing_are_seen(here: Path) -> None:
    for number in range(1000):
        os.mknod(here / f"{number:04}", 0o600)
    with os.scandir(here) as entries:
        next(entries)
        for number in range(1000):
            os.chmod(here / f"{number:04}", 0o640)
        for _ in entries:
            pass
    assert {stat.S_IMODE((here / f"{number:04}").stat().st_mode) for number in range(1000)} == {0o640}


def test_rewinding_sees_new_entries(here: Path) -> None:
    (here / "a").touch()
    descriptor = os.open(here, os.O_RDONLY)
    try:
        assert os.listdir(descriptor) == ["a"]
        (here / "b").touch()
        assert sorted(os.listdir(descriptor)) == ["a", "b"]  # os.listdir(fd) rewinds
    finally:
        os.close(descriptor)


def test_opening_by_name_while_it_is_replaced_never_fails(here: Path) -> None:
    """Rename over an existing name is atomic: whoever opens it gets the old or the new file."""
    target = here / "target"
    target.write_text("0" * 10)
    stop = threading.Event()
    failures: list[OSError] = []

    def replace() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            (here / "next").write_text(f"{number:010}")
            os.rename(here / "next", target)

    worker = threading.Thread(target=replace)
    worker.start()
    try:
        for _ in range(300):
            try:
                assert len(target.read_text()) == 10
            except OSError as exc:
                failures.append(exc)
    finally:
        stop.set()
        worker.join(60)
    assert not failures


def test_below_the_under_storage_it_is_the_same_tree(shared_local: LocalDaemon, here: Path) -> None:
    """Files appear in the under storage under their own names."""
    (here / "d").mkdir()
    (here / "d" / "file").write_text("to the under storage")
    seen = shared_local.ufs_dir / here.name / "d" / "file"
    shared_local.wait_persisted(f"/{here.name}")
    assert seen.read_text() == "to the under storage"
