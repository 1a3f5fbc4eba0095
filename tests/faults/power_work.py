"""A random workload of one program, seeded, that tells the oracle of everything it does."""

from __future__ import annotations

import os
import random
import stat
from contextlib import suppress
from pathlib import Path

from power_oracle import File, Oracle, Tree

_SIZES = (0, 1, 100, 4096, 5000, 70_000, 1 << 20, 1_500_000)


class Work:
    """`is_synchronous`: close(2) makes everything durable (CACHE_THROUGH)."""

    def __init__(self, top: Path, oracle: Oracle, dice: random.Random, *, is_synchronous: bool) -> None:
        self.top = top
        self.oracle = oracle
        self.dice = dice
        self.is_synchronous = is_synchronous
        self._open: list[tuple[int, File]] = []
        self._descriptors: set[int] = set()
        """All that are open: also that of a call which never came back well."""
        self._names = 0

    def step(self) -> None:
        """One operation. OSError when the power is gone."""
        actions = (
            (self._create, 8),
            (self._append, 4),
            (self._overwrite, 4),
            (self._rewrite, 3),
            (self._truncate, 2),
            (self._rename, 4),
            (self._unlink, 3),
            (self._mkdir, 2),
            (self._rmdir, 1),
            (self._symlink, 1),
            (self._chmod, 2),
            (self._sync_directory, 1),
            (self._write_synchronously, 1),
            (self._read, 4),
            (self._keep_open, 2),
            (self._use_open, 4),
        )
        action = self.dice.choices([one for one, _ in actions], [weight for _, weight in actions])[0]
        action()

    def close(self) -> None:
        """Descriptors of a filesystem that is gone."""
        self._open.clear()
        for fd in list(self._descriptors):
            with suppress(OSError):
                self._closed(fd)

    # --- choosing ---------------------------------------------------------------------------------

    def _files(self) -> list[tuple[str, File]]:
        return [(path, file) for path, (_, _, file) in self.oracle.tree.items() if file is not None]

    def _file(self) -> tuple[str, File] | None:
        files = self._files()
        return self.dice.choice(files) if files else None

    def _directories(self) -> list[str]:
        return ["", *(path for path, (mode, _, _) in self.oracle.tree.items() if stat.S_ISDIR(mode))]

    def _new_name(self) -> str:
        self._names += 1
        return os.path.join(
            self.dice.choice(self._directories()), f"n{self._names}-{self.dice.randrange(999)}"
        )

    def _data(self) -> bytes:
        return self.dice.randbytes(self.dice.choice(_SIZES[1:]))

    # --- what is done to descriptors --------------------------------------------------------------

    def _opened(self, path: str, flags: int) -> int:
        fd = os.open(self.top / path, flags, 0o644)
        self._descriptors.add(fd)
        return fd

    def _closed(self, fd: int) -> None:
        self._descriptors.discard(fd)
        os.close(fd)

    def _write(self, fd: int, file: File, offset: int, data: bytes) -> None:
        file.write(offset, data)
        assert os.pwrite(fd, data, offset) == len(data)

    def _fsync(self, fd: int, file: File) -> None:
        os.fsync(fd)
        file.synced()
        self.oracle.synced()

    def _close(self, fd: int, file: File) -> None:
        self._closed(fd)
        if self.is_synchronous and not any(other is file for _, other in self._open):
            file.synced()
            self.oracle.synced()

    def _finish(self, fd: int, file: File) -> None:
        if self.dice.random() < 0.35:
            self._fsync(fd, file)
            if self.dice.random() < 0.2:
                # At the end: where O_APPEND would put it, whatever is asked.
                self._write(fd, file, len(file.now), b"after the sync")
        self._close(fd, file)

    # --- operations -------------------------------------------------------------------------------

    def _change(self, what: str, do: object, apply: object) -> None:
        self.oracle.change(what, apply)  # type: ignore[arg-type]
        do()  # type: ignore[operator]
        self.oracle.done()

    def _create(self) -> None:
        name, file, size = self._new_name(), File(), self.dice.choice(_SIZES)
        fd = -1

        def do() -> None:
            nonlocal fd
            fd = self._opened(name, os.O_CREAT | os.O_EXCL | os.O_RDWR)

        self._change(f"create {name}", do, lambda tree: tree.__setitem__(name, (0o100644, "", file)))
        if size:
            self._write(fd, file, 0, self.dice.randbytes(size))
        if self.dice.random() < 0.3:
            self._write(fd, file, self.dice.randrange(2 * size + 1), self._data())
        self._finish(fd, file)

    def _append(self) -> None:
        if (found := self._file()) is None:
            return
        fd = self._opened(found[0], os.O_WRONLY | os.O_APPEND)
        data = self._data()
        found[1].write(len(found[1].now), data)
        assert os.write(fd, data) == len(data)
        self._finish(fd, found[1])

    def _overwrite(self) -> None:
        if (found := self._file()) is None:
            return
        fd = self._opened(found[0], os.O_RDWR)
        for _ in range(self.dice.randrange(1, 4)):
            self._write(fd, found[1], self.dice.randrange(len(found[1].now) + 1), self._data())
        self._finish(fd, found[1])

    def _rewrite(self) -> None:
        if (found := self._file()) is None:
            return
        found[1].truncate(0)
        fd = self._opened(found[0], os.O_WRONLY | os.O_TRUNC)
        self._write(fd, found[1], 0, self._data())
        self._finish(fd, found[1])

    def _truncate(self) -> None:
        if (found := self._file()) is None:
            return
        size = self.dice.randrange(len(found[1].now) + 5000)
        found[1].truncate(size)
        os.truncate(self.top / found[0], size)

    def _rename(self) -> None:
        paths = list(self.oracle.tree)
        if not paths:
            return
        old = self.dice.choice(paths)
        is_dir = stat.S_ISDIR(self.oracle.tree[old][0])
        files = [path for path, _ in self._files() if path != old]
        new = (
            self.dice.choice(files) if files and not is_dir and self.dice.random() < 0.4 else self._new_name()
        )
        if new.startswith(f"{old}/"):
            return

        def apply(tree: Tree) -> None:
            for path in [path for path in tree if path == old or path.startswith(f"{old}/")]:
                tree[new + path[len(old) :]] = tree.pop(path)

        self._change(f"rename {old} {new}", lambda: os.rename(self.top / old, self.top / new), apply)

    def _unlink(self) -> None:
        if (found := self._file()) is None:
            return
        name = found[0]
        self._change(f"unlink {name}", lambda: os.unlink(self.top / name), lambda tree: tree.pop(name))

    def _mkdir(self) -> None:
        name = self._new_name()
        self._change(
            f"mkdir {name}",
            lambda: os.mkdir(self.top / name, 0o755),
            lambda tree: tree.__setitem__(name, (0o40755, "", None)),
        )

    def _rmdir(self) -> None:
        empty = [
            path
            for path in self._directories()[1:]
            if not any(other.startswith(f"{path}/") for other in self.oracle.tree)
        ]
        if empty:
            name = self.dice.choice(empty)
            self._change(f"rmdir {name}", lambda: os.rmdir(self.top / name), lambda tree: tree.pop(name))

    def _symlink(self) -> None:
        name = self._new_name()
        self._change(
            f"symlink {name}",
            lambda: os.symlink("target", self.top / name),
            lambda tree: tree.__setitem__(name, (0o120777, "target", None)),
        )

    def _chmod(self) -> None:
        if (found := self._file()) is None:
            return
        name, mode = found[0], self.dice.choice((0o600, 0o640, 0o755))
        self._change(
            f"chmod {name} {mode:o}",
            lambda: os.chmod(self.top / name, mode),
            lambda tree: tree.__setitem__(name, (0o100000 | mode, *tree[name][1:])),
        )

    def _sync_directory(self) -> None:
        fd = self._opened(self.dice.choice(self._directories()), os.O_RDONLY)
        try:
            os.fsync(fd)
            self.oracle.synced()
        finally:
            self._closed(fd)

    def _write_synchronously(self) -> None:
        if (found := self._file()) is None:
            return
        path, file = found
        fd = self._opened(path, os.O_WRONLY | os.O_SYNC)
        self._write(fd, file, self.dice.randrange(len(file.now) + 1), self._data())
        file.synced()
        self.oracle.synced()
        self._close(fd, file)

    def _read(self) -> None:
        if (found := self._file()) is not None:
            data, wanted = (self.top / found[0]).read_bytes(), found[1].now
            assert data == wanted, f"{found[0]}: {difference(data, wanted)}, {found[1].touched}"

    def _keep_open(self) -> None:
        if len(self._open) < 4 and (found := self._file()) is not None:
            self._open.append((self._opened(found[0], os.O_RDWR), found[1]))

    def _use_open(self) -> None:
        if not self._open:
            return
        at = self.dice.randrange(len(self._open))
        fd, file = self._open[at]
        what = self.dice.random()
        if what < 0.5:
            self._write(fd, file, self.dice.randrange(len(file.now) + 1), self._data())
        elif what < 0.75:
            self._fsync(fd, file)
        else:
            del self._open[at]
            self._close(fd, file)


def difference(found: bytes, wanted: bytes) -> str:
    """For people."""
    at = next((at for at, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), -1)
    return f"{len(found)} bytes, should be {len(wanted)}; first difference at {at}"
