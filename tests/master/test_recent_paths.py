"""Which paths our own persists changed while somebody compares: exact for who watches, and bounded."""

from __future__ import annotations

import random

from alluxiofuse.master.recent_paths import RecentPaths


def test_what_changed_since_a_watcher_began() -> None:
    chance = random.Random(3)
    recent = RecentPaths()
    paths = [b"a", b"a/b", b"a/b/c", b"d"]
    changes: list[tuple[bytes, bool]] = []
    watchers: dict[int, int] = {}  # token -> how many changes there were before
    for _ in range(5000):
        what = chance.random()
        if what < 0.2 and len(watchers) < 4:
            watchers[recent.watch()] = len(changes)
        elif what < 0.4 and watchers:
            token = chance.choice(list(watchers))
            del watchers[token]
            recent.end(token)
        elif watchers:
            path, is_tree = chance.choice(paths), chance.random() < 0.2
            changes.append((path, is_tree))
            recent.note(1, path, is_tree)
        for token, start in watchers.items():
            for path in paths:
                expected = any(
                    at == path or (is_tree and path.startswith(at + b"/")) for at, is_tree in changes[start:]
                )
                assert recent.is_changed(token, 1, path) == expected
                assert not recent.is_changed(token, 2, path)


def test_bounded_also_when_somebody_is_always_watching() -> None:
    recent = RecentPaths()
    token = recent.watch()
    for number in range(10_000):
        recent.note(1, b"%d" % number)
        following = recent.watch()
        recent.note(1, b"tree%d" % number, is_tree=True)
        recent.end(token)
        token = following
    assert len(recent._paths) + len(recent._trees) <= 3
