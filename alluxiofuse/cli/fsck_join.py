"""Compares what a master wants with what workers have, container by container, in one pass over both.

What may be somebody's only copy is never dropped: it stays, or becomes a file in lost+found. What a
kill leaves behind and the next start mends is a note.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from alluxiofuse.findings import Findings
from alluxiofuse.master import fsck_content as content
from alluxiofuse.master.fsck_check import Check
from alluxiofuse.master.fsck_content import Wanted
from alluxiofuse.units import format_size
from alluxiofuse.worker.fsck import UNRECORDED, Held, WorkerCheck, bytes_of
from alluxiofuse.worker.slab import CLEAN, DIRTY, WRITING

_WHAT_TO_DO = "restore it from a backup, write it anew, or remove it"


@dataclass
class Unchecked:
    """Files whose bytes are at workers that were not looked at."""

    files: int = 0
    size: int = 0
    workers: set[int] = field(default_factory=set)


class Join:
    """One run. `workers`: those whose state directories were given."""

    def __init__(self, check: Check, workers: list[WorkerCheck], findings: Findings) -> None:
        self._check = check
        self._workers = [worker for worker in workers if worker.mark.cluster_id in ("", check.cluster_id)]
        self._strangers = [worker for worker in workers if worker not in self._workers]
        self._findings = findings
        self.unchecked = Unchecked()
        known = content.workers(check)
        self._ids = {id(worker): known.get(worker.uuid, 0) for worker in workers}
        self._has_all = set(known.values()) <= set(self._ids.values())
        self._end = content.next_container(check)

    def run(self) -> None:
        for worker in self._strangers:
            self._findings.problem(
                "state-foreign",
                f"the worker {worker.uuid} has data of another state of a master, which was lost, or "
                "formatted anew",
                None,
                "check those together that belong together; what it has of that state is in its slabs",
            )
            report_alone(worker, self._findings)
        self._register()
        self._compare()
        for worker in self._workers:
            if self._is_older_than(worker):
                self._findings.problem(
                    "state-older",
                    f"the master's state is older than what the worker {worker.uuid} has seen: it was "
                    "restored from a copy",
                    worker.accept(self._check.cluster_id),
                    "files made or changed since that copy may be older, missing, or in /lost+found",
                )

    def _is_older_than(self, worker: WorkerCheck) -> bool:
        """The master does not know of everything that the worker knows."""
        return worker.mark.sequence > self._check.store.sequence

    def _register(self) -> None:
        for worker in self._workers:
            if worker.uuid and not self._ids[id(worker)] and any(True for _ in worker.index.items(b"c")):
                self._findings.problem(
                    "worker-unknown",
                    f"the master does not know the worker {worker.uuid}, which has data",
                    content.name_worker(self._check, worker.uuid),
                )

    def _compare(self) -> None:
        for container, want, held in self._pairs():
            if want is None:
                for one in held:
                    self._unwanted(one, None)
            elif not want.ino or (self._is_gone(want) and not want.names):
                self._without_inode(container, want, held)
            elif want.names:
                self._made_again(want, held)
            elif not want.is_base:
                self._of_file(want, held)

    def _is_gone(self, want: Wanted) -> bool:
        return self._check.inode(want.ino) is None

    def _pairs(self) -> Iterator[tuple[int, Wanted | None, list[Held]]]:
        wants = ((want.container, 0, want) for want in content.wanted(self._check))
        helds = [
            ((held.container, number, held) for held in worker.held())
            for number, worker in enumerate(self._workers, 1)
        ]
        merged = heapq.merge(wants, *helds, key=lambda item: item[:2])
        for container, group in itertools.groupby(merged, key=lambda item: item[0]):
            items = [item[2] for item in group]
            want = next((item for item in items if isinstance(item, Wanted)), None)
            yield container, want, [item for item in items if isinstance(item, Held)]

    # --- content of files -------------------------------------------------------------------------

    def _of_file(self, want: Wanted, held: list[Held]) -> None:
        if not want.is_dirty:
            self._clean(want, held)
        elif want.is_open:
            self._open(want, held)
        elif want.size or any(one.size and one.state == DIRTY and not one.trouble for one in held):
            self._sealed(want, held)

    def _clean(self, want: Wanted, held: list[Held]) -> None:
        """The under storage has it."""
        for one in held:
            if one.state == DIRTY and not (one.trouble or one.bad or one.unsure or one.size != want.size):
                self._findings.note(
                    "clean-soon",
                    f"{self._name(want)} is in the under storage: its worker is told at the next start",
                )
            elif one.state in (DIRTY, WRITING) and not one.trouble:
                self._findings.problem(
                    "slab-damaged",
                    f"{one.path}, of {self._name(want)}, is not what is in the under storage: it is fetched "
                    "again",
                    one.worker.drop(one),
                )
            elif one.state == UNRECORDED:
                self._leftover(one)

    def _open(self, want: Wanted, held: list[Held]) -> None:
        """Open for writing when the daemon ended."""
        name = self._name(want)
        usable = [one for one in held if not one.trouble]
        if usable:
            one = max(usable, key=lambda item: item.state != UNRECORDED)
            if one.state == UNRECORDED and one.size:
                self._findings.problem(
                    "slab-unindexed",
                    f"{one.path}, of {name}, is not in the index: it is entered",
                    one.worker.record_again(one),
                )
                return
            self._bad_pages(want, one)
            self._holder(want, one)
            self._findings.note("open", f"{name} was being written: it is sealed at the next start")
        elif held or not self._is_checked(want):
            self._lost_or_unchecked(want, held)
        elif want.base and not any(worker.has(want.base) for worker in self._workers):
            self._lost(want, "its content before the last writing is at no worker")
        else:
            self._findings.note("open", f"writing of {name} had not begun: it is as before at the next start")

    def _sealed(self, want: Wanted, held: list[Held]) -> None:
        name = self._name(want)
        usable = [one for one in held if not one.trouble]
        if not usable:
            self._lost_or_unchecked(want, held)
            return
        one = max(usable, key=lambda item: (item.state == DIRTY, item.state != UNRECORDED))
        if one.state == UNRECORDED:
            self._findings.problem(
                "slab-unindexed",
                f"{one.path}, of {name}, is not in the index: it is entered, with the checksums of what is "
                "there",
                one.worker.record_again(one),
            )
            return
        if one.state == CLEAN:
            self._findings.problem(
                "slab-not-dirty",
                f"{one.path}, of {name}, counts as clean, and is not in the under storage",
                one.worker.mark_dirty(one),
            )
        if one.state == DIRTY and one.unsure:
            self._findings.problem(
                "pages-damaged",
                f"{one.path}, of {name}: the checksums of {one.unsure} page(s) are lost: new ones are taken "
                "of what is there",
                one.worker.record_again(one),
                "look whether the file is what it should be",
            )
        if one.state == WRITING and one.size == want.size:
            self._findings.note("open", f"{name} is sealed at its worker at the next start")
        elif one.size != want.size:
            self._findings.problem(
                "size-differs",
                f"{name} has {want.size} bytes, its worker has {one.size} of it: the file ends there now",
                content.set_size(self._check, want.ino, one.size),
                "look whether the file is what it should be",
            )
        self._bad_pages(want, one)
        self._holder(want, one)

    def _bad_pages(self, want: Wanted, one: Held) -> None:
        for run in one.bad:
            first, end = bytes_of(run, one.size)
            self._findings.lost(
                "bytes-lost",
                f"{self._name(want)}: bytes {first} to {end} are not those that were written",
                None,
                _WHAT_TO_DO + self._older(want),
            )

    def _holder(self, want: Wanted, one: Held) -> None:
        worker_id = self._ids[id(one.worker)]
        if worker_id and want.worker_id != worker_id:
            self._findings.problem(
                "holder-wrong",
                f"{self._name(want)} is at worker {worker_id}, not at "
                f"{want.worker_id or 'one that is not known'}",
                content.set_holder(self._check, want.ino, worker_id),
            )

    def _is_checked(self, want: Wanted) -> bool:
        """The worker that should have it was looked at."""
        return self._has_all or (want.worker_id != 0 and want.worker_id in self._ids.values())

    def _lost_or_unchecked(self, want: Wanted, held: list[Held]) -> None:
        if held:
            self._lost(want, held[0].trouble)
        elif self._is_checked(want):
            self._lost(want, "no worker has it")
        else:
            self.unchecked.files += 1
            self.unchecked.size += want.size
            self.unchecked.workers.add(want.worker_id)

    def _lost(self, want: Wanted, why: str) -> None:
        if want.is_orphan:
            self._findings.note("orphan", f"inode {want.ino} was removed while it was open")
            return
        self._findings.lost(
            "file-lost",
            f"{self._name(want)}: {want.size} bytes that are not in the under storage ({why})",
            None,
            _WHAT_TO_DO + self._older(want),
        )

    def _older(self, want: Wanted) -> str:
        older = content.older_version(self._check, want)
        return f"; {older}" if older else ""

    def _name(self, want: Wanted) -> str:
        return content.names_of(self._check, want)

    # --- files whose record is missing ------------------------------------------------------------

    def _made_again(self, want: Wanted, held: list[Held]) -> None:
        usable = [one for one in held if not one.trouble and one.state != CLEAN]
        name = self._name(want)
        if not usable:
            if self._is_checked(want) and not held:
                self._findings.lost(
                    "file-lost",
                    f"{name}: its record and its bytes are gone; it was not in the under storage yet",
                    content.drop_names(self._check, want),
                    "restore it from a backup",
                )
            else:
                self._findings.problem(
                    "inode-missing",
                    f"{name}: its record is missing",
                    None,
                    f"check it together with its worker, which has container {want.container}",
                )
            return
        one = usable[0]
        if one.state == UNRECORDED:
            self._findings.problem(
                "slab-unindexed", f"{one.path}, of {name}, is not in the index: it is entered",
                one.worker.record_again(one),
            )  # fmt: skip
            return
        worker_id = self._ids[id(one.worker)]
        self._findings.problem(
            "inode-missing",
            f"{name}: its record is missing; it is made again of its {one.size} bytes, with mode 644",
            content.make_again(
                self._check, want, one.size, one.mtime_ns, worker_id, is_open=one.state == WRITING
            ),
        )

    # --- what no file wants -----------------------------------------------------------------------

    def _without_inode(self, container: int, want: Wanted, held: list[Held]) -> None:
        """The index has an entry for it, but no inode: something was lost."""
        for one in held:
            self._unwanted(one, want)
        if not any(one.state in (DIRTY, WRITING) for one in held) and want.ino not in self._check.handled:
            self._findings.problem(
                "container-stale",
                f"the index says that container {container} is of inode {want.ino}, which is gone",
                self._check.delete("meta", b"c" + container.to_bytes(8, "big")) if self._has_all else None,
            )

    def _unwanted(self, one: Held, want: Wanted | None) -> None:
        if one.trouble:
            self._findings.note("unwanted", f"container {one.container} is of no file: {one.trouble}")
        elif one.state == CLEAN:
            self._findings.note(
                "unwanted",
                f"{one.path} is of no file any more: it is dropped at the next start",
                one.worker.drop(one),
            )
        elif one.state == UNRECORDED:
            self._leftover(one)
        elif want is None and self._was_removed(one):
            self._findings.note(
                "removed",
                f"{one.path} is of a file that was removed ({format_size(one.size)}): it is dropped at the "
                "next start",
            )
        else:
            ino = want.ino if want is not None else 0
            self._findings.problem(
                "unwanted-dirty",
                f"{one.path} ({format_size(one.size)}) is in no under storage and of no file: it becomes one "
                "in /lost+found",
                content.salvage(
                    self._check,
                    one.container,
                    ino,
                    one.size,
                    one.mtime_ns,
                    self._ids[id(one.worker)],
                    is_open=one.state == WRITING,
                ),
            )

    def _was_removed(self, one: Held) -> bool:
        """The master's state is whole, and has given this container to a file: so that was removed."""
        is_whole = not self._check.is_damaged and not self._is_older_than(one.worker)
        return is_whole and one.container < self._end

    def _leftover(self, one: Held) -> None:
        self._findings.note("leftover", f"{one.path} is of no use: it is removed at the next start")


def report_alone(worker: WorkerCheck, findings: Findings) -> None:
    """Without its master nobody knows what is needed of a worker: what is damaged and not clean counts
    as lost."""
    for one in worker.held():
        if one.state == CLEAN:
            continue
        if one.state == UNRECORDED:
            findings.note("leftover", f"{one.path} is not in the index: it is removed at the next start")
        elif one.trouble:
            findings.lost(
                "file-lost", f"container {one.container}, {one.size} bytes: {one.trouble}", None,
                "check it together with the master, which knows the file",
            )  # fmt: skip
        elif one.state == WRITING:
            findings.note("open", f"{one.path} was being written: it is sealed at the next start")
        else:
            for run in one.bad:
                first, end = bytes_of(run, one.size)
                findings.lost(
                    "bytes-lost", f"{one.path}: bytes {first} to {end} are not those that were written", None,
                    "check it together with the master, which knows the file",
                )  # fmt: skip
            if one.unsure:
                findings.problem(
                    "pages-damaged",
                    f"{one.path}: the checksums of {one.unsure} page(s) are lost: new ones are taken of what "
                    "is there",
                    one.worker.record_again(one),
                )
