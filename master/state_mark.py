"""Whether those who come back knew this state of the master, or another one.

A state directory that was lost and formatted anew is another cluster: its inode numbers and container
ids mean other things. One that was restored from an older copy gives ids out a second time. Who has seen
more than the state holds (`StateMark`) must not go on with what it has: it is refused, before anything.
"""

from __future__ import annotations

import logging

from alluxiofuse.errors import ForeignStateError
from alluxiofuse.master.store import Store
from alluxiofuse.rpc.ratelimit import LimitedLog
from alluxiofuse.wire.types import StateMark

_log = logging.getLogger(__name__)


class StateGuard:
    def __init__(self, store: Store, cluster_id: str) -> None:
        self._store = store
        self._cluster_id = cluster_id
        self._limited = LimitedLog(_log)
        self.refused_count = 0

    def mark(self) -> StateMark:
        """What may be remembered: it survives this machine's power."""
        return StateMark(self._cluster_id, self._store.synced_sequence)

    def check(self, who: str, seen: StateMark, way_out: str) -> None:
        """ForeignStateError. `way_out`: what a person can do about it."""
        if not seen.cluster_id:
            return
        if seen.cluster_id != self._cluster_id:
            reason = "the master's state is another one than before: it was lost, or formatted anew"
        elif seen.sequence > self._store.sequence:
            reason = "the master's state is older than before: it was restored from a copy"
        else:
            return
        self.refused_count += 1
        self._limited.warning("%s is refused: %s", who, reason)
        raise ForeignStateError(f"{reason}; {way_out}")
