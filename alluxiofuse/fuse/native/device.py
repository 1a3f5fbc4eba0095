"""The descriptor of /dev/fuse: mounting, whole requests in, whole answers out."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from alluxiofuse.errors import UserError
from alluxiofuse.fuse.mountopts import MountOptions
from alluxiofuse.fuse.native import abi
from alluxiofuse.fuse.native.abi import OUT_HEADER

log = logging.getLogger("alluxiofuse.fuse")

_MS = {
    "ro": 1,
    "nosuid": 2,
    "nodev": 4,
    "noexec": 8,
    "sync": 16,
    "dirsync": 128,
    "noatime": 1024,
    "nodiratime": 2048,
}
"""mount(2)'s flags, from linux/mount.h; what they are the opposite of is the default."""
_FUSERMOUNT_TIMEOUT_S = 30.0
FSTYPE = "fuse.alluxiofuse"


_GONE = (errno.ENOENT, errno.ENODEV, errno.EBADF, errno.ENOTCONN)
_KERNEL_PAGE_BYTES = 4096
_CAP_SYS_ADMIN = 21


def _make_pipe() -> tuple[int, int]:
    """With room for the largest answer, or what may be had (CAP_SYS_RESOURCE is needed for over 1 MiB)."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for size in (2 * abi.MAX_WRITE, abi.MAX_WRITE):
        with suppress(OSError):
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, size)
            break
    return reader, writer


def max_read_bytes() -> int:
    """What an answer may hold so that it fits into a pipe together with its header, which takes a page
    of it."""
    pipe = _make_pipe()
    size = fcntl.fcntl(pipe[1], fcntl.F_GETPIPE_SZ)
    for end in pipe:
        os.close(end)
    return min(abi.MAX_WRITE, max(size - _KERNEL_PAGE_BYTES, 32 * _KERNEL_PAGE_BYTES))


def kernel_version() -> list[int]:
    """Its first two numbers."""
    return [int(part) for part in re.findall(r"\d+", os.uname().release)[:2]]


def why_no_passthrough() -> str:
    """In a few words; "" when nothing is known that speaks against it."""
    if kernel_version() < [6, 9]:
        return f"Linux {os.uname().release} has no passthrough"
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    if capabilities is None or not int(capabilities[1], 16) >> _CAP_SYS_ADMIN & 1:
        return "passthrough needs CAP_SYS_ADMIN"
    return ""


class Ended(Exception):
    """The kernel has let go of the connection: unmounted, or aborted."""


class Device:
    """Owns a descriptor of /dev/fuse that a mount is connected to. Not blocking."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self._pipe: tuple[int, int] | None = None
        """Empty between two calls; None: not made yet."""

    def receive(self, buffer: bytearray) -> int:
        """How many bytes of `buffer` the next request fills; 0: there is none now. Ended."""
        while True:
            try:
                return os.readv(self.fd, [buffer])
            except OSError as exc:
                if exc.errno == errno.EAGAIN:
                    return 0
                if exc.errno in (errno.EINTR, errno.ENOENT):  # ENOENT: it was taken back meanwhile
                    continue
                if exc.errno in (errno.ENODEV, errno.EBADF, errno.ECONNABORTED):
                    raise Ended from None
                raise

    def receive_within(self, seconds: float, buffer: bytearray) -> int:
        """`receive`, again and again for so long. The thread does nothing else meanwhile."""
        until = time.monotonic() + seconds
        while not (count := self.receive(buffer)) and time.monotonic() < until:
            pass
        return count

    def send(self, *parts: bytes | bytearray | memoryview) -> None:
        """An answer. Whoever asked may be gone (ENOENT), or the mount."""
        try:
            os.writev(self.fd, parts)
        except OSError as exc:
            if exc.errno not in _GONE:
                raise

    def send_from(self, unique: int, fd: int, offset: int, length: int) -> bool:
        """An answer whose payload are bytes of a file, which the kernel moves without our touching them.
        False: it was not sent (use `send`); OSError as of reading. May wait for the file's disk."""
        if self._pipe is None:
            self._pipe = _make_pipe()
        reader, writer = self._pipe
        try:
            os.write(writer, OUT_HEADER.pack(16 + length, 0, unique))
            if os.splice(fd, writer, length, offset_src=offset) == length:
                os.splice(reader, self.fd, 16 + length)
                return True
        except OSError as exc:
            if exc.errno in _GONE:
                return True
            self._drop_pipe()
            raise
        self._drop_pipe()
        return False

    def _drop_pipe(self) -> None:
        """With whatever is in it."""
        pipe, self._pipe = self._pipe, None
        for end in pipe or ():
            os.close(end)

    def notify(self, message: bytes) -> None:
        """May wait in the kernel for requests on the same inode: never in the thread that answers.
        OSError: ENOENT the kernel does not know the inode or name."""
        os.write(self.fd, message)

    def open_backing(self, fd: int) -> int:
        """See `passthrough.BackingDevice`. EPERM: not negotiated, or CAP_SYS_ADMIN is missing; ELOOP: the
        file is on a filesystem that is itself stacked."""
        argument = bytearray(abi.BACKING_MAP.pack(fd, 0, 0))
        return int(fcntl.ioctl(self.fd, abi.IOC_BACKING_OPEN, argument, True))

    def close_backing(self, backing_id: int) -> None:
        fcntl.ioctl(self.fd, abi.IOC_BACKING_CLOSE, bytearray(backing_id.to_bytes(4, "little")), True)

    def close(self) -> None:
        """If nobody else has it, the mount is dead from now on."""
        self._drop_pipe()
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def mount(mountpoint: str, options: MountOptions, fsname: str, max_read: int) -> Device:
    """UserError in one line when it can't be done."""
    try:
        if os.geteuid() == 0:
            return Device(_mount_as_root(mountpoint, options, fsname, max_read))
        return Device(_mount_by_helper(mountpoint, options, fsname, max_read))
    except OSError as exc:
        if exc.errno == errno.ENOENT and not os.path.exists("/dev/fuse"):
            reason = "there is no /dev/fuse: `modprobe fuse`, or in a container --device /dev/fuse"
        elif exc.errno == errno.EPERM:
            reason = "not permitted (in a container: --device /dev/fuse --cap-add SYS_ADMIN is needed)"
        else:
            reason = exc.strerror or str(exc)
        raise UserError(f"cannot mount at {mountpoint}: {reason}") from None


def _mount_as_root(mountpoint: str, options: MountOptions, fsname: str, max_read: int) -> int:
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        mode = os.stat(mountpoint).st_mode
        given = set(options.kernel)
        names = given | ({"ro"} if options.is_readonly else set())
        names |= {no for no, yes in (("nosuid", "suid"), ("nodev", "dev")) if yes not in given}
        flags = sum(_MS[name] for name in names if name in _MS)
        data = [
            f"max_read={max_read}",
            f"fd={fd}",
            f"rootmode={mode & 0o170000:o}",
            "user_id=0",
            "group_id=0",
            "default_permissions",
        ]
        if options.is_allowed_for_others:
            data.append("allow_other")
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.mount(
            fsname.encode(),
            os.fsencode(mountpoint),
            FSTYPE.encode(),
            ctypes.c_ulong(flags),
            ",".join(data).encode(),
        )
        if done != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return fd
    except BaseException:
        os.close(fd)
        raise


def _mount_by_helper(mountpoint: str, options: MountOptions, fsname: str, max_read: int) -> int:
    """fusermount3 mounts for us, and sends the descriptor through a socket that it inherits."""
    helper = shutil.which("fusermount3")
    if helper is None:
        raise UserError(f"cannot mount at {mountpoint}: not root, and fusermount3 is not installed")
    escaped = fsname.replace("\\", "\\\\").replace(",", "\\,")
    words = ["default_permissions", "subtype=alluxiofuse", f"fsname={escaped}", *options.kernel]
    words.append(f"max_read={max_read}")
    words += ["ro"] * options.is_readonly + ["allow_other"] * options.is_allowed_for_others
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        ours.settimeout(_FUSERMOUNT_TIMEOUT_S)
        done = subprocess.Popen(
            [helper, "-o", ",".join(words), "--", mountpoint],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno()), "LC_ALL": "C"},
            stderr=subprocess.PIPE,
        )
        theirs.close()
        fds: Sequence[int] = ()
        with suppress(TimeoutError):
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        ours.close()
        _, error = done.communicate()
    if not fds:
        text = os.fsdecode(error).strip().splitlines()
        if options.is_allowed_for_others and any("allow_other" in line for line in text):
            raise UserError("for -o allow_other, user_allow_other must be set in /etc/fuse.conf")
        raise UserError(f"cannot mount at {mountpoint}: {text[-1] if text else 'fusermount3 refused it'}")
    os.set_inheritable(fds[0], False)
    return fds[0]
