#!/usr/bin/env python3
"""Measure directories side by side: `bench.py [LABEL=]DIR...`. Standard library only.

Every workload runs in each directory in turn (A B A B ...), so that what the machine does meanwhile
hits all alike; shown are medians and the ratio to the first directory. "cold" means that the
kernel's caches were dropped (as root; else only the page cache of the files concerned), not the
cache of the filesystem under test. What is read from the large file is compared, byte by byte,
outside the time that counts. Everything is made in a new directory inside each DIR and removed at
the end, also after Ctrl-C, which shows what was measured until then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmark import daemons, large, programs, small
from benchmark.place import CHUNK_BYTES, DROP_CACHES, Place, Workload, WrongBytesError
from benchmark.table import as_json, as_text

WORKLOADS: dict[str, Workload] = {
    **large.WORKLOADS,
    **small.WORKLOADS,
    **programs.WORKLOADS,
    **daemons.WORKLOADS,
}
FAILURES = (OSError, sqlite3.Error, WrongBytesError, programs.ProgramError)
"""Of a directory, not of this program: noted, and the others go on."""


class Bench:
    """One run over `places`; `results` and `failures` fill as it goes."""

    def __init__(self, places: Sequence[Place], names: Sequence[str], rest: Sequence[int], settle_s: float):
        self._places = places
        self._rest = [*rest, *(place.pid for place in places if place.pid is not None)]
        self._settle_s = settle_s
        self.results: dict[str, list[list[float]]] = {name: [[] for _ in places] for name in names}
        self.failures: list[str] = []

    def run(self, rounds: int) -> None:
        for number in range(rounds):
            for name, per_place in self.results.items():
                for place, results in zip(self._places, per_place, strict=True):
                    progress(f"round {number + 1}/{rounds}: {name} in {place.label}")
                    self._measure(WORKLOADS[name], place, results)
        progress("")

    def show(self, is_json: bool) -> None:
        """Results on standard output, nothing before there are any; failures on standard error."""
        for failure in self.failures:
            print(f"bench.py: {failure}", file=sys.stderr)
        if not any(rounds for per_place in self.results.values() for rounds in per_place):
            return
        if is_json:
            print(json.dumps(as_json(self._places, WORKLOADS, self.results), indent=1))
            return
        print(as_text(self._places, WORKLOADS, self.results))
        for place in self._places:
            for note in sorted(place.notes):
                print(f"{place.label}: {note}")
        if not os.access(DROP_CACHES, os.W_OK):
            print("not root: only page caches were dropped for the cold rows")

    def _measure(self, workload: Workload, place: Place, results: list[float]) -> None:
        if workload.needs_pid and place.pid is None:
            return
        try:
            os.sync()  # earlier dirty pages go to disk before the next measurement
            if not daemons.wait_for_rest(self._rest, self._settle_s):
                place.notes.add(f"daemons were still busy after {self._settle_s:.0f} s before some rows")
            results.append(workload.run(place))
        except FAILURES as error:
            failure = f"{place.label}: {workload.title}: {error}"
            if failure not in self.failures:
                self.failures.append(failure)


def progress(text: str) -> None:
    """One line that is overwritten, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r{text}", end="\033[K", file=sys.stderr, flush=True)


def parse_size(text: str) -> int:
    number, unit = text[:-1], text[-1:].upper()
    powers = {"K": 10, "M": 20, "G": 30}
    size = int(text) if unit.isdigit() else int(number) << powers[unit]
    return max(CHUNK_BYTES, size - size % CHUNK_BYTES)


def parse_directory(text: str) -> tuple[str, Path]:
    """(label, directory); a directory's name may have a "=" in it."""
    label, equals, directory = text.partition("=")
    if equals and not Path(text).is_dir():
        return label, Path(directory)
    return text, Path(text)


def parse_pid(text: str) -> tuple[str, int]:
    label, equals, pid = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: write LABEL=PID")
    return label, int(pid)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("directories", nargs="+", metavar="[LABEL=]DIR", type=parse_directory)
    add("--size", default="1G", type=parse_size, help="of the large file (default 1G)")
    add("--files", default=1000, type=int, help="how many small files (default 1000)")
    add("--tree", default=2000, type=int, help="how many files tar unpacks, git commits (default 2000)")
    add("--rounds", default=3, type=int, help="default 3; medians are shown")
    add("--seconds", default=2.0, type=float, help="of each workload without an end (default 2)")
    add("--only", default="", help=f"comma-separated, of: {', '.join(WORKLOADS)}")
    add(
        "--pid",
        action="append",
        default=[],
        metavar="LABEL=PID",
        type=parse_pid,
        help="the daemon behind the directory of that label: its CPU time and memory are shown",
    )
    add(
        "--rest",
        action="append",
        default=[],
        metavar="PID",
        type=int,
        help="another process whose work belongs to the daemons', an S3 server for instance",
    )
    add(
        "--settle",
        default=30.0,
        type=float,
        metavar="SECONDS",
        help="how long to wait, before each measurement, until the processes named by --pid and --rest "
        "have come to rest (default 30)",
    )
    add("--json", action="store_true", help="all results of all rounds, for scripts")
    arguments = parser.parse_args(argv)
    check(parser, arguments)
    return arguments


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the program with one line when something can't be done; sets `names`."""
    wanted = [name for name in arguments.only.split(",") if name]
    unknown = [name for name in wanted if name not in WORKLOADS]
    if unknown:
        parser.error(f"--only: no such workload: {', '.join(unknown)}")
    if not arguments.pid and any(WORKLOADS[name].needs_pid for name in wanted):
        parser.error("CPU time and memory need --pid LABEL=PID")
    for name in wanted:
        program = WORKLOADS[name].program
        if program and shutil.which(program) is None:
            parser.error(f"--only {name}: there is no program {program}")
    arguments.names = wanted or [
        name
        for name, workload in WORKLOADS.items()
        if (arguments.pid or not workload.needs_pid)
        and (not workload.program or shutil.which(workload.program))
    ]
    labels = [label for label, _ in arguments.directories]
    for label, directory in arguments.directories:
        if not directory.is_dir():
            parser.error(f"{directory} is not a directory")
        if labels.count(label) > 1:
            parser.error(f"{label} is given twice: write LABEL=DIR")
    for label, _ in arguments.pid:
        if label not in labels:
            parser.error(f"--pid: no directory has the label {label}")
    for pid in [*arguments.rest, *(pid for _, pid in arguments.pid)]:
        if not Path(f"/proc/{pid}/stat").exists():
            parser.error(f"there is no process {pid}")
    if min(arguments.files, arguments.tree, arguments.rounds) < 1:
        parser.error("--files, --tree and --rounds are at least 1")


@contextlib.contextmanager
def made_places(arguments: argparse.Namespace) -> Iterator[list[Place]]:
    places: list[Place] = []
    pids = dict(arguments.pid)
    try:
        for label, directory in arguments.directories:
            root = Path(tempfile.mkdtemp(prefix="bench-", dir=directory))
            places.append(
                Place(
                    label,
                    root,
                    arguments.size,
                    arguments.files,
                    arguments.tree,
                    arguments.seconds,
                    pids.get(label),
                )
            )
        yield places
    finally:
        progress("removing what was made")
        for place in places:
            shutil.rmtree(place.root, ignore_errors=True)
        progress("")


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with made_places(arguments) as places:
            bench = Bench(places, arguments.names, arguments.rest, arguments.settle)
            try:
                bench.run(arguments.rounds)
            finally:  # interrupted after hours, it shows what it has
                bench.show(arguments.json)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 1
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
