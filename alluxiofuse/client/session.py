"""The client's session at the master: its lease, the watch, releases, and calls that survive a lost
session or connection."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar
from zlib import crc32

import msgspec
import trio

from alluxiofuse.client.intents import CHANGE, IntentLog
from alluxiofuse.client.request_ids import RequestIds
from alluxiofuse.errors import AlluxioFuseError, ConnectionLost, ForeignStateError, SessionExpiredError
from alluxiofuse.rpc.base import Connection
from alluxiofuse.rpc.reconnecting import MAX_ATTEMPTS, NotSentError, Reconnecting
from alluxiofuse.rpc.tally import tally
from alluxiofuse.wire import master_ops as ops
from alluxiofuse.wire.messages import Change, Request, request_id
from alluxiofuse.wire.types import EVENT_ATTR, EVENT_DATA, EVENT_ENTRY, Event, StateMark

log = logging.getLogger(__name__)
R = TypeVar("R")

RELEASE_BATCH = 100
MAX_RELEASES = 65536
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
        """One item for each open file."""

    def changed(self, event: Event) -> None:
        """Of one event, before the listener hears of it. Plain and quick."""

    def all_changed(self) -> None:
        """Events were missed. Plain and quick."""

    async def settle(self) -> None:
        """All events of a poll were told: send what must be done before they count as applied."""


async def ask_again(
    connection: Connection, request: Request[R], on_late: Callable[[R], None] | None = None
) -> R:
    """A call that may be done twice: sent again when the connection broke under it."""
    if not isinstance(connection, Reconnecting):
        return await connection.call(request)
    answer = await connection.exchange(request, on_late=on_late, is_idempotent=True)
    answer.close_fds()
    return answer.result


class Session:
    """Owned by one FileSystem; all state belongs to the trio thread."""

    def __init__(
        self,
        master: Connection,
        hooks: SessionHooks,
        name: str,
        hostname: str,
        intents: IntentLog | None = None,
    ) -> None:
        """`intents`: what this client leaves to the next, and has from the one before."""
        self.id = 0
        """0: not open."""
        self.listener: CacheListener | None = None
        self._master = master
        self._hooks = hooks
        self._name = name
        self._hostname = hostname
        self._lease_s = 0.0
        self._event_seq = 0
        self._healthy_until = -1.0
        """trio time until which what was cached may be believed without a word from the master."""
        self._seen = StateMark()
        """What the master's state held when it was last heard of; another state is none to go on with."""
        self._is_refused = False
        self._told: dict[str, int] = {}
        """Counters that the master knows."""
        self._renewing = trio.Lock()
        self.intents = intents
        self._ids = RequestIds() if intents is None else RequestIds(intents.life, intents.reserved_slots)
        before = None if intents is None else intents.predecessor
        self._predecessor = before if before is not None and before.session_id else None
        self._held: Counter[int] = Counter()
        """Open files of the predecessor that were not opened again yet."""
        self._released: list[int] = []
        """Opens that ended and the master has not been told of."""
        self._releasing: list[int] = []
        """Those in a Release that was not answered. It is sent at most once, so while it waits for a
        connection the master still counts them."""
        self._sending = trio.Lock()
        """Held by the one task that sends releases."""
        self._has_released = trio.Event()
        self._is_batch_full = trio.Event()

    @property
    def is_watch_healthy(self) -> bool:
        return self._healthy_until > trio.current_time()

    @property
    def is_connected(self) -> bool:
        """A master is there, as far as we know."""
        return not isinstance(self._master, Reconnecting) or self._master.current is not None

    # --- life ---------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Start the session, or go on with the predecessor's; the errors of the connection, or what the
        master refuses."""
        before = self._predecessor
        if before is None:
            self._take(await ask_again(self._master, ops.OpenSession(self._name, self._hostname)))
            return
        self.id, self._event_seq, self._held = before.session_id, before.event_seq, Counter(before.open_inos)
        async with self._renewing:
            await self._renew(self._master)
        self._healthy_until = trio.current_time() + self._lease_s

    def reopened(self, ino: int) -> None:
        """An open file of the predecessor was opened again, or can't be."""
        if self._held[ino]:
            self._held[ino] -= 1
            self.release(ino)

    async def close(self) -> None:
        """Release what is left and end the session. The errors of the connection."""
        await self.send_releases()
        session_id, self.id = self.id, 0
        await self._master.call(ops.CloseSession(session_id))

    async def resume(self, connection: Connection) -> None:
        """`Reconnecting.on_connected`: before anything else is asked on a new connection, the master
        hears exactly what is open, whatever was lost with the old one."""
        if not self.id:
            return
        try:
            await self._renew(connection)
        except ForeignStateError as exc:
            if not self._is_refused:
                log.error("the master refuses this client: %s", exc.message)
            self._is_refused = True
            raise
        self._is_refused = False

    async def call(
        self,
        request: Request[R],
        *,
        is_idempotent: bool = False,
        on_late: Callable[[R], None] | None = None,
    ) -> R:
        """Ask the master; once more in a new session when it does not know ours any more. A Change is
        carried out once, however often connections break and masters end meanwhile; only when the
        session is lost too can it not be known whether that has happened: ConnectionLost. `is_idempotent`:
        then it is simply done again. `on_late`: see `Connection.exchange`."""
        if isinstance(request, Change):
            if self.intents is not None and not is_idempotent:
                return await self._noted_change(request, self.intents, on_late)
            if self._master.may_lose_answers:
                slot = await self._ids.take()
                try:
                    return await self._change(request, slot, is_idempotent, on_late)
                finally:
                    self._ids.give_back(slot)
        try:
            if is_idempotent:
                return await ask_again(self._master, request, on_late)
            return await self._master.call(request)
        except SessionExpiredError:
            if not await self._renewed(request):
                raise
        return await self._master.call(msgspec.structs.replace(request, session_id=self.id))

    async def call_now(self, request: Request[R], on_late: Callable[[R], None]) -> R:
        """Ask a master that is there now: ConnectionLost at once when there is none, or it goes away."""
        link = self._master
        connection = link.current if isinstance(link, Reconnecting) else link
        if connection is None:
            raise ConnectionLost("the master is away")
        answer = await connection.exchange(request, on_late=on_late)
        answer.close_fds()
        return answer.result

    async def _renewed(self, request: Request[R]) -> bool:
        """There is a new session in place of the request's; False when it did not name ours."""
        expired = getattr(request, "session_id", 0)
        if not expired or not self.id:
            return False
        async with self._renewing:
            if self.id == expired:
                await self._renew(self._master)
        return True

    async def _noted_change(
        self, request: Change[R], intents: IntentLog, on_late: Callable[[R], None] | None
    ) -> R:
        """So that it is carried out once even if this process ends before the program has its answer: then
        the request comes again to the next one, which uses the same id. The slot is in use till then."""
        kind = CHANGE | crc32(request.OP.encode()) << 8
        former = intents.former(kind)
        lost: ConnectionLost | None = None
        if former is None:
            slot, number = await self._ids.take(), self._ids.next_number()
        else:
            slot, number = former
            lost = ConnectionLost("the process that sent it has ended")
            before = self._predecessor
            if before is None or before.session_id != self.id:
                raise ConnectionLost(f"the session of {request.OP} was lost: it may have been done")
        is_later = intents.at_end(partial(self._ids.give_back, slot))
        try:
            intents.note(kind, slot, number)
            return await self._change(request, slot, False, on_late, number, lost)
        finally:
            if not is_later:
                self._ids.give_back(slot)

    async def _change(
        self,
        request: Change[R],
        slot: int,
        is_idempotent: bool,
        on_late: Callable[[R], None] | None,
        number: int = 0,
        lost: ConnectionLost | None = None,
    ) -> R:
        """`lost`: it was sent before, with `number`."""
        request = msgspec.structs.replace(
            request, request_id=request_id(slot, number or self._ids.next_number())
        )
        for _ in range(MAX_ATTEMPTS):
            try:
                answer = await self._master.exchange(request, on_late=on_late)
                answer.close_fds()
                return answer.result
            except NotSentError:
                raise
            except ConnectionLost as exc:
                lost = exc
                tally["calls_repeated"] += 1
            except SessionExpiredError:
                if lost is not None and not is_idempotent:
                    tally["calls_unknown"] += 1
                    raise ConnectionLost(
                        f"the answer to {request.OP} was lost, and the session too: it may have been done"
                    ) from None
                if not await self._renewed(request):
                    raise
                request = msgspec.structs.replace(request, session_id=self.id)
        raise lost or SessionExpiredError("the master ends our sessions at once")

    async def _renew(self, connection: Connection) -> None:
        """Take the old session up again (the connection broke, the master restarted), else start anew.
        Single flight, by the lock or because the new connection is nobody else's yet."""
        old, inos = self.id, self._open_inos() + self._released + self._releasing
        try:
            grant = await connection.call(ops.OpenSession(self._name, self._hostname, old, inos, self._seen))
        except SessionExpiredError:
            inos = self._open_inos()
            grant = await connection.call(ops.OpenSession(self._name, self._hostname, 0, inos, self._seen))
            self._released.clear()  # they were the old session's
            tally["sessions_lost"] += 1
            log.warning("the master had given our session up: a new one with %d open files", len(inos))
        self.id = grant.session_id
        self._lease_s = grant.lease_s
        self._told = {}
        if grant.session_id != old:
            self._take(grant)
            self._tell_reset()
        if self.intents is not None:
            self.intents.remember_session(self.id, self._event_seq)

    def _open_inos(self) -> list[int]:
        return [*self._hooks.open_inos(), *self._held.elements()]

    def _take(self, grant: ops.SessionGrant) -> None:
        self.id = grant.session_id
        self._lease_s = grant.lease_s
        self._seen = grant.state
        self._event_seq = grant.event_seq
        self._healthy_until = trio.current_time() + grant.lease_s
        if self.intents is not None:
            self.intents.remember_session(self.id, self._event_seq)

    # --- watch --------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Hear of changes and keep the lease, for ever. After a lease without a word: reset, once."""
        while True:
            was_healthy = self.is_watch_healthy
            with trio.move_on_at(self._healthy_until if was_healthy else float("inf")):
                if not await self._poll():
                    await trio.sleep(_RETRY_S)
            if was_healthy and not self.is_watch_healthy:
                tally["leases_lapsed"] += 1
                log.warning("no word from the master for %.0f s: nothing cached is believed", self._lease_s)
                self._tell_reset()

    async def _poll(self) -> bool:
        """One long poll; False when it failed."""
        asked_at = trio.current_time()
        wait_s = max(0.1, min(60.0, self._lease_s / 3))
        try:
            counters = dict(tally)
            request = ops.Watch(self.id, self._event_seq, wait_s, {} if counters == self._told else counters)
            answer = await self.call(request, is_idempotent=True)
        except AlluxioFuseError as exc:
            log.debug("the watch failed: %s", exc)
            return False
        if request.session_id != self.id:
            return True  # its numbers are another session's
        self._seen, self._told = answer.state, counters
        if answer.is_reset:
            self._tell_reset()
        for event in answer.events:
            self._tell(event)
        if self.intents is not None:  # What came by the last poll was passed on meanwhile.
            self.intents.remember_session(self.id, self._event_seq)
        self._event_seq = answer.seq
        self._healthy_until = asked_at + self._lease_s
        if answer.events:
            await self._hooks.settle()
        return True

    def _tell(self, event: Event) -> None:
        self._hooks.changed(event)
        listener = self.listener
        if listener is None:
            return
        if event.kind == EVENT_ATTR:
            listener.attr_changed(event.ino)
        elif event.kind == EVENT_DATA:
            listener.data_changed(event.ino)
        elif event.kind == EVENT_ENTRY:
            listener.entry_changed(event.ino, event.name)
        elif event.ino:  # EVENT_FREED: pages in the kernel are cached copies too.
            listener.data_changed(event.ino)

    def _tell_reset(self) -> None:
        self._hooks.all_changed()
        if self.listener is not None:
            self.listener.reset()

    # --- releases -----------------------------------------------------------------------------------

    def release(self, ino: int) -> None:
        """One open of `ino` ended; told to the master soon, together with others."""
        self._released.append(ino)
        if len(self._released) == 1:
            self._has_released.set()
        elif len(self._released) >= RELEASE_BATCH:
            self._is_batch_full.set()

    async def keep_releasing(self) -> None:
        """Send what was released, for ever."""
        while True:
            await self._has_released.wait()
            with trio.move_on_after(RELEASE_DELAY_S):
                await self._is_batch_full.wait()
            self._has_released, self._is_batch_full = trio.Event(), trio.Event()
            try:
                await self.send_releases()
            except AlluxioFuseError as exc:
                log.debug("releasing: %s", exc)
                await trio.sleep(_RETRY_S)

    async def send_releases(self) -> None:
        """Now. When the connection breaks under it, `resume` puts the count right."""
        async with self._sending:
            while batch := self._released[:MAX_RELEASES]:
                self._releasing = batch
                del self._released[: len(batch)]
                try:
                    await self._master.call(ops.Release(self.id, batch))
                except SessionExpiredError:
                    continue
                finally:
                    self._releasing = []
