"""Progress bars on stderr, on terminals only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

Advance = Callable[[int], None]


def _advance_of(bar: tqdm[Any]) -> Advance:
    def advance(count: int) -> None:
        bar.update(count)

    return advance


@contextmanager
def byte_bar(what: str, total_bytes: int | None) -> Iterator[Advance]:
    """Rate and time left while bytes are moved; call what it gives with each number of bytes done."""
    with tqdm(
        total=total_bytes,
        desc=what,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        file=sys.stderr,
        disable=not sys.stderr.isatty(),
        leave=False,
    ) as bar:
        yield _advance_of(bar)


@contextmanager
def count_bar(what: str, total: int, unit: str) -> Iterator[Advance]:
    """The same for things that are counted."""
    with tqdm(
        total=total, desc=what, unit=unit, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False
    ) as bar:
        yield _advance_of(bar)
