"""The daemon's side of its keeper (docs/adr/0002-keeper.md): becoming two processes, and what they say."""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import trio

from alluxiofuse.errors import UserError
from alluxiofuse.fuse import keeper
from alluxiofuse.fuse import mountpoint as mountpoints
from alluxiofuse.fuse.memory import Memory, make
from alluxiofuse.fuse.mountopts import MountOptions
from alluxiofuse.fuse.native.device import kernel_version, why_no_passthrough

UPGRADE_TIMEOUT_S = 60.0
MIN_KERNEL = [6, 16]
"""With what a next daemon needs (docs/adr/0002-keeper.md)."""


class Kept:
    """A daemon that has a keeper. Messages are small, and the keeper always listens: no sending waits."""

    def __init__(self, sock: int, memory: int, fuse: int, keeper_pid: int) -> None:
        """`fuse` -1: there is no mount yet."""
        self._sock = socket.socket(fileno=sock)
        self.fuse = fuse
        self.pid = keeper_pid
        self.mountpoint = ""
        self.negotiated: dict[str, int] = {}
        if fuse >= 0:
            state = json.loads(self._sock.recv(keeper.MESSAGE_BYTES)[1:])
            self.mountpoint, self.negotiated = os.fsdecode(bytes.fromhex(state["mount"])), state["negotiated"]
        self.memory = Memory(memory)
        os.close(memory)
        self.is_stopping = False
        """The end was ordered: nobody is to take over."""

    @property
    def is_takeover(self) -> bool:
        return self.fuse >= 0

    def _tell(self, message: bytes, fds: Sequence[int] = ()) -> None:
        with suppress(OSError):  # It is gone: `wait` tells.
            socket.send_fds(self._sock, [message], list(fds))

    def mounted(self, fd: int, mountpoint: str) -> None:
        """Something is mounted now, and the keeper has it too."""
        self.mountpoint = mountpoint
        listener, path = _listen(mountpoint)
        fds = [fd] if listener is None else [fd, listener.fileno()]
        self._tell(b"M" + os.fsencode(mountpoint) + b"\0" + os.fsencode(path), fds)
        if listener is not None:
            listener.close()

    def can_resume(self, negotiated: dict[str, int]) -> None:
        state = {"mount": os.fsencode(self.mountpoint).hex(), "negotiated": negotiated}
        self._tell(b"S" + json.dumps(state).encode())

    def ready(self, fds: Sequence[int] = ()) -> None:
        """It answers. `fds`: standard output and error of daemons from now on."""
        self._tell(b"R", fds)

    def ended(self) -> None:
        """Nothing is mounted any more."""
        self._tell(b"E")

    def leave(self) -> NoReturn:
        """End at once, as by a kill; all that must be known is known. Another daemon follows."""
        self._tell(b"H")
        logging.shutdown()
        os._exit(0)

    async def wait(self) -> bool:
        """Until another daemon is to take over (True), or the keeper is gone."""
        await trio.lowlevel.wait_readable(self._sock.fileno())
        return self._sock.recv(1) == b"U"


def is_wanted(options: MountOptions) -> bool:
    """The mount is to have a keeper."""
    if options.keeper is not None:
        return options.keeper
    if options.session == "pyfuse3" or kernel_version() < MIN_KERNEL:
        return False
    return options.session == "native" or not why_no_passthrough()


def begin(program: Sequence[str], arguments: Sequence[str], directory: str = "") -> Kept:
    """Become two processes: the keeper goes on as this one, the daemon (which returns) is its child. By
    `program` and `arguments` the keeper starts further daemons, in `directory` ("": where we are). Before any
    thread is started."""
    assert len(program) == keeper.PROGRAM_WORDS
    sys.stdout.flush()
    sys.stderr.flush()
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory, pid = make(), os.getpid()
    child = os.fork()
    if not child:
        theirs.close()
        keeper.stand_apart()
        return Kept(ours.detach(), memory, -1, pid)
    for fd in (0, 1, 2, theirs.fileno(), memory):  # Those that we opened for closed ones are not.
        os.set_inheritable(fd, True)
    script = str(Path(keeper.__file__).resolve())
    words = [
        "-I",
        "-S",
        script,
        theirs.fileno(),
        memory,
        child,
        directory or os.getcwd(),
        *program,
        *arguments,
    ]
    try:
        os.execv(sys.executable, [sys.executable, *map(str, words)])  # noqa: S606
    finally:
        os._exit(keeper.GAVE_UP)  # The daemon hears of it.


def taken_over() -> Kept | None:
    """What the keeper that started this process says; None: none did. Asked once."""
    words = os.environ.pop(keeper.VARIABLE, "")
    if not words:
        return None
    sock, memory, fuse, pid = (int(word) for word in words.split(","))
    for fd in (sock, memory, fuse):
        os.set_inheritable(fd, False)
    return Kept(sock, memory, fuse, pid)


# --- upgrades -----------------------------------------------------------------------------------------


def _runtime_directory() -> Path:
    """Nobody else's. OSError."""
    if os.geteuid() == 0:
        path = Path("/run/alluxiofuse")
    elif "XDG_RUNTIME_DIR" in os.environ:
        path = Path(os.environ["XDG_RUNTIME_DIR"]) / "alluxiofuse"
    else:
        path = Path(f"/tmp/alluxiofuse-{os.geteuid()}")  # noqa: S108 - looked at below
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(f"{path} is not ours alone")
    return path


def _listen(mountpoint: str) -> tuple[socket.socket | None, str]:
    mount = mountpoints.mount_at(mountpoint)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        path = _runtime_directory() / (mount.device if mount is not None else "0:0")
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen(4)
    except OSError:
        listener.close()
        return None, ""  # It can't be upgraded while it is mounted.
    return listener, str(path)


def upgrade(directory: str, program: Sequence[str]) -> None:
    """Have the mount at `directory` (no symlinks; it is not asked) served by `program`. UserError."""
    mount = mountpoints.mount_at(directory)
    if mount is None or not mount.is_ours:
        raise UserError(f"{directory} is not an alluxiofuse mount")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(UPGRADE_TIMEOUT_S)
        try:
            sock.connect(str(_runtime_directory() / mount.device))
        except OSError:
            raise UserError(
                f"{directory} has no keeper that you may ask: mount it with -o session=native,keeper=on"
            ) from None
        uid = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[4:8], sys.byteorder)
        if uid not in (0, os.geteuid()):
            raise UserError(f"the keeper of {directory} is another user's")
        try:
            sock.send(b"\0".join(os.fsencode(word) for word in (str(keeper.FORMAT), *program)))
            answer = sock.recv(keeper.MESSAGE_BYTES)
        except OSError as exc:
            raise UserError(f"{directory}: its keeper does not answer: {exc.strerror or exc}") from None
    if answer != b"ok":
        raise UserError(f"{directory}: {os.fsdecode(answer) or 'its keeper has ended'}")
