"""Answers to changes, kept so that a request that comes again is not carried out again.

A change of a session carries a request id: a slot, and a number that grows within the slot
(`wire.messages.Change`). Of each slot the newest number and its answer are kept, in the store under
REPLY + session + slot, written by the very batch that makes the change: after a kill, either both are
there or neither. By using a slot again the client says that it needs its answer no more, so a session
keeps at most as many answers as it ever had changes under way. A refusal (an errno) has changed
nothing and is not kept: repeated, it is looked at anew.

Answers end with their session: those of sessions that ended are deleted by `sweep`, as are, once nobody
of the life before can come back, those of sessions that did not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from alluxiofuse.errors import BadRequestError, SessionExpiredError
from alluxiofuse.master.sessions import Session, Sessions
from alluxiofuse.master.store import Store, u64
from alluxiofuse.rpc.base import Peer
from alluxiofuse.wire.codec import decode
from alluxiofuse.wire.messages import Change, result_type, slot_and_number

REPLY = b"reply"
R = TypeVar("R")
_SLOT_BYTES = 2


class Replies:
    """Owned by the master's only thread; nothing here awaits."""

    def __init__(self, store: Store, sessions: Sessions) -> None:
        self._store = store
        self._sessions = sessions
        self._ended: set[int] = set()
        """Sessions whose answers are still to be deleted."""
        self._is_old_swept = False
        self._result_types: dict[type[Change[Any]], Any] = {}
        self.change_count = 0
        """Changes that were asked for."""
        self.repeated_count = 0
        """Requests that were answered with a kept answer."""

    def once(
        self,
        step: Callable[[Any], R],
        request: Any,
        peer: Peer,
        restore: Callable[[Any, R], R],
    ) -> R:
        """`step(request)`, unless it was carried out before: then `restore(request, answer)`, which does
        what a new life of the master, or a client that came back, does not know of. SessionExpiredError:
        nothing was done, and nothing is known of earlier times."""
        self.change_count += 1
        session = self._sessions.of(request.session_id, peer)
        if not request.request_id:
            return step(request)
        if session is None:
            raise SessionExpiredError(f"session {request.session_id} has ended")
        slot, number = slot_and_number(request.request_id)
        if session.numbers is None:
            session.numbers = self._numbers(session.session_id)
        known = session.numbers.get(slot, 0)
        if number <= known:
            if number < known:
                raise BadRequestError("a request came after a later one of its slot")
            return restore(request, self._kept(request, session, slot))
        self._store.reply = (REPLY + u64(session.session_id) + slot.to_bytes(_SLOT_BYTES, "big"), number)
        try:
            return step(request)
        finally:
            if self._store.reply is None:  # It went into a commit.
                session.numbers[slot] = number
            self._store.reply = None

    def _kept(self, request: Change[R], session: Session, slot: int) -> R:
        self.repeated_count += 1
        kind = self._result_types.get(type(request))
        if kind is None:
            kind = self._result_types[type(request)] = result_type(type(request))
        value = self._store.get("meta", REPLY + u64(session.session_id) + slot.to_bytes(_SLOT_BYTES, "big"))
        assert value is not None
        answer: R = decode(value[8:], kind)
        return answer

    def _numbers(self, session_id: int) -> dict[int, int]:
        """Of a session of the life before."""
        return {
            int.from_bytes(key, "big"): int.from_bytes(value[:8], "big")
            for key, value in self._store.scan("meta", REPLY + u64(session_id))
        }

    # --- the end ----------------------------------------------------------------------------------

    def forget(self, session_id: int) -> None:
        """The session has ended."""
        self._ended.add(session_id)

    def sweep(self) -> None:
        """Delete what is needed no more. StateError: next time."""
        if not self._is_old_swept and not self._sessions.is_recovering:
            self._ended |= {
                session_id for session_id in self._kept_sessions() if not self._sessions.is_known(session_id)
            }
            self._is_old_swept = True
        while self._ended:
            session_id = min(self._ended)
            tx = self._store.transaction()
            for key, _ in self._store.scan("meta", REPLY + u64(session_id)):
                tx.delete("meta", REPLY + u64(session_id) + key)
            tx.commit()
            self._ended.remove(session_id)

    def _kept_sessions(self) -> set[int]:
        """Of which there are answers; a seek for each."""
        found: set[int] = set()
        after: bytes | None = None
        while (key := next((key for key, _ in self._store.scan("meta", REPLY, after)), None)) is not None:
            session_id = int.from_bytes(key[:8], "big")
            found.add(session_id)
            after = u64(session_id) + b"\xff" * _SLOT_BYTES
        return found
