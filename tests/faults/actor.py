"""A process that does what it is told on a FUSE mount: `python actor.py DIRECTORY`.

It is apart from the test so that a mount that hangs can be noticed and the process be killed. Requests
and answers are pickles with a length before each, on stdin and stdout.

    ("do", Op)      -> ("ok", data read or b"") or ("error", errno)
    ("scan", path)  -> ("ok", {relative path: Found}): everything below, read past the kernel's page cache
    ("touch", path) -> ("ok", b""): opens it for writing, fsync, close
    ("forget",)     -> ("ok", b""): closes everything, whatever it says
"""

from __future__ import annotations

import mmap
import os
import pickle
import stat
import struct
import sys
from contextlib import suppress
from typing import IO, Any

from oracle import DIRECTORY, FILE, SYMLINK, Found, Op
from stamps import stamped

_READ_BYTES = 1 << 20
_KINDS = {stat.S_IFREG: FILE, stat.S_IFDIR: DIRECTORY, stat.S_IFLNK: SYMLINK}


def send(stream: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(struct.pack("<I", len(data)) + data)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """EOFError when the other end is gone."""
    head = stream.read(4)
    if len(head) < 4:
        raise EOFError
    return pickle.loads(stream.read(struct.unpack("<I", head)[0]))  # noqa: S301 - our own child or parent


class Actor:
    def __init__(self, root: str) -> None:
        self._root = root
        self._fds: dict[int, int] = {}

    def do(self, op: Op) -> bytes:
        """OSError as the system call said; what a read read."""
        path = os.path.join(self._root, op.path)
        other = os.path.join(self._root, op.other)
        match op.name:
            case "create" | "open":
                flags = os.O_RDWR | (os.O_APPEND if op.is_append else 0)
                flags |= os.O_CREAT | os.O_EXCL if op.name == "create" else 0
                flags |= os.O_TRUNC if op.is_truncating else 0
                self._fds[op.handle] = os.open(path, flags, op.mode)
            case "mkdir":
                os.mkdir(path, op.mode)
            case "symlink":
                os.symlink(op.other, path)
            case "link":
                os.link(path, other)
            case "unlink":
                os.unlink(path)
            case "rmdir":
                os.rmdir(path)
            case "rename":
                os.rename(path, other)
            case "chmod":
                os.chmod(path, op.mode)
            case "setxattr":
                os.setxattr(path, op.other, op.value)
            case "removexattr":
                os.removexattr(path, op.other)
            case "utime":
                os.utime(path, ns=(op.mtime_ns, op.mtime_ns))
            case "truncate":
                os.truncate(path, op.length)
            case "ftruncate":
                os.ftruncate(self._fds[op.handle], op.length)
            case "write":
                self._write(op)
            case "fsync":
                os.fsync(self._fds[op.handle])
            case "close":
                os.close(self._fds.pop(op.handle))
            case "read":
                return read_all(path, 0)
            case _:
                raise ValueError(op.name)
        return b""

    def _write(self, op: Op) -> None:
        fd, data = self._fds[op.handle], stamped(op.file_id, op.version, op.offset, op.length)
        done = 0
        while done < len(data):
            rest = memoryview(data)[done:]
            done += os.write(fd, rest) if op.is_append else os.pwrite(fd, rest, op.offset + done)

    def forget(self) -> None:
        while self._fds:
            with suppress(OSError):
                os.close(self._fds.popitem()[1])


def read_all(path: str, flags: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | flags)
    parts: list[bytes] = []
    try:
        # Aligned, since with O_DIRECT the filesystem of a slab may insist on it.
        with mmap.mmap(-1, _READ_BYTES) as buffer:
            while count := os.readv(fd, [buffer]):
                parts.append(buffer[:count])
                if count % mmap.PAGESIZE:
                    break  # The end, behind which there is no aligned offset.
        return b"".join(parts)
    finally:
        os.close(fd)


def touch(path: str) -> bytes:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    return b""


def scan(top: str, flags: int = os.O_DIRECT) -> dict[str, Found]:
    """Everything below, files read with `flags`."""
    found: dict[str, Found] = {}
    waiting = [""]
    while waiting:
        directory = waiting.pop()
        for name in sorted(os.listdir(os.path.join(top, directory))):
            relative = f"{directory}/{name}" if directory else name
            one = found[relative] = look(os.path.join(top, relative), flags)
            if one.kind == DIRECTORY:
                waiting.append(relative)
    return found


def look(path: str, flags: int) -> Found:
    """Content first: opening is what makes size and times exact (close-to-open)."""
    about = os.lstat(path)
    kind = _KINDS.get(stat.S_IFMT(about.st_mode), "something else")
    data, target, error, xattrs = b"", "", "", {}
    try:
        if kind == FILE:
            data = read_all(path, flags)
            about = os.lstat(path)
        if kind == SYMLINK:
            target = os.readlink(path)
        else:
            xattrs = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    except OSError as exc:
        error = f"can't be read: {exc.strerror}"
    return Found(
        kind,
        stat.S_IMODE(about.st_mode),
        about.st_nlink,
        about.st_ino,
        about.st_size,
        about.st_mtime_ns,
        target,
        xattrs,
        data,
        error,
    )


def main() -> None:
    os.umask(0)
    root, source, sink = sys.argv[1], sys.stdin.buffer, sys.stdout.buffer
    actor = Actor(root)
    with suppress(EOFError):
        while True:
            request = receive(source)
            try:
                match request:
                    case ("do", op):
                        result: Any = actor.do(op)
                    case ("scan", path):
                        result = scan(path)
                    case ("touch", path):
                        result = touch(path)
                    case _:
                        actor.forget()
                        result = b""
            except OSError as exc:
                send(sink, ("error", exc.errno))
            else:
                send(sink, ("ok", result))


if __name__ == "__main__":
    main()
