"""The main job by separate processes that share a secret: master, two workers, two mounts; workers that
die, none at all, and peers that do not belong."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import MIB, Cluster, run_cli
from servers import wait_until
from trees import PACKAGES, add_oddities, assert_same, copy_library, run

Start = Callable[..., Cluster]
REFUSAL_LIMIT_S = 30.0
"""Most that a program may wait for the error when there is no worker; what is meant is `soon`."""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    top.mkdir()
    copy_library(top, PACKAGES[:2])
    add_oddities(top)
    return top


def second_mount(site: Cluster) -> Path:
    where = site.base / "mnt2"
    where.mkdir()
    site.add_mount(where)
    return where


def drop_kernel_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def holders(site: Cluster, path: str) -> list[str]:
    """Hostnames of the workers that have blocks of it."""
    return [one["hostname"] for one in site.fs_json("location", path)[0]["cached"]]


def shows(left: Path, right: Path) -> Callable[[], bool]:
    def is_same() -> bool:
        try:
            assert_same(left, right)
        except AssertionError as exc:
            print(exc)
            return False
        return True

    return is_same


def test_two_mounts_and_two_workers(cluster: Start, tree: Path, tmp_path: Path) -> None:
    site = cluster(secret=True)
    other = second_mount(site)
    run("cp", "-a", tree, site.mount / "in")
    assert_same(tree, other / "in")
    script = """
        set -e
        mv in/email moved; rm -r in/json; ln -s moved link; echo more >> moved/errors.py
        mkdir deep; cp -a moved deep/copy; chmod 700 deep
    """
    shutil.copytree(tree, tmp_path / "twin" / "in", symlinks=True)
    run("bash", "-c", script, cwd=other)
    run("bash", "-c", "echo more >> moved/errors.py", cwd=other)
    assert (site.mount / "moved/errors.py").read_bytes() == (
        tree / "email/errors.py"
    ).read_bytes() + 2 * b"more\n"
    wait_until(shows(other, site.mount), "the first mount shows what the second one did")
    site.wait_persisted()
    wait_until(shows(site.mount, site.ufs_dir), "it is there as plain files")
    found = site.report()
    assert [(one["hostname"], one["is_alive"]) for one in found["workers"]] == [("w1", True), ("w2", True)]
    assert len([name for name in found["sessions"] if "fuse" in name]) == 2, found["sessions"]
    site.fs("free", "-R", "/")
    drop_kernel_caches()
    assert_same(site.ufs_dir, other)
    assert set(holders(site, "/in/odd/large")) <= {"w1", "w2"} != set()


def test_reads_from_another_worker_while_it_writes(cluster: Start) -> None:
    """The file is at a worker of another machine; the reader's own worker does not have it."""
    site = cluster(secret=True, workers=0)
    site.add_worker()
    data = os.urandom(5 * MIB + 3)
    other = second_mount(site)
    with open(site.mount / "file", "wb") as file:
        file.write(data)
        file.flush()
        near = site.add_worker(socket.gethostname())
        assert (other / "file").read_bytes() == data, "from the far one, which has the only copy"
    site.wait_persisted()
    assert (site.ufs_dir / "file").read_bytes() == data
    drop_kernel_caches()
    assert (other / "file").read_bytes() == data
    assert near.stop() == 0
    drop_kernel_caches()
    assert (other / "file").read_bytes() == data, "by TCP, its own worker is gone"


def test_a_worker_dies_and_reads_go_on(cluster: Start) -> None:
    site = cluster(secret=True)
    site.expects_clean_end = False
    contents = {f"file{n}": os.urandom(300_000 + n) for n in range(12)}
    for name, data in contents.items():
        (site.mount / name).write_bytes(data)
    site.wait_persisted()
    reader = open(site.mount / "file0", "rb")  # noqa: SIM115 - open over the death of its worker
    with reader:
        assert reader.read(1000) == contents["file0"][:1000]
        victim = site.workers[int(holders(site, "/file0")[0][1:]) - 1]
        victim.kill()
        drop_kernel_caches()
        began = time.monotonic()
        for name, data in contents.items():
            assert (site.mount / name).read_bytes() == data
        assert reader.read() == contents["file0"][1000:]
        print(f"reading after the death took {time.monotonic() - began:.1f} s")
    (site.mount / "new").write_bytes(b"by the other one")
    site.wait_persisted("/new")
    assert (site.ufs_dir / "new").read_bytes() == b"by the other one"
    victim.start()
    wait_until(lambda: all(one["is_alive"] for one in site.report()["workers"]), "it is back")
    assert len(site.report()["workers"]) == 2


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_without_any_worker(cluster: Start, how: str) -> None:
    site = cluster(secret=True, env={"ALLUXIOFUSE_CLIENT_PATIENCE": "3s"})
    site.expects_clean_end = how == "stop"
    data = os.urandom(3 * MIB)
    (site.ufs_dir / "only there").write_bytes(data)
    (site.mount / "written").write_bytes(data)
    site.wait_persisted()
    for worker in site.workers:
        if how == "stop":
            assert worker.stop() == 0
        else:
            worker.kill()
    drop_kernel_caches()
    began = time.monotonic()
    assert (site.mount / "only there").read_bytes() == data, "straight from the under storage"
    assert (site.mount / "written").read_bytes() == data
    print(f"reading took {time.monotonic() - began:.1f} s")
    count = 0

    def refused_in_s() -> float:
        nonlocal count
        count += 1
        began = time.monotonic()
        with pytest.raises(OSError) as caught, open(site.mount / f"new{count}", "wb", buffering=0) as file:
            file.write(data)
        assert caught.value.errno == errno.EIO
        took_s = time.monotonic() - began
        assert took_s < REFUSAL_LIMIT_S
        return took_s

    refused_in_s()
    wait_until(lambda: refused_in_s() < 1.0, "patience is for an outage, not for each file")
    assert site.client is not None
    assert "failed: unavailable: " in site.client.log_text()
    assert (site.mount / "written").read_bytes() == data, "the filesystem goes on"
    (site.mount / "directory").mkdir()
    (site.mount / "written").rename(site.mount / "directory/renamed")
    for worker in site.workers:
        worker.start()
    for name in ("new1", "another"):
        (site.mount / name).write_bytes(data)
        assert (site.mount / name).read_bytes() == data
    site.wait_persisted()
    assert (site.ufs_dir / "new1").read_bytes() == data
    wait_until((site.ufs_dir / "directory/renamed").exists, "the rename arrived")


class Recorder:
    """Passes one connection on to a server and keeps what the client sent."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._port = port
        self.port = self._listener.getsockname()[1]
        self.sent = bytearray()
        self.received = bytearray()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        client, _ = self._listener.accept()
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            back = threading.Thread(target=self._pass, args=(server, client, self.received))
            back.start()
            self._pass(client, server, self.sent)
            back.join()

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, kept: bytearray) -> None:
        while data := source.recv(65536):
            kept += data
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._thread.join(30)
        self._listener.close()


def test_who_does_not_belong_gets_nothing_and_is_logged(cluster: Start, tmp_path: Path) -> None:
    site = cluster(secret=True, workers=1)
    (site.mount / "name of a file").write_text("precious content")
    wrong = tmp_path / "wrong"
    wrong.touch(mode=0o600)
    wrong.write_text("0123456789abcdef" * 4)
    worker_port = site.report()["workers"][0]["address"].rpartition(":")[2]
    servers = [(site.master, int(site.address.rpartition(":")[2])), (site.workers[0], int(worker_port))]

    def refusals(text: str) -> int:
        return sum("refused" in line for line in text.splitlines())

    for arguments in ([], ["--secret-file", str(wrong)]):
        before = refusals(site.master.log_text())
        done = run_cli("fs", "cat", "--master", site.address, *arguments, "/name of a file", check=False)
        assert (done.returncode, done.stdout) == (1, "")
        wait_until(lambda before=before: refusals(site.master.log_text()) > before, "it is logged")  # type: ignore[misc]

    recorder = Recorder(servers[0][1])
    done = run_cli(
        *["fs", "stat", "--master", f"127.0.0.1:{recorder.port}", *site.secret_arguments, "/name of a file"]
    )
    recorder.close()
    assert "name of a file" in done.stdout
    for daemon, port in servers:
        before = refusals(daemon.log_text())
        with socket.create_connection(("127.0.0.1", port), timeout=30) as replayed:
            replayed.sendall(recorder.sent)
            got = b""
            try:
                while chunk := replayed.recv(65536):
                    got += chunk
            except ConnectionResetError:
                pass
        assert len(got) < len(recorder.received)
        assert b"name of a file" not in got
        wait_until(lambda b=before, d=daemon: refusals(d.log_text()) > b, "it is logged")  # type: ignore[misc]
    assert site.secret_file is not None
    for daemon in site.daemons:
        assert site.secret_file.read_text() not in daemon.log_text()
        assert wrong.read_text() not in daemon.log_text()
    assert (site.mount / "name of a file").read_text() == "precious content"
    print([line for line in site.master.log_text().splitlines() if "refused" in line])
