"""Waiting for an upload: close under CACHE_THROUGH, and fsync where no tier is durable."""

from __future__ import annotations

import trio

from alluxiofuse.client.core import Core
from alluxiofuse.errors import UfsUnavailableError
from alluxiofuse.rpc import interrupt
from alluxiofuse.wire import master_ops as ops


class UploadPatience:
    """Of one call of a program. Runs out when nothing can be uploaded for `client.persist_patience_s`;
    an upload that is under way, or waits for others that are, takes as long as it takes."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._stuck_since_s = trio.current_time()

    async def is_persisted(self, ino: int, container: int, wait_s: float) -> bool:
        """Whether the under storage has content `container` of the inode, or newer, after at most
        `wait_s`. UfsUnavailableError when patience has run out: nothing is lost, it goes on being tried.
        UfsError when the store refuses it; EINTR when the program is told to stop."""
        end = self._stuck_since_s + self._core.config.persist_patience_s
        request = ops.WaitPersisted(ino, container, min(wait_s, max(0.0, end - trio.current_time())))
        try:
            found = await interrupt.watched(lambda: self._core.session.call(request, is_idempotent=True))
        except UfsUnavailableError:
            if trio.current_time() >= end:
                raise
            return False
        self._stuck_since_s = trio.current_time()
        return found
