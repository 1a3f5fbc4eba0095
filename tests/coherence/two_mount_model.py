"""Random operations on two mounts of one namespace, against the same operations on a plain directory.

One operation at a time, from either mount. After each one:

* the mount that did it has the plain directory's outcome (value or errno), and sees its own change;
* whoever opens a file anew, on either mount, gets exactly the bytes, size and times: no waiting;
* names (also those that do not exist), attributes and listings of both mounts, and what was opened
  or mapped before, agree within the time in which news travels (waited for, up to `PATIENCE_S`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from two_mount_checks import Difference, Touched
from two_mount_operations import Operations

PATIENCE_S = 30.0
"""For what has to be there within a second on a machine that has time."""
FRESH_S = 1.0


class Model(Operations):
    def __init__(self, mounts: list[Path], plain: Path, seed: int) -> None:
        super().__init__(mounts, plain, seed)
        self.late = 0.0
        """The longest that anything took to agree."""
        self.late_count = 0
        """How often that was more than `FRESH_S`."""
        self._operations = self._weighted()

    def _weighted(self) -> list[Callable[[int], Touched | None]]:
        weights: list[tuple[int, Callable[[int], Touched | None]]] = [
            (10, self.open),
            (6, self.create),
            (16, self.write),
            (6, self.append),
            (9, self.close),
            (4, self.truncate),
            (4, self.ftruncate),
            (8, self.rename),
            (6, self.unlink),
            (3, self.link),
            (2, self.symlink),
            (4, self.mkdir),
            (3, self.rmdir),
            (3, self.fsync),
            (3, self.utimens),
            (3, self.chmod),
            (3, self.map),
            (2, self.unmap),
            (3, self.write_by_map),
            (4, self.whole_file),
            (5, self.read),
            (3, self.replace),
        ]
        return [operation for weight, operation in weights for _ in range(weight)]

    # --- running ------------------------------------------------------------------------------------

    def run(self, count: int) -> None:
        for _ in range(count):
            self.step()
        while self.handles:
            self.close_handle(self.handles[-1])
        self.unmap_all()
        self.agree(self.check_everything, "the end")

    def step(self) -> None:
        operation, mount = self.dice.choice(self._operations), self.dice.randrange(2)
        self.count += 1
        self.note(f"{self.count} mount {mount} {operation.__name__}")
        touched = operation(mount)
        if touched is None:
            return
        if touched.is_content:
            for inode in touched.inodes:
                self.check_opens(inode, mount)
        self.agree(self.check_names, "names and attributes")
        self.agree(lambda: self.check_listings(touched.paths), "listings")
        for inode in touched.inodes:
            self.agree(lambda inode=inode: self.check_open_files(inode), "what is open")  # type: ignore[misc]

    def agree(self, check: Callable[[], None], what: str) -> None:
        began = time.monotonic()
        pause_s = 0.0005
        while True:
            try:
                check()
                break
            except Difference as exc:
                if time.monotonic() - began > PATIENCE_S:
                    raise Difference(f"after {PATIENCE_S:.0f} s still: {what}: {exc}") from None
            time.sleep(pause_s)
            pause_s = min(0.05, 2 * pause_s)
        took = time.monotonic() - began
        self.late = max(self.late, took)
        self.late_count += took > FRESH_S

    # --- the end ------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """Close everything, whatever state it is in."""
        self.unmap_all()
        for handle in self.handles:
            for fd in (handle.fd, handle.twin):
                try:
                    os.close(fd)
                except OSError:
                    pass
        self.handles.clear()
