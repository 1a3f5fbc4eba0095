"""Between synchronous steps and metadata that has to be fetched from an under storage first.

A namespace operation is one synchronous step: checks, transaction, commit. Where it meets something
that is not known yet, it asks the gate, which raises `NeedsLoad` out of the step (nothing has been
committed). `Gate.run` then gives a coroutine that loads and runs the whole step again, so that
everything is looked at anew. What an operation has had loaded it does not ask for twice, so an
operation ends also where metadata is compared with the under storage every time.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from alluxiofuse.errors import FsError, StateError
from alluxiofuse.master.records import InodeRecord

R = TypeVar("R")
_MAX_ROUNDS = 1000
"""Of one operation. A long path needs a round or two a component; more is somebody renaming under
the feet of this operation all the time."""


class Loader(Protocol):
    """See `ufs_loader.UfsLoader`."""

    def needs_child(
        self, parent: int, parent_record: InodeRecord, name: bytes, child: int | None
    ) -> bool: ...

    async def load_child(self, parent: int, name: bytes) -> None: ...

    def needs_children(self, ino: int, record: InodeRecord) -> bool: ...

    async def load_children(self, ino: int) -> None: ...

    def needs_refresh(self, ino: int, record: InodeRecord) -> bool: ...

    async def refresh(self, ino: int) -> None: ...

    def cache_s(self, record: InodeRecord) -> float: ...

    def listed_cache_s(self, directory: int, record: InodeRecord) -> Callable[[InodeRecord], float]: ...


_Need = tuple[int, bytes | None, bool]
"""(inode, name or None, whether a whole listing): what was asked for."""


class NeedsLoad(Exception):
    """Raised out of a step; never leaves `Gate.run`."""

    def __init__(self, need: _Need, load: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self.need = need
        self.load = load


class Gate:
    """Owned by the master's only thread. `_done` belongs to the step that runs now."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self._done: set[_Need] = set()

    def child(self, parent: int, parent_record: InodeRecord, name: bytes, child: int | None) -> None:
        """Go on only when it is known whether, and as what, `name` is in `parent`."""
        if self.loader.needs_child(parent, parent_record, name, child):
            loader = self.loader
            self._need((parent, name, False), lambda: loader.load_child(parent, name))

    def children(self, ino: int, record: InodeRecord) -> None:
        """Go on only when all names of the directory are known."""
        if self.loader.needs_children(ino, record):
            loader = self.loader
            self._need((ino, None, True), lambda: loader.load_children(ino))

    def fresh(self, ino: int, record: InodeRecord) -> None:
        """Go on only when the inode was compared with the under storage recently enough."""
        if self.loader.needs_refresh(ino, record):
            loader = self.loader
            self._need((ino, None, False), lambda: loader.refresh(ino))

    def _need(self, need: _Need, load: Callable[[], Awaitable[None]]) -> None:
        if need not in self._done:
            raise NeedsLoad(need, load)

    def run(self, step: Callable[[], R]) -> R | Awaitable[R]:
        """The step's result, or an awaitable of it when something has to be loaded first. If that is
        cancelled, nothing of the step was done."""
        try:
            return step()
        except NeedsLoad as needs:
            return self._run_loading(step, needs)

    async def _run_loading(self, step: Callable[[], R], needs: NeedsLoad) -> R:
        done: set[_Need] = set()
        failure: StateError | None = None
        for _ in range(_MAX_ROUNDS):
            try:
                await needs.load()
                done.add(needs.need)
            except StateError as exc:
                failure = exc  # What is known is served: the loader asks for nothing more then.
            self._done = done
            try:
                return step()
            except NeedsLoad as more:
                if failure is not None:
                    raise failure from None
                needs = more
            finally:
                self._done = set()
        raise FsError(errno.ELOOP)
