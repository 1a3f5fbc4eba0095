"""What a client leaves behind for the process that takes its session over (docs/adr/0002-keeper.md).

A request of a program that was carried out, and whose answer died with the process, comes again to its
successor. Before something is done that must not be done twice, the client notes in an *intent log*,
which outlives it, how it will be recognised: the id under which the master keeps the answer, or where an
append begins. The notes of a request end when the program has its answer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

CHANGE, APPEND, REMOTE_APPEND = 1, 2, 3
"""Kinds of notes: a change at the master (slot, number), with what sort of change above the lowest 8 bits; an
append by descriptor (inode, offset); one through the worker (container, number)."""
LIFE_SHIFT = 32
"""Numbers that must grow over all lives of a client: the life in front, a count behind."""

asked_by: ContextVar[int] = ContextVar("asked_by", default=0)
"""Number of the program's request that a task serves, the same when it comes again; 0: nobody's."""


@dataclass(slots=True)
class Predecessor:
    session_id: int
    """0: it had none."""
    event_seq: int
    open_inos: list[int] = field(default_factory=list)
    """One item for each open file."""


class IntentLog(Protocol):
    """Belongs to the trio thread."""

    @property
    def life(self) -> int:
        """How many processes there have been, this one included."""

    @property
    def predecessor(self) -> Predecessor | None: ...

    @property
    def reserved_slots(self) -> set[int]:
        """Slots of changes of which it is not known whether they were carried out."""

    def note(self, kind: int, first: int, second: int) -> None:
        """On behalf of `asked_by`."""

    def former(self, kind: int) -> tuple[int, int] | None:
        """What a predecessor noted of this kind on behalf of the same request, the last if it was several
        times (those before were refused); once."""

    def at_end(self, call: Callable[[], None]) -> bool:
        """`call` when the program has its answer. False: nobody asked, and it will not be called."""

    def remember_session(self, session_id: int, event_seq: int) -> None: ...
