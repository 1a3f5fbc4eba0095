"""What the kernel knows of us: inodes, and for how long it may believe what we said.

Entries and attributes get long timeouts; the master tells what changed (the client's watch), and
the kernel is made to forget just that. Two things make this safe: an answer that a change has
overtaken is given with timeouts of zero (`ChangeLog`), and without a healthy watch nothing is cached.

Inode numbers are the master's, except that a mount of a subtree shows its directory as the
kernel's root (1). Everything here belongs to the trio thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pyfuse3

from alluxiofuse.client.changes import ChangeLog
from alluxiofuse.fuse.invalidation import Invalidator
from alluxiofuse.wire.types import Attr

KERNEL_ROOT = 1
BLOCK_SIZE_HINT = 128 << 10
"""st_blksize: what stdio and Python buffer, so the size of the writes of many programs. Each write(2)
is one request to us, but a buffered reader that seeks about reads this much each time."""
_KIND = 0o170000
_REGULAR = 0o100000
"""S_IFMT and S_IFREG."""
MAPPED_BYTES = 4096
"""A page of the kernel's."""
ON_ITS_WAY_S = 0.25
"""How long an answer may take to the kernel."""
MAX_OUTGROWN = 1000
MAX_TOP_NAMES = 1 << 20
"""Names in the root directory that are remembered for `reset`; further ones are not cached."""


class _Known:
    """An inode that the kernel holds a reference to."""

    __slots__ = ("cache_s", "lookups", "size", "told")

    def __init__(self) -> None:
        self.lookups = 0
        self.told = 0
        """`version` of the last attributes that it was given."""
        self.cache_s = 0.0
        self.size = 0
        """As the kernel has it: as it was last told, and its own writes."""


class KernelView:
    """Also the FileSystem's CacheListener. `limit_s` bounds all timeouts; `is_healthy` says whether
    changes are being heard of at all."""

    def __init__(
        self,
        root_ino: int,
        limit_s: float,
        is_healthy: Callable[[], bool],
        new_attributes: Callable[[], pyfuse3.EntryAttributes] = pyfuse3.EntryAttributes,
    ) -> None:
        self.root_ino = root_ino
        self.new_attributes = new_attributes
        """Makes what an answer is filled into: the session's own kind."""
        self.changes = ChangeLog()
        self.on_void: Callable[[int | None], None] = lambda ino: None
        """Called with an inode of which all that is remembered elsewhere is void; None: of all."""
        self.is_incomplete = False
        """The kernel knows inodes from a former daemon too."""
        self._limit_s = limit_s
        self._is_healthy = is_healthy
        self._invalidator: Invalidator | None = None
        self._known: dict[int, _Known] = {}
        self._top_names: set[bytes] = set()
        """Names of the root directory that the kernel may have cached, also as not existing."""
        self._former_sizes: dict[int, tuple[int, float]] = {}
        """Of some inodes that were written elsewhere while the kernel knew them: the size before it was
        told of a larger one, and until when it may still go by it. The oldest first."""

    def connect(self, invalidator: Invalidator) -> None:
        """From now on tell the kernel what to forget."""
        self._invalidator = invalidator

    # --- numbers ------------------------------------------------------------------------------------

    def ours(self, kernel_ino: int) -> int:
        return self.root_ino if kernel_ino == KERNEL_ROOT else kernel_ino

    def kernels(self, ino: int) -> int:
        return KERNEL_ROOT if ino == self.root_ino else ino

    def knows(self, ino: int) -> bool:
        return self.is_incomplete or ino == self.root_ino or ino in self._known

    def believes_otherwise(self, attr: Attr) -> bool:
        """The kernel may go on believing other attributes than these, or these are not to be believed
        for any time (being written)."""
        known = self._known.get(attr.ino)
        if known is None:
            return self.is_incomplete
        return attr.home != 0 or known.told != version(attr)

    def is_mapped_write(self, ino: int, offset: int) -> bool:
        """A write by a handle with O_APPEND that is not to the end: the kernel writes pages of shared
        mappings back by any handle of the inode, and appends at the end as it knows it."""
        known = self._known.get(ino)
        if known is None or offset >= known.size or offset % MAPPED_BYTES:
            return False
        # An append to an end that has just moved on: the kernel may not have had our newer answer yet.
        size, until = self._former_sizes.get(ino, (-1, 0.0))
        return offset != size or time.monotonic() > until

    def grown(self, ino: int, end: int) -> None:
        """The kernel wrote up to `end`."""
        known = self._known.get(ino)
        if known is not None and end > known.size:
            known.size = end

    def emptied(self, ino: int) -> None:
        """The kernel opened it with O_TRUNC."""
        known = self._known.get(ino)
        if known is not None:
            known.size = 0

    # --- answers ------------------------------------------------------------------------------------

    def entry(self, attr: Attr, parent: int, name: bytes, since: int) -> pyfuse3.EntryAttributes:
        """The answer to a lookup or creation, of which the kernel keeps a reference."""
        self._tell(attr).lookups += 1
        return self._filled(attr, *self._entry_timeouts(attr, parent, name, since))

    def listing(self, parent: int, since: int) -> Listing:
        """For the entries of one page of a listing, within one request and without an await."""
        return Listing(self, parent, since)

    def attributes(self, attr: Attr, since: int) -> pyfuse3.EntryAttributes:
        """The answer to getattr or setattr."""
        known = self._known.get(attr.ino)
        if known is not None or self.knows(attr.ino):
            self._tell(attr)
        return self._filled(attr, 0.0, self._attr_timeout(attr, since))

    def negative(self, parent: int, name: bytes, since: int) -> pyfuse3.EntryAttributes:
        """A name that does not exist, cached as long as entries of its directory are."""
        answer = self.new_attributes()
        answer.st_ino = 0
        known = self._known.get(parent)
        cache_s = 0.0 if known is None else known.cache_s
        answer.entry_timeout = self._entry_timeout(cache_s, parent, name, since)
        return answer

    def _tell(self, attr: Attr) -> _Known:
        known = self._known.get(attr.ino)
        if known is None:
            known = self._known[attr.ino] = _Known()
        known.told = version(attr)
        known.cache_s = attr.cache_s
        if attr.size > known.size and attr.home:
            self._outgrown(attr.ino, known.size)
        known.size = attr.size
        return known

    def _outgrown(self, ino: int, size: int) -> None:
        self._former_sizes.pop(ino, None)
        self._former_sizes[ino] = size, time.monotonic() + ON_ITS_WAY_S
        if len(self._former_sizes) > MAX_OUTGROWN:
            del self._former_sizes[next(iter(self._former_sizes))]

    def _entry_timeouts(self, attr: Attr, parent: int, name: bytes, since: int) -> tuple[float, float]:
        return self._entry_timeout(attr.cache_s, parent, name, since), self._attr_timeout(attr, since)

    def _entry_timeout(self, cache_s: float, parent: int, name: bytes, since: int) -> float:
        if not self.changes.is_current(since, (parent, name)) or not self._is_healthy():
            return 0.0
        if parent == self.root_ino and not self._remember_top(name):
            return 0.0
        return max(0.0, min(cache_s, self._limit_s))

    def _remember_top(self, name: bytes) -> bool:
        """A name in the root directory, to be voided by `reset`. False: too many."""
        if name not in self._top_names:
            if len(self._top_names) >= MAX_TOP_NAMES:
                return False
            self._top_names.add(name)
        return True

    def _attr_timeout(self, attr: Attr, since: int) -> float:
        if attr.home or not self.changes.is_current(since, attr.ino) or not self._is_healthy():
            return 0.0  # with a home it is being written: size and times are asked for each time
        return max(0.0, min(attr.cache_s, self._limit_s))

    def _filled(self, attr: Attr, entry_s: float, attr_s: float) -> pyfuse3.EntryAttributes:
        out = self.new_attributes()
        out.st_blksize = BLOCK_SIZE_HINT
        fill(out, attr, entry_s, attr_s)
        if attr.ino == self.root_ino:
            out.st_ino = KERNEL_ROOT
        return out

    # --- what the kernel lets go of ---------------------------------------------------------------------

    def forget(self, kernel_ino: int, count: int) -> None:
        ino = self.ours(kernel_ino)
        known = self._known.get(ino)
        if known is None:
            return
        known.lookups -= count
        if known.lookups <= 0 and ino != self.root_ino:
            del self._known[ino]
            self._former_sizes.pop(ino, None)
            self.on_void(ino)

    def forget_name(self, parent: int, name: bytes) -> None:
        """Removed through the mount itself."""
        if parent == self.root_ino:
            self._top_names.discard(name)

    # --- CacheListener: what became void --------------------------------------------------------------

    def attr_changed(self, ino: int) -> None:
        self.changes.note(ino)
        self.on_void(ino)
        if self._invalidator is not None and self.knows(ino):
            self._invalidator.attr(self.kernels(ino))

    def data_changed(self, ino: int) -> None:
        self.changes.note(ino)
        self.on_void(ino)
        if self._invalidator is not None and self.knows(ino):
            self._invalidator.data(self.kernels(ino))

    def entry_changed(self, parent: int, name: bytes) -> None:
        self.changes.note((parent, name), parent)
        if self._invalidator is not None and self.knows(parent):
            self._invalidator.entry(self.kernels(parent), name)
            # The kernel voids the directory's attributes itself only when it has such an entry.
            self._invalidator.attr(self.kernels(parent))

    def reset(self) -> None:
        """Voiding an entry voids all that is below it, so the names in the root suffice, together with
        the attributes and pages of every inode that is known (those in use are not dropped)."""
        self.changes.note_all()
        self.on_void(None)
        if self._invalidator is not None:
            names, self._top_names = self._top_names, set()
            inos = [self.kernels(ino) for ino in self._known]
            self._invalidator.reset([(KERNEL_ROOT, name) for name in names], inos)


class Listing:
    """As `KernelView.entry` for many entries, of which the kernel takes as many as it has room for."""

    __slots__ = ("_is_current", "_is_top", "_known", "_limit_s", "_out", "_parent", "_since", "_view")

    def __init__(self, view: KernelView, parent: int, since: int) -> None:
        self._view = view
        self._parent = parent
        self._since = since
        self._known = view._known
        is_healthy = view._is_healthy()
        self._is_current = is_healthy and view.changes.now == since
        """Nothing at all has changed since; else each entry is looked up."""
        self._is_top = parent == view.root_ino
        self._limit_s = view._limit_s if is_healthy else 0.0
        self._out = view.new_attributes()
        self._out.st_blksize = BLOCK_SIZE_HINT

    def entry(self, attr: Attr, name: bytes) -> pyfuse3.EntryAttributes:
        """Valid until the next call; `taken` must follow when the kernel had room for it."""
        if not self._is_current:
            fill(self._out, attr, *self._view._entry_timeouts(attr, self._parent, name, self._since))
            if attr.home:
                self._keep_size(attr)
            return self._out
        cache_s, limit_s = attr.cache_s, self._limit_s
        valid_s = cache_s if 0.0 <= cache_s <= limit_s else max(0.0, min(cache_s, limit_s))
        is_remembered = not self._is_top or self._view._remember_top(name)
        fill(self._out, attr, valid_s if is_remembered else 0.0, 0.0 if attr.home else valid_s)
        if attr.home:
            self._keep_size(attr)
        return self._out

    def _keep_size(self, attr: Attr) -> None:
        """Of what is being written a listing has an older size, and the kernel would cut a mapping there
        before it asks."""
        known = self._known.get(attr.ino)
        if known is not None and known.told:
            self._out.st_size = known.size

    def taken(self, attr: Attr) -> None:
        known = self._known.get(attr.ino)
        if known is None:
            known = self._known[attr.ino] = _Known()
        if not (attr.home and known.told):
            known.size = attr.size
        known.told = version(attr)
        known.cache_s = attr.cache_s
        known.lookups += 1


def version(attr: Attr) -> int:
    """Tells attributes of an inode apart: whatever changes in them moves one of these."""
    return hash((attr.container, attr.size, attr.mtime_ns, attr.ctime_ns))


def fill(out: pyfuse3.EntryAttributes, attr: Attr, entry_s: float, attr_s: float) -> None:
    """All but st_blksize, and with our own inode number."""
    mode, size = attr.mode, attr.size
    out.st_ino = attr.ino
    out.st_mode = mode
    out.st_nlink = attr.nlink
    out.st_uid = attr.uid
    out.st_gid = attr.gid
    out.st_rdev = attr.rdev
    out.st_size = size
    out.st_blocks = (size + 511) >> 9 if mode & _KIND == _REGULAR else 0
    out.st_atime_ns = attr.atime_ns
    out.st_mtime_ns = attr.mtime_ns
    out.st_ctime_ns = attr.ctime_ns
    out.entry_timeout = entry_s
    out.attr_timeout = attr_s
