"""How many file descriptors this process may have, and how they are shared out. Layer 0.

Each part that keeps descriptors (connections, slabs, a database's files) keeps within its share, so
that none is without: running out in the middle of a RocksDB compaction or of an accept is what must
not happen. Shares are taken when the part is made.
"""

from __future__ import annotations

import errno
import resource
from typing import Final

MOST: Final = 1 << 20
"""More are never counted on."""
EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE})
"""Errnos that say that there are none left: nothing is wrong with what was to be opened."""


def raise_limit() -> None:
    """The soft limit to the hard one: the soft one is low for the sake of programs that use select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def share(part: float, *, most: int, least: int = 8) -> int:
    """`part` (0 to 1) of what this process may have, but at least `least` and at most `most`."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MOST if soft == resource.RLIM_INFINITY else min(soft, MOST)
    return max(least, min(most, int(limit * part)))
