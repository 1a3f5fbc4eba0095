"""Client sessions: leases, and who has which inode open. In memory; clients bring it back after a
restart of the master (`OpenSession` with the old id and what they hold open).

A session belongs to the connection by which it was opened or taken up last. What still comes by an
earlier one was sent by a client that has given it up and asked again: it is refused.

Guarded by nothing: all calls come from the master's only thread, none awaits.
"""

from __future__ import annotations

import errno
import itertools
from collections import Counter
from dataclasses import dataclass, field

from alluxiofuse.errors import FsError, SessionExpiredError, UnavailableError
from alluxiofuse.master.clock import Clock
from alluxiofuse.master.store import Store
from alluxiofuse.rpc.base import Peer

MAX_SESSIONS = 10_000
MAX_OPENS_PER_SESSION = 1 << 20
"""As many as `OpenSession.open_inos` can bring back."""
MAX_NAMES = 1000
"""Sessions that a report names."""
MAX_NAME_CHARS = 200


@dataclass(slots=True)
class Session:
    session_id: int
    client_name: str
    hostname: str
    seen_at_s: float
    """Of the monotonic clock: the last sign of life."""
    opens: Counter[int] = field(default_factory=Counter)
    """Inode -> how many open files."""
    open_count: int = 0
    """Sum of `opens`."""
    passes_at: int = 0
    """See `master_ops.Open`."""
    writes: dict[int, int] = field(default_factory=dict)
    """Inode -> container that this session began to write and has not seen sealed."""
    sealed: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Inode, open here -> the container that this session wrote last and has perhaps not seen sealed, and
    the size with which it was."""
    numbers: dict[int, int] | None = None
    """Slot -> number of the newest change whose answer is kept (`replies`); None: not looked up yet."""
    peer: Peer | None = None
    """The connection that it belongs to; None: any."""
    counters: dict[str, int] = field(default_factory=dict)
    """What went wrong at the client, as it says."""
    watch_count: int = 0
    """Polls that wait here now: a session with one is alive however long the poll."""


class Sessions:
    def __init__(
        self, store: Store, clock: Clock, lease_s: float, close_stale_sessions: bool = False
    ) -> None:
        """`close_stale_sessions`: no session of an earlier life can come back (one-process mode).
        Must be constructed inside trio.run: the lease for returning sessions starts now."""
        self._store = store
        self._clock = clock
        self.lease_s = lease_s
        self._sessions: dict[int, Session] = {}
        self._open_counts: Counter[int] = Counter()
        """Inode -> opens of all sessions: the sum of their `opens`."""
        self.resumed_count = 0
        """How often a session was taken up again."""
        self.refused_count = 0
        """Requests that came by a connection which their session had left."""
        self.expired_count = 0
        """Sessions whose lease ran out."""
        self._ended_counters: Counter[str] = Counter()
        """Of the clients of sessions that ended."""
        self._first_id = store.take_number(b"next_session")
        """Smaller ids are of earlier lives. (Taken and not used.)"""
        self._return_until_s = clock.monotonic() + (0 if close_stale_sessions else lease_s)

    # --- life -------------------------------------------------------------------------------------

    def open(
        self,
        client_name: str,
        hostname: str,
        session_id: int,
        open_inos: list[int],
        peer: Peer | None = None,
    ) -> Session:
        """A new session, or with `session_id` the one of that id; `peer`'s from now on. SessionExpiredError
        when that one ended; UnavailableError when there are too many. `open_inos` (one item an open
        file) replaces what was known to be open."""
        now = self._clock.monotonic()
        if session_id not in self._sessions and len(self._sessions) >= MAX_SESSIONS:
            raise UnavailableError(f"{MAX_SESSIONS} clients are connected already: no more are taken")
        if session_id == 0:
            session_id = self._store.take_number(b"next_session")
        elif session_id not in self._sessions and not self._may_return(session_id):
            raise SessionExpiredError(f"session {session_id} has ended")
        else:
            self.resumed_count += 1
        session = self._sessions.get(session_id)
        if session is None:
            session = self._sessions[session_id] = Session(session_id, client_name, hostname, now)
        session.seen_at_s = now
        session.peer = peer
        self._set_opens(session, Counter(open_inos))
        return session

    def of(self, session_id: int, peer: Peer) -> Session | None:
        """The session, if there is one. SessionExpiredError when it has left this connection."""
        session = self._sessions.get(session_id)
        if session is not None and session.peer is not peer and session.peer is not None:
            self.refused_count += 1
            raise SessionExpiredError("the session goes on by another connection")
        return session

    def is_known(self, session_id: int) -> bool:
        return session_id in self._sessions

    def _may_return(self, session_id: int) -> bool:
        return session_id < self._first_id and self.is_recovering

    @property
    def is_recovering(self) -> bool:
        """Sessions of the life before may still come back: nothing of theirs is given up yet."""
        return self._clock.monotonic() < self._return_until_s

    def touch(self, session_id: int) -> Session:
        """A sign of life. SessionExpiredError when there is no such session."""
        session = self._sessions.get(session_id)
        if session is None:
            raise SessionExpiredError(f"session {session_id} has ended")
        session.seen_at_s = self._clock.monotonic()
        return session

    def expired(self) -> list[int]:
        """Sessions whose lease ran out: the caller ends them."""
        end = self._clock.monotonic() - self.lease_s
        return [s.session_id for s in self._sessions.values() if s.seen_at_s < end and not s.watch_count]

    def remove(self, session_id: int) -> Session | None:
        """Take a session out with all its opens; None when there is none."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._open_counts.subtract(session.opens)
            self._sweep(session.opens)
            self._ended_counters.update(session.counters)
        return session

    def client_counters(self) -> Counter[str]:
        """Of all clients of this life, together."""
        total = self._ended_counters.copy()
        for session in self._sessions.values():
            total.update(session.counters)
        return total

    def names(self) -> list[str]:
        """For people: "fuse /mnt/a @ host"."""
        names = [
            f"{s.client_name} @ {s.hostname}"[:MAX_NAME_CHARS]
            for s in itertools.islice(self._sessions.values(), MAX_NAMES)
        ]
        more = len(self._sessions) - len(names)
        return [*names, f"and {more} more"] if more else names

    # --- open files -------------------------------------------------------------------------------

    def add_open(self, session_id: int, ino: int) -> None:
        """SessionExpiredError, or EMFILE for one that holds far too many: nothing changed."""
        session = self.require_room(session_id)
        session.opens[ino] += 1
        session.open_count += 1
        self._open_counts[ino] += 1

    def require_room(self, session_id: int) -> Session:
        """The session, which may open one more file. SessionExpiredError, EMFILE."""
        session = self.touch(session_id)
        if session.open_count >= MAX_OPENS_PER_SESSION:
            raise FsError(errno.EMFILE)
        return session

    def release(self, session_id: int, ino: int) -> bool:
        """Give one open back; True when nobody has the inode open any more. A session or an open
        that is not known is ignored (False): releases may come late."""
        session = self._sessions.get(session_id)
        if session is None or session.opens[ino] <= 0:
            return False
        session.opens[ino] -= 1
        session.open_count -= 1
        if not session.opens[ino]:
            del session.opens[ino]
            session.sealed.pop(ino, None)
        self._open_counts[ino] -= 1
        self._sweep((ino,))
        return not self.is_open(ino)

    def is_open(self, ino: int) -> bool:
        return ino in self._open_counts

    def open_inos(self, session_id: int) -> list[int]:
        session = self._sessions.get(session_id)
        return [] if session is None else list(session.opens)

    def read_at(self, ino: int, besides: int) -> set[int]:
        """Workers whose slabs the kernels of other sessions may be reading this inode from by themselves."""
        own = self._sessions.get(besides)
        if self._open_counts[ino] == (0 if own is None else own.opens[ino]):
            return set()
        return {s.passes_at for s in self._sessions.values() if s is not own and s.opens[ino]} - {0}

    # --- writers ----------------------------------------------------------------------------------

    def add_writer(self, session_id: int, ino: int, container: int) -> None:
        self.touch(session_id).writes[ino] = container

    def writes(self, session_id: int, ino: int) -> int:
        """The container of the inode that the session began to write and has not seen sealed; 0: none,
        or not known any more."""
        session = self._sessions.get(session_id)
        return 0 if session is None else session.writes.get(ino, 0)

    def clear_writers(self, ino: int, container: int, sealed_size: int | None = None) -> None:
        """`container` is sealed, or thrown away (None): nobody writes it any more."""
        for session in self._sessions.values():
            if session.writes.get(ino) == container:
                del session.writes[ino]
                if sealed_size is not None and session.opens[ino]:
                    session.sealed[ino] = container, sealed_size

    def sealed_size(self, session_id: int, ino: int, container: int) -> int | None:
        """With how many bytes `container`, which the session wrote, was sealed, by whomever; None: it was
        not, as far as is known."""
        session = self._sessions.get(session_id)
        known, size = (0, 0) if session is None else session.sealed.get(ino, (0, 0))
        return size if known == container else None

    def end_writer(self, session_id: int, ino: int) -> bool:
        """The session has ended its writing; True when no other session writes the inode."""
        session = self._sessions.get(session_id)
        if session is not None:
            session.writes.pop(ino, None)
        return not any(ino in s.writes for s in self._sessions.values())

    # --- inside -----------------------------------------------------------------------------------

    def _set_opens(self, session: Session, opens: Counter[int]) -> None:
        old, session.opens = session.opens, opens
        session.sealed = {ino: what for ino, what in session.sealed.items() if ino in opens}
        session.open_count = opens.total()
        self._open_counts.update(opens)
        self._open_counts.subtract(old)
        self._sweep(old)

    def _sweep(self, inos: object) -> None:
        for ino in inos:  # type: ignore[attr-defined]
            if self._open_counts[ino] <= 0:
                del self._open_counts[ino]
