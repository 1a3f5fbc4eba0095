"""Operations of the master about client sessions. See `master_ops`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta, field

from alluxiofuse.wire.messages import (
    U63,
    Id,
    Message,
    Nothing,
    Request,
    Text,
)
from alluxiofuse.wire.types import (
    Counters,
    Event,
    StateMark,
)


class OpenSession(Request["SessionGrant"]):
    """Start a client session; or, with `session_id`, take up an old one after a reconnect or a
    master restart (then `open_inos` says what the client still holds open)."""

    OP: ClassVar[str] = "master.open_session"
    client_name: Text
    """For people: "fuse /mnt/a", "cli"."""
    hostname: Text
    session_id: Id = 0
    open_inos: Annotated[list[int], Meta(max_length=1 << 20)] = []
    seen: StateMark = field(default_factory=StateMark)
    """ForeignStateError when the master's state does not go on from there: ids would mean other things."""


class SessionGrant(Message):
    session_id: Id
    lease_s: float
    """Without a heartbeat (or a watch poll) for this long, the session and all it holds end."""
    event_seq: U63
    """Where the first `Watch` starts."""
    cluster_id: Text
    state: StateMark = field(default_factory=StateMark)


class SessionHeartbeat(Request[Nothing]):
    OP: ClassVar[str] = "master.session_heartbeat"
    session_id: Id


class CloseSession(Request[Nothing]):
    OP: ClassVar[str] = "master.close_session"
    session_id: Id


class Watch(Request["WatchAnswer"]):
    """Long poll: answers when something changed that this session did not do itself, at the latest
    after `wait_s`. Polling with `after` = n acknowledges that all events up to n were applied."""

    OP: ClassVar[str] = "master.watch"
    session_id: Id
    after: U63
    wait_s: Annotated[float, Meta(ge=0, le=60)]
    counters: Counters = {}
    """What went wrong at the client since it started: see `rpc.tally`. Empty: nothing new."""


class WatchAnswer(Message):
    seq: U63
    """Poll with this `after` next."""
    is_reset: bool
    """Events were missed: everything that is cached is void."""
    events: list[Event]
    state: StateMark = field(default_factory=StateMark)
    """What of the master's state may be remembered now."""
