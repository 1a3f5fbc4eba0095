"""What a filesystem may show after a power failure, given what was acknowledged and what was synced.

* The tree (names, kinds, modes) is that after some number of the operations in their order: at least
  those before the last sync of anything, at most all of them and the one in flight.
* A file's bytes are those of its last sync, changed at each place by some of what was done to it
  since. Bytes that nothing was done to since must be readable; what was, may be an error (EIO), and
  never anything else.
"""

from __future__ import annotations

import copy
import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 4096
PAGE = 1 << 20
"""The unit that checksums are of, so that is lost."""


@dataclass
class File:
    """`states[0]` is the content of the last sync; the rest is what it became by each change since."""

    states: list[bytes] = field(default_factory=lambda: [b""])
    touched: list[tuple[int, int]] = field(default_factory=list)
    """[start, end) of each change since the last sync."""
    notes: list[str] = field(default_factory=list)
    """What happened to it, for people."""

    @property
    def now(self) -> bytes:
        return self.states[-1]

    def write(self, offset: int, data: bytes) -> None:
        self.notes.append(f"write {offset}+{len(data)}")
        old = self.now.ljust(offset, b"\0")
        self.states.append(old[:offset] + data + old[offset + len(data) :])
        self.touched.append((min(offset, len(self.states[-2])), offset + len(data)))

    def truncate(self, size: int) -> None:
        self.notes.append(f"truncate {size}")
        old = self.now
        self.states.append(old[:size].ljust(size, b"\0"))
        self.touched.append((min(size, len(old)), max(size, len(old))))

    def synced(self) -> None:
        self.notes.append("synced")
        self.states, self.touched = [self.now], []

    def problem(self, found: Found) -> str:
        """What of it can't be; "" when all can."""
        sizes = [len(one) for one in self.states]
        if not min(sizes) <= found.size <= max(sizes):
            return f"size {found.size}, may be {min(sizes)} to {max(sizes)}; {self.touched}"
        for offset in range(0, found.size, BLOCK):
            end = min(offset + BLOCK, found.size)
            block = found.blocks[offset // BLOCK]
            if block is None:
                if not self._may_be_lost(offset, end):
                    return f"synced bytes at {offset} can't be read"
            elif not any(state[offset:end] == block for state in self.states):
                wrong = self._first_wrong(offset, block)
                if wrong is not None:
                    return f"wrong byte {block[wrong - offset]} at {wrong} of {found.size}; {self.touched}"
        return ""

    def _may_be_lost(self, start: int, end: int) -> bool:
        """A change since the last sync went to every byte of it."""
        end = min(end, len(self.states[0]))
        return all(any(a <= at < b for a, b in self.touched) for at in range(start, end))

    def _first_wrong(self, offset: int, block: bytes) -> int | None:
        for at, byte in enumerate(block, offset):
            if not any(state[at] == byte if len(state) > at else not byte for state in self.states):
                return at
        return None


@dataclass
class Found:
    """A file's bytes; None for a block that can't be read."""

    size: int
    blocks: list[bytes | None]

    @property
    def is_whole(self) -> bool:
        return None not in self.blocks

    @property
    def content(self) -> bytes:
        return b"".join(block or b"" for block in self.blocks)

    @classmethod
    def at(cls, path: Path) -> Found:
        size = path.stat().st_size
        try:
            data = path.read_bytes()
            if len(data) == size:
                return cls(size, [data[at : at + BLOCK] for at in range(0, size, BLOCK)])
        except OSError as exc:
            if exc.errno not in (errno.EIO, errno.ESTALE):
                raise
        found = cls(size, [])
        for offset in range(0, size, PAGE):
            page = _read(path, offset, min(PAGE, size - offset))
            count = -(-min(PAGE, size - offset) // BLOCK)
            found.blocks += [None if page is None else page[at * BLOCK :][:BLOCK] for at in range(count)]
        return found


def _read(path: Path, offset: int, length: int) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        data = os.pread(fd, length, offset)
    except OSError:
        return None
    finally:
        os.close(fd)
    return data if len(data) == length else None


Node = tuple[int, str, File | None]
"""Mode with its type, the target of a symlink, the content of a file."""
Tree = dict[str, Node]
Change = Callable[[Tree], None]


def shape(tree: Tree) -> dict[str, tuple[int, str]]:
    return {path: (mode, target) for path, (mode, target, _) in tree.items()}


def shape_of(top: Path) -> dict[str, tuple[int, str]]:
    """What is really there."""
    found = {}
    for folder, folders, names in os.walk(top):
        for name in (*folders, *names):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            target = os.readlink(path) if stat.S_ISLNK(mode) else ""
            found[str(path.relative_to(top))] = (mode, target)
    return found


class Oracle:
    """`change` is called before an operation, `done` when it was acknowledged."""

    def __init__(self) -> None:
        self.base: Tree = {}
        """As it was when the log below began."""
        self.tree: Tree = {}
        self.log: list[tuple[str, Change]] = []
        self.durable_count = 0
        self.done_count = 0

    def change(self, what: str, change: Change) -> None:
        self.log.append((what, change))

    def done(self) -> None:
        """The change that was announced last happened."""
        self.log[-1][1](self.tree)
        self.done_count = len(self.log)

    def synced(self) -> None:
        """A sync of anything returned: all names so far are durable."""
        self.durable_count = self.done_count

    def after_failure(self, top: Path) -> list[str]:
        """AssertionError unless what is in `top` may be; it is the new base. Paths of files of which
        something is lost: they are to be removed."""
        found = shape_of(top)
        contents = {path: Found.at(top / path) for path, (mode, _) in found.items() if stat.S_ISREG(mode)}
        tree = copy.copy(self.base)
        problems = []
        for count in range(len(self.log) + 1):
            if count:
                self.log[count - 1][1](tree)
            if count < self.durable_count or shape(tree) != found:
                continue
            wrong = self._wrong_content(tree, contents)
            if not wrong:
                self._restart(tree, contents)
                return [path for path, one in contents.items() if not one.is_whole]
            problems.append(f"after {count} operations: {wrong}")
        raise AssertionError("\n".join([*problems, self._explain(found)]))

    @staticmethod
    def _wrong_content(tree: Tree, contents: dict[str, Found]) -> str:
        for path, one in contents.items():
            file = tree[path][2]
            assert file is not None
            problem = file.problem(one)
            if problem:
                return f"{path}: {problem}; {file.notes}"
        return ""

    def _restart(self, tree: Tree, contents: dict[str, Found]) -> None:
        for path, (_, _, file) in tree.items():
            if file is not None:
                file.states, file.touched = [contents[path].content], []
                file.notes = [*file.notes[-10:], f"found {contents[path].size}"]
        self.base, self.tree = copy.copy(tree), copy.copy(tree)
        self.log.clear()
        self.durable_count = self.done_count = 0

    def _explain(self, found: dict[str, tuple[int, str]]) -> str:
        """No prefix fits: how the nearest ones differ."""
        tree = copy.copy(self.base)
        lines = [f"{len(self.log)} operations, {self.durable_count} durable, {self.done_count} acknowledged"]
        best: tuple[int, int, list[str]] | None = None
        for count in range(len(self.log) + 1):
            if count:
                self.log[count - 1][1](tree)
            wanted = shape(tree)
            differs = [
                f"{path}: {found.get(path)}, should be {wanted.get(path)}"
                for path in sorted(found.keys() | wanted.keys())
                if found.get(path) != wanted.get(path)
            ]
            if count >= self.durable_count and (best is None or len(differs) < best[0]):
                best = (len(differs), count, differs)
        assert best is not None
        lines += [f"nearest after {best[1]} operations:", *best[2][:10]]
        lines += [f"  {number}: {what}" for number, (what, _) in enumerate(self.log, 1)][-60:]
        return "\n".join(lines)
