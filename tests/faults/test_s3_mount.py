"""A mount on a bucket behind a proxy that fails on demand: what programs see, what `admin report` counts,
how often a store that is down is asked, and that all is well when the cause is gone."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import LocalDaemon
from s3_proxy import Action, Answer, Cut, Damage, Hang, Hold, Rule, S3Proxy
from servers import SeaweedS3, wait_until

from alluxiofuse.ufs.s3_pace import ATTEMPTS

MIB = 1 << 20
TIMEOUT_S = 3
SEED = int(os.environ.get("FAULTS_SEED", "1"))
ROUNDS = int(os.environ.get("FAULTS_S3_ROUNDS") or 25)
LONG = pytest.mark.skipif(not os.environ.get("FAULTS_S3_ROUNDS"), reason="long: with FAULTS_S3_ROUNDS set")
CHANGING = "PutObject|CopyObject|Create.*|UploadPart.*|Complete.*|Abort.*|Delete.*"


class Site:
    """A daemon on a bucket behind the proxy, and the bucket itself, from behind."""

    def __init__(self, server: SeaweedS3, proxy: S3Proxy, start: Callable[..., LocalDaemon]) -> None:
        self.client, self.proxy = server.client(), proxy
        self.bucket = server.create_bucket(f"mount-{random.getrandbits(40):x}")
        options = {**server.options, "endpoint": proxy.endpoint, "timeout_s": str(TIMEOUT_S)}
        options |= {"part_bytes": "5MiB", "multipart_bytes": "5MiB"}
        # Few at once, so that what was handed out before a fault is soon over.
        env = {"ALLUXIOFUSE_MASTER_PERSIST_PARALLEL": "2", "ALLUXIOFUSE_WORKER_FETCH_PARALLEL": "4"}
        arguments = ["--sync-interval", "0"]
        self.daemon = start(f"s3://{self.bucket}", options=options, arguments=arguments, env=env)
        self.mount = self.daemon.mount

    def put(self, key: str, data: bytes) -> None:
        """From outside."""
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def objects(self) -> dict[str, bytes]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
        return {key: self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read() for key in keys}

    def counters(self) -> dict[str, int]:
        """Of the master and its worker together."""
        report = self.daemon.report()
        found = dict(report["counters"])
        for worker in report["workers"]:
            for name, count in worker["counters"].items():
                found[name] = found.get(name, 0) + count
        return found

    def wait_counted(self, name: str, least: int = 1) -> None:
        wait_until(lambda: self.counters().get(name, 0) >= least, f"{name} >= {least} in admin report")

    def wait_persisted(self) -> None:
        wait_until(
            lambda: self.daemon.report()["persist_pending_count"] == 0, "the persist log is empty", 120
        )
        assert self.daemon.report()["persist_failing"] == []

    def wait_read(self, name: str, data: bytes) -> None:
        """Reads may fail for a few seconds more after a store that was silent."""

        def is_read() -> bool:
            try:
                found = (self.mount / name).read_bytes()
            except OSError:
                return False
            assert found == data
            return True

        wait_until(is_read, f"{name} can be read")

    def uploads(self) -> list[str]:
        found = self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", ())
        return [one["Key"] for one in found]


@pytest.fixture
def site(s3_server: SeaweedS3, local_daemon: Callable[..., LocalDaemon]) -> Iterator[Site]:
    with S3Proxy(s3_server.endpoint, SEED) as proxy:
        found = Site(s3_server, proxy, local_daemon)
        yield found
        proxy.clear()


def test_a_tenth_of_the_requests_fails(site: Site) -> None:
    """In every way at once. Programs see right bytes, or EIO from reads; writes all succeed."""
    dice = random.Random(SEED)
    passing: list[Action] = [
        Answer(500, "InternalError"),
        Answer(503, "SlowDown"),
        Answer(500, "InternalError", is_done=True),
        Cut(),
        Cut(is_done=True),
    ]
    damages: list[Action] = [
        Damage(flip=True),
        Damage(keep=0.5),
        Damage(keep=0.5, is_length_right=True),
        Damage(etag="0" * 32),
    ]
    rules = [Rule(".*", way, fraction=0.08 / len(passing)) for way in passing]
    rules += [Rule("GetObject", way, fraction=0.1 / len(damages)) for way in damages]
    outside = {f"outside{number}": dice.randbytes(dice.choice((10, 3000, 2 * MIB))) for number in range(10)}
    for key, data in outside.items():
        site.put(key, data)
    inside: dict[str, bytes] = {}
    wrong, errors = 0, set[int | None]()
    with site.proxy.failing(*rules):
        for number in range(ROUNDS):
            name = f"f{number % 20}"
            data = dice.randbytes(dice.choice((0, 5, 4096, 100_000, 6 * MIB)))
            (site.mount / name).write_bytes(data)
            inside[name] = data
            if dice.random() < 0.3:
                os.rename(site.mount / name, site.mount / f"{name}-moved")
                inside[f"{name}-moved"] = inside.pop(name)
            if dice.random() < 0.1:
                os.unlink(site.mount / f"{name}-moved") if f"{name}-moved" in inside else None
                inside.pop(f"{name}-moved", None)
            key = dice.choice(list(outside))
            try:
                wrong += (site.mount / key).read_bytes() != outside[key]
            except OSError as error:
                errors.add(error.errno)
    assert wrong == 0
    assert errors <= {errno.EIO}
    site.wait_persisted()
    wanted = inside | outside
    assert site.objects() == wanted
    assert {path.name: path.read_bytes() for path in site.mount.iterdir()} == wanted
    site.wait_counted("ufs_retries")


def test_a_store_that_is_down_is_probed_not_stormed(site: Site) -> None:
    """Writes go on; one entry at a time asks whether the store is back; the report says so."""
    cached, cold = os.urandom(100_000), os.urandom(100_000)
    site.put("cached", cached)
    site.put("cold", cold)
    assert (site.mount / "cached").read_bytes() == cached
    os.stat(site.mount / "cold")
    with site.proxy.failing(Rule(action=Cut())):
        wanted = {f"f{number}": b"%d" % number for number in range(60)}
        for name, data in wanted.items():
            (site.mount / name).write_bytes(data)

        def is_quiet() -> bool:
            """What was handed out at first has failed: one entry a rest."""
            before = site.counters().get("persist_rests", 0)
            site.proxy.forget()
            site.wait_counted("persist_rests", before + 2)
            asked = site.proxy.operations()["PutObject"]
            return bool(asked <= (site.counters()["persist_rests"] - before + 1) * ATTEMPTS)

        wait_until(is_quiet, "only probes are sent", 120)
        assert any("rests" in line for line in site.daemon.report()["persist_failing"])
        assert (site.mount / "cached").read_bytes() == cached
        with pytest.raises(OSError) as caught:
            (site.mount / "cold").read_bytes()
        assert caught.value.errno == errno.EIO
        site.wait_counted("reads_given_up")
    site.wait_persisted()
    assert site.objects() == {**wanted, "cached": cached, "cold": cold}
    site.wait_read("cold", cold)


def test_a_silent_store_blocks_nobody_else(site: Site, tmp_path: Path) -> None:
    """A read of it ends with EIO, its reader can be killed, another mount works, and the daemon stops."""
    other = tmp_path / "other"
    other.mkdir()
    site.daemon.fs("mount", "/other", str(other))
    for number in range(10):
        site.put(f"cold{number}", b"x" * MIB)
    assert (site.mount / "cold9").read_bytes() == b"x" * MIB
    with site.proxy.failing(Rule("GetObject|" + CHANGING, Hang())):
        for number in range(12):  # more than are uploaded at once
            (site.mount / f"f{number}").write_bytes(b"x")
        readers = [
            subprocess.Popen(["cat", site.mount / f"cold{number}"], stdout=subprocess.DEVNULL)
            for number in range(8)  # more than are read at once
        ]
        site.wait_counted("ufs_read_bytes", 0)
        (site.mount / "other/a").write_bytes(b"quick")
        site.daemon.wait_persisted("/other")
        assert (other / "a").read_bytes() == b"quick"
        (other / "b").write_bytes(b"from outside")
        wait_until((site.mount / "other/b").exists, "the next comparison finds it")
        assert (site.mount / "other/b").read_bytes() == b"from outside"
        readers[0].kill()
        readers[0].wait(60)
        for reader in readers[1:]:
            assert reader.wait(300) == 1
        site.wait_counted("ufs_no_answer")
        assert (site.mount / "other/b").read_bytes() == b"from outside"
    site.wait_persisted()
    site.wait_read("cold1", b"x" * MIB)


@LONG
def test_stopping_while_the_store_is_silent(site: Site) -> None:
    site.put("cold", b"x" * MIB)
    os.stat(site.mount / "cold")
    with site.proxy.failing(Rule(action=Hang())):
        reader = subprocess.Popen(["cat", site.mount / "cold"], stdout=subprocess.DEVNULL)
        (site.mount / "new").write_bytes(b"waits")
        wait_until(lambda: site.proxy.operations()["PutObject"] > 0, "the upload hangs")
        assert site.daemon.stop(signal.SIGTERM) in (0, 1)
        reader.kill()
        reader.wait(60)
    site.daemon.expects_clean_end = True
    site.daemon.daemon.start()
    site.wait_persisted()
    assert site.objects() == {"cold": b"x" * MIB, "new": b"waits"}


@LONG
def test_damaged_bodies_never_reach_a_program(site: Site) -> None:
    data = {f"f{number}": os.urandom(200_000 + number) for number in range(1)}
    for key, body in data.items():
        site.put(key, body)
    os.listdir(site.mount)
    with site.proxy.failing(Rule("GetObject", Damage(flip=True))):
        for key in data:
            with pytest.raises(OSError) as caught:
                (site.mount / key).read_bytes()
            assert caught.value.errno == errno.EIO
        site.wait_counted("ufs_damaged_bodies")
    for key, body in data.items():
        assert (site.mount / key).read_bytes() == body


def test_an_upload_in_parts_is_not_left_by_a_kill(site: Site) -> None:
    """Of the daemon: the next one aborts it, though the file is gone by then and nothing is uploaded."""
    rule = site.proxy.add(Rule("UploadPart", Hang(is_done=True), skip=1))
    (site.mount / "big").write_bytes(os.urandom(11 * MIB))
    wait_until(lambda: rule.used > 0, "a part hangs")
    assert site.uploads() == ["big"]
    site.daemon.kill()
    site.proxy.clear()
    os.makedirs(site.mount, exist_ok=True)
    site.daemon.daemon.start()
    os.unlink(site.mount / "big")
    wait_until(lambda: site.uploads() == [], "it is aborted")
    site.wait_persisted()
    assert site.objects() == {}


def test_the_upload_process_dies_with_its_worker(
    s3_server: SeaweedS3, local_daemon: Callable[..., LocalDaemon]
) -> None:
    """At once, also in the middle of a request: what it went on sending could land after a newer upload."""
    bucket = s3_server.create_bucket(f"dies-{random.getrandbits(40):x}")
    with S3Proxy(s3_server.endpoint) as proxy:
        options = {**s3_server.options, "endpoint": proxy.endpoint, "timeout_s": "600"}
        daemon = local_daemon(f"s3://{bucket}", options=options)
        held = Hold()
        proxy.add(Rule("PutObject", held))
        (daemon.mount / "f").write_bytes(b"x")
        assert held.reached.wait(60)
        pid = daemon.daemon.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert children
        daemon.kill()
        wait_until(lambda: not any(_is_alive(child) for child in children), "it is dead", 60)


def _is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
