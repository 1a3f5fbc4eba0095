"""The wall clock jumps under running daemons; the monotonic clock goes on as it does.

Daemons are started with a small library before libc (libfaketime fails clock_nanosleep for Python).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from daemons import Cluster
from servers import SeaweedS3, wait_until

DAY_S = 86_400
JUMPS = {"tomorrow": DAY_S, "yesterday": -DAY_S, "1970": DAY_S - int(time.time()), "now": 0}
LIBRARY = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile long long *jump_s;

__attribute__((constructor)) static void begin(void) {
    int fd = open(getenv("WALL_CLOCK_JUMP"), O_RDONLY | O_CLOEXEC);
    void *at = mmap(NULL, 8, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (at != MAP_FAILED) jump_s = at;
}
int clock_gettime(clockid_t clock, struct timespec *out) {
    int failed = syscall(SYS_clock_gettime, clock, out);
    if (!failed && jump_s && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        out->tv_sec += *jump_s;
    return failed;
}
int gettimeofday(struct timeval *restrict out, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""


class WallClock:
    """Of the daemons that are started with `env`."""

    def __init__(self, directory: Path) -> None:
        library, self._file = directory / "clock.so", directory / "clock"
        self.jump(0)
        command = ["cc", "-shared", "-fPIC", "-o", str(library), "-x", "c", "-"]
        subprocess.run(command, input=LIBRARY.encode(), check=True, capture_output=True)
        self.env = {"LD_PRELOAD": str(library), "WALL_CLOCK_JUMP": str(self._file)}

    def jump(self, seconds: int) -> None:
        """From the true time."""
        with open(self._file, "r+b" if self._file.exists() else "w+b", buffering=0) as file:
            os.pwrite(file.fileno(), seconds.to_bytes(8, sys.byteorder, signed=True), 0)


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    if shutil.which("cc") is None:
        reason = "no C compiler: apt-get install gcc libc6-dev"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return WallClock(tmp_path)


def test_jumps_end_no_lease_and_freeze_no_cache(cluster: Callable[..., Cluster], clock: WallClock) -> None:
    env = {**clock.env, "ALLUXIOFUSE_MASTER_SESSION_LEASE_S": "5s"}
    site = cluster(env=env, workers=1, master_arguments=["--worker-timeout", "5s"])
    outside = site.ufs_dir / "outside"
    outside.write_text("first")
    assert (site.mount / "outside").read_text() == "first"
    with open(site.mount / "held", "w+") as held:
        for number, (jump, jump_s) in enumerate(JUMPS.items()):
            clock.jump(jump_s)
            held.write(f"{jump}\n")
            held.flush()
            os.fsync(held.fileno())
            name, new = f"file{number}", f"new{number}"
            (site.mount / name).write_text(jump)
            os.rename(site.mount / name, site.mount / f"{name}.moved")
            text = f"changed while the clock stood at {jump}"
            outside.write_text(text)
            (site.ufs_dir / new).write_text(jump)
            wait_until(partial(has, site.mount / "outside", text), f"{jump}: a change outside is seen")
            wait_until(partial(is_listed, site.mount / new), f"{jump}: a new file outside is seen")
            site.wait_persisted(f"/{name}.moved")
            assert (site.ufs_dir / f"{name}.moved").read_text() == jump
        held.seek(0)
        assert held.read() == "".join(f"{jump}\n" for jump in JUMPS)
    report = site.report()
    assert [worker["is_alive"] for worker in report["workers"]] == [True]
    assert not report["workers"][0]["counters"].get("registrations_expired")
    assert site.client is not None
    assert "given our session up" not in site.client.log_text()
    assert "no word from the master" not in site.client.log_text()


def has(path: Path, text: str) -> bool:
    return path.read_text() == text


def is_listed(path: Path) -> bool:
    return path.name in os.listdir(path.parent)


def test_s3_says_that_the_clock_is_wrong(
    cluster: Callable[..., Cluster], clock: WallClock, s3_server: SeaweedS3
) -> None:
    """Signatures carry the time. It is an outage with one clear line, and ends with its cause."""
    bucket = s3_server.create_bucket("clock-test")
    site = cluster(
        f"s3://{bucket}/a",
        env={**clock.env, **s3_server.environment},
        workers=1,
        master_arguments=["--option", f"endpoint={s3_server.endpoint}"],
    )
    (site.mount / "file").write_text("content")
    clock.jump(-DAY_S)
    site.fs("persist", "--timeout", "1s", "/file", check=False)
    words = "the clock of this machine is wrong"
    wait_until(lambda: any(words in line for line in site.report()["persist_failing"]), "the report says so")
    clock.jump(0)
    site.wait_persisted("/file")
    found = s3_server.client().get_object(Bucket=bucket, Key="a/file")
    assert found["Body"].read() == b"content"
