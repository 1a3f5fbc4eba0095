"""What `local` does with names and descriptors of a directory it has opened: looking, listing,
attributes, removing. Plain system calls that raise OSError; no policy, no project errors."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import stat as stat_bits
import struct
import time
from contextlib import suppress
from dataclasses import replace

from alluxiofuse.ufs.base import TEMP_PREFIX, UfsAttrs, UfsEntry
from alluxiofuse.ufs.beneath import opened

RACY_NS = 20_000_000
"""More than a tick of any kernel's coarse clock (10 ms at HZ=100)."""
_FUTURE_NS = 1_000_000_000
_FINGERPRINT = struct.Struct("<QQqq")
_MAX_NS = (1 << 63) - 1


def version_of(seen: os.stat_result) -> bytes:
    """The fingerprint, see `local`."""
    mtime_ns, ctime_ns = clamp(seen.st_mtime_ns), clamp(seen.st_ctime_ns)
    return _FINGERPRINT.pack(seen.st_ino, seen.st_size, mtime_ns, ctime_ns)


def is_touched(old: bytes, new: bytes, mtime_ns: int) -> bool:
    """The same file of the same size, last written as before or at `mtime_ns`; its ctime may differ."""
    if len(old) != _FINGERPRINT.size or len(new) != _FINGERPRINT.size:
        return False
    *was, old_mtime_ns, _ = _FINGERPRINT.unpack(old)
    *now, new_mtime_ns, _ = _FINGERPRINT.unpack(new)
    return was == now and new_mtime_ns in (old_mtime_ns, clamp(mtime_ns))


def clamp(time_ns: int) -> int:
    """Into 64 bits: some filesystems hold years that nanoseconds since 1970 can't."""
    return max(-_MAX_NS, min(_MAX_NS, time_ns))


def is_racy(seen: os.stat_result, asked_at_ns: int) -> bool:
    """True when a change after this look could carry the same ctime. `asked_at_ns`: the clock from
    before the look. A ctime far in the future is another machine's clock, about which nothing is known."""
    return -_FUTURE_NS < asked_at_ns - seen.st_ctime_ns < RACY_NS


def look(at: int, name: bytes, path: bytes) -> tuple[UfsEntry, bool]:
    """(entry, is_racy) of `name` in the directory `at`, or of the open thing `at` itself for b""."""
    asked_at_ns = time.time_ns()
    seen = os.stat(name, dir_fd=at, follow_symlinks=False) if name else os.fstat(at)
    racy = is_racy(seen, asked_at_ns)
    if racy and stat_bits.S_ISDIR(seen.st_mode):
        return entry(at, name, path, seen, b""), False
    return entry(at, name, path, seen), racy


def scan(fd: int, path: bytes) -> tuple[list[UfsEntry], list[int]]:
    """Entries of an open directory in no order, and the indices of files too young to trust."""
    entries: list[UfsEntry] = []
    racy: list[int] = []
    prefix = path + b"/" if path else b""
    for item in os.listdir(fd):
        name = os.fsencode(item)
        if name.startswith(TEMP_PREFIX):
            continue
        try:
            found, is_young = look(fd, name, prefix + name)
        except FileNotFoundError:
            continue  # gone since it was listed
        if is_young:
            racy.append(len(entries))
        entries.append(found)
    return entries, racy


def wait_a_tick() -> None:
    time.sleep(RACY_NS / 1e9)


def settle(at: int, name: bytes, path: bytes) -> UfsEntry:
    """The second look, after `wait_a_tick`. Something that is being written all the time gets a
    fingerprint that no later look will ever repeat."""
    found, is_young = look(at, name, path)
    if not is_young:
        return found
    return replace(found, fingerprint=found.fingerprint + secrets.token_bytes(8))


def temp_name(name: bytes) -> bytes:
    """Where `name` is put together: always the same, so that the next put, or the removal of `name`,
    finds what a crash left there. Whoever writes a file holds its flock until it has its name: what
    nobody has locked is left over."""
    return TEMP_PREFIX + hashlib.blake2b(name, digest_size=12).hexdigest().encode()


def create_temp(parent: int, name: bytes) -> tuple[int, bytes]:
    """(descriptor, name) of an empty locked file to put `name` together in; a left-over one is taken
    away first. Another name where somebody is putting the same one right now."""
    temp = temp_name(name)
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(temp, flags, 0o600, dir_fd=parent)
        except FileExistsError:
            if not remove_left_over(parent, temp):
                temp = temp_name(name) + b"-" + secrets.token_hex(8).encode()
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                return fd, temp  # a filesystem without locks
        if os.fstat(fd).st_nlink:
            return fd, temp
        os.close(fd)  # taken for a left-over between the two calls


def remove_left_over(parent: int, temp: bytes) -> bool:
    """False: somebody is writing it. OSError."""
    try:
        fd = os.open(temp, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        with suppress(FileNotFoundError):
            os.unlink(temp, dir_fd=parent)  # a symlink is made in one step: it was left
        return True
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                return False
        unlink_same(parent, temp, os.fstat(fd))
        return True
    finally:
        os.close(fd)


def tidy(parent: int, name: bytes) -> None:
    """Take away what an interrupted put of `name` left. Its failure is nobody's trouble."""
    with suppress(OSError):
        remove_left_over(parent, temp_name(name))


def entry(at: int, name: bytes, path: bytes, seen: os.stat_result, version: bytes | None = None) -> UfsEntry:
    """`name` in the directory `at`, or `at` itself for b"" (only a symlink's target is read)."""
    mode = seen.st_mode
    return UfsEntry(
        path,
        mode,
        0 if stat_bits.S_ISDIR(mode) else seen.st_size,
        clamp(seen.st_mtime_ns),
        version_of(seen) if version is None else version,
        seen.st_uid,
        seen.st_gid,
        os.readlink(name, dir_fd=at) if stat_bits.S_ISLNK(mode) else b"",
        seen.st_rdev,
    )


def set_attrs(thing: int | bytes, attrs: UfsAttrs, *, is_symlink: bool) -> None:
    """`thing` is an open descriptor, or for an O_PATH one its /proc/self/fd link, which leads to the
    thing and no further. The owner goes first, because changing it clears the set-id bits."""
    try:
        os.chown(thing, attrs.uid, attrs.gid)
    except PermissionError:
        if os.geteuid() == 0:
            raise
    if not is_symlink:
        os.chmod(thing, stat_bits.S_IMODE(attrs.mode))
    os.utime(thing, ns=(attrs.mtime_ns, attrs.mtime_ns))


def read_range(fd: int, offset: int, length: int) -> bytes:
    if length <= 0:
        return b""
    data = os.pread(fd, length, offset)
    if len(data) == length or not data:
        return data
    parts = [data]
    done = len(data)
    while done < length and (data := os.pread(fd, length - done, offset + done)):
        parts.append(data)
        done += len(data)
    return b"".join(parts)


def unlink_same(parent: int, name: bytes, seen: os.stat_result) -> None:
    with suppress(FileNotFoundError):
        now = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if (now.st_dev, now.st_ino) == (seen.st_dev, seen.st_ino):
            os.unlink(name, dir_fd=parent)


def delete_one(parent: int, name: bytes) -> None:
    tidy(parent, name)
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        _delete_directory(parent, name)


def _delete_directory(parent: int, name: bytes) -> None:
    try:
        os.rmdir(name, dir_fd=parent)
    except NotADirectoryError:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM)) from None
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        with opened(os.open(name, flags, dir_fd=parent)) as fd:
            left = [os.fsencode(one) for one in os.listdir(fd)]
            if not all(one.startswith(TEMP_PREFIX) for one in left):
                raise
            for one in left:  # half-written files, which nobody sees
                os.unlink(one, dir_fd=fd)
        os.rmdir(name, dir_fd=parent)
