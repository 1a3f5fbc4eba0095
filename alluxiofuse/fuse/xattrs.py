"""Extended attributes: which names are ours, and which inodes have none.

The kernel asks for `security.capability` before each write(2), and `ls -l` for `security.selinux`
and POSIX ACLs of each file. So the names that an inode has are asked for once and remembered until
something says that they changed. Trio thread only.
"""

from __future__ import annotations

import errno
from collections import OrderedDict

from alluxiofuse.errors import FsError

MAX_INODES = 100_000
_NAMESPACES = (b"user.", b"trusted.", b"security.")
_NOT_KEPT = (b"security.selinux",)
"""No labels here, said in the way by which programs learn that it holds for the whole filesystem:
`ls -l` then asks once and not for every file."""


def check_name(name: bytes) -> None:
    """EOPNOTSUPP for namespaces that are not kept, above all system.posix_acl_*. Who may use which
    has been checked by the kernel (xattr(7)); ERANGE for a name longer than the kernel allows."""
    if not name.startswith(_NAMESPACES) or name in _NOT_KEPT:
        raise FsError(errno.EOPNOTSUPP)
    if len(name) > 255:
        raise FsError(errno.ERANGE)


def visible(names: list[bytes], uid: int) -> list[bytes]:
    """trusted.* is shown to root only."""
    return [name for name in names if uid == 0 or not name.startswith(b"trusted.")]


class XattrNames:
    """The names of each inode, as far as they were asked for."""

    def __init__(self, max_inodes: int = MAX_INODES) -> None:
        self._max_inodes = max_inodes
        self._names: OrderedDict[int, frozenset[bytes]] = OrderedDict()
        """In the order they were learned: the first is dropped when there are too many."""

    def get(self, ino: int) -> frozenset[bytes] | None:
        """None: not known."""
        return self._names.get(ino)

    def learn(self, ino: int, names: frozenset[bytes]) -> None:
        self._names[ino] = names
        if len(self._names) > self._max_inodes:
            self._names.popitem(last=False)

    def void(self, ino: int | None) -> None:
        """None: everything."""
        if ino is None:
            self._names.clear()
        else:
            self._names.pop(ino, None)
