"""The command: what it refuses, what it says, states of masters and workers apart, Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import damages_log as of_log
import damages_slabs as of_slabs
from daemons import PROGRAM, Cluster, LocalDaemon, clean_environment, run_cli
from fsck_tree import DIRTY_FILES, build, expected, tree_of
from fsck_world import check_clean, damage_of, fsck, index_of, repair, store_of

from alluxiofuse.ids import ROOT_INO
from alluxiofuse.master.format import ensure_formatted
from alluxiofuse.master.mounts import MountTable
from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.store import Store, u64
from alluxiofuse.ufs.registry import open_ufs

Start = Callable[..., LocalDaemon]
NO_UPLOADS = {"ALLUXIOFUSE_MASTER_PERSIST_DELAY_S": "1h"}


def refused(*arguments: str | Path) -> str:
    done = run_cli("fsck", *arguments, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    return done.stderr


def test_what_is_refused(local_daemon: Start, tmp_path: Path) -> None:
    site = local_daemon()
    assert "is in use by another alluxiofuse" in refused("--state", site.state)
    assert "no state directory" in refused()
    assert "is no state directory" in refused("--state", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").write_text("x")
    assert "is not a state directory" in refused("--state", tmp_path / "foreign")
    assert os.listdir(tmp_path / "foreign") == ["file"]


def test_a_newer_format_is_refused_or_left(local_daemon: Start) -> None:
    site = local_daemon()
    assert site.stop() == 0
    with store_of(site) as store:
        tx = store.transaction()
        tx.put("meta", b"format", u64(99))
        tx.commit()
    for arguments in ((), ("--repair",)):
        found = fsck(site.state, arguments=arguments)
        assert "newer version" in found["findings"][0]["text"]
        assert found["exit_code"] == 4


def test_text_and_what_is_not_ours(local_daemon: Start) -> None:
    site = local_daemon(env=NO_UPLOADS)
    build(site)
    site.kill()
    note = site.base / "ssd" / "slabs" / "00" / "README"
    note.write_text("a person's")
    done = run_cli("fsck", "--state", site.state)
    assert done.stdout.splitlines()[-1] == "clean"
    assert f"note: {note} is not ours: it is left alone\n" in done.stdout
    of_log.entry_missing(site)
    of_slabs.dirty_slab_missing(site)
    done = run_cli("fsck", "--state", site.state, check=False)
    assert done.returncode == 4
    assert "problem: /dirty.bin is not in the under storage, and would never get there\n" in done.stdout
    assert "lost: /dirty.bin: 3145733 bytes that are not in the under storage" in done.stdout
    assert done.stdout.splitlines()[-1] == "2 found: --repair undoes what can be undone"
    done = run_cli("fsck", "--state", site.state, "--repair", check=False)
    assert done.returncode == 4
    assert done.stdout.splitlines()[-1] == "1 mended, 1 left"
    site.daemon.start()
    assert note.read_text() == "a person's"
    (site.mount / "dirty.bin").write_bytes(b"written anew")
    assert site.stop() == 0
    check_clean(site.state)


def test_an_index_that_is_gone(local_daemon: Start) -> None:
    """What only the worker had is found again in its tier directory."""
    site = local_daemon(env=NO_UPLOADS)
    build(site)
    site.kill()
    shutil.rmtree(site.state / "worker" / "index")
    tier = ("--tier", f"SSD:{site.base / 'ssd'}:1GB")
    found = fsck(site.state)
    assert "index-missing" in found["left"]
    assert "index-missing" in fsck(site.state, arguments=("--repair",))["left"], "no tier was named"
    assert not (site.state / "worker" / "index").exists()
    mended = repair(site.state, arguments=tier)
    assert mended["mended"]["slab-unindexed"] == len(DIRTY_FILES)
    assert tree_of(site) == expected()
    site.daemon.start()
    for name, data in DIRTY_FILES.items():
        assert (site.mount / name).read_bytes() == data


def test_a_worker_of_another_master(local_daemon: Start) -> None:
    """Nothing of it is compared, dropped or given away."""
    site, other = local_daemon(env=NO_UPLOADS), local_daemon(env=NO_UPLOADS)
    build(site)
    (other.mount / "file").write_bytes(b"other")
    site.kill()
    other.kill()
    shutil.rmtree(site.state / "master")
    shutil.copytree(other.state / "master", site.state / "master")
    slabs = sorted((site.base / "ssd" / "slabs").rglob("0*"))
    found = fsck(site.state, arguments=("--repair",))
    assert found["left"] == {"state-foreign": 1}
    assert found["unchecked"]["files"] == 1
    assert sorted((site.base / "ssd" / "slabs").rglob("0*")) == slabs
    with index_of(site) as index:
        assert sum(record.state == 1 for _, record in index.records()) == len(DIRTY_FILES)


def test_daemons_apart(cluster: Callable[..., Cluster]) -> None:
    site = cluster(workers=2, env=NO_UPLOADS)
    site.expects_clean_end = False
    (site.mount / "file").write_bytes(b"x" * 5000)
    for daemon in reversed(site.daemons):
        daemon.kill()
    subprocess.run(["umount", "--lazy", str(site.mount)], check=True)
    master, workers = site.base / "master", [site.base / "worker1", site.base / "worker2"]
    found = check_clean(master)
    assert found["unchecked"] == {"files": 1, "bytes": 5000}
    for worker in workers:
        check_clean(worker)
    found = check_clean(master, *workers)
    assert found["unchecked"] == {"files": 0, "bytes": 0}
    slabs = [
        slab
        for number in (1, 2)
        for slab in (site.base / f"ssd{number}" / "slabs").rglob("0*")
        if slab.is_file() and slab.stat().st_size == 5000
    ]
    assert len(slabs) == 1
    home = workers[int(slabs[0].parts[-4][-1]) - 1]
    os.truncate(slabs[0], 100)
    assert fsck(home)["left"] == {"bytes-lost": 1}
    slabs[0].unlink()
    found = fsck(master, home)
    assert damage_of(found)[0]["text"].startswith("/file: 5000 bytes")
    assert fsck(home)["left"] == {"file-lost": 1}


def make_state(directory: Path, files: int) -> Path:
    """A master's state with so many empty files that are missing in the persist log."""
    state = directory / "state"
    (state / "master").mkdir(parents=True)
    (state / "lock").touch()
    (directory / "ufs").mkdir()
    store = Store(state / "master" / "meta")
    tx = store.transaction()
    ensure_formatted(tx, 1)
    MountTable(store, open_ufs).ensure_root(str(directory / "ufs"), {}, -1.0, tx)
    for _ in range(files):
        ino = store.take_number(b"next_ino")
        record = InodeRecord(0o100644, 1, 0, 0, 0, 0, 1, 1, 1, 1, ROOT_INO, b"f%d" % ino, 1)
        tx.put_edge(ROOT_INO, record.name, ino)
        tx.put_inode(ino, record)
    tx.commit()
    store.close()
    return state


def test_ctrl_c_in_the_middle_of_a_repair(tmp_path: Path) -> None:
    state = make_state(tmp_path, 20_000)
    command = [*PROGRAM, "fsck", "--json", "--repair", "--state", str(state)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment()
    ) as process:
        assert process.stdout is not None
        for _ in range(100):
            process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, complaints = process.communicate(timeout=120)
        assert process.returncode == 130
    assert b"Traceback" not in complaints
    assert out.endswith(b'"is_complete": false}\n')
    found = fsck(state)
    assert 0 < found["left"]["entry-missing"] < 20_000, "a part was mended"
    assert repair(state)["mended"].keys() == {"entry-missing"}
