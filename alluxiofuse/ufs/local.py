"""A directory of this machine, or an NFS mount, as an under storage.

Nothing outside the directory is ever touched: every path is resolved by the kernel without following
symlinks (`beneath`), and symlinks are shown as what they are.

Fingerprints. A file's is (inode, size, mtime, ctime). The ctime is in it because a program can write
bytes and set the mtime back (rsync, cp -p, touch -r), but not the ctime; the price is that a chmod
from outside looks like a change and costs a fetch. Our own `put`, `rename` and `set_attrs` move the
ctime too: the entry they return holds the new fingerprint, which the caller stores.

A timestamp says nothing about changes within its own clock tick. So where a file's ctime is younger
than `RACY_NS`, `stat` and `list` wait that long, once, and look again; a change after that has a
later ctime. A directory that young gets the fingerprint b"" (unknown) without waiting. This trusts
the clock of an NFS server to agree with ours within that margin, or to have fine timestamps.

A put is a temporary file in the target's directory, renamed over it. One that a crash left behind is
hidden; it goes with the next put or removal of the same name (`tidy`), or with its directory. It may be
deleted by hand at any time.

Identity. A directory is told from another one under the same path by its filesystem's id (statfs) and
its inode. The master keeps what it saw first (option `identity`, which is not for users but for
`identity=new`). UfsUnavailableError, for every call, where it is another one: the filesystem's id and
the inode both differ, or the id of a filesystem whose ids are lasting, or the inode and the directory
is empty. So the empty mount point of a disk that is not mounted never looks like a store in which
everything was deleted.
"""

from __future__ import annotations

import errno
import os
import stat as stat_bits
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import attrgetter

from alluxiofuse.errors import (
    UfsChangedError,
    UfsError,
    UfsExistsError,
    UfsNotFoundError,
    UfsPermissionError,
    UfsUnavailableError,
)
from alluxiofuse.ufs.base import (
    TEMP_PREFIX,
    Buffer,
    Capabilities,
    ListPage,
    UfsAttrs,
    UfsEntry,
    UnderStorage,
    stopping,
)
from alluxiofuse.ufs.beneath import O_DIR, O_LOOK, open_beneath, opened
from alluxiofuse.ufs.file_copy import copy_range
from alluxiofuse.ufs.local_files import (
    clamp,
    create_temp,
    delete_one,
    entry,
    is_touched,
    look,
    read_range,
    remove_left_over,
    scan,
    set_attrs,
    settle,
    temp_name,
    tidy,
    unlink_same,
    version_of,
    wait_a_tick,
)
from alluxiofuse.ufs.local_place import is_other_place, place_identity
from alluxiofuse.ufs.paths import check_new_path, check_path, show

OPTIONS = {
    "fsync": "true or false: a change is on the medium before it counts as done; default true",
    "identity": "new: the directory that is there now is the right one, though it is not the one from before",
}
_NOT_FOUND = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
_UNAVAILABLE = {
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EINTR,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENODEV,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
}


class LocalUnderStorage(UnderStorage):
    """Constant after construction, but for `_identity` (written once) and `_good`."""

    scheme = "file"
    capabilities = Capabilities(
        has_directories=True,
        has_posix_attrs=True,
        has_symlinks=True,
        has_atomic_rename=True,
        has_strong_versions=True,
        default_sync_interval_s=1.0,
        max_parallel_reads=4,
        preferred_read_bytes=8 << 20,
    )

    def __init__(self, directory: str | bytes, *, is_synced: bool = True, identity: str = "") -> None:
        """Touches nothing yet. `is_synced`: a change is on the medium (fsync of file and directory)
        before the call returns; without, a power failure may undo the last ones. `identity`: what
        `identity()` said of the right directory; "": that of the one that is there first."""
        self._root = os.path.abspath(os.fsencode(directory))
        self._is_synced = is_synced
        self._identity = identity
        self._good = ""
        """That of the directory that was last found to be the right one."""
        self.uri = "file://" + self._root.decode("utf-8", "backslashreplace")

    def check(self) -> None:
        try:
            if not os.path.lexists(self._root):
                os.mkdir(self._root, 0o755)
            with self._at(b""), self._open_root() as root, opened(self._open_list(root, b"")):
                return
        except FileNotFoundError:
            parent = show(os.path.dirname(self._root))
            raise UfsNotFoundError(f"{self.uri}: neither it nor {parent} exists") from None
        except OSError as error:
            raise self._error(error, b"") from None

    def identity(self) -> str:
        with self._at(b""), self._open_root() as root:
            return place_identity(root)

    def tidy(self, path: bytes) -> None:
        check_path(path)
        with suppress(UfsNotFoundError), self._at(path), self._open_parent(path, is_made=False) as parent:
            tidy(parent, path.rpartition(b"/")[2])

    def close(self) -> None:
        """Nothing is held open between calls."""

    def stat(self, path: bytes) -> UfsEntry:
        check_path(path)
        if path.rpartition(b"/")[2].startswith(TEMP_PREFIX):
            raise UfsNotFoundError(f"{self._show(path)} is a half-written file")
        with self._at(path), self._open_root() as root:
            with opened(open_beneath(root, path or b".", O_LOOK)) as fd:
                found, is_racy = look(fd, b"", path)
            if not is_racy:
                return found
            wait_a_tick()
            with opened(open_beneath(root, path, O_LOOK)) as fd:
                return settle(fd, b"", path)

    def list(self, path: bytes, token: str | None = None, limit: int = 1000) -> ListPage:
        """All in one page whatever `limit`: the kernel gives names unsorted, and 10,000 with
        attributes take a few tens of milliseconds."""
        check_path(path)
        if token is not None:
            return ListPage([], None)
        with self._at(path), self._open_root() as root, opened(self._open_list(root, path)) as fd:
            entries, racy = scan(fd, path)
            if racy:
                wait_a_tick()
                for index in racy:
                    name = entries[index].path.rpartition(b"/")[2]
                    with suppress(FileNotFoundError):
                        entries[index] = settle(fd, name, entries[index].path)
        entries.sort(key=attrgetter("path"))
        return ListPage(entries, None)

    def read(self, path: bytes, offset: int, length: int, fingerprint: bytes | None = None) -> Buffer:
        check_path(path)
        with self._at(path), self._open_root() as root:
            # O_NONBLOCK: a FIFO must not hang us.
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            with opened(open_beneath(root, path or b".", flags)) as fd:
                before = self._expect(path, fd, fingerprint)
                data = read_range(fd, offset, min(length, before.st_size - offset))
                if fingerprint is not None:
                    self._expect(path, fd, fingerprint)
                    if len(data) < min(length, before.st_size - offset):
                        raise UfsUnavailableError(f"{self._show(path)}: short read")
                return data

    def put(
        self,
        path: bytes,
        fd: int,
        size: int,
        attrs: UfsAttrs,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> UfsEntry:
        check_new_path(path)
        go_on = stopping(is_cancelled, self._show(path))
        name = path.rpartition(b"/")[2]
        with self._making(path), self._open_parent(path) as parent:
            made, temp = create_temp(parent, name)
            with opened(made) as target:
                try:
                    copy_range(fd, target, size, go_on)
                    set_attrs(target, attrs, is_symlink=False)
                    if self._is_synced:
                        os.fsync(target)
                    before = os.fstat(target)
                    go_on()
                    os.rename(temp, name, src_dir_fd=parent, dst_dir_fd=parent)
                except BaseException:
                    with suppress(OSError):
                        os.unlink(temp, dir_fd=parent)
                    raise
                after = os.fstat(target)
            self._sync(parent)
            # Whoever wrote into it between the two looks gets noticed at the next sync: the older
            # fingerprint is then the one to keep.
            is_ours = (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
            return entry(parent, b"", path, after if is_ours else before)

    def mkdir(self, path: bytes, attrs: UfsAttrs) -> UfsEntry:
        """A directory that is there keeps its attributes."""
        if not path:
            return self.stat(path)
        check_new_path(path)
        name = path.rpartition(b"/")[2]
        with self._making(path), self._open_parent(path) as parent:
            try:
                os.mkdir(name, 0o700, dir_fd=parent)
            except FileExistsError:
                if not stat_bits.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                    raise
            else:
                self._set(parent, name, attrs)
                self._sync(parent)
            return self._look(parent, name, path)

    def symlink(self, path: bytes, target: bytes, attrs: UfsAttrs) -> UfsEntry:
        """Replaces a file or symlink, like `put`."""
        check_new_path(path)
        name = path.rpartition(b"/")[2]
        with self._making(path), self._open_parent(path) as parent:
            temp = temp_name(name)
            if not remove_left_over(parent, temp):
                raise UfsUnavailableError(f"{self._show(path)} is being written by somebody else")
            os.symlink(target, temp, dir_fd=parent)
            try:
                self._set(parent, temp, attrs)
                os.rename(temp, name, src_dir_fd=parent, dst_dir_fd=parent)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temp, dir_fd=parent)
                raise
            self._sync(parent)
            return self._look(parent, name, path)

    def set_attrs(self, path: bytes, attrs: UfsAttrs) -> UfsEntry:
        check_path(path)
        with self._at(path), self._open_root() as root:
            self._set(root, path or b".", attrs)
            return self._look(root, path, path)

    def is_touched(self, old: bytes, new: bytes, mtime_ns: int) -> bool:
        return is_touched(old, new, mtime_ns)

    def rename(self, source: bytes, target: bytes) -> UfsEntry:
        check_new_path(source)
        check_new_path(target)
        old, new = source.rpartition(b"/")[2], target.rpartition(b"/")[2]
        with self._at(source), self._open_parent(source, is_made=False) as old_parent:
            moved = os.stat(old, dir_fd=old_parent, follow_symlinks=False)
            with self._making(target), self._open_parent(target) as new_parent:
                with self._at(source):
                    self._move(old_parent, old, new_parent, new)
                if source != target and moved.st_nlink > 1 and not stat_bits.S_ISDIR(moved.st_mode):
                    # rename(2) of two links to one file does nothing, and leaves the source.
                    unlink_same(old_parent, old, moved)
                tidy(old_parent, old)
                self._sync(new_parent)
                self._sync(old_parent)
                return self._look(new_parent, new, target)

    def copy(self, source: bytes, target: bytes) -> UfsEntry:
        """The kernel copies (a reflink where the filesystem can)."""
        check_path(source)
        with self._at(source), self._open_root() as root:
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            with opened(open_beneath(root, source or b".", flags)) as fd:
                seen = self._expect(source, fd, None)
                mode = stat_bits.S_IMODE(seen.st_mode)
                attrs = UfsAttrs(mode, seen.st_uid, seen.st_gid, clamp(seen.st_mtime_ns))
                return self.put(target, fd, seen.st_size, attrs)

    def delete(self, path: bytes) -> None:
        self.delete_many([path])

    def delete_many(self, paths: Sequence[bytes]) -> None:
        """One fsync for all names in a row that share a directory."""
        for parent_path, names in _by_parent(paths):
            try:
                with self._at(parent_path), self._open_parent(parent_path + b"/x", is_made=False) as parent:
                    for name in names:
                        with self._at(b"/".join(filter(None, (parent_path, name)))):
                            delete_one(parent, name)
                    self._sync(parent)
            except UfsNotFoundError:
                continue

    # --- helpers ---------------------------------------------------------------------------------

    def _show(self, path: bytes) -> str:
        return f"{self.uri}/{show(path)}" if path else self.uri

    @contextmanager
    def _at(self, path: bytes) -> Iterator[None]:
        """Turns an OSError inside into the UfsError that belongs to it."""
        try:
            yield
        except OSError as error:
            raise self._error(error, path) from None

    @contextmanager
    def _making(self, path: bytes) -> Iterator[None]:
        """As `_at`, around what makes a new name: nothing is "not found" then. A parent is no
        directory, or it was removed under our hands."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOENT:
                text = f"{self._show(path)}: its directory was removed meanwhile"
                raise UfsUnavailableError(text) from None
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                text = f"{self._show(path)}: something above it is not a directory"
                raise UfsError(text, errno=errno.ENOTDIR) from None
            raise self._error(error, path) from None

    def _error(self, error: OSError, path: bytes) -> UfsError:
        code = error.errno or errno.EIO
        text = f"{self._show(path)}: {os.strerror(code)}"
        if code in _NOT_FOUND:
            return UfsNotFoundError(text)
        if code == errno.EEXIST:
            return UfsExistsError(text)
        if code in (errno.EACCES, errno.EPERM):
            return UfsPermissionError(text, errno=code)
        if code in _UNAVAILABLE:
            return UfsUnavailableError(text)
        return UfsError(text, errno=code)

    @contextmanager
    def _open_root(self) -> Iterator[int]:
        """Opened anew for each call, so that a directory replaced or mounted later is seen; a
        missing one is never taken for an empty one."""
        try:
            fd = os.open(self._root, O_DIR)
        except FileNotFoundError:
            raise UfsUnavailableError(f"{self.uri}: the directory is gone") from None
        except NotADirectoryError:
            raise UfsError(f"{self.uri} is not a directory", errno=errno.ENOTDIR) from None
        try:
            self._check_identity(fd)
            yield fd
        finally:
            os.close(fd)

    def _check_identity(self, root: int) -> None:
        found = place_identity(root)
        if found == self._good:
            return
        if not self._identity:
            self._identity = found
        elif is_other_place(root, self._identity, found):
            raise UfsUnavailableError(
                f"{self.uri}: another or an empty directory is there now; is its disk mounted? "
                "(if it is the right one, give the option identity=new once)"
            )
        self._good = found

    def _open_list(self, root: int, path: bytes) -> int:
        return open_beneath(root, path or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    @contextmanager
    def _open_parent(self, path: bytes, *, is_made: bool = True) -> Iterator[int]:
        """The directory that holds `path`; made with its parents when missing and `is_made`."""
        parent = path.rpartition(b"/")[0]
        with self._open_root() as root:
            if not parent:
                yield root
                return
            try:
                fd = open_beneath(root, parent, O_DIR)
            except OSError as error:
                if not is_made or error.errno != errno.ENOENT:
                    raise
                fd = self._make_dirs(root, parent)
            with opened(fd):
                yield fd

    def _make_dirs(self, root: int, path: bytes) -> int:
        here = os.dup(root)
        for name in path.split(b"/"):
            with opened(here):
                with suppress(FileExistsError):
                    os.mkdir(name, 0o755, dir_fd=here)
                    self._sync(here)
                here = os.open(name, O_DIR | os.O_NOFOLLOW, dir_fd=here)
        return here

    def _look(self, at: int, name: bytes, path: bytes) -> UfsEntry:
        """What our own call has just made or changed: young, but only by us."""
        with opened(open_beneath(at, name or b".", O_LOOK)) as fd:
            return look(fd, b"", path)[0]

    def _expect(self, path: bytes, fd: int, fingerprint: bytes | None) -> os.stat_result:
        """fstat of an open regular file; UfsChangedError when it is another version."""
        seen = os.fstat(fd)
        if fingerprint is not None and version_of(seen) != fingerprint:
            raise UfsChangedError(f"{self._show(path)} was changed outside")
        if not stat_bits.S_ISREG(seen.st_mode):
            code = errno.EISDIR if stat_bits.S_ISDIR(seen.st_mode) else errno.EINVAL
            raise UfsError(f"{self._show(path)} is no regular file", errno=code)
        return seen

    def _move(self, old_parent: int, old: bytes, new_parent: int, new: bytes) -> None:
        try:
            os.rename(old, new, src_dir_fd=old_parent, dst_dir_fd=new_parent)
        except FileNotFoundError:
            os.stat(old, dir_fd=old_parent, follow_symlinks=False)  # raises: it is the source that is gone
            text = f"{self.uri}: the directory of {show(new)} was removed meanwhile"
            raise UfsUnavailableError(text) from None
        except NotADirectoryError:
            text = f"{self.uri}: {show(new)} is a file where a directory is to be put"
            raise UfsError(text, errno=errno.ENOTDIR) from None

    def _set(self, at: int, name: bytes, attrs: UfsAttrs) -> None:
        """By a descriptor of the thing itself, so that a symlink swapped in is never followed."""
        with opened(open_beneath(at, name, O_LOOK)) as fd:
            is_symlink = stat_bits.S_ISLNK(os.fstat(fd).st_mode)
            set_attrs(f"/proc/self/fd/{fd}".encode(), attrs, is_symlink=is_symlink)

    def _sync(self, directory: int) -> None:
        """fsync of a directory known by an O_PATH descriptor; one we may not read is left alone."""
        if not self._is_synced:
            return
        with suppress(PermissionError):
            fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
            with opened(fd):
                try:
                    os.fsync(fd)
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some can't, e.g. CIFS
                        raise


def _by_parent(paths: Sequence[bytes]) -> Iterator[tuple[bytes, list[bytes]]]:
    """Runs of names in the order given, each run of one directory."""
    parent: bytes | None = None
    names: list[bytes] = []
    for path in paths:
        check_path(path)
        if not path:
            raise UfsError("the mounted place itself can't be deleted", errno=errno.EBUSY)
        above, _, name = path.rpartition(b"/")
        if above != parent and names:
            yield parent or b"", names
            names = []
        parent = above
        names.append(name)
    if names:
        yield parent or b"", names
