"""What a check of data on disk finds, and what became of it. Layer 0.

A finding has a level:

* NOTE    - no damage: what a kill leaves behind, and the next start mends by itself.
* PROBLEM - damage. `mend` says how to undo it; without one a person has to.
* LOST    - bytes that are nowhere any more: named, never hidden. Mending (if any) only puts the
            rest in order.

A mend is one atomic batch, or may be repeated: it can be interrupted at any point. It is run at once
when the check repairs, and never otherwise. A check that mended something is run again, until a run
mends nothing: what that last run found is what is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from alluxiofuse.errors import AlluxioFuseError

MAX_REMEMBERED = 1_000_000
"""Findings of which it is remembered that they were told already."""

Mend = Callable[[], None]
"""Undoes damage. CantMend: it can't; the message says what a person has to do."""


class CantMend(AlluxioFuseError):
    """This damage is not undone by the program."""

    code = "cant_mend"


class Level(Enum):
    NOTE = "note"
    PROBLEM = "problem"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    code: str
    """Stable name of the kind of finding, for programs."""
    text: str
    """One sentence that names the thing."""
    is_mended: bool = False
    advice: str = ""
    """What a person can do."""


class Findings:
    """Collects the findings of one check (of several runs, when it repairs)."""

    def __init__(self, *, is_repairing: bool = False, tell: Callable[[Finding], None] | None = None) -> None:
        """`tell` gets every finding once, as it is found."""
        self.is_repairing = is_repairing
        self._tell = tell or (lambda finding: None)
        self._told: set[int] = set()
        self.notes: Counter[str] = Counter()
        """Code -> how many, of the last run."""
        self.left: Counter[str] = Counter()
        """PROBLEMs and LOSTs of the last run that were not mended."""
        self.mended: Counter[str] = Counter()
        """Of all runs."""
        self.run_mended = 0
        """In this run: another one has to follow."""

    def begin_run(self) -> None:
        self.notes.clear()
        self.left.clear()
        self.run_mended = 0

    def note(self, code: str, text: str, mend: Mend | None = None) -> None:
        """Not damage. `mend`: do now what the next start would do."""
        if self.is_repairing and mend is not None and self._try(mend) is None:
            self._say(Finding(Level.NOTE, code, text, is_mended=True))
            self.run_mended += 1
            return
        self.notes[code] += 1
        self._say(Finding(Level.NOTE, code, text))

    def problem(self, code: str, text: str, mend: Mend | None = None, advice: str = "") -> None:
        self._damage(Level.PROBLEM, code, text, mend, advice)

    def lost(self, code: str, text: str, mend: Mend | None = None, advice: str = "") -> None:
        self._damage(Level.LOST, code, text, mend, advice)

    def _damage(self, level: Level, code: str, text: str, mend: Mend | None, advice: str) -> None:
        if self.is_repairing and mend is not None:
            failure = self._try(mend)
            if failure is None:
                self.mended[code] += 1
                self.run_mended += 1
                self._say(Finding(level, code, text, is_mended=True, advice=advice))
                return
            advice = failure
        self.left[code] += 1
        self._say(Finding(level, code, text, advice=advice))

    def _try(self, mend: Mend) -> str | None:
        """None: done; else why not."""
        try:
            mend()
        except CantMend as exc:
            return exc.message
        return None

    def _say(self, finding: Finding) -> None:
        key = hash((finding.code, finding.text, finding.is_mended))
        if key in self._told:
            return
        if len(self._told) < MAX_REMEMBERED:
            self._told.add(key)
        self._tell(finding)
