"""Ordinary programs on the mount, doing what they do on a local disk."""

from __future__ import annotations

import functools
import os
import shutil
import sqlite3
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import LocalDaemon
from trees import run as run_program

TIMEOUT_S = 300
run = functools.partial(run_program, timeout_s=TIMEOUT_S)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"not in a minute: {what}"
        time.sleep(0.05)


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory on a local disk with everything that a tree may hold."""
    base = tmp_path_factory.mktemp("tree") / "tree"
    base.mkdir()
    for number in range(120):
        directory = base / f"d{number % 7}" / f"e{number % 3}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"file {number}").write_bytes(os.urandom(number * 1000 % 90_000))
    (base / "big").write_bytes(os.urandom(3 << 20))
    (base / "empty").touch()
    (base / "empty directory").mkdir()
    (base / "link").symlink_to("d1/e1")
    (base / "dangling").symlink_to("/nowhere")
    os.link(base / "big", base / "hard link")
    (base / "script").write_text("#!/bin/sh\n")
    (base / "script").chmod(0o755)
    (base / "private").touch(0o600)
    os.utime(base / "empty", ns=(10**18, 10**18 + 123_456_789))
    os.mkfifo(base / "fifo")
    (base / os.fsdecode(b"\xff bytes")).write_text("x")
    return base


def assert_same_tree(left: Path, right: Path) -> None:
    """Contents, names, kinds, modes, times to the nanosecond, targets and link counts."""
    run("diff", "-r", "--no-dereference", "--exclude=fifo", left, right)
    listing = ["find", ".", "-printf", r"%P %y %m %n %l %T@\n"]
    of_files = ["find", ".", "!", "-type", "d", "-printf", r"%P %s\n"]
    for command in (listing, of_files):
        assert sorted(run(*command, cwd=left).splitlines()) == sorted(run(*command, cwd=right).splitlines())


def test_shell_tools(here: Path) -> None:
    script = r"""
        set -e
        echo one > a; echo two >> a; cat a | grep -q two
        cp a b; cmp a b; mv b c; ln -s c d; readlink d; test -L d
        head -c 100000 /dev/urandom > random
        dd if=random of=copy bs=4k conv=fsync status=none; cmp random copy
        split -b 30000 random part.; cat part.* | cmp - random
        sort -R /etc/services > shuffled; sort shuffled | uniq > sorted; wc -l < sorted
        sed -i s/one/three/ a; grep -q three a
        truncate -s 1M sparse; stat -c %s sparse | grep -qx 1048576
        mktemp -d tmp.XXXX; touch -d 1965-03-04 old; test old -ot a
        ls -laR > /dev/null; find . -type f ! -name sums | xargs sha256sum > sums; sha256sum --quiet -c sums
        gzip -k shuffled; zcat shuffled.gz | cmp - shuffled
        rm -rf part.* tmp.*; mkdir -p x/y/z; rmdir -p x/y/z; ! test -e x
    """
    run("bash", "-c", textwrap.dedent(script), cwd=here)


def test_cp_a_and_diff(here: Path, tree: Path) -> None:
    run("cp", "-a", tree, here / "copy")
    assert_same_tree(tree, here / "copy")
    run("cp", "-a", here / "copy", here / "copy of the copy")
    assert_same_tree(tree, here / "copy of the copy")


@needs("tar")
def test_tar_both_ways(here: Path, tree: Path, tmp_path: Path) -> None:
    run("tar", "--format=posix", "-cf", here / "a.tar", "-C", tree.parent, tree.name)
    run("tar", "xpf", here / "a.tar", "-C", here)
    assert_same_tree(tree, here / tree.name)
    run("tar", "--format=posix", "-czf", tmp_path / "b.tar.gz", "-C", here, tree.name)
    run("tar", "xpzf", tmp_path / "b.tar.gz", "-C", tmp_path)
    assert_same_tree(tree, tmp_path / tree.name)


@needs("rsync")
def test_rsync(here: Path, tree: Path) -> None:
    copy = here / "copy"
    run("rsync", "-aH", f"{tree}/", copy)
    assert_same_tree(tree, copy)
    again = run("rsync", "-aH", "--itemize-changes", f"{tree}/", copy)
    assert again == ""
    (copy / "empty").unlink()
    (copy / "extra").touch()
    (copy / "big").write_bytes(b"changed")
    run("rsync", "-aH", "--delete", "--inplace", f"{tree}/", copy)
    assert_same_tree(tree, copy)


@needs("git")
def test_git(here: Path) -> None:
    who = {f"GIT_{role}_{what}": "a@b.c" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    env = {**who, "GIT_CONFIG_GLOBAL": "/dev/null", "HOME": str(here)}
    repository = here / "repository"

    def git(*arguments: str | Path, cwd: Path = repository) -> str:
        return run("git", *arguments, cwd=cwd, env=env)

    git("init", "--initial-branch=main", repository, cwd=here)
    for number in range(100):
        path = repository / f"d{number % 9}" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{number}\n" * number)
    git("add", ".")
    git("commit", "-m", "first")
    assert git("status", "--porcelain") == ""
    (repository / "d1" / "1.txt").write_text("changed\n")
    git("rm", "-q", "d2/2.txt")
    git("mv", "d3/3.txt", "moved")
    git("commit", "-am", "second")
    git("checkout", "-b", "side", "HEAD~1")
    (repository / "side").write_text("side\n")
    git("add", "side")
    git("commit", "-m", "side")
    git("merge", "-m", "merge", "main")
    git("clone", "--no-local", repository, here / "clone", cwd=here)
    run("diff", "-r", "--exclude=.git", repository, here / "clone")
    git("gc", "--aggressive", "--prune=now", "--quiet")
    git("worktree", "add", here / "worktree", "main")
    git("fsck", "--full", "--strict")
    git("fsck", "--full", cwd=here / "clone")
    assert git("log", "--oneline").count("\n") == 4
    assert git("stash", "list") == ""


@pytest.mark.parametrize("journal", ["DELETE", "TRUNCATE", "PERSIST", "WAL"])
def test_sqlite(here: Path, journal: str) -> None:
    path = here / "base.db"
    with sqlite3.connect(path) as base:
        assert base.execute(f"PRAGMA journal_mode={journal}").fetchone()[0].upper() == journal
        base.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, text TEXT)")
        for first in range(0, 500, 50):
            with base:
                base.executemany(
                    "INSERT INTO t VALUES (?, ?)", [(n, "x" * n) for n in range(first, first + 50)]
                )
        base.execute("BEGIN")
        base.execute("DELETE FROM t")
        base.rollback()
    base.close()
    other = sqlite3.connect(path)
    assert other.execute("SELECT count(*), sum(length(text)) FROM t").fetchone() == (500, 500 * 499 // 2)
    other.execute("VACUUM")
    assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    other.close()


def test_sqlite_writers_wait_for_each_other(here: Path) -> None:
    path = here / "base.db"
    with sqlite3.connect(path) as base:
        base.execute("CREATE TABLE t (n INTEGER)")
    base.close()
    errors: list[Exception] = []

    def write() -> None:
        try:
            mine = sqlite3.connect(path, timeout=120)
            for number in range(20):
                with mine:
                    mine.execute("INSERT INTO t VALUES (?)", (number,))
            mine.close()
        except sqlite3.Error as exc:
            errors.append(exc)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(TIMEOUT_S)
    assert not errors
    base = sqlite3.connect(path)
    assert base.execute("SELECT count(*) FROM t").fetchone() == (60,)
    base.close()


@needs("gcc", "make")
def test_make_builds_a_program(here: Path) -> None:
    for number in range(5):
        (here / f"part{number}.c").write_text(f"int part{number}(void) {{ return {number}; }}\n")
        (here / f"part{number}.h").write_text(f"int part{number}(void);\n")
    includes = "".join(f'#include "part{number}.h"\n' for number in range(5))
    calls = " + ".join(f"part{number}()" for number in range(5))
    (here / "main.c").write_text(
        f'#include <stdio.h>\n{includes}int main(void) {{ printf("%d\\n", {calls}); }}\n'
    )
    (here / "Makefile").write_text(
        "OBJECTS = main.o part0.o part1.o part2.o part3.o part4.o\n"
        "program: libparts.a main.o\n\tgcc -o $@ main.o -L. -lparts\n"
        "libparts.a: $(filter part%,$(OBJECTS))\n\tar rcs $@ $^\n"
        "%.o: %.c\n\tgcc -c -o $@ $<\n"
    )
    run("make", "-j4", cwd=here)
    assert run(here / "program") == "10\n"
    assert "up to date" in run("make", cwd=here)
    (here / "part4.c").write_text("int part4(void) { return 94; }\n")
    run("make", cwd=here)
    assert run(here / "program") == "100\n"


def test_python_packages_are_imported_from_it(here: Path) -> None:
    package = here / "site" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from package.part import VALUE\n")
    (package / "part.py").write_text("VALUE = 42\n")
    command = [sys.executable, "-c", "import package; print(package.VALUE)"]
    env = {"PYTHONPATH": str(here / "site"), "PYTHONDONTWRITEBYTECODE": ""}
    assert run(*command, env=env) == "42\n"
    assert (package / "__pycache__").is_dir()
    assert run(*command, env=env) == "42\n"
    run(sys.executable, "-m", "zipfile", "-c", here / "a.zip", here / "site")
    run(sys.executable, "-m", "zipfile", "-t", here / "a.zip")


def test_parquet(here: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    dataset = pytest.importorskip("pyarrow.dataset")
    table = pyarrow.table({"n": list(range(200_000)), "text": [f"row {n % 1000}" for n in range(200_000)]})
    parquet.write_table(table, here / "one.parquet", row_group_size=20_000)
    assert parquet.read_table(here / "one.parquet").equals(table)
    assert (
        parquet.read_table(here / "one.parquet", memory_map=True, columns=["n"]).column("n")[-1].as_py()
        == 199_999
    )
    dataset.write_dataset(
        table, here / "many", format="parquet", max_rows_per_file=50_000, max_rows_per_group=50_000
    )
    assert dataset.dataset(here / "many").count_rows() == 200_000


def test_pandas(here: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"n": range(5000), "half": [n / 2 for n in range(5000)]})
    frame.to_csv(here / "a.csv", index=False)
    assert pandas.read_csv(here / "a.csv").equals(frame)
    frame.to_pickle(here / "a.pickle")
    assert pandas.read_pickle(here / "a.pickle").equals(frame)


def test_everything_is_in_the_under_storage_afterwards(
    shared_local: LocalDaemon, here: Path, tree: Path
) -> None:
    """The point of it: plain files, under their own names."""
    run("cp", "-r", "--no-dereference", *[path for path in tree.iterdir() if path.name != "fifo"], here)
    shared_local.wait_persisted(f"/{here.name}")
    seen = shared_local.ufs_dir / here.name
    for path in tree.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert (seen / path.relative_to(tree)).read_bytes() == path.read_bytes()


def test_files_that_were_there_before(shared_local: LocalDaemon, here: Path, tree: Path) -> None:
    """A tree that others put into the under storage shows up, and its contents are read through."""
    place = shared_local.ufs_dir / f"{here.name}-outside"
    shutil.copytree(tree, place, symlinks=True, ignore=shutil.ignore_patterns("fifo"))
    try:
        through = shared_local.mount / place.name
        until(through.exists, "the tree is seen")  # after the sync interval at the latest
        for path in place.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert (through / path.relative_to(place)).read_bytes() == path.read_bytes()
        run("rm", "-rf", through)
        until(lambda: not place.exists(), "it is removed there too")
    finally:
        shutil.rmtree(place, ignore_errors=True)
