"""One actor of the workload: its process, its world, and what it can't know."""

from __future__ import annotations

import errno
import os
import random
import select
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from actor import receive, send
from oracle import Found, Op, World, content_differences
from workload import Workload

ANSWER_TIMEOUT_S = 240.0
UNCERTAIN = {errno.EIO, errno.ENOTCONN, errno.ECONNABORTED}
"""What an operation may say that a fault has met: nobody knows whether it was done."""
_ACTOR = Path(__file__).with_name("actor.py")


class FaultFailure(AssertionError):
    """What was acknowledged is not there, or something is there that was never written."""


class Acknowledged:
    """Counts the operations of all players that returned, and wakes who waits for a number."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self.count = 0

    def add(self) -> None:
        with self._condition:
            self.count += 1
            self._condition.notify_all()

    def ended(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def wait(self, is_enough: Callable[[], bool]) -> None:
        """Asked again after each operation, and when a player ends."""
        with self._condition:
            if not self._condition.wait_for(is_enough, ANSWER_TIMEOUT_S):
                raise FaultFailure(f"the workload stands still after {self.count} operations")


class Player:
    """Changes the directory `name` of a FUSE mount, which nobody else does. `play` runs in a thread
    of its own; everything else is called while it does not."""

    def __init__(self, name: str, number: int, mount: Path, acknowledged: Acknowledged) -> None:
        self.name = name
        self.mount = mount
        self.worlds = [World(number)]
        """More than one: what may be, since an operation of unknown outcome."""
        self.history: deque[str] = deque(maxlen=5000)
        """Each operation with the time at which it returned."""
        self.is_struck = False
        """A fault may have met what was not made durable, and explains errors."""
        self.may_lapse = False
        """The mount's session may have ended: what is open without a name may be gone."""
        self.failure: BaseException | None = None
        self._acknowledged = acknowledged
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._process = subprocess.Popen(
            [sys.executable, str(_ACTOR), str(mount / name)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    @property
    def world(self) -> World:
        (world,) = self.worlds
        return world

    @property
    def is_playing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    # --- talking to the process -------------------------------------------------------------------

    def ask(self, *request: Any) -> Any:
        """OSError as the actor met it."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        send(process.stdin, request)
        ready, _, _ = select.select([process.stdout], [], [], ANSWER_TIMEOUT_S)
        if not ready:
            raise FaultFailure(f"{self.name}: {request[:2]} hangs")
        kind, value = receive(process.stdout)
        if kind == "error":
            raise OSError(value, os.strerror(value))
        return value

    def scan(self, mount: Path | None = None) -> dict[str, Found]:
        """The player's directory, through its own mount or another one."""
        found = self.ask("scan", str((mount or self.mount) / self.name))
        assert isinstance(found, dict)
        return found

    def close(self) -> None:
        """Idempotent."""
        self._stop.set()
        self._process.kill()
        self._process.wait()
        if self._thread is not None:
            self._thread.join()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            try:
                stream.close()
            except OSError:
                pass

    # --- playing ----------------------------------------------------------------------------------

    def start(self, dice: random.Random) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, args=(dice,), name=self.name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """After the operation under way."""
        self._stop.set()
        self.join()

    def join(self) -> None:
        """Until it stopped, by itself or by `stop`; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def _run(self, dice: random.Random) -> None:
        try:
            workload = Workload(self.world, dice)
            while not self._stop.is_set() and self.do(workload.next()):
                self._acknowledged.add()
        except BaseException as exc:
            self.failure = exc
        finally:
            self._acknowledged.ended()

    def do(self, op: Op) -> bool:
        """False: nobody knows whether it was done; no further operation before `worlds` is one again."""
        world = self.world
        try:
            data = self.ask("do", op)
        except OSError as exc:
            self.note(f"{op} -> {errno.errorcode.get(exc.errno or 0, exc.errno)}")
            is_gone = exc.errno == errno.ESTALE and self.may_lapse and world.is_nameless(op.handle)
            if not is_gone and (exc.errno not in UNCERTAIN or not self.is_struck):
                raise FaultFailure(f"{op}: {exc}\n{self.story(op.path)}") from None
            self.worlds = world.outcomes(op)
            return False
        self.note(str(op))
        world.apply(op)
        if op.name == "read":
            self._check_read(op, data)
        return True

    def forget_nameless(self) -> None:
        """Close what is open and may have no name any more: it may be there, or be gone."""
        nameless = {number for world in self.worlds for number in world.handles if world.is_nameless(number)}
        for number in sorted(nameless):
            op, is_certain = Op("close", handle=number), True
            try:
                self.ask("do", op)
            except OSError as exc:
                if exc.errno not in (errno.ESTALE, errno.EIO, errno.EBADF):
                    raise
                is_certain = False
            self.note(f"close handle={number}: it may have had no name")
            for world in self.worlds:
                world.apply(op, is_certain=is_certain)

    def _check_read(self, op: Op, data: bytes) -> None:
        versions = self.world.names[op.path].versions
        wrong = content_differences(versions if self.is_struck else versions[-1:], data)
        if wrong:
            raise FaultFailure("\n".join([f"reading {op.path}:", *wrong, self.story(op.path)]))

    def note(self, line: str) -> None:
        self.history.append(f"{datetime.now():%H:%M:%S.%f} {line}")

    def story(self, *paths: str) -> str:
        """What was done last, and last with some paths. FAULTS_LOG names a directory for all of it."""
        lines = list(self.history)
        if directory := os.environ.get("FAULTS_LOG"):
            Path(directory, self.name).write_text("\n".join(lines) + "\n")
        about = [line for line in lines if any(path and f"={path} " in f"{line} " for path in paths)]
        return "\n".join([f"{self.name} did last:", *lines[-12:], "and with it:", *about[-20:]])
