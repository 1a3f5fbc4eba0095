"""close under CACHE_THROUGH, and fsync where no tier is durable, while the under storage is away: they
wait for it, not for ever, and what was written is uploaded later all the same."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import LocalDaemon
from s3_proxy import Cut, Rule, S3Proxy
from servers import SeaweedS3, wait_until

PATIENCE_S = 4.0
SLACK_S = 6.0
DOWN = Rule(action=Cut())
_WRITE = "import os,sys; fd=os.open(sys.argv[1], os.O_CREAT|os.O_WRONLY); os.write(fd, b'x'*5000); {end}"
ENDS = {"close": "os.close(fd)", "fsync": "os.fsync(fd)"}


class Site:
    """One daemon on a bucket behind a proxy, only MEM, close waits for the under storage."""

    def __init__(self, server: SeaweedS3, proxy: S3Proxy, start: Callable[..., LocalDaemon]) -> None:
        self.proxy, self.client = proxy, server.client()
        self.bucket = server.create_bucket(f"patience-{random.getrandbits(40):x}")
        self._start = start
        self._options = {**server.options, "endpoint": proxy.endpoint, "timeout_s": "3"}

    def mount(self, end: str, patience_s: float) -> LocalDaemon:
        write_type = "CACHE_THROUGH" if end == "close" else "ASYNC_THROUGH"
        env = {
            "ALLUXIOFUSE_CLIENT_PERSIST_PATIENCE": f"{patience_s:g}s",
            "ALLUXIOFUSE_CLIENT_WRITE_TYPE": write_type,
        }
        daemon = self._start(
            f"s3://{self.bucket}", options=self._options, tiers=["MEM:{base}/mem:200MB"], env=env
        )
        assert os.listdir(daemon.mount) == []  # what is there is known: no need to ask while it is away
        return daemon

    def has(self, key: str, data: bytes) -> bool:
        found = self.client.list_objects_v2(Bucket=self.bucket, Prefix=key).get("Contents", ())
        return bool(found) and self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read() == data


@pytest.fixture
def site(s3_server: SeaweedS3, local_daemon: Callable[..., LocalDaemon]) -> Iterator[Site]:
    with S3Proxy(s3_server.endpoint, 1) as proxy:
        yield Site(s3_server, proxy, local_daemon)
        proxy.clear()


def write_and(end: str, path: Path, data: bytes) -> int:
    """0, or the error of the close or fsync."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        assert os.write(fd, data) == len(data)
        if end == "fsync":
            os.fsync(fd)
    except OSError as exc:
        os.close(fd)
        return exc.errno or 0
    try:
        os.close(fd)
    except OSError as exc:
        return exc.errno or 0
    return 0


@pytest.mark.parametrize("end", list(ENDS))
def test_a_store_that_is_away_is_an_error_in_the_end(site: Site, end: str) -> None:
    daemon = site.mount(end, PATIENCE_S)
    assert write_and(end, daemon.mount / "before", b"before") == 0
    assert site.has("before", b"before")
    data = os.urandom(300_000)
    with site.proxy.failing(DOWN):
        began = time.monotonic()
        assert write_and(end, daemon.mount / "f", data) == errno.EIO
        assert PATIENCE_S - 0.5 < time.monotonic() - began < PATIENCE_S + SLACK_S
        assert (daemon.mount / "f").read_bytes() == data
        began = time.monotonic()
        assert write_and(end, daemon.mount / "g", b"of another one") == errno.EIO
        assert time.monotonic() - began < PATIENCE_S + SLACK_S
    wait_until(lambda: site.has("f", data) and site.has("g", b"of another one"), "both are uploaded", 60)
    assert write_and(end, daemon.mount / "after", b"after") == 0
    assert site.has("after", b"after")


@pytest.mark.parametrize("end", list(ENDS))
def test_a_store_that_comes_back_in_time_is_a_pause(site: Site, end: str) -> None:
    daemon = site.mount(end, 60.0)
    with site.proxy.failing(DOWN):
        script = _WRITE.format(end=ENDS[end])
        program = subprocess.Popen([sys.executable, "-c", script, str(daemon.mount / "f")])
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(PATIENCE_S)
    assert program.wait(60) == 0
    assert site.has("f", b"x" * 5000)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("end", list(ENDS))
def test_who_waits_can_be_ended(site: Site, end: str, number: int) -> None:
    daemon = site.mount(end, 600.0)
    with site.proxy.failing(DOWN):
        script = _WRITE.format(end=ENDS[end])
        command = [sys.executable, "-c", script, str(daemon.mount / "f")]
        program = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(2)
        program.send_signal(number)
        began = time.monotonic()
        assert program.wait(30) != 0
        assert time.monotonic() - began < 5
    wait_until(lambda: site.has("f", b"x" * 5000), "it is uploaded", 60)
