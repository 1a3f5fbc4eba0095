"""Attributes, owners, extended attributes and filesystem numbers on a real mount."""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from daemons import LocalDaemon

NANO = 1_000_000_000


def raises(code: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda exc: exc.errno == code)


def as_user(uid: int, code: str, *arguments: str) -> int:
    """Exit code of Python code run as a user without privileges."""
    script = f"import os, sys, stat\nos.setgroups([]); os.setgid({uid}); os.setuid({uid})\n{code}"
    return subprocess.run([sys.executable, "-c", script, *arguments], check=False).returncode


@pytest.fixture
def open_here(shared_local: LocalDaemon, here: Path) -> Path:
    """`here`, which other users can reach: the site's own directory is private."""
    shared_local.base.chmod(0o711)
    return here


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changing users needs root")


@pytest.mark.parametrize("at_s", [-(1 << 31), -86400 * 365, -1, 0, 1, 1 << 31, 1 << 33])
def test_times_of_any_age(here: Path, at_s: int) -> None:
    path = here / "file"
    path.touch()
    os.utime(path, ns=(at_s * NANO + 1, at_s * NANO + 999_999_999))
    info = path.stat()
    assert (info.st_atime_ns, info.st_mtime_ns) == (at_s * NANO + 1, at_s * NANO + 999_999_999)


def test_times_of_directories_and_links(here: Path) -> None:
    (here / "link").symlink_to("x")
    os.utime(here, ns=(5 * NANO, 7 * NANO))
    os.utime(here / "link", ns=(1 * NANO, 2 * NANO), follow_symlinks=False)
    assert here.stat().st_mtime_ns == 7 * NANO
    assert os.lstat(here / "link").st_mtime_ns == 2 * NANO


def test_writing_moves_the_times(here: Path) -> None:
    path = here / "file"
    path.write_text("x")
    os.utime(path, ns=(0, 0))
    before = path.stat()
    with path.open("a") as file:
        file.write("y")
    after = path.stat()
    assert after.st_mtime_ns > before.st_mtime_ns
    assert after.st_ctime_ns >= before.st_ctime_ns
    assert abs(after.st_mtime - time.time()) < 60
    os.utime(here, ns=(0, 0))
    (here / "other").touch()
    assert here.stat().st_mtime_ns > 0


def test_times_set_while_it_is_written_stay(here: Path) -> None:
    """What cp -p, tar and rsync do: write, set the times, close."""
    path = here / "file"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b"content")
    os.utime(descriptor, ns=(11 * NANO, 12 * NANO))
    os.close(descriptor)
    assert path.stat().st_mtime_ns == 12 * NANO
    assert path.read_bytes() == b"content"
    assert path.stat().st_mtime_ns == 12 * NANO


@pytest.mark.parametrize("mode", [0o000, 0o644, 0o755, 0o4755, 0o2755, 0o1777, 0o7777])
def test_chmod(here: Path, mode: int) -> None:
    (here / "file").touch()
    (here / "dir").mkdir()
    os.chmod(here / "file", mode)
    os.chmod(here / "dir", mode)
    assert stat.S_IMODE((here / "file").stat().st_mode) == mode
    assert stat.S_IMODE((here / "dir").stat().st_mode) == mode


def test_umask_applies(here: Path) -> None:
    old = os.umask(0o027)
    try:
        os.close(os.open(here / "file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(here / "dir", 0o777)
    finally:
        os.umask(old)
    assert stat.S_IMODE((here / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((here / "dir").stat().st_mode) == 0o750


@needs_root
def test_chown(here: Path) -> None:
    path = here / "file"
    path.touch()
    os.chown(path, 1234, 5678)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 5678)
    os.chown(path, -1, 99)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 99)
    (here / "link").symlink_to("file")
    os.lchown(here / "link", 7, 8)
    assert (os.lstat(here / "link").st_uid, path.stat().st_uid) == (7, 1234)


@needs_root
def test_permissions_are_enforced(open_here: Path) -> None:
    (open_here / "secret").write_text("x")
    (open_here / "secret").chmod(0o600)
    (open_here / "open").write_text("x")
    (open_here / "open").chmod(0o644)
    open_here.chmod(0o755)
    read = "open(sys.argv[1]).read()"
    assert as_user(1000, read, str(open_here / "open")) == 0
    assert as_user(1000, read, str(open_here / "secret")) == 1
    assert as_user(1000, "open(sys.argv[1], 'w')", str(open_here / "open")) == 1
    assert as_user(1000, "os.mkdir(sys.argv[1])", str(open_here / "new")) == 1
    open_here.chmod(0o777)
    assert as_user(1000, "open(sys.argv[1], 'x').write('mine')", str(open_here / "new")) == 0
    assert ((open_here / "new").stat().st_uid, (open_here / "new").stat().st_gid) == (1000, 1000)
    open_here.chmod(0o1777)
    assert as_user(1001, "os.unlink(sys.argv[1])", str(open_here / "new")) == 1  # sticky
    assert as_user(1000, "os.unlink(sys.argv[1])", str(open_here / "new")) == 0


@needs_root
def test_writing_takes_away_setuid(open_here: Path) -> None:
    path = open_here / "file"
    path.write_text("x")
    path.chmod(0o6777)
    open_here.chmod(0o777)
    assert as_user(1000, "f = open(sys.argv[1], 'a'); f.write('y'); f.close()", str(path)) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o777


@needs_root
def test_a_setgid_directory_gives_its_group(here: Path) -> None:
    (here / "shared").mkdir()
    os.chown(here / "shared", 0, 4321)
    (here / "shared").chmod(0o2775)
    (here / "shared" / "file").touch()
    (here / "shared" / "sub").mkdir()
    assert (here / "shared" / "file").stat().st_gid == 4321
    assert (here / "shared" / "sub").stat().st_gid == 4321
    assert (here / "shared" / "sub").stat().st_mode & stat.S_ISGID


def test_extended_attributes(here: Path) -> None:
    path = here / "file"
    path.write_text("x")
    assert os.listxattr(path) == []
    with raises(errno.ENODATA):
        os.getxattr(path, "user.a")
    os.setxattr(path, "user.a", b"one")
    os.setxattr(path, "user.b", b"")
    os.setxattr(path, "user.big", b"v" * 60_000)
    os.setxattr(path, b"user.\xff", b"\0bytes\0")
    assert set(map(os.fsencode, os.listxattr(path))) == {b"user.a", b"user.b", b"user.big", b"user.\xff"}
    assert os.getxattr(path, "user.a") == b"one"
    assert os.getxattr(path, "user.b") == b""
    assert os.getxattr(path, "user.big") == b"v" * 60_000
    assert os.getxattr(path, b"user.\xff") == b"\0bytes\0"
    with raises(errno.EEXIST):
        os.setxattr(path, "user.a", b"", os.XATTR_CREATE)
    with raises(errno.ENODATA):
        os.setxattr(path, "user.c", b"", os.XATTR_REPLACE)
    os.setxattr(path, "user.a", b"two", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.a") == b"two"
    os.removexattr(path, "user.a")
    with raises(errno.ENODATA):
        os.removexattr(path, "user.a")
    with raises(errno.ENODATA):
        os.getxattr(path, "user.a")
    path.write_text("changed")
    assert os.getxattr(path, "user.big") == b"v" * 60_000


def test_namespaces_of_extended_attributes(open_here: Path) -> None:
    path = open_here / "file"
    path.touch()
    with raises(errno.EOPNOTSUPP):
        os.setxattr(path, "nonsense.x", b"x")
    acl = struct.pack("<IHHIHHIHHI", 2, 1, 6, 0xFFFFFFFF, 4, 4, 0xFFFFFFFF, 32, 4, 0xFFFFFFFF)
    with raises(errno.EOPNOTSUPP):
        os.setxattr(path, "system.posix_acl_access", acl)
    with raises(errno.EOPNOTSUPP):
        os.getxattr(path, "system.posix_acl_access")
    os.setxattr(open_here, "user.on-directory", b"x")
    assert os.listxattr(open_here) == ["user.on-directory"]
    if os.geteuid() == 0:
        os.setxattr(path, "trusted.x", b"root's")
        os.setxattr(path, "security.x", b"y")
        assert set(os.listxattr(path)) == {"trusted.x", "security.x"}
        open_here.chmod(0o755)
        assert as_user(1000, "assert 'trusted.x' not in os.listxattr(sys.argv[1])", str(path)) == 0


def test_numbers_for_df(shared_local: LocalDaemon) -> None:
    info = os.statvfs(shared_local.mount)
    assert info.f_blocks * info.f_frsize >= 1 << 30
    assert 0 < info.f_bavail <= info.f_bfree <= info.f_blocks
    assert info.f_files > info.f_ffree > 0
    assert info.f_namemax == 255
    out = subprocess.run(
        ["df", "-h", str(shared_local.mount)], check=True, capture_output=True, text=True
    ).stdout
    assert out.splitlines()[1].endswith(str(shared_local.mount))


def test_it_is_a_mount_of_our_type(shared_local: LocalDaemon) -> None:
    out = subprocess.run(
        ["findmnt", "-no", "FSTYPE,OPTIONS", "--mountpoint", str(shared_local.mount)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert out.startswith("fuse.alluxiofuse ")
    assert "default_permissions" in out


def test_size_counts_blocks(here: Path) -> None:
    (here / "file").write_bytes(b"x" * 10_000)
    assert (here / "file").stat().st_blocks * 512 >= 10_000
    out = subprocess.run(["du", "-k", str(here / "file")], check=True, capture_output=True, text=True).stdout
    assert int(out.split()[0]) >= 9


def test_inode_numbers_stay(here: Path) -> None:
    path = here / "file"
    path.write_text("x")
    ino = path.stat().st_ino
    path.write_text("other content")
    path.rename(here / "moved")
    assert (here / "moved").stat().st_ino == ino
    with os.scandir(here) as entries:
        assert [entry.inode() for entry in entries] == [ino]


def test_no_selinux_labels_is_said_for_the_whole_filesystem(here: Path) -> None:
    """`ls -l` asks for a label of each file until it hears ENOTSUP."""
    (here / "f").touch()
    with pytest.raises(OSError) as caught:
        os.getxattr(here / "f", "security.selinux")
    assert caught.value.errno == errno.ENOTSUP
