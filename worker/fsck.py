"""The check of a worker's state directory: its index against the slab files. Offline.

`WorkerCheck.run` looks at the index itself and at the files, `WorkerCheck.held` goes through the
records in the order of their containers and says what of each is really there. Who needs what, only
a master knows: whoever has its answer decides what to do about dirty containers (`cli/fsck_join.py`).
What is clean can be fetched again: what is wrong with it is dropped.

Mending keeps the order of the worker: bytes, then index; and for dropping index, then bytes. So an
interruption leaves what a kill of the worker leaves.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from alluxiofuse.errors import AlluxioFuseError, StateError
from alluxiofuse.findings import CantMend, Findings, Mend
from alluxiofuse.ids import PAGE_BYTES, page_count
from alluxiofuse.units import format_size
from alluxiofuse.wire.codec import decode, encode
from alluxiofuse.wire.types import StateMark
from alluxiofuse.worker import layout
from alluxiofuse.worker.fsck_places import Place, Places
from alluxiofuse.worker.fsck_slab import Looked, look, reindex
from alluxiofuse.worker.index import FORMAT, Index, SlabRecord, u64
from alluxiofuse.worker.layout import slab_path
from alluxiofuse.worker.slab import CLEAN, DIRTY, WRITING

MAX_KEPT = 100_000
"""Of each kind of thing that one run remembers."""
LOST_AND_FOUND = "lost+found"
"""In a tier directory: files that a repair took out of the way."""


@dataclass(slots=True)
class Held:
    """One container at this worker."""

    worker: WorkerCheck
    container: int
    state: int
    """slab.CLEAN, DIRTY or WRITING; UNRECORDED."""
    size: int
    """Of the content; of one that is open for writing or has no record, of the file."""
    mtime_ns: int = 0
    trouble: str = ""
    """Why there are no bytes of it, "" when there are."""
    bad: list[tuple[int, int]] = field(default_factory=list)
    """Runs of pages (first, count) whose bytes are gone or are not those that were stored; of clean
    ones those that are not there at all too."""
    unsure: int = 0
    """Pages without a readable checksum."""
    path: str = ""


UNRECORDED = -1
"""A slab file of which the index knows nothing."""


class WorkerCheck:
    """`index` is open; `tiers` are (directory, quota in bytes or 0) that the caller knows of, besides
    those that the index names."""

    def __init__(
        self,
        index: Index,
        findings: Findings,
        tiers: list[tuple[str, int]],
        *,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        """`advance` is called for every record. UserError: a directory of `tiers` is another worker's."""
        self.index = index
        self.findings = findings
        self._verify = False
        self._advance = advance
        found = Places(self.uuid, index.directories(), tiers, findings)
        self.places = found.there
        self._absent = found.absent
        self.unrecorded: dict[int, str] = {}
        """Container -> root of the directory, of slab files without a record."""
        self._used: dict[int, int] = {}
        self._moved: dict[int, Place] = {}
        """Containers whose slab is in another directory than the index says."""
        self._renaming: set[tuple[int, int]] | None = None
        """(directory id, `SlabRecord.was`) of what is open for writing; None: not asked for yet."""

    @property
    def uuid(self) -> str:
        """ "" when it has none yet."""
        found = self.index.get(b"muuid")
        return "" if found is None or not found.isascii() else found.decode()

    @property
    def mark(self) -> StateMark:
        """Which state of a master it has seen."""
        try:
            return self.index.seen_state
        except StateError:
            return StateMark()

    def accept(self, cluster_id: str) -> Mend:
        """Go on with the state of the master as it is now."""
        return lambda: self.index.see_state(StateMark(cluster_id))

    # --- the index itself -------------------------------------------------------------------------

    def run(self) -> None:
        """Index and files, but for what `held` looks at."""
        self._identity()
        self._pages_of_nobody()
        for place in self.places.values():
            self._files(place)
        for place in self.places.values():
            used = self._used.get(place.directory_id, 0)
            if place.quota_bytes and used > place.quota_bytes:
                self.findings.note(
                    "over-quota",
                    f"{place.root} holds {format_size(used)}, its quota is {format_size(place.quota_bytes)}: "
                    "the rest is evicted or moved when the worker runs",
                )

    def _identity(self) -> None:
        highest = max((*self.index.directories(), *self.places), default=0)
        raw = self.index.get(b"mnext_directory")
        following = int.from_bytes(raw, "big") if raw is not None and len(raw) == 8 else 1
        if highest >= following:
            self.findings.problem(
                "counter",
                f"the next directory id is {following}, though {highest} is in use",
                self._put(b"mnext_directory", u64(highest + 1)),
            )
        raw = self.index.get(b"mstate")
        if raw is not None and self.mark == StateMark() and raw != encode(StateMark()):
            self.findings.problem(
                "mark-damaged", "which state of the master the worker has seen can't be read", self.accept("")
            )
        raw = self.index.get(b"mformat")
        if self.uuid and (raw is None or len(raw) != 8):
            self.findings.problem(
                "format-missing",
                "the number of the index's format is missing",
                self._put(b"mformat", u64(FORMAT)),
            )
        if not self.uuid and any(True for _ in self.index.items(b"d")):
            markers = {layout.read_marker(Path(place.root)) for place in self.places.values()}
            uuids = {marker.worker_uuid for marker in markers if marker is not None}
            mend = self._put(b"muuid", uuids.pop().encode()) if len(uuids) == 1 else None
            self.findings.problem(
                "uuid-missing",
                "the index does not say which worker it is of",
                mend,
                "the tier directories tell when they are given with --tier",
            )

    def _put(self, key: bytes, value: bytes) -> Mend:
        def change() -> None:
            batch = self.index.batch()
            batch.raw.put(key, value)
            self.index.commit(batch)

        return change

    def _pages_of_nobody(self) -> None:
        """Page tables of containers that have no record, or are shorter."""
        container, chunks = 0, 0
        for key, raw in self.index.items(b"p"):
            number = int.from_bytes(key[:8], "big")
            if number != container:
                container, chunks = number, self._chunks_of(number)
            if len(key) == 16 and (chunks < 0 or int.from_bytes(key[8:], "big") < chunks):
                continue
            batch = self.index.batch()
            batch.raw.delete(b"p" + key)
            self.findings.problem(
                "pages-stale",
                f"there is a page table of container {container}, which has no such pages",
                lambda batch=batch: self.index.commit(batch),  # type: ignore[misc]
            )
            del raw

    def _chunks_of(self, container: int) -> int:
        """Page tables that a container may have; -1: any."""
        record = self._record(self.index.get(b"c" + u64(container)))
        if record is None:
            return -1 if self.index.get(b"c" + u64(container)) is not None else 0
        pages = page_count(record.size)
        return -1 if record.state == WRITING else -(-pages // 64) if pages > 1 else 0

    @staticmethod
    def _record(raw: bytes | None) -> SlabRecord | None:
        """None: none, or damaged."""
        if raw is None:
            return None
        try:
            record = decode(raw, SlabRecord)
        except AlluxioFuseError:
            return None
        is_plausible = 0 <= record.size < 1 << 63 and record.state in (CLEAN, DIRTY, WRITING)
        is_plausible = is_plausible and 0 <= record.was < 1 << 63 and 0 <= record.checksum < 1 << 64
        return record if is_plausible and 0 <= record.directory < 1 << 63 else None

    # --- files ------------------------------------------------------------------------------------

    def _files(self, place: Place) -> None:
        """Files without a record, half moved ones, those of others."""
        used = 0
        for folder in range(256):
            try:
                entries = list(os.scandir(f"{place.root}/slabs/{folder:02x}"))
            except FileNotFoundError:
                continue  # made at the next start
            except OSError as exc:
                raise StateError(f"{place.root}/slabs/{folder:02x} can't be read: {exc.strerror}") from None
            for entry in entries:
                used += self._file(place, folder, entry)
        self._used[place.directory_id] = used

    def _file(self, place: Place, folder: int, entry: os.DirEntry[str]) -> int:
        """Bytes that it takes."""
        kind, container = layout.slab_of(folder, entry)
        if kind == layout.FOREIGN:
            self.findings.note("foreign-file", f"{entry.path} is not ours: it is left alone")
            return 0
        if kind == layout.PART:
            self.findings.note(
                "half-moved", f"{entry.path} was being moved here: it is removed at the next start"
            )
            return 0
        raw = self.index.get(b"c" + u64(container))
        record = self._record(raw)
        if record is not None and record.directory == place.directory_id:
            return entry.stat().st_blocks * 512
        if record is not None and self._is_copy(container, record):
            self.findings.note("second-copy", f"{entry.path} is an old copy: it is removed at the next start")
        elif record is not None:
            if len(self._moved) < MAX_KEPT:
                self._moved[container] = place
            self.findings.problem(
                "slab-elsewhere",
                f"the slab of container {container} is in {place.root}, not where the index says",
                self._moved_to(container, record, place),
            )
        elif raw is None and not self._is_renaming(container, place) and len(self.unrecorded) < MAX_KEPT:
            self.unrecorded[container] = place.root
        return entry.stat().st_blocks * 512

    def _is_copy(self, container: int, record: SlabRecord) -> bool:
        """The one that the index means is there too, or its directory is not."""
        place = self.places.get(record.directory)
        return place is None or os.path.isfile(slab_path(place.root, container))

    def _is_renaming(self, container: int, place: Place) -> bool:
        """The file still has the name of the container that it was before (`SlabRecord.was`): a kill
        between the record and the renaming."""
        if self._renaming is None:
            records = (self._record(raw) for _, raw in self.index.items(b"c"))
            self._renaming = {(one.directory, one.was) for one in records if one is not None and one.was}
        return (place.directory_id, container) in self._renaming

    def _moved_to(self, container: int, record: SlabRecord, place: Place) -> Mend:
        def change() -> None:
            record.directory = place.directory_id
            self.index.put(container, record)

        return change

    # --- containers -------------------------------------------------------------------------------

    def held(self) -> Iterator[Held]:
        """Every container, ascending. What is wrong with clean ones is told and mended on the way; of
        dirty ones `Held` says it."""
        files = (self._unrecorded(*file) for file in sorted(self.unrecorded.items()))
        yield from heapq.merge(self._recorded(), files, key=lambda held: held.container)

    def verify(self, advance: Callable[[int], None]) -> None:
        """`held` is to read all bytes and compare their checksums; `advance` gets their number."""
        self._verify, self._advance = True, advance

    @property
    def used_bytes(self) -> int:
        """What its slabs take; known after `run`."""
        return sum(self._used.values())

    def has(self, container: int) -> bool:
        """There is something of it here."""
        raw = self.index.get(b"c" + u64(container))
        return raw is not None or container in self.unrecorded

    def _unrecorded(self, container: int, root: str) -> Held:
        path = slab_path(root, container)
        try:
            found = os.stat(path)
        except OSError as exc:
            return Held(self, container, UNRECORDED, 0, 0, f"{path}: {exc.strerror}", path=path)
        return Held(self, container, UNRECORDED, found.st_size, found.st_mtime_ns, path=path)

    def _recorded(self) -> Iterator[Held]:
        for key, raw in self.index.items(b"c"):
            if not self._verify:
                self._advance(1)
            container = int.from_bytes(key[:8], "big")
            record = self._record(raw)
            if len(key) != 8 or record is None:
                held = self._damaged_record(key, raw)
            else:
                held = self._slab(container, record)
            if held is not None:
                yield held

    def _damaged_record(self, key: bytes, raw: bytes) -> Held | None:
        """Its slab file, if there is one, counts as one without a record."""

        def put_away() -> None:
            batch = self.index.batch()
            batch.raw.delete(b"c" + key)
            batch.raw.put(b"x" + key, raw)
            self.index.commit(batch)

        container = int.from_bytes(key[:8], "big")
        self.findings.problem(
            "record-damaged", f"the record of container {container} can't be read", put_away
        )
        for place in self.places.values():
            if len(key) == 8 and os.path.isfile(slab_path(place.root, container)):
                return self._unrecorded(container, place.root)
        return None

    def _slab(self, container: int, record: SlabRecord) -> Held | None:
        place = self._moved.get(container) or self.places.get(record.directory)
        if place is None:
            where = self._absent.get(record.directory, f"a directory that is not known ({record.directory})")
            if record.state == CLEAN:
                self.findings.note(
                    "slab-elsewhere", f"what is cached in {where}, which is not there, is forgotten"
                )
                return None
            trouble = f"it is in {where}, which is not there: mount its disk, or name it with --tier"
            return Held(self, container, record.state, record.size, trouble=trouble)
        path = slab_path(place.root, container)
        if not os.path.isfile(path) and record.was and not self.index.get(b"c" + u64(record.was)):
            old = slab_path(place.root, record.was)
            if os.path.isfile(old):
                self.findings.note("renaming", f"{old} is renamed at the next start")
                path = old
        try:
            looked = look(self.index, container, record, path, self._verify, self._advance)
        except OSError as exc:
            return self._missing(container, record, path, exc.strerror or str(exc))
        held = Held(self, container, record.state, looked.size, looked.mtime_ns, path=path)
        held.bad, held.unsure = looked.bad, looked.unsure
        if record.state == WRITING and looked.unsure:
            self.findings.problem(
                "pages-damaged",
                f"{path}: its page table can't be read; it is made anew when the file is sealed",
                self._forget_pages(container),
            )
        if record.state == CLEAN and (looked.bad or looked.unsure or looked.is_wrong):
            self._clean_is_bad(held, looked)
            return None
        return held

    def _missing(self, container: int, record: SlabRecord, path: str, reason: str) -> Held | None:
        if record.state == CLEAN:
            self.findings.problem(
                "slab-missing", f"{path}: {reason}; it was clean", self.forget(container, record.size)
            )
            return None
        return Held(self, container, record.state, record.size, trouble=f"{path}: {reason}")

    def _forget_pages(self, container: int) -> Mend:
        """All that there are: how many pages a slab has that is written to, its record does not say."""

        def change() -> None:
            batch = self.index.batch()
            for key, _ in self.index.items(b"p" + u64(container)):
                batch.raw.delete(b"p" + u64(container) + key)
            self.index.commit(batch)

        return change

    def _clean_is_bad(self, held: Held, looked: Looked) -> None:
        pages = sum(count for _, count in looked.bad) + looked.unsure
        what = f"{pages} page(s) are not what was stored" if pages else "its size or its page table is wrong"
        self.findings.problem(
            "slab-damaged",
            f"{held.path}: {what}; it is clean, and is fetched again when it is needed",
            self.drop(held),
        )

    # --- what whoever decides may do --------------------------------------------------------------

    def forget(self, container: int, size: int) -> Mend:
        """The record goes."""

        def change() -> None:
            batch = self.index.batch()
            batch.delete(container, page_count(size))
            self.index.commit(batch)

        return change

    def drop(self, held: Held) -> Mend:
        """Record and file go: of what nobody needs from here."""

        def change() -> None:
            self.forget(held.container, held.size)()
            try:
                os.unlink(held.path)
            except OSError as exc:
                raise CantMend(f"{held.path}: {exc.strerror}") from None

        return change

    def mark_dirty(self, held: Held) -> Mend:
        """It is not in any under storage: it must not be evicted."""

        def change() -> None:
            record = self.index.record(held.container)
            if record is not None:
                record.state = DIRTY
                self.index.put(held.container, record)

        return change

    def record_again(self, held: Held) -> Mend:
        """A record for a file that has none, or new checksums for one that has lost some: of the
        bytes as they are."""

        def change() -> None:
            root = held.path.rpartition("/slabs/")[0]
            places = [place for place in self.places.values() if place.root == root]
            if not places:
                raise CantMend(f"{held.path} is in no directory of this worker")
            try:
                reindex(self.index, held.container, held.path, places[0].directory_id)
            except OSError as exc:
                raise CantMend(f"{held.path}: {exc.strerror}") from None

        return change


def index_again(path: Path, roots: list[str]) -> Index:
    """A new, empty index for a worker that has lost its own, in place of the one that its tier
    directories tell of; what is in them is without a record then. CantMend: they tell of none, or of
    several."""
    markers = {root: layout.read_marker(Path(root)) for root in roots}
    found = {root: marker for root, marker in markers.items() if marker is not None}
    if len({marker.worker_uuid for marker in found.values()}) != 1:
        raise CantMend("name its tier directories with --tier: they tell which worker it was")
    index = Index(path)
    batch = index.batch()
    for root, marker in found.items():
        batch.raw.put(b"muuid", marker.worker_uuid.encode())
        batch.raw.put(b"d" + u64(marker.directory_id), os.fsencode(root))
    batch.raw.put(b"mformat", u64(FORMAT))
    highest = max(marker.directory_id for marker in found.values())
    batch.raw.put(b"mnext_directory", u64(highest + 1))
    index.commit(batch)
    return index


def bytes_of(run: tuple[int, int], size: int) -> tuple[int, int]:
    """(first byte, byte after the last) of a run of pages of a file."""
    return run[0] * PAGE_BYTES, min(size, (run[0] + run[1]) * PAGE_BYTES)
