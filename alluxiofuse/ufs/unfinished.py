"""What would be left half done in a store if this process died now: noted in a file, so that the next
process can undo it and touches nothing that other programs are doing there.

The file: one JSON array a line, `["+", key, id]` when something was begun, `["-", key, id]` when it
is over. Appended in one write each; a torn last line is ignored. One process uses it at a time.
"""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from pathlib import Path

Note = tuple[str, str]
"""(key, the store's id of the upload)."""


class Unfinished:
    """Threads may share it. Kept in memory only until `keep_in`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[Note] = set()
        self._left: set[Note] = set()
        """Nobody works on these any more; they could not be undone yet."""
        self._fd = -1

    def keep_in(self, path: Path) -> None:
        """Take over what an earlier process left in `path`, and note everything there from now on.
        OSError where that can't be written."""
        with self._lock:
            if self._fd >= 0:
                return
            self._left |= _read(path)
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            if not self._left:
                os.ftruncate(self._fd, 0)
            for note in self._running:
                self._append("+", note)

    def begun(self, note: Note) -> None:
        """On the disk when this returns."""
        with self._lock:
            self._running.add(note)
            self._append("+", note)

    def ended(self, note: Note) -> None:
        """Completed, or undone."""
        with self._lock:
            self._running.discard(note)
            self._left.discard(note)
            self._append("-", note)
            if self._fd >= 0 and not self._running and not self._left:
                with suppress(OSError):
                    os.ftruncate(self._fd, 0)

    def left_behind(self, note: Note) -> None:
        """It could not be undone now."""
        with self._lock:
            self._running.discard(note)
            self._left.add(note)

    def left(self) -> list[Note]:
        return sorted(self._left)

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _append(self, sign: str, note: Note) -> None:
        """A disk that can't take the note must not stop the upload: then a crash may leave it behind."""
        if self._fd < 0:
            return
        with suppress(OSError):
            os.write(self._fd, json.dumps([sign, *note]).encode() + b"\n")
            if sign == "+":
                os.fdatasync(self._fd)


def _read(path: Path) -> set[Note]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return set()
    left: set[Note] = set()
    for line in lines:
        try:
            sign, key, upload_id = json.loads(line)
        except ValueError:
            continue
        note = (str(key), str(upload_id))
        (left.add if sign == "+" else left.discard)(note)
    return left
