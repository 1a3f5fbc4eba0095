"""Which commits survive the machine: the write-ahead log's fsyncs, shared by all who wait for one.

A commit survives a kill of the process at once (`store`); the power is another matter. What must not
overtake the log waits here before it has effects elsewhere that can't be undone:

* the answer to fsync(2), and to who waits for the under storage (CACHE_THROUGH);
* changes of an under storage (`persist_jobs`) and commands to workers (`workers`): a container is
  dropped, or evictable, when the commit that says why can't be lost any more;
* the start of writing over content that only a worker has (`service`).
"""

from __future__ import annotations

from typing import Protocol

import trio


class Log(Protocol):
    """What is needed of `store.Store`."""

    commit_count: int
    synced_count: int
    """Of the commits; set by `sync`."""
    needed_count: int
    """The newest commit that fsync(2) waits for."""

    def sync(self) -> None: ...


class Durability:
    """Owned by the master's thread; one per store."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._round: trio.Event | None = None
        """Set when the fsync under way ends."""
        self.hurried = trio.Event()
        """Somebody will wait soon: whoever syncs now and then does it now, and replaces this."""

    @property
    def is_durable(self) -> bool:
        """All commits so far are."""
        return self._log.synced_count >= self._log.commit_count

    def begin(self) -> int:
        """For fsync(2): the commit to wait for, which begins to become durable; 0: all that matters is."""
        log = self._log
        if log.synced_count >= log.needed_count:
            return 0
        self.hurried.set()
        return log.needed_count

    async def wait(self, gather_s: float = 0.0, upto: int = 0) -> None:
        """Until all commits so far (those up to number `upto`) are durable; `gather_s` may pass first, so
        that one fsync serves many. StateError: the log can't be synced. If cancelled, an fsync that was
        begun ends first."""
        log, wanted = self._log, self._log.commit_count
        if upto:
            wanted = min(upto, wanted)  # numbers of an earlier life may be larger
        if gather_s and log.synced_count < wanted:
            await trio.sleep(gather_s)
        while log.synced_count < wanted:
            if self._round is not None:
                await self._round.wait()
            else:
                await self._sync()

    async def _sync(self) -> None:
        done = self._round = trio.Event()
        try:
            await trio.to_thread.run_sync(self._log.sync)
        finally:
            self._round = None
            done.set()
