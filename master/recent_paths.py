"""Which paths of under storages our own persists have just changed. Plain state."""

from __future__ import annotations

from collections.abc import Iterator

from alluxiofuse.master import places


class RecentPaths:
    """Paths that our own persists changed while somebody compares a listing with the namespace: what
    such a listing says of them may be older than what we know."""

    def __init__(self) -> None:
        self._sequence = 0
        self._watchers: dict[int, int] = {}
        self._paths: dict[tuple[int, bytes], int] = {}
        self._trees: dict[tuple[int, bytes], int] = {}

    def watch(self) -> int:
        """Before the under storage is asked. A token for `is_changed` and `end`."""
        self._sequence += 1
        self._watchers[self._sequence] = self._sequence
        return self._sequence

    def end(self, token: int) -> None:
        del self._watchers[token]
        if not self._watchers:
            self._paths.clear()
            self._trees.clear()

    def note(self, mount_id: int, path: bytes, is_tree: bool = False) -> None:
        """Just changed by us. Called in the same await-free stretch as the commit."""
        if self._watchers:
            self._sequence += 1
            (self._trees if is_tree else self._paths)[mount_id, path] = self._sequence

    def is_changed(self, token: int, mount_id: int, path: bytes) -> bool:
        if self._paths.get((mount_id, path), 0) > token:
            return True
        return bool(self._trees) and any(
            self._trees.get((mount_id, at), 0) > token for at in _with_prefixes(path)
        )


def _with_prefixes(path: bytes) -> Iterator[bytes]:
    yield from places.prefixes(path)
    yield path
