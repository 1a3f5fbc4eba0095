"""Makes the kernel forget, in a thread of its own.

Invalidating an entry waits in the kernel for requests that hold the directory's lock, and
invalidating pages waits for reads of them; the trio thread has to go on answering those. So the
thread that answers never waits for this one, and this one waits only for the kernel: no cycle.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Literal, Protocol

import pyfuse3

log = logging.getLogger("alluxiofuse.fuse")

MAX_PENDING = 50_000

Order = tuple[Literal["attr", "data"], int] | tuple[Literal["entry"], int, bytes]


class Kernel(Protocol):
    """pyfuse3's notifications; a test's own recorder."""

    def invalidate_inode(self, inode: int, attr_only: bool = False) -> None: ...

    def invalidate_entry(self, inode_p: int, name: bytes) -> None: ...


class PyFuse3Kernel:
    """The kernel behind pyfuse3's session. What it does not know (ENOENT) needs no invalidation."""

    def invalidate_inode(self, inode: int, attr_only: bool = False) -> None:
        _ignoring_enoent(lambda: pyfuse3.invalidate_inode(inode, attr_only))

    def invalidate_entry(self, inode_p: int, name: bytes) -> None:
        _ignoring_enoent(lambda: pyfuse3.invalidate_entry(inode_p, name))


def _ignoring_enoent(call: Callable[[], None]) -> None:
    try:
        call()
    except OSError as exc:
        if exc.errno != errno.ENOENT:
            raise


class Invalidator:
    """A bounded set of orders and the thread that carries them out, oldest first.

    `attr`, `data`, `entry` may be called from any thread and never block. The same order while it
    waits is carried out once. When more than `max_pending` wait, they are dropped, and
    `on_overflow` is called (in the caller's thread): it must order everything that is known.
    """

    def __init__(
        self, kernel: Kernel, on_overflow: Callable[[], None], max_pending: int = MAX_PENDING
    ) -> None:
        self._kernel = kernel
        self._on_overflow = on_overflow
        self._max_pending = max_pending
        self._changed = threading.Condition()
        self._pending: OrderedDict[Order, None] = OrderedDict()  # guarded by _changed
        self._names: list[tuple[int, bytes]] = []  # guarded by _changed; of a reset, last first
        self._inos: list[int] = []  # guarded by _changed; of a reset, after its names
        self._is_closed = False  # guarded by _changed
        self._busy = False  # guarded by _changed
        self._is_turn_of_reset = False  # the thread's own
        self._thread = threading.Thread(target=self._run, name="invalidator", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def attr(self, ino: int) -> None:
        self._put(("attr", ino))

    def data(self, ino: int) -> None:
        self._put(("data", ino))

    def entry(self, parent: int, name: bytes) -> None:
        self._put(("entry", parent, name))

    def _put(self, order: Order) -> None:
        with self._changed:
            if self._is_closed:
                return
            self._pending[order] = None
            is_full = len(self._pending) > self._max_pending
            if is_full:
                self._pending.clear()
            self._changed.notify_all()
        if is_full:
            self._on_overflow()

    def reset(self, names: Iterable[tuple[int, bytes]], inos: Iterable[int]) -> None:
        """Instead of all that waits: these entries, then attributes and pages of these inodes. That may be
        a million, seconds of work: what is ordered meanwhile takes turns with it."""
        reset_names, reset_inos = list(names), list(inos)
        reset_names.reverse()
        reset_inos.reverse()
        with self._changed:
            if not self._is_closed:
                self._pending.clear()
                self._names, self._inos = reset_names, reset_inos
                self._changed.notify_all()

    @property
    def _has_orders(self) -> bool:
        return bool(self._pending or self._names or self._inos)

    def wait_idle(self, timeout_s: float) -> bool:
        """All orders given so far are carried out. Blocks: never in the thread that answers."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._has_orders or self._busy), timeout_s)

    def close(self) -> None:
        """No more orders; one that is being carried out ends by itself. Before the session closes,
        follow with `join`: an order must not reach a session that is no more."""
        with self._changed:
            self._is_closed = True
            self._pending.clear()
            self._names, self._inos = [], []
            self._changed.notify_all()

    def join(self, timeout_s: float) -> bool:
        """The thread has ended. Blocks."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (order := self._next()) is not None:
            try:
                self._carry_out(order)
            except OSError as exc:
                # ENODEV, ENOTCONN: being unmounted, the kernel forgets everything anyway.
                level = logging.DEBUG if exc.errno in (errno.ENODEV, errno.ENOTCONN) else logging.WARNING
                log.log(level, "the kernel did not invalidate %r: %s", order[:2], exc)
            except Exception:
                log.exception("invalidating failed unexpectedly")

    def _next(self) -> Order | None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._has_orders or self._is_closed)
            if self._is_closed:
                return None
            self._busy = True
            self._is_turn_of_reset = not self._is_turn_of_reset
            if self._pending and not (self._is_turn_of_reset and (self._names or self._inos)):
                return self._pending.popitem(last=False)[0]
            if self._names:
                return ("entry", *self._names.pop())
            return ("data", self._inos.pop())

    def _carry_out(self, order: Order) -> None:
        if order[0] == "entry":
            self._kernel.invalidate_entry(order[1], order[2])
        else:
            self._kernel.invalidate_inode(order[1], order[0] == "attr")
