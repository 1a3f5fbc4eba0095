"""Programs as people run them: tar, git, sqlite."""

from __future__ import annotations

import io
import os
import random
import shutil
import sqlite3
import subprocess
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from benchmark.place import Place, Workload, WrongBytesError, per_second, timed

_GIT_ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    **{
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "bench"), ("EMAIL", "bench@localhost"))
    },
}


class ProgramError(Exception):
    """A program ended with an error: its name and the last that it said."""


def _run(command: Sequence[str], stdin: bytes | None = None) -> None:
    done = subprocess.run(
        command, input=stdin, capture_output=True, env={**os.environ, **_GIT_ENVIRONMENT}, check=False
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing said"]
        raise ProgramError(f"{' '.join(command[:1])} ended with {done.returncode}: {said[-1]}")


@lru_cache(maxsize=1)
def _archive(count: int) -> bytes:
    """A source tree: directories up to five deep, files of 0 to 32 KiB, modes and times set."""
    pick = random.Random(4)
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as tar:
        for number in range(count):
            parts = [f"d{pick.randrange(4)}" for _ in range(pick.randrange(1, 6))]
            info = tarfile.TarInfo("/".join([*parts, f"f{number}"]))
            info.size = pick.choice((0, 100, 1000, 4000, 8000, 32000))
            info.mtime = 1_700_000_000 + number
            tar.addfile(info, io.BytesIO(pick.randbytes(info.size)))
    return memory.getvalue()


def _untarred(place: Place) -> tuple[Path, float]:
    """A new tree, and how many seconds tar took."""
    target = place.root / "tree"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    archive = _archive(place.tree_count)
    return target, timed(lambda: _run(["tar", "-x", "-C", str(target)], stdin=archive))


def untar(place: Place) -> float:
    _, seconds = _untarred(place)
    return place.tree_count / seconds


def git(place: Place) -> float:
    """Seconds for init, add and commit of that tree."""
    tree, _ = _untarred(place)

    def commit() -> None:
        at = ["git", "-C", str(tree)]
        _run([*at, "init", "-q"])
        _run([*at, "add", "-A"])
        _run([*at, "commit", "-q", "-m", "all"])

    seconds = timed(commit)
    _run(["git", "-C", str(tree), "fsck", "--strict"])
    shutil.rmtree(tree)
    return seconds


def sqlite(place: Place, journal: str) -> float:
    """Transactions a second of one row each, on the disk when the commit returns."""
    directory = place.root / "sqlite"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    database = sqlite3.connect(directory / "bench.db", isolation_level=None)
    try:
        found = database.execute(f"PRAGMA journal_mode={journal}").fetchone()[0]
        if found.lower() != journal.lower():
            raise ProgramError(f"sqlite took journal_mode={found} for {journal}")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, text TEXT)")
        numbers = iter(range(1 << 60))

        def insert() -> None:
            database.execute("INSERT INTO rows VALUES (?, ?)", (next(numbers), "x" * 100))

        rate = per_second(insert, place.seconds)
        if database.execute("PRAGMA integrity_check").fetchone()[0] != "ok":
            raise WrongBytesError("the database is damaged")
        if database.execute("SELECT COUNT(*) FROM rows").fetchone()[0] != next(numbers):
            raise WrongBytesError("the database lost rows")
        return rate
    finally:
        database.close()
        shutil.rmtree(directory, ignore_errors=True)


WORKLOADS = {
    "untar": Workload("tar x of a source tree", "files/s", untar, program="tar"),
    "git": Workload("git init, add, commit of it", "s", git, is_less_better=True, program="git"),
    "sqlite": Workload("sqlite, rollback journal, fsynced", "tx/s", lambda place: sqlite(place, "DELETE")),
    "sqlite-wal": Workload("sqlite, WAL, fsynced", "tx/s", lambda place: sqlite(place, "WAL")),
}
