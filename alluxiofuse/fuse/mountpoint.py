"""Directories to mount at, what is mounted where, and unmounting."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from alluxiofuse.errors import UserError

FSTYPE = "fuse.alluxiofuse"
MOUNTINFO = Path("/proc/self/mountinfo")
AnyPath = str | bytes | os.PathLike[str]
_DEAD_ERRNOS = (errno.ENOTCONN, errno.ECONNABORTED)
_FUSERMOUNT_TIMEOUT_S = 30.0


class InUseError(UserError):
    """Somebody has files open on the mount, or is in it."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo (proc_pid_mountinfo(5)), as far as we need it."""

    device: str
    """major:minor."""
    path: bytes
    """Where it is mounted."""
    fstype: str
    source: str
    options: str
    """Of the mount (rw, nosuid...) and, after a semicolon, of the superblock (user_id=...)."""

    @property
    def is_ours(self) -> bool:
        return self.fstype == FSTYPE


@dataclass(frozen=True, slots=True)
class Place:
    """A path below a mount of ours."""

    mount: Mount
    inside: bytes
    """From the mount's root, begins with a slash; b"/" is the mount's root itself."""


_OCTAL = re.compile(rb"\\([0-7]{3})")


def _decoded(field: bytes) -> bytes:
    """Spaces, tabs, newlines and backslashes arrive as \\ooo."""
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field)


def parse_mountinfo(text: bytes) -> list[Mount]:
    """In the order of the file: a later mount hides an earlier one at the same path."""
    mounts = []
    for line in text.splitlines():
        fields = line.split(b" ")
        try:
            dash = fields.index(b"-", 6)
            fstype, source, super_options = fields[dash + 1 : dash + 4]
        except ValueError:
            continue
        mounts.append(
            Mount(
                device=fields[2].decode("ascii", "replace"),
                path=_decoded(fields[4]),
                fstype=fstype.decode("ascii", "replace"),
                source=os.fsdecode(_decoded(source)),
                options=f"{os.fsdecode(fields[5])};{os.fsdecode(super_options)}",
            )
        )
    return mounts


def mounts() -> list[Mount]:
    return parse_mountinfo(MOUNTINFO.read_bytes())


def mount_at(path: AnyPath) -> Mount | None:
    """What is mounted exactly at `path` (absolute, no symlinks), the topmost."""
    wanted = os.fsencode(path)
    found = None
    for mount in mounts():
        if mount.path == wanted:
            found = mount
    return found


def find_mount(path: AnyPath) -> Place | None:
    """The mount of ours that `path` is on; None when it is on another filesystem. Symlinks are
    resolved (also on the mount, which therefore must answer); the path need not exist."""
    real = os.path.realpath(os.fsencode(path))
    best: Mount | None = None
    for mount in mounts():
        prefix = mount.path if mount.path == b"/" else mount.path + b"/"
        is_above = real == mount.path or real.startswith(prefix)
        if is_above and (best is None or len(mount.path) >= len(best.path)):
            best = mount
    if best is None or not best.is_ours:
        return None
    return Place(best, b"/" + real[len(best.path) :].lstrip(b"/"))


def prepare(path: AnyPath, *, is_nonempty_allowed: bool = False) -> list[str]:
    """Make sure that something can be mounted at `path`; before anything is started. UserError says
    what is in the way. A dead mount that a crashed daemon of ours left behind is cleared away.

    Returns what the user should be told, one line each."""
    shown = os.fsdecode(path)
    notes: list[str] = []
    try:
        info = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{shown} does not exist: create it first, for instance with mkdir") from None
    except OSError as exc:
        if exc.errno not in _DEAD_ERRNOS:
            raise UserError(f"cannot mount at {shown}: {exc.strerror}") from None
        notes.append(_clear_dead(path))
        return notes + prepare(path, is_nonempty_allowed=is_nonempty_allowed)
    if not stat.S_ISDIR(info.st_mode):
        raise UserError(f"{shown} is not a directory")
    mount = mount_at(os.path.realpath(os.fsencode(path)))
    if mount is not None and mount.is_ours:
        if _is_dead(path):
            notes.append(_clear_dead(path))
            return notes + prepare(path, is_nonempty_allowed=is_nonempty_allowed)
        raise UserError(
            f"{shown} is already an alluxiofuse mount of {mount.source}: unmount it first with "
            f"`alluxiofuse umount {shown}`"
        )
    if not is_nonempty_allowed and _has_entries(path):
        raise UserError(f"{shown} is not empty: choose an empty directory, or mount over it with -o nonempty")
    return notes


def _has_entries(path: AnyPath) -> bool:
    try:
        with os.scandir(path) as entries:
            return next(entries, None) is not None
    except OSError as exc:
        raise UserError(f"cannot mount at {os.fsdecode(path)}: {exc.strerror}") from None


def _is_dead(path: AnyPath) -> bool:
    """The kernel may still answer stat(2) for a daemon that has just died; statfs(2) it passes on."""
    try:
        os.statvfs(path)
    except OSError as exc:
        return exc.errno in _DEAD_ERRNOS
    return False


def _clear_dead(path: AnyPath) -> str:
    shown = os.fsdecode(path)
    mount = mount_at(_resolved(path))
    if mount is None or not mount.is_ours:
        kind = f"a dead mount ({mount.fstype})" if mount else "a dead mount"
        raise UserError(f"{shown} is {kind}: its daemon is gone; clear it with `fusermount3 -u {shown}`")
    umount(path, is_lazy=True)
    return f"{shown}: cleared away the mount that a crashed daemon had left behind"


def _resolved(path: AnyPath) -> bytes:
    """Absolute, without symlinks above the last component: what is mounted there may be dead, and
    must not be touched."""
    parent, name = os.path.split(os.path.abspath(os.fsencode(path)))
    return os.path.join(os.path.realpath(parent), name)


def umount(path: AnyPath, *, is_lazy: bool = False, is_forced: bool = False) -> None:
    """Unmount what is mounted at `path`; UserError in one line when it can't be done. Blocks until the
    filesystem has answered what the kernel still wants. Lazy: at once, even if it is in use. Forced
    (root only): requests that are waiting get an error, whether or not it can be unmounted then."""
    shown = os.fsdecode(path)
    target = os.fsdecode(_resolved(path))
    helper = shutil.which("fusermount3") or shutil.which("fusermount")
    flags = [*(["--lazy"] if is_lazy else []), *(["--force"] if is_forced else [])]
    command = ["umount", "--no-canonicalize", *flags, "--", target]
    if os.geteuid() != 0 and helper is not None:
        command = [helper, "-u", *(["-z"] if is_lazy else []), "--", target]
    command[0] = shutil.which(command[0], path=_system_path()) or command[0]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=_FUSERMOUNT_TIMEOUT_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise UserError(f"cannot unmount {shown}: {command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{shown} was not unmounted in {_FUSERMOUNT_TIMEOUT_S:.0f} s") from None
    if done.returncode == 0:
        return
    reason = os.fsdecode(done.stderr).strip().splitlines()
    text = reason[-1] if reason else f"exit code {done.returncode}"
    if "busy" in text.lower():
        raise InUseError(
            f"{shown} is in use: `fuser -vm {shown}` or `lsof +f -- {shown}` shows by whom; "
            f"`alluxiofuse umount --lazy {shown}` detaches it anyway"
        )
    raise UserError(f"cannot unmount {shown}: {text}")


def _system_path() -> str:
    """mount(8) starts helpers without PATH."""
    return os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
