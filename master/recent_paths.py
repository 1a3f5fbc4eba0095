"""Which paths of under storages our own persists have just changed. Plain state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from alluxiofuse.master import places


class RecentPaths:
    """Paths that our own persists changed while somebody compares a listing with the namespace: what
    such a listing says of them may be older than what we know."""

    def __init__(self) -> None:
        self._sequence = 0
        self._watchers: dict[int, int] = {}
        self._paths: OrderedDict[tuple[int, bytes], int] = OrderedDict()
        self._trees: OrderedDict[tuple[int, bytes], int] = OrderedDict()
        """Both in the order of the changes; what is older than all watchers is dropped."""

    def watch(self) -> int:
        """Before the under storage is asked. A token for `is_changed` and `end`."""
        self._sequence += 1
        self._watchers[self._sequence] = self._sequence
        return self._sequence

    def end(self, token: int) -> None:
        del self._watchers[token]
        oldest = next(iter(self._watchers), None)
        for known in (self._paths, self._trees):
            if oldest is None:
                known.clear()
            while known and known[next(iter(known))] < (oldest or 0):
                known.popitem(last=False)

    def note(self, mount_id: int, path: bytes, is_tree: bool = False) -> None:
        """Just changed by us. Called in the same await-free stretch as the commit."""
        if self._watchers:
            self._sequence += 1
            known = self._trees if is_tree else self._paths
            known[mount_id, path] = self._sequence
            known.move_to_end((mount_id, path))

    def is_changed(self, token: int, mount_id: int, path: bytes) -> bool:
        if self._paths.get((mount_id, path), 0) > token:
            return True
        return bool(self._trees) and any(
            self._trees.get((mount_id, at), 0) > token for at in _with_prefixes(path)
        )


def _with_prefixes(path: bytes) -> Iterator[bytes]:
    yield from places.prefixes(path)
    yield path
