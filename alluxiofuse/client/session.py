"""The client's session at the master: lease, watch, releases, and calls that survive a lost session."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import trio

from alluxiofuse.errors import AlluxioFuseError, PeerError, SessionExpiredError
from alluxiofuse.rpc.base import Connection
from alluxiofuse.wire import master_ops as ops
from alluxiofuse.wire.messages import Request
from alluxiofuse.wire.types import EVENT_ATTR, EVENT_DATA, EVENT_ENTRY, EVENT_FREED, Event

log = logging.getLogger(__name__)
R = TypeVar("R")

RELEASE_BATCH = 100
RELEASE_DELAY_S = 0.05
_RETRY_S = 0.5


class CacheListener(Protocol):
    """Whoever caches what a FileSystem answered. Called from the watch task: must not block, await
    or call back into the FileSystem; queue it."""

    def attr_changed(self, ino: int) -> None: ...

    def data_changed(self, ino: int) -> None:
        """Attributes and cached pages of `ino` are void."""

    def entry_changed(self, parent: int, name: bytes) -> None:
        """Name (also a negative entry), the directory's attributes and its cached listing are void."""

    def reset(self) -> None:
        """Everything cached is void: events were missed or the master was away for a lease."""


class SessionHooks(Protocol):
    """What a session needs from the FileSystem it belongs to."""

    def open_inos(self) -> list[int]:
        """Inodes held open, once each."""

    async def reopen(self) -> None:
        """The session is a new one: register everything that is open again."""

    def changed(self, event: Event) -> None:
        """Of one event, before the listener hears of it. Plain and quick."""

    async def settle(self) -> None:
        """All events of a poll were told: send what must be done before they count as applied."""


class Session:
    """Owned by one FileSystem; all state belongs to the trio thread."""

    def __init__(self, master: Connection, hooks: SessionHooks, name: str, hostname: str) -> None:
        self.id = 0
        self.listener: CacheListener | None = None
        self._master = master
        self._hooks = hooks
        self._name = name
        self._hostname = hostname
        self._lease_s = 0.0
        self._event_seq = 0
        self._healthy_until = -1.0
        """trio time until which what was cached may be believed without hearing from the master."""
        self._renewing = trio.Lock()
        self._released: list[int] = []
        self._has_released = trio.Event()

    @property
    def is_watch_healthy(self) -> bool:
        return self._healthy_until > trio.current_time()

    async def open(self) -> None:
        """Start the session. The errors of the connection, or what the master refuses."""
        self._take(await self._master.call(ops.OpenSession(self._name, self._hostname)))

    def _take(self, grant: ops.SessionGrant) -> None:
        self.id = grant.session_id
        self._lease_s = grant.lease_s
        self._event_seq = grant.event_seq
        self._healthy_until = trio.current_time() + grant.lease_s

    async def call(self, request: Request[R]) -> R:
        """Ask the master; once more in a new session when it does not know ours any more."""
        try:
            return await self._master.call(request)
        except SessionExpiredError:
            await self._renew()
            if hasattr(request, "session_id"):
                request.session_id = self.id
            return await self._master.call(request)

    async def _renew(self) -> None:
        """Take the old session up again (the master restarted), else start a new one. Single flight."""
        expired = self.id
        async with self._renewing:
            if self.id != expired:
                return
            inos = self._hooks.open_inos()
            try:
                grant = await self._master.call(ops.OpenSession(self._name, self._hostname, expired, inos))
            except SessionExpiredError:
                grant = await self._master.call(ops.OpenSession(self._name, self._hostname))
            log.warning("the master had lost our session: now %d, %d open inodes", grant.session_id, len(inos))
            self._take(grant)
            self._tell(lambda listener: listener.reset())
            if grant.session_id != expired:
                self._released.clear()  # they were the old session's
                await self._hooks.reopen()

    # --- background ---------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Hear of changes, for ever. A master that does not answer for a lease: reset, once."""
        while True:
            is_new_loss = self.is_watch_healthy
            with trio.move_on_at(self._healthy_until if is_new_loss else float("inf")) as lease:
                await self._poll_until_it_fails()
            if is_new_loss and (lease.cancelled_caught or not self.is_watch_healthy):
                log.warning("no word from the master for %.0f s: nothing cached is believed", self._lease_s)
                self._tell(lambda listener: listener.reset())
            if not lease.cancelled_caught:
                await trio.sleep(_RETRY_S)

    async def _poll_until_it_fails(self) -> None:
        request = ops.Watch(self.id, self._event_seq, max(0.1, min(60.0, self._lease_s / 3)))
        try:
            asked_at = trio.current_time()
            answer = await self._master.call(request)
        except SessionExpiredError:
            await self._try_renew()
            return
        except AlluxioFuseError as exc:
            log.debug("watch: %s", exc)
            return
        await self._apply(answer, asked_at)

    async def _apply(self, answer: ops.WatchAnswer, asked_at: float) -> None:
        raise NotImplementedError

    async def _try_renew(self) -> None:
        try:
            await self._renew()
        except AlluxioFuseError as exc:
            log.debug("renewing the session: %s", exc)

    def _tell(self, what: Callable[[CacheListener], None]) -> None:
        if self.listener is not None:
            what(self.listener)
