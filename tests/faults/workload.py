"""Which operation comes next: a function of the dice and of the world so far. Only operations that must
succeed are chosen, so every error but that of a fault is a failure."""

from __future__ import annotations

import random
from dataclasses import dataclass

from oracle import DIRECTORY, FILE, SYMLINK, Node, Op, World

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """How large a world may get: every check reads all of it."""

    files: int = 24
    directories: int = 8
    depth: int = 3
    handles: int = 3
    file_bytes: int = 2 * MIB
    unsynced: int = 12
    """Writes to one file before it is synced or closed: each is a version to compare with."""


WEIGHTS = {
    "create": 14, "mkdir": 4, "symlink": 3, "link": 4, "unlink": 7, "rmdir": 2, "rename": 9, "chmod": 4,
    "truncate": 3, "setxattr": 4, "removexattr": 2, "utime": 3, "open": 7, "write": 28, "ftruncate": 3,
    "fsync": 5, "close": 12, "read": 4,
}  # fmt: skip
SIZES = (1, 100, 4096, 5000, 20_000, 70_000, 70_000, 200_000, MIB + 1)


class Workload:
    def __init__(self, world: World, dice: random.Random, limits: Limits | None = None) -> None:
        self.world = world
        self._dice = dice
        self._limits = limits or Limits()
        self._count = 0

    def next(self) -> Op:
        names, weights = list(WEIGHTS), list(WEIGHTS.values())
        while True:
            name = self._dice.choices(names, weights)[0]
            op: Op | None = getattr(self, f"_{name}")()
            if op is not None:
                return op

    # --- picking ----------------------------------------------------------------------------------

    def _pick(self, paths: list[str]) -> str | None:
        return self._dice.choice(paths) if paths else None

    def _file(self) -> str | None:
        """A regular file that may be written."""
        settled = [path for path in self.world.paths(FILE) if not self.world.names[path].is_unsettled]
        return self._pick(settled)

    def _any(self) -> str | None:
        return self._pick(sorted(self.world.names))

    def _not_a_link(self) -> str | None:
        return self._pick([path for path, node in sorted(self.world.names.items()) if node.kind != SYMLINK])

    def _free_name(self, *, is_directory: bool = False) -> str | None:
        """A path where nothing is. Names come from a small pool, so that they are used again."""
        parents = ["", *self.world.paths(DIRECTORY)]
        if is_directory:
            parents = [one for one in parents if one.count("/") + bool(one) < self._limits.depth]
        parent = self._dice.choice(parents)
        name = f"{'d' if is_directory else 'n'}{self._dice.randrange(30)}"
        path = f"{parent}/{name}" if parent else name
        return None if path in self.world.names else path

    def _is_full(self) -> bool:
        return len(self.world.names) - len(self.world.paths(DIRECTORY)) >= self._limits.files

    def _handle(self) -> int | None:
        found = [number for number, one in sorted(self.world.handles.items()) if not one.node.is_unsettled]
        return self._dice.choice(found) if found else None

    def _new_handle(self) -> int:
        return next(number for number in range(100) if number not in self.world.handles)

    # --- names ------------------------------------------------------------------------------------

    def _create(self) -> Op | None:
        path = self._free_name()
        if path is None or self._is_full() or len(self.world.handles) >= self._limits.handles:
            return None
        mode = self._dice.choice((0o644, 0o600, 0o755, 0o640))
        is_append = self._dice.random() < 0.2
        return Op("create", path, handle=self._new_handle(), mode=mode, is_append=is_append)

    def _mkdir(self) -> Op | None:
        path = self._free_name(is_directory=True)
        if path is None or len(self.world.paths(DIRECTORY)) >= self._limits.directories:
            return None
        return Op("mkdir", path, mode=self._dice.choice((0o755, 0o700, 0o711)))

    def _symlink(self) -> Op | None:
        path = self._free_name()
        if path is None or self._is_full():
            return None
        return Op("symlink", path, self._dice.choice(("nowhere", "../elsewhere", "n1", "/a/b c")))

    def _link(self) -> Op | None:
        old, new = self._pick(self.world.paths(FILE)), self._free_name()
        return None if old is None or new is None or self._is_full() else Op("link", old, new)

    def _unlink(self) -> Op | None:
        if not self._is_full() and self._dice.random() < 0.5:
            return None
        path = self._pick(self.world.paths(FILE) + self.world.paths(SYMLINK))
        return None if path is None else Op("unlink", path)

    def _rmdir(self) -> Op | None:
        empty = [path for path in self.world.paths(DIRECTORY) if not self.world.below(path)]
        path = self._pick(empty)
        return None if path is None else Op("rmdir", path)

    def _rename(self) -> Op | None:
        old = self._any()
        if old is None:
            return None
        is_directory = self.world.names[old].kind == DIRECTORY
        if self._dice.random() < 0.4:
            new = self._target(old, is_directory=is_directory)
        else:
            new = self._free_name(is_directory=is_directory)
        if new is None or new == old or f"{new}/".startswith(f"{old}/") or self._is_too_deep(old, new):
            return None
        return Op("rename", old, new)

    def _target(self, old: str, *, is_directory: bool) -> str | None:
        """Something that a rename may replace."""
        if is_directory:
            empty = [path for path in self.world.paths(DIRECTORY) if not self.world.below(path)]
            return self._pick([path for path in empty if path != old])
        return self._pick(self.world.paths(FILE) + self.world.paths(SYMLINK))

    def _is_too_deep(self, old: str, new: str) -> bool:
        deepest = max(path.count("/") for path in [old, *self.world.below(old)]) - old.count("/")
        return new.count("/") + deepest > self._limits.depth

    # --- attributes -------------------------------------------------------------------------------

    def _chmod(self) -> Op | None:
        path = self._not_a_link()
        if path is None:
            return None
        modes = (0o755, 0o700) if self.world.names[path].kind == DIRECTORY else (0o644, 0o600, 0o444, 0o755)
        return Op("chmod", path, mode=self._dice.choice(modes))

    def _setxattr(self) -> Op | None:
        path = self._not_a_link()
        if path is None:
            return None
        value = self._dice.randbytes(self._dice.choice((0, 5, 300)))
        return Op("setxattr", path, f"user.x{self._dice.randrange(4)}", value=value)

    def _removexattr(self) -> Op | None:
        there = [
            (path, name) for path, node in sorted(self.world.names.items()) for name in sorted(node.xattrs)
        ]
        if not there:
            return None
        path, name = self._dice.choice(there)
        return Op("removexattr", path, name)

    def _utime(self) -> Op | None:
        path = self._file()
        if path is None:
            return None
        return Op("utime", path, mtime_ns=10**18 + self._dice.randrange(10**17))

    # --- content ----------------------------------------------------------------------------------

    def _open(self) -> Op | None:
        path = self._file()
        if path is None or len(self.world.handles) >= self._limits.handles:
            return None
        return Op(
            "open",
            path,
            handle=self._new_handle(),
            is_append=self._dice.random() < 0.3,
            is_truncating=self._dice.random() < 0.2,
        )

    def _write(self) -> Op | None:
        number = self._handle()
        if number is None:
            return None
        handle = self.world.handles[number]
        node, size = handle.node, len(handle.node.versions[-1])
        if len(node.versions) > self._limits.unsynced:
            return Op("fsync", handle=number)
        length = self._dice.choice(SIZES)
        offset = size if handle.is_append else self._offset(node)
        if offset + length > self._limits.file_bytes:
            return Op("ftruncate", handle=number, length=self._dice.randrange(1000))
        node.write_count += 1
        return Op(
            "write",
            handle=number,
            offset=offset,
            length=length,
            is_append=handle.is_append,
            file_id=node.file_id,
            version=node.write_count,
        )

    def _offset(self, node: Node) -> int:
        size = len(node.versions[-1])
        inside = self._dice.randrange(size + 1)
        return self._dice.choice((0, size, size, inside, inside & ~4095, MIB, size + 5000))

    def _truncate(self) -> Op | None:
        path = self._file()
        return None if path is None else Op("truncate", path, length=self._new_size(self.world.names[path]))

    def _ftruncate(self) -> Op | None:
        number = self._handle()
        if number is None:
            return None
        return Op("ftruncate", handle=number, length=self._new_size(self.world.handles[number].node))

    def _new_size(self, node: Node) -> int:
        size = len(node.versions[-1])
        return self._dice.choice((0, size // 2, self._dice.randrange(size + 1), size + 3000, 4096))

    def _fsync(self) -> Op | None:
        number = self._handle()
        return None if number is None else Op("fsync", handle=number)

    def _close(self) -> Op | None:
        number = self._handle()
        return None if number is None else Op("close", handle=number)

    def _read(self) -> Op | None:
        path = self._file()
        return None if path is None else Op("read", path)
