"""What all that changes slabs shares: the table, the index, the names of files. See `slabs`."""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable

from alluxiofuse.errors import StaleError
from alluxiofuse.wire.types import OrphanSeal
from alluxiofuse.worker.accounts import Accounts
from alluxiofuse.worker.fds import Descriptors
from alluxiofuse.worker.index import Index, SlabRecord
from alluxiofuse.worker.layout import slab_path
from alluxiofuse.worker.slab import Lock, Slab
from alluxiofuse.worker.tiers import Tiers

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Of a filesystem that has no hard links."""


class Table(Accounts):
    """All slabs of a worker."""

    def __init__(
        self,
        tiers: Tiers,
        index: Index,
        *,
        high_watermark: float = 0.95,
        wall_s: Callable[[], float] = time.time,
        max_open_slabs: int | None = None,
    ) -> None:
        super().__init__(tiers, high_watermark)
        self.index = index
        self.fds = Descriptors(max_open_slabs)
        self.by_container: dict[int, Slab] = {}
        self.locks: dict[int, Lock] = {}
        self.changed: dict[int, None] = {}
        """Containers whose report to the master is out of date, oldest change first."""
        self.writing: set[Slab] = set()
        """Those open for writing."""
        self.passing: dict[Slab, None] = {}
        """Those that kernels may be writing to by themselves."""
        self.passing_ended: Callable[[Slab], None] = lambda slab: None
        """Called when one is sealed, or dropped."""
        self.orphans: dict[int, OrphanSeal] = {}
        """Seals that no client asked for, to be told to the master."""
        self.counters: Counter[str] = Counter()
        self.old_names: dict[str, None] = {}
        """Paths of files that have another name or place in the index by now; they are removed once
        that is durable, so that a slab is found whatever of the index is lost with the power."""
        self._wall_s = wall_s
        self._lock_ids = itertools.count(1)

    # --- finding ----------------------------------------------------------------------------------

    def get(self, container: int) -> Slab | None:
        return self.by_container.get(container)

    def lock_of(self, lock_id: int) -> Lock:
        """StaleError when the lock ended."""
        found = self.locks.get(lock_id)
        if found is None:
            raise StaleError(f"lock {lock_id} has ended: attach again")
        return found

    def path(self, slab: Slab) -> str:
        return slab_path(slab.directory.root, slab.container)

    # --- records -----

    def _record(self, slab: Slab) -> SlabRecord:
        return SlabRecord(
            slab.size,
            slab.directory.directory_id,
            slab.state,
            int(self._wall_s()),
            slab.page_count <= 1 and bool(slab.present),
            slab.checksum if slab.page_count <= 1 else 0,
            passes=slab.passes,
        )

    def stored_checksums(self, slab: Slab, pages: Iterable[int]) -> dict[int, int]:
        """What the index says of present pages."""
        if slab.page_count <= 1:
            return dict.fromkeys(pages, slab.checksum)
        return self.index.checksums(slab.container, pages)

    # --- names of files -----

    def _new_file(self, path: str) -> int:
        """A read-write descriptor of a new, empty file."""
        if path in self.old_names:
            os.unlink(path)  # It may be another slab's file too.
            del self.old_names[path]
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def _give_name(self, old_path: str, path: str) -> None:
        if path in self.old_names:
            os.unlink(path)
            del self.old_names[path]
        try:
            os.link(old_path, path)
        except OSError as exc:
            if exc.errno not in _NO_LINKS:
                raise
            self.index.sync()
            os.rename(old_path, path)
        else:
            self.old_names[old_path] = None

    def remove_old_names(self, paths: Iterable[str]) -> None:
        """The index was synced since these became old names."""
        for path in paths:
            if path in self.old_names:
                del self.old_names[path]
                self._unlink(path)

    def _unlink(self, path: str) -> None:
        try:
            os.unlink(path)
        except OSError:
            self.counters["unlink_failed"] += 1
