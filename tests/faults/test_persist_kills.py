"""kill -9 at each point between a change of the namespace and its completion in the under storage.

A proxy in front of the real S3 server holds the n-th changing request of a scenario, before the server
sees it or when only the answer is missing; then the daemon is killed, and the request is lost, or
reaches the server after all, or was answered a moment before. Whatever n: after the next start the
namespace is what was acknowledged, and once the log is empty the store equals it.

A local under storage has no proxy: the kill comes at a random moment after the change.

FAULTS_PERSIST_KILLS=all runs every scenario at every point (and that many minutes), a number so many
of them; FAULTS_SEED chooses.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import LocalDaemon
from s3_proxy import Hold, Rule, S3Proxy
from servers import SeaweedS3, wait_until

MIB = 1 << 20
CHANGING = "PutObject|CopyObject|Create.*|UploadPart.*|Complete.*|Abort.*|Delete.*"
SEED = int(os.environ.get("FAULTS_SEED", "1"))
HOW_MANY = os.environ.get("FAULTS_PERSIST_KILLS", "")
Tree = dict[str, bytes | None]
"""Path -> bytes; None: a directory."""


def write(path: Path, size: int = 100, mode: str = "wb") -> None:
    with open(path, mode) as file:
        file.write(os.urandom(size))


# --- scenarios: what is there and persisted before, and the change -----------------------------------------


def two_files(top: Path) -> None:
    write(top / "a", 1000)
    write(top / "b", 2000)


def tree(top: Path) -> None:
    (top / "d/sub").mkdir(parents=True)
    for name in ("d/a", "d/b", "d/sub/c"):
        write(top / name)


def nothing(top: Path) -> None:
    pass


def swap(top: Path) -> None:
    os.rename(top / "a", top / "t")
    os.rename(top / "b", top / "a")
    os.rename(top / "t", top / "b")


def delete_and_create(top: Path) -> None:
    os.unlink(top / "a")
    write(top / "a", 300)


def directories(top: Path) -> None:
    (top / "new/deep").mkdir(parents=True)
    for name in ("d/sub/c", "d/a", "d/b"):
        os.unlink(top / name)
    os.rmdir(top / "d/sub")
    os.rmdir(top / "d")


def file_for_directory(top: Path) -> None:
    directories(top)
    write(top / "d")


def several(top: Path) -> None:
    write(top / "x", 50)
    os.rename(top / "x", top / "y")
    write(top / "y", 70, "ab")
    os.rename(top / "a", top / "z")
    write(top / "z", 10, "ab")
    write(top / "a", 20)


def rename_tree_and_write_in_it(top: Path) -> None:
    write(top / "d/a", 500)
    os.rename(top / "d", top / "e")
    write(top / "e/b", 600)
    os.unlink(top / "e/sub/c")


SCENARIOS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "create": (nothing, lambda top: write(top / "a")),
    "create_empty": (nothing, lambda top: write(top / "a", 0)),
    "overwrite": (two_files, lambda top: write(top / "a", 3000)),
    "append": (two_files, lambda top: write(top / "a", 5, "ab")),
    "rename": (two_files, lambda top: os.rename(top / "a", top / "c")),
    "rename_over": (two_files, lambda top: os.rename(top / "a", top / "b")),
    "rename_tree": (tree, lambda top: os.rename(top / "d", top / "e")),
    "rename_tree_busy": (tree, rename_tree_and_write_in_it),
    "delete": (two_files, lambda top: os.unlink(top / "a")),
    "delete_create": (two_files, delete_and_create),
    "swap": (two_files, swap),
    "parts": (nothing, lambda top: write(top / "big", 11 * MIB)),
    "parts_over": (two_files, lambda top: write(top / "a", 6 * MIB)),
    "directories": (tree, directories),
    "file_for_directory": (tree, file_for_directory),
    "truncate": (two_files, lambda top: os.truncate(top / "a", 0)),
    "several": (two_files, several),
}
HOWS = ("lost", "late", "done", "answered")
"""What becomes of the held request: the server never sees it; it sees it after the daemon is dead; it did
it, the answer is lost; it was answered, and the kill comes within a moment."""


def tree_of(top: Path) -> Tree:
    def fail(error: OSError) -> None:
        raise error

    found: Tree = {}
    for directory, names, files in os.walk(top, onerror=fail):
        base = Path(directory)
        for name in names:
            found[str((base / name).relative_to(top))] = None
        for name in files:
            found[str((base / name).relative_to(top))] = (base / name).read_bytes()
    return found


def wait_log_empty(site: LocalDaemon) -> None:
    def is_empty() -> bool:
        report = site.report()
        return bool(report["persist_pending_count"] == 0)

    try:
        wait_until(is_empty, "the persist log is empty", 180)
    except TimeoutError:
        raise AssertionError(f"{site.report()}\n{site.daemon.log_text()[-4000:]}") from None


def assert_shown(found: Tree, acknowledged: Tree, what: str) -> None:
    """On S3: this server goes on listing a directory for a while after its last object was deleted, so
    one that was removed may be seen again, empty."""
    assert {**acknowledged, **{path: None for path, data in found.items() if data is None}} == found, what
    gone = {path for path in found if path not in acknowledged}
    assert not any(path.startswith(tuple(f"{one}/" for one in gone)) for path in acknowledged), what


# --- S3 ---------------------------------------------------------------------------------------------------


class Bucket:
    """A daemon on a bucket behind the proxy."""

    def __init__(self, server: SeaweedS3, proxy: S3Proxy, start: Callable[..., LocalDaemon]) -> None:
        self.client, self.proxy = server.client(), proxy
        self.name = server.create_bucket(f"kills-{random.getrandbits(32):x}")
        options = {**server.options, "endpoint": proxy.endpoint}
        options |= {"part_bytes": "5MiB", "multipart_bytes": "5MiB", "timeout_s": "20"}
        self.site = start(
            f"s3://{self.name}", options=options, env={"ALLUXIOFUSE_MASTER_PERSIST_DELAY_S": "50ms"}
        )
        self.site.expects_clean_end = False

    def objects(self, prefix: str) -> Tree:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        found: Tree = {}
        for page in pages:
            for item in page.get("Contents", ()):
                body = self.client.get_object(Bucket=self.name, Key=item["Key"])["Body"].read()
                found[item["Key"].removeprefix(prefix)] = body
        return found

    def uploads(self) -> list[dict[str, Any]]:
        """Unfinished ones that have parts: those without cost nothing, and when the answer to their
        creation was lost nobody can know whose they are."""
        found = self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", ())
        parts = [
            (one, self.client.list_parts(Bucket=self.name, Key=one["Key"], UploadId=one["UploadId"]))
            for one in found
        ]
        return [one for one, listed in parts if listed.get("Parts")]

    def run(self, name: str, number: int, how: str, directory: str) -> bool:
        """False: the scenario has fewer than `number` requests."""
        site, (prepare, change) = self.site, SCENARIOS[name]
        top = site.mount / directory
        top.mkdir()
        prepare(top)
        wait_log_empty(site)
        held = Hold(is_done=how in ("done", "answered"))
        rule = self.proxy.add(Rule(CHANGING, held, skip=number, times=1))
        change(top)
        acknowledged = tree_of(top)
        while not held.reached.wait(0.2):
            if site.report()["persist_pending_count"] == 0 and not rule.used:
                self.proxy.clear()
                return False
        if how == "answered":
            held.release()
            time.sleep(random.uniform(0, 0.02))
        site.daemon.kill()
        if how == "late":
            held.release()
        else:
            held.drop()
        self.proxy.clear()
        site.daemon.start()
        what = f"{name}, request {number}, {how}"
        assert_shown(tree_of(top), acknowledged, what)
        wait_log_empty(site)
        assert_shown(tree_of(top), acknowledged, what)
        files = {path: data for path, data in acknowledged.items() if data is not None}
        assert self.objects(f"{directory}/") == files, what
        assert self.uploads() == [], what
        report = site.report()
        assert report["persist_failing"] == [], what
        return True


@pytest.fixture
def bucket(s3_server: SeaweedS3, local_daemon: Callable[..., LocalDaemon]) -> Iterator[Bucket]:
    with S3Proxy(s3_server.endpoint) as proxy:
        yield Bucket(s3_server, proxy, local_daemon)


FEW = [
    ("create", 0, "done"),
    ("rename", 0, "answered"),
    ("parts", 2, "done"),
    ("swap", 1, "late"),
]


def test_killed_at_a_request(bucket: Bucket) -> None:
    if not HOW_MANY:
        for count, (name, number, how) in enumerate(FEW):
            assert bucket.run(name, number, how, f"run{count}"), f"{name} has no request {number}"
        return
    ways = [(name, how) for name in SCENARIOS for how in HOWS]
    random.Random(SEED).shuffle(ways)
    most = 10_000 if HOW_MANY == "all" else int(HOW_MANY)
    done = 0
    for name, how in ways:
        for number in itertools.count():
            if done == most:
                return
            print(f"{name}, request {number}, {how}", flush=True)
            if not bucket.run(name, number, how, f"run-{name}-{how}-{number}"):
                break
            done += 1
    print(f"{done} kills")


# --- a local directory --------------------------------------------------------------------------------------


def check_restarted(site: LocalDaemon, top: Path, acknowledged: Tree, name: str) -> None:
    """Killed and started again: the mount has what was acknowledged, and soon the under storage too."""
    site.daemon.kill()
    site.daemon.start()
    assert tree_of(top) == acknowledged, name
    wait_log_empty(site)
    assert tree_of(top) == acknowledged, name
    assert tree_of(site.ufs_dir / top.name) == acknowledged, name
    assert list(site.ufs_dir.rglob(".alluxiofuse-*")) == [], name


def test_killed_at_a_moment(local_daemon: Callable[..., LocalDaemon]) -> None:
    site = local_daemon(env={"ALLUXIOFUSE_MASTER_PERSIST_DELAY_S": "0"})
    site.expects_clean_end = False
    dice = random.Random(SEED)
    names = list(SCENARIOS)
    rounds = 300 if HOW_MANY == "all" else int(HOW_MANY or 3)
    for count in range(rounds):
        name = names[count % len(names)] if HOW_MANY == "all" else dice.choice(names)
        prepare, change = SCENARIOS[name]
        top = site.mount / f"run{count}"
        top.mkdir()
        prepare(top)
        wait_log_empty(site)
        delay_s = dice.choice([0.0, 0.0, dice.uniform(0, 0.02), dice.uniform(0, 0.1)])
        print(f"{name}, {delay_s * 1000:.1f} ms", flush=True)
        change(top)
        acknowledged = tree_of(top)
        time.sleep(delay_s)  # where in it the kill falls is chance
        check_restarted(site, top, acknowledged, name)


TRACED = "rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,symlinkat,ftruncate,fsync,linkat"


def processes_of(pid: int) -> list[int]:
    """The daemon and those that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(int(child) for child in children)]


@contextlib.contextmanager
def killed_at_call(site: LocalDaemon, number: int) -> Iterator[None]:
    """The `number`-th of the traced system calls of any thread kills its process before it is done."""
    pids = [argument for pid in processes_of(site.daemon.pid) for argument in ("-p", str(pid))]
    inject = f"inject={TRACED}:signal=SIGKILL:when={number}"
    command = ["strace", "-f", "-o", "/dev/null", *pids, "-e", f"trace={TRACED}", "-e", inject]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as tracer:
        assert tracer.stderr is not None
        for _ in pids[::2]:
            assert b"attached" in tracer.stderr.readline()
        drained = threading.Thread(target=tracer.stderr.read)
        drained.start()
        try:
            yield
        finally:
            tracer.terminate()
            try:
                tracer.wait(10)
            except subprocess.TimeoutExpired:
                tracer.kill()  # it may wait for ever for threads of a process that is dead
            drained.join()


@pytest.mark.skipif(not HOW_MANY, reason="long: with FAULTS_PERSIST_KILLS set")
@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace")
def test_killed_at_a_system_call(local_daemon: Callable[..., LocalDaemon]) -> None:
    """Of the daemon or of its upload process. `when` counts by thread, so low numbers are most."""
    site = local_daemon(env={"ALLUXIOFUSE_MASTER_PERSIST_DELAY_S": "1500ms"})
    site.expects_clean_end = False
    dice = random.Random(SEED)
    rounds = 200 if HOW_MANY == "all" else int(HOW_MANY)
    died = 0
    for count in range(rounds):
        name, number = dice.choice(list(SCENARIOS)), dice.choice((1, 1, 2, 2, 3, 4, 6))
        prepare, change = SCENARIOS[name]
        top = site.mount / f"run{count}"
        top.mkdir()
        prepare(top)
        wait_log_empty(site)
        before = processes_of(site.daemon.pid)
        print(f"{name}, call {number}", flush=True)
        acknowledged: Tree | None = None
        try:
            with killed_at_call(site, number):
                change(top)
                acknowledged = tree_of(top)
                ends_s = time.monotonic() + 8
                while processes_of(site.daemon.pid) == before and time.monotonic() < ends_s:
                    time.sleep(0.1)
        except OSError:
            pass  # the daemon died: of itself or while it was looked at
        if acknowledged is None:  # it died in the middle of the change
            site.daemon.kill()
            site.daemon.start()
            wait_log_empty(site)
            assert tree_of(site.ufs_dir / f"run{count}") == tree_of(top), name
            continue
        died += not site.daemon.is_running or processes_of(site.daemon.pid) != before
        check_restarted(site, top, acknowledged, name)
    print(f"{died} died of {rounds}")
    assert died
