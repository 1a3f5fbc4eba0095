"""The main job on a real tree: what is in the directory is on the mount, what is written through the
mount is in the directory as plain files, and what others do to the directory shows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import LocalDaemon, Site
from servers import wait_until
from trees import add_oddities, assert_same, copy_library, run

Start = Callable[..., LocalDaemon]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    top.mkdir()
    copy_library(top)
    add_oddities(top)
    return top


def wait_drained(site: Site) -> None:
    """Until the persist log is empty."""
    wait_until(lambda: site.report()["persist_pending_count"] == 0, "the persist log is empty")


def test_what_was_there_is_read_by_programs(local_daemon: Start, tree: Path, tmp_path: Path) -> None:
    site = local_daemon(tree)
    listed = [
        run("ls", "-lRa", "--time-style=full-iso", "--indicator-style=none", top)
        for top in (tree, site.mount)
    ]
    of_tree, of_mount = ([line.split() for line in text.splitlines()] for text in listed)
    # Kind and mode, owner, size of files, time and name are the same; link counts of directories need not be.
    assert len(of_tree) == len(of_mount) > 250
    assert {tuple(w[2:]) for w in of_tree if w and w[0][0] in "-l"} == {
        tuple(w[2:]) for w in of_mount if w and w[0][0] in "-l"
    }
    for path in sorted(tree.rglob("*.py"))[:20]:
        assert run("cat", site.mount / path.relative_to(tree)) == path.read_text()
    assert_same(tree, site.mount)
    run("cp", "-a", site.mount, tmp_path / "copied")
    assert_same(tree, tmp_path / "copied")
    run("tar", "--format=posix", "-cf", tmp_path / "out.tar", "-C", site.mount, ".")
    (tmp_path / "unpacked").mkdir()
    run("tar", "xpf", tmp_path / "out.tar", "-C", tmp_path / "unpacked")
    assert_same(tree, tmp_path / "unpacked")
    assert site.report()["persist_pending_count"] == 0, "reading changes nothing"


def test_what_is_written_is_there_as_plain_files(local_daemon: Start, tree: Path, tmp_path: Path) -> None:
    """The same commands on the mount and in a directory of a local disk: afterwards all three are equal."""
    site = local_daemon()
    twin = tmp_path / "twin"
    twin.mkdir()
    run("tar", "--format=posix", "-cf", tmp_path / "in.tar", "-C", tree, ".")
    script = f"""
        set -e
        cp -a '{tree}' copy
        mkdir unpacked; tar xpf '{tmp_path}/in.tar' -C unpacked
        for n in 1 2 3; do echo line $n >> log; done
        echo replaced > copy/json/scanner.py
        truncate -s 12345 copy/json/decoder.py
        dd if=/dev/zero of=copy/odd/large bs=1000 seek=3 count=2 conv=notrunc status=none
        mv copy/email elsewhere; mv elsewhere/mime copy/json/mime
        mv copy/asyncio/queues.py copy/asyncio/locks.py
        mv unpacked/json unpacked/json2; mkdir unpacked/json; echo new > unpacked/json/file
        rm -r unpacked/encodings copy/unittest
        rm copy/odd/empty; rmdir 'copy/odd/empty directory'
        ln -s ../log copy/odd/new_link; ln -sfn elsewhere 'copy/odd/directory link'
        chmod 640 log; chmod 2750 elsewhere
        touch -d '2001-02-03 04:05:06.789' log copy/json/__init__.py
        find . -exec touch -h -d '2020-01-01 00:00:00.5' '{{}}' +
    """
    run("bash", "-c", script, cwd=twin)
    run("bash", "-c", script, cwd=site.mount)
    assert_same(twin, site.mount)
    wait_drained(site)
    assert_same(twin, site.ufs_dir)
    site.restart()
    assert_same(twin, site.mount)
    run("rm", "-rf", *site.mount.iterdir())
    wait_drained(site)
    assert list(site.ufs_dir.iterdir()) == []


def test_what_others_do_in_the_directory_shows(local_daemon: Start, tree: Path) -> None:
    site = local_daemon()
    assert list(site.mount.iterdir()) == []

    def shows() -> bool:
        try:
            assert_same(site.ufs_dir, site.mount)
        except AssertionError as exc:
            print(exc)
            return False
        return True

    shutil.copytree(tree, site.ufs_dir / "in", symlinks=True)
    wait_until(shows, "what was copied in")
    (site.ufs_dir / "in/json/scanner.py").write_text("changed outside")
    os.chmod(site.ufs_dir / "in/json/decoder.py", 0o600)
    (site.ufs_dir / "in/odd/link").unlink()
    (site.ufs_dir / "in/odd/link").symlink_to("elsewhere")
    wait_until(shows, "what was changed")
    assert (site.mount / "in/json/scanner.py").read_text() == "changed outside"
    (site.ufs_dir / "in/email").rename(site.ufs_dir / "moved")
    shutil.rmtree(site.ufs_dir / "in/encodings")
    (site.ufs_dir / "in/json/scanner.py").unlink()
    wait_until(shows, "what was moved and removed")
    assert not (site.mount / "in/encodings").exists()
    shutil.rmtree(site.ufs_dir / "in")
    (site.ufs_dir / "in").write_text("a file in a directory's place")
    wait_until(shows, "a kind changed")
