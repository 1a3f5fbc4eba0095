"""Kinds of fault. The harness knows only `Fault`; network cut-offs, failing stores and others plug in."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from daemons import Daemon


@dataclass(frozen=True)
class Aim:
    """FUSE mounts by their directories."""

    dead: frozenset[Path]
    """Those that will die, with all files that are open there; their players stop by themselves."""
    felt: frozenset[Path]
    """Those whose programs may get an error that says nothing (EIO), and may lose what they did not
    sync; the dead ones among them. On others everything goes on as if nothing was."""
    lapsed: frozenset[Path] = frozenset()
    """Those whose session may end: what is open there without a name may be gone (ESTALE)."""


class Fault(Protocol):
    name: str

    def aim(self, dice: random.Random) -> Aim:
        """Choose what is to happen."""
        ...

    def strike(self) -> None:
        """Make it happen, while the workload runs."""
        ...

    def heal(self, dice: random.Random) -> None:
        """Everything works again when it returns."""
        ...


class Kill:
    """SIGKILL of some daemons, and a new start of each on what it left. One in five starts is itself
    killed somewhere on its way, so that recoveries are interrupted too."""

    def __init__(
        self,
        name: str,
        choose: Callable[[random.Random], list[Daemon]],
        mounts: Mapping[str, Path],
        *,
        is_felt_by_all: bool = True,
    ) -> None:
        """`mounts`: where they are, by the names of the daemons that serve them."""
        self.name = name
        self._choose = choose
        self._mounts = mounts
        self._is_felt_by_all = is_felt_by_all
        self._victims: list[Daemon] = []
        self._start_s = 1.0

    def aim(self, dice: random.Random) -> Aim:
        self._victims = self._choose(dice)
        dead = frozenset(self._mounts[one.name] for one in self._victims if one.name in self._mounts)
        return Aim(dead, frozenset(self._mounts.values()) if self._is_felt_by_all else dead)

    def strike(self) -> None:
        for victim in self._victims:
            victim.kill()

    def heal(self, dice: random.Random) -> None:
        for victim in self._victims:
            if dice.random() < 0.2:
                victim.start(wait=False)
                time.sleep(self._start_s * dice.uniform(0.3, 1.1))
                victim.kill()
            began = time.monotonic()
            victim.start()
            self._start_s = time.monotonic() - began
