"""`alluxiofuse fsck`: checks state directories offline, and repairs them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from alluxiofuse.cli import options as shared
from alluxiofuse.cli.outcome import complain
from alluxiofuse.cli.progress import byte_bar, count_bar
from alluxiofuse.cli.state_dir import LOCK_NAME, StateDir
from alluxiofuse.cli.tiers import default_mem_directory
from alluxiofuse.config import Config
from alluxiofuse.config_load import merge_tiers, parse_tier
from alluxiofuse.errors import StateError, UserError
from alluxiofuse.findings import Finding, Findings, Level
from alluxiofuse.units import format_size

if TYPE_CHECKING:
    from alluxiofuse.cli.fsck_join import Unchecked
    from alluxiofuse.master.store import Store
    from alluxiofuse.worker.index import Index

CLEAN, MENDED, LEFT = 0, 1, 4
"""Exit codes, as of fsck(8). 2 is a mistake in the arguments, as with every command."""
MAX_RUNS = 12
MAX_NOTES = 20
"""Of one kind, that are shown one by one."""
_BACKUP = (
    "restore it from a backup; what is in under storages is not touched, and `format` begins anew with it"
)


@dataclass
class Opened:
    """What is to be checked."""

    store: Store | None = None
    indexes: list[Index] = field(default_factory=list)
    lost_indexes: dict[Path, list[str]] = field(default_factory=dict)
    """Where a worker's index should be -> tier directories that may tell of it."""
    stack: ExitStack = field(default_factory=ExitStack)
    """Closes all of it."""

    def add_index(self, index: Index) -> None:
        self.indexes.append(index)
        self.stack.callback(index.close)


@click.command()
@click.option(
    "--state",
    "states",
    multiple=True,
    metavar="DIR",
    help="State directory of a local, master or worker daemon. Repeat it to check a master together with "
    "workers. Default: those of the configuration.",
)
@shared.tier_option("Only for those that the worker's state does not name any more, and to check quotas.")
@click.option("--repair", is_flag=True, help="Undo the damage that is found.")
@click.option("--verify-data", is_flag=True, help="Read all slabs and compare their checksums.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@shared.config_option
def fsck(
    states: tuple[str, ...],
    tiers: tuple[str, ...],
    repair: bool,
    verify_data: bool,
    as_json: bool,
    config_file: str | None,
) -> None:
    """Check metadata and slabs against each other. The daemons must not be running.

    Nothing is changed without --repair. A repair never deletes what may be the only copy of something:
    it gets its name back, or becomes a file in /lost+found. What a daemon's end left behind, and its next
    start puts in order, is shown as a note.

    Exit codes: 0 nothing found, 1 damage found and undone, 4 damage left, 2 a mistake in the arguments,
    130 interrupted (a repair can be started again).
    """
    config = shared.load_config(
        config_file, {"worker.tiers": merge_tiers([parse_tier(one) for one in tiers]) or None}
    )
    wanted = list(dict.fromkeys(states)) or _configured(config)
    if not wanted:
        raise UserError("no state directory: give --state DIR")
    places = [(one.path, one.quota_bytes) for tier in config.worker.tiers for one in tier.directories]
    telling = _Json() if as_json else _Text()
    findings = Findings(is_repairing=repair, tell=telling.tell)
    unchecked = None
    with telling.document():
        try:
            with _open(wanted, findings, [path for path, _ in places]) as opened:
                unchecked = _check(opened, findings, places, verify_data)
                if repair:
                    _sync(opened)
        except StateError as exc:
            findings.problem("unreadable", exc.message, None, _BACKUP)
        code = LEFT if findings.left else MENDED if findings.mended else CLEAN
        telling.summary(findings, unchecked, code)
    sys.exit(code)


def _configured(config: Config) -> list[str]:
    return [one for one in dict.fromkeys((config.master.state_dir, config.worker.state_dir)) if one]


# --- opening --------------------------------------------------------------------------------------------


@contextmanager
def _open(states: list[str], findings: Findings, tiers: list[str]) -> Iterator[Opened]:
    """All of them locked until the end."""
    from alluxiofuse.master.store import Store
    from alluxiofuse.worker.index import Index

    repair = findings.is_repairing
    with ExitStack() as stack:
        opened = Opened(stack=stack)
        for state in states:
            if not Path(state).is_dir():
                raise UserError(f"{state} is no state directory: there is nothing to check")
            if not (Path(state) / LOCK_NAME).exists():
                raise UserError(f"{state} is not a state directory of alluxiofuse")
            directory = stack.enter_context(StateDir(state))
            meta, index = directory.master_directory / "meta", directory.worker_directory / "index"
            if directory.worker_directory.is_dir() and not index.is_dir():
                opened.lost_indexes[index] = tiers or _default_tiers(directory)
            elif not meta.is_dir() and not index.is_dir():
                raise UserError(f"{state} holds no metadata and no cache: no daemon has run on it yet")
            if meta.is_dir():
                if opened.store is not None:
                    raise UserError("more than one of these is of a master: check one at a time")
                opened.store = Store(meta, is_readonly=not repair)
                stack.callback(opened.store.close)
            if index.is_dir():
                opened.add_index(Index(index, is_readonly=not repair))
        yield opened


def _make_indexes_again(opened: Opened, findings: Findings) -> None:
    from alluxiofuse.worker.fsck import index_again

    for path, tiers in list(opened.lost_indexes.items()):

        def mend(path: Path = path, tiers: list[str] = tiers) -> None:
            opened.add_index(index_again(path, tiers))
            del opened.lost_indexes[path]

        findings.problem(
            "index-missing",
            f"{path}, the index of the worker's slabs, is missing",
            mend,
            "what is in no under storage is found again in the tier directories by a repair",
        )


def _default_tiers(directory: StateDir) -> list[str]:
    """Of `local`, without --tier."""
    return [str(directory.path / "cache"), str(default_mem_directory(directory.path))]


def _sync(opened: Opened) -> None:
    if opened.store is not None:
        opened.store.sync()
    for index in opened.indexes:
        index.sync()


# --- checking -------------------------------------------------------------------------------------------


def _check(
    opened: Opened, findings: Findings, places: list[tuple[str, int]], verify: bool
) -> Unchecked | None:
    """Runs until one mends nothing; bytes are read once, at the end."""
    unchecked = None
    for number in range(1, MAX_RUNS + 1):
        findings.begin_run()
        unchecked = _run(opened, findings, places, f"checking ({number})" if number > 1 else "checking")
        if not findings.run_mended:
            break
    if verify:
        findings.begin_run()
        _run(opened, findings, places, "reading", verify=True)
    return unchecked


def _run(
    opened: Opened, findings: Findings, places: list[tuple[str, int]], what: str, verify: bool = False
) -> Unchecked | None:
    from alluxiofuse.cli.fsck_join import Join, report_alone
    from alluxiofuse.master.fsck import check_store, work_of
    from alluxiofuse.master.fsck_check import Check
    from alluxiofuse.worker.fsck import WorkerCheck

    _make_indexes_again(opened, findings)
    total = sum(index.estimate() for index in opened.indexes)
    total += work_of(opened.store) if opened.store is not None else 0
    workers = []
    with ExitStack() as stack:
        advance = stack.enter_context(count_bar(what, total, "records"))
        for index in opened.indexes:
            workers.append(WorkerCheck(index, findings, places, advance=advance))
        check = None
        if opened.store is not None:
            known = next((worker.mark.cluster_id for worker in workers if worker.mark.cluster_id), "")
            check = Check(opened.store, findings, cluster_id=known)
            check_store(check, advance)
        for worker in workers:
            worker.run()
        if verify:
            used = sum(worker.used_bytes for worker in workers)
            read = stack.enter_context(byte_bar(what, used))
            for worker in workers:
                worker.verify(read)
        if check is None:
            for worker in workers:
                report_alone(worker, findings)
            return None
        join = Join(check, workers, findings)
        join.run()
        return join.unchecked


# --- telling --------------------------------------------------------------------------------------------


class _Text:
    """A line for each finding, on stdout."""

    def __init__(self) -> None:
        self._notes: Counter[str] = Counter()

    @contextmanager
    def document(self) -> Iterator[None]:
        yield

    def tell(self, finding: Finding) -> None:
        if finding.level is Level.NOTE:
            self._notes[finding.code] += 1
            if self._notes[finding.code] > MAX_NOTES:
                return
        word = finding.level.value
        if finding.is_mended:
            word = "mended" if finding.level is not Level.LOST else "lost"
        advice = f" ({finding.advice})" if finding.advice else ""
        click.echo(f"{word}: {_on_one_line(finding.text)}{_on_one_line(advice)}")

    def summary(self, findings: Findings, unchecked: Unchecked | None, code: int) -> None:
        for kind, count in sorted(self._notes.items()):
            if count > MAX_NOTES:
                click.echo(f"note: {count - MAX_NOTES} more of the kind {kind}")
        if unchecked is not None and unchecked.files:
            complain(
                f"{unchecked.files} file(s) ({format_size(unchecked.size)}) are in no under storage yet, and "
                "at workers that were not looked at: give their --state too",
                "note",
            )
        left, mended = sum(findings.left.values()), sum(findings.mended.values())
        if code == CLEAN:
            click.echo("clean")
        elif code == MENDED:
            click.echo(f"{mended} mended, nothing left")
        elif findings.is_repairing:
            click.echo(f"{mended} mended, {left} left")
        else:
            click.echo(f"{left} found: --repair undoes what can be undone")


class _Json:
    """{"findings": [...], "notes": {...}, "mended": {...}, "left": {...}, ...}, written as it goes."""

    def __init__(self) -> None:
        self._notes: Counter[str] = Counter()
        self._is_first = True
        self._is_whole = False

    @contextmanager
    def document(self) -> Iterator[None]:
        click.echo('{"findings": [', nl=False)
        try:
            yield
        finally:
            if not self._is_whole:
                click.echo('], "is_complete": false}')

    def tell(self, finding: Finding) -> None:
        if finding.level is Level.NOTE:
            self._notes[finding.code] += 1
            if self._notes[finding.code] > MAX_NOTES:
                return
        found = {
            "level": finding.level.value,
            "code": finding.code,
            "text": _on_one_line(finding.text),
            "is_mended": finding.is_mended,
            "advice": _on_one_line(finding.advice),
        }
        click.echo(("\n" if self._is_first else ",\n") + msgspec.json.encode(found).decode(), nl=False)
        self._is_first = False

    def summary(self, findings: Findings, unchecked: Unchecked | None, code: int) -> None:
        files = {"files": 0, "bytes": 0}
        if unchecked is not None:
            files = {"files": unchecked.files, "bytes": unchecked.size}
        rest = {
            "is_complete": True,
            "notes": dict(findings.notes),
            "mended": dict(findings.mended),
            "left": dict(findings.left),
            "unchecked": files,
            "exit_code": code,
        }
        self._is_whole = True
        click.echo("\n], " + msgspec.json.encode(rest).decode()[1:])


def _on_one_line(text: str) -> str:
    """Names of files may hold anything, also what is no text."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
