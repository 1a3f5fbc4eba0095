"""SIGKILL under load: nothing acknowledged is lost, no byte is wrong, and the store follows.

    make test-faults                            200 kills of each kind
    FAULTS_KILLS=9 FAULTS_KINDS=worker,client FAULTS_WHERE=far pytest tests/faults/test_kills.py -k cluster -s

A failure names its seed; FAULTS_SEED=N repeats it. FAULTS_HOLD and FAULTS_LOG: see harness.py, player.py.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import Cluster, Daemon, LocalDaemon
from harness import Harness, seed_of_run
from kinds import Kill
from servers import SeaweedS3
from stores import BucketStore, DirectoryStore

KILLS = int(os.environ.get("FAULTS_KILLS", "3"))
KINDS = os.environ.get("FAULTS_KINDS", "master,worker,client,everything").split(",")
WHERE = os.environ.get("FAULTS_WHERE", "")
WRITE_TYPES = os.environ.get("FAULTS_WRITE_TYPES", "")
MOUNT_OPTIONS = os.environ.get("FAULTS_MOUNT_OPTIONS", "")
"""For instance session=native."""
QUICK = {
    "ALLUXIOFUSE_MASTER_PERSIST_DELAY": "100ms",
    "ALLUXIOFUSE_MASTER_SESSION_LEASE": "5s",
    "ALLUXIOFUSE_WORKER_SESSION_GRACE": "2s",
    "ALLUXIOFUSE_CLIENT_PATIENCE": "120s",
}
"""Uploads are under way most of the time, what killed writers left is sealed soon, and nobody gives up on a
daemon that is about to come back, however slow the machine is."""


@pytest.fixture
def seed() -> int:
    found = seed_of_run()
    print(f"FAULTS_SEED={found}")
    return found


def one_of(choices: tuple[str, ...], this: str, wanted: str, seed: int) -> None:
    """Skips unless the seed chose this one, or the environment says so ("both": each of them)."""
    if wanted != "both" and this != (wanted or random.Random(seed).choice(choices)):
        pytest.skip("the seed chose the other one")


def kill_local(site: LocalDaemon) -> Kill:
    return Kill("local", lambda _: [site.daemon], {site.daemon.name: site.mount})


@pytest.mark.parametrize("write_type", ["ASYNC_THROUGH", "CACHE_THROUGH"])
def test_local(local_daemon: Callable[..., LocalDaemon], seed: int, write_type: str) -> None:
    """The one-process daemon. By default the seed chooses the write type."""
    one_of(("ASYNC_THROUGH", "CACHE_THROUGH"), write_type, WRITE_TYPES, seed)
    site = local_daemon(
        env={**QUICK, "ALLUXIOFUSE_CLIENT_WRITE_TYPE": write_type}, mount_options=MOUNT_OPTIONS
    )
    site.expects_clean_end = False
    with Harness(site, [site.mount], DirectoryStore(site.ufs_dir), seed, players_per_mount=3) as harness:
        harness.run(kill_local(site), KILLS)
        harness.finish()


def test_local_on_s3(local_daemon: Callable[..., LocalDaemon], s3_server: SeaweedS3, seed: int) -> None:
    """Without comparing metadata: SeaweedFS lists a directory for 40 s and more after its last object was
    deleted (docs/ufs.md), so that what was removed would be found again."""
    bucket = s3_server.create_bucket(f"kills-{seed:x}")
    arguments = ["--sync-interval", "-1"]
    site = local_daemon(f"s3://{bucket}", options=s3_server.options, env=QUICK, arguments=arguments)
    site.expects_clean_end = False
    with Harness(site, [site.mount], BucketStore(s3_server, bucket), seed, players_per_mount=3) as harness:
        harness.run(kill_local(site), KILLS)
        harness.finish()


def kills_of(site: Cluster, mounts: dict[str, Path]) -> dict[str, Kill]:
    """Each kind by its name. `mounts`: by the names of their daemons."""
    clients = [one for one in site.daemons if one.name in mounts]
    choices: dict[str, Callable[[random.Random], list[Daemon]]] = {
        "master": lambda _: [site.master],
        "worker": lambda dice: [dice.choice(site.workers)],
        "client": lambda dice: [dice.choice(clients)],
        "everything": lambda _: site.daemons,
    }
    return {
        name: Kill(name, choose, mounts, is_felt_by_all=name != "client") for name, choose in choices.items()
    }


@pytest.mark.parametrize("where", ["near", "far"])
def test_cluster(cluster: Callable[..., Cluster], seed: int, where: str) -> None:
    """One process of a cluster, or all at once. Near: one of the workers is on the clients' machine, and
    they read and write by its descriptors. Far: by TCP alone. By default the seed chooses."""
    one_of(("near", "far"), where, WHERE, seed)
    site = cluster(workers=0, env=QUICK, mount_options=MOUNT_OPTIONS)
    site.expects_clean_end = False
    site.add_worker(socket.gethostname() if where == "near" else None)
    site.add_worker()
    second = site.base / "mnt2"
    second.mkdir()
    mounts = {"mount-mnt": site.mount, site.add_mount(second).name: second}
    with Harness(site, list(mounts.values()), DirectoryStore(site.ufs_dir), seed) as harness:
        for name, kill in kills_of(site, mounts).items():
            if name in KINDS:
                harness.run(kill, KILLS)
        harness.finish()
