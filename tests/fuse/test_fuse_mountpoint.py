"""Checks of directories, and reading the mount table."""

from pathlib import Path

import pytest

from alluxiofuse.errors import UserError
from alluxiofuse.fuse import mountpoint
from alluxiofuse.fuse.mountpoint import find_mount, mount_at, parse_mountinfo, prepare, umount

TABLE = rb"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /mnt/a\040b rw,nosuid - fuse.alluxiofuse h:1/x\134y rw,user_id=0
31 30 0:41 / /mnt/a\040b/in rw master:3 propagate_from:2 - tmpfs tmpfs rw
32 22 0:42 / /mnt/a\040b rw - fuse.alluxiofuse h:2 rw,user_id=0
garbage
33 22 0:43 / / rw - fuse.sshfs x
"""


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mountinfo"
    path.write_bytes(TABLE)
    monkeypatch.setattr(mountpoint, "MOUNTINFO", path)


def test_lines_are_decoded() -> None:
    found = parse_mountinfo(TABLE)
    assert [mount.path for mount in found] == [b"/", b"/mnt/a b", b"/mnt/a b/in", b"/mnt/a b"]
    assert found[1].source == "h:1/x\\y"
    assert found[1].device == "0:40"
    assert found[1].is_ours
    assert not found[2].is_ours
    assert "user_id=0" in found[1].options


@pytest.mark.usefixtures("table")
def test_the_topmost_mount_counts() -> None:
    found = mount_at("/mnt/a b")
    assert found is not None
    assert found.source == "h:2"


@pytest.mark.usefixtures("table")
def test_a_path_below_a_mount_of_ours() -> None:
    place = find_mount("/mnt/a b/c/../d")
    assert place is not None
    assert (place.mount.source, place.inside) == ("h:2", b"/d")
    root = find_mount(b"/mnt/a b/")
    assert root is not None
    assert root.inside == b"/"
    assert find_mount("/mnt/a bc") is None
    assert find_mount("/mnt/a b/in/x") is None  # another filesystem is mounted there
    assert find_mount("/etc") is None


def test_an_empty_directory_will_do(tmp_path: Path) -> None:
    assert prepare(str(tmp_path)) == []


def test_what_is_in_the_way_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        prepare(str(tmp_path / "no"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a directory"):
        prepare(str(tmp_path / "file"))
    with pytest.raises(UserError, match="not empty"):
        prepare(str(tmp_path))
    assert prepare(str(tmp_path), is_nonempty_allowed=True) == []


def test_unmounting_what_is_not_mounted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot unmount"):
        umount(tmp_path.as_posix())
