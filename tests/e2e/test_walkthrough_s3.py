"""The main job on a bucket, checked from outside by boto3: objects are files and files are objects.
And the cache: what was read once is served without the server, what was freed is not."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import MIB, LocalDaemon
from servers import SeaweedS3, wait_until
from trees import PACKAGES, copy_library, digests, run

Start = Callable[..., LocalDaemon]
NO_SERVER_LIMIT_S = 60.0
"""Most that a read may take to fail without the server; generous, what is meant is `not for ever`."""


class Bucket:
    def __init__(self, server: SeaweedS3, name: str) -> None:
        self.name = server.create_bucket(name)
        self.client: Any = server.client()

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)

    def get(self, key: str) -> bytes:
        body = self.client.get_object(Bucket=self.name, Key=key)["Body"].read()
        assert isinstance(body, bytes)
        return body

    def keys(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        return [one["Key"] for page in pages for one in page.get("Contents", ())]

    def digests(self) -> dict[str, str]:
        return {key: hashlib.sha256(self.get(key)).hexdigest() for key in self.keys() if key[-1] != "/"}

    def put_tree(self, top: Path, prefix: str) -> None:
        for directory, _, names in os.walk(top):
            for name in names:
                path = Path(directory, name)
                self.put(f"{prefix}{path.relative_to(top)}", path.read_bytes())


@pytest.fixture
def bucket(s3_server: SeaweedS3, request: pytest.FixtureRequest) -> Bucket:
    return Bucket(s3_server, request.node.name.replace("_", "-")[:60])


@pytest.fixture
def own_server() -> Iterator[SeaweedS3]:
    """One that the test may stop."""
    with SeaweedS3() as server:
        yield server


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    top.mkdir()
    copy_library(top, PACKAGES[:3])
    (top / "Grüße %+ &#'\".txt").write_text("a name")
    (top / "odd sizes").mkdir()
    for size in (1, MIB - 1, MIB, MIB + 1, 3 * MIB + 7):
        (top / f"odd sizes/{size}").write_bytes(os.urandom(size))
    return top


def on_s3(start: Start, server: SeaweedS3, uri: str, **options: Any) -> LocalDaemon:
    return start(uri, options=server.options, **options)


def drop_kernel_caches() -> None:
    """So that reads arrive at the daemon again."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def test_what_is_in_the_bucket_is_read(
    local_daemon: Start, s3_server: SeaweedS3, bucket: Bucket, tree: Path, tmp_path: Path
) -> None:
    bucket.put_tree(tree, "some/prefix/")
    bucket.put("elsewhere", b"not below the prefix")
    site = on_s3(local_daemon, s3_server, f"s3://{bucket.name}/some/prefix")
    assert run("ls", "-R", ".", cwd=site.mount) == run("ls", "-R", ".", cwd=tree)
    run("diff", "-r", tree, site.mount)
    run("cp", "-a", site.mount, tmp_path / "copied")
    run("tar", "cf", tmp_path / "out.tar", "-C", site.mount, ".")
    (tmp_path / "unpacked").mkdir()
    run("tar", "xf", tmp_path / "out.tar", "-C", tmp_path / "unpacked")
    for copy in ("copied", "unpacked"):
        assert digests(tmp_path / copy) == digests(tree)
    head = bucket.client.head_object(Bucket=bucket.name, Key="some/prefix/json/decoder.py")
    assert (site.mount / "json/decoder.py").stat().st_mtime == head["LastModified"].timestamp()
    assert bucket.digests() == {
        "elsewhere": hashlib.sha256(b"not below the prefix").hexdigest(),
        **{f"some/prefix/{name}": digest for name, digest in digests(tree).items()},
    }, "reading changes nothing"


def test_what_is_written_is_there_as_objects(
    local_daemon: Start, s3_server: SeaweedS3, bucket: Bucket, tree: Path, tmp_path: Path
) -> None:
    site = on_s3(local_daemon, s3_server, f"s3://{bucket.name}")
    run("cp", "-a", tree, site.mount / "copy")
    run("tar", "cf", tmp_path / "in.tar", "-C", tree, ".")
    (site.mount / "unpacked").mkdir()
    run("tar", "xf", tmp_path / "in.tar", "-C", site.mount / "unpacked")
    site.wait_persisted()
    assert bucket.digests() == digests(site.mount)
    assert set(bucket.digests()) == {
        f"{top}/{name}" for top in ("copy", "unpacked") for name in digests(tree)
    }
    script = """
        set -e
        mv copy/email moved                             # a directory
        mv moved/mime copy/mime                         # and one out of it, before it has been moved
        mv copy/asyncio unpacked/json/asyncio
        mv copy/json/decoder.py copy/json/scanner.py    # over another
        echo replaced > copy/json/encoder.py
        echo appended >> copy/json/tool.py
        printf middle | dd of='copy/odd sizes/1048577' bs=1 seek=524288 conv=notrunc status=none
        truncate -s 1000 'copy/odd sizes/1048576'
        rm -r unpacked/email
        rm 'copy/odd sizes/1'
        : > empty
        ln -s empty link; chmod 600 empty; mkdir -p no/object/here
    """
    run("bash", "-c", script, cwd=site.mount)
    site.wait_persisted()
    wait_until(lambda: site.report()["persist_pending_count"] == 0, "the persist log is empty")
    assert bucket.digests() == digests(site.mount)
    assert bucket.get("copy/json/tool.py") == (tree / "json/tool.py").read_bytes() + b"appended\n"
    assert bucket.get("copy/json/scanner.py") == (tree / "json/decoder.py").read_bytes()
    before = digests(site.mount)
    site.restart()
    assert digests(site.mount) == before
    assert os.readlink(site.mount / "link") == "empty"
    assert (site.mount / "empty").stat().st_mode & 0o777 == 0o600
    assert (site.mount / "no/object/here").is_dir()
    run("bash", "-c", "rm -rf *", cwd=site.mount)
    wait_until(lambda: site.report()["persist_pending_count"] == 0, "the persist log is empty")
    assert bucket.keys() == []


def test_large_objects_go_in_parts(
    local_daemon: Start, s3_server: SeaweedS3, bucket: Bucket, tmp_path: Path
) -> None:
    site = on_s3(local_daemon, s3_server, f"s3://{bucket.name}")
    with open(tmp_path / "large", "wb") as file:
        for _ in range(100):
            file.write(os.urandom(MIB))
        file.write(b"and some")
    run("cp", tmp_path / "large", site.mount / "large")
    site.wait_persisted("/large")
    head = bucket.client.head_object(Bucket=bucket.name, Key="large")
    assert head["ContentLength"] == 100 * MIB + 8
    assert "-" in head["ETag"], "a multipart upload"
    bucket.client.download_file(bucket.name, "large", str(tmp_path / "back"))
    run("cmp", tmp_path / "large", tmp_path / "back")
    site.fs("free", "/large")
    drop_kernel_caches()
    run("cmp", tmp_path / "large", site.mount / "large")
    with open(site.mount / "large", "ab") as file:
        file.write(b"appended")
    site.wait_persisted("/large")
    assert bucket.client.head_object(Bucket=bucket.name, Key="large")["ContentLength"] == 100 * MIB + 16
    tail = bucket.client.get_object(Bucket=bucket.name, Key="large", Range="bytes=-16")["Body"].read()
    assert tail == b"and someappended"
    (site.mount / "large").rename(site.mount / "renamed")
    wait_until(lambda: bucket.keys() == ["renamed"], "it was copied and the old one removed")
    run("cmp", "-n", str(100 * MIB + 8), tmp_path / "large", site.mount / "renamed")


def test_what_others_do_in_the_bucket_shows(
    local_daemon: Start, s3_server: SeaweedS3, bucket: Bucket
) -> None:
    for name in ("a/1", "a/2", "b"):
        bucket.put(name, name.encode())
    site = on_s3(local_daemon, s3_server, f"s3://{bucket.name}", arguments=["--sync-interval", "100ms"])
    assert digests(site.mount) == bucket.digests()
    bucket.put("a/2", b"changed outside")
    bucket.put("c/d/e", b"new")
    bucket.client.delete_object(Bucket=bucket.name, Key="a/1")
    wait_until(lambda: digests(site.mount) == bucket.digests(), "changed, made and removed outside")
    bucket.put("b", b"just now")
    site.fs("sync", "/")
    assert (site.mount / "b").read_bytes() == b"just now"


def expect_eio(path: Path) -> float:
    """How long it took, in seconds."""
    began = time.monotonic()
    with pytest.raises(OSError) as caught:
        path.read_bytes()
    assert caught.value.errno == errno.EIO
    took_s = time.monotonic() - began
    assert took_s < NO_SERVER_LIMIT_S
    return took_s


def test_the_cache_serves_without_the_server(local_daemon: Start, own_server: SeaweedS3) -> None:
    bucket = Bucket(own_server, "cached")
    contents = {"large": os.urandom(40 * MIB), **{f"dir/{n}": os.urandom(n * 1000) for n in range(20)}}
    for key, data in contents.items():
        bucket.put(key, data)
    bucket.put("dir/never read", b"x" * 1000)
    options = {**own_server.options, "timeout_s": "2"}
    site = local_daemon("s3://cached", options=options, tiers=["MEM:{base}/mem:32MB", "SSD:{base}/ssd:1GB"])

    def all_is_served() -> None:
        drop_kernel_caches()
        for key, data in contents.items():
            assert (site.mount / key).read_bytes() == data
            assert (site.mount / key).stat().st_size == len(data)
        assert len(run("ls", "-l", site.mount / "dir").splitlines()) == 1 + 20 + 1
        run("tar", "cf", "/dev/null", "--exclude=never read", "-C", site.mount, ".")

    all_is_served()
    own_server.stop()
    all_is_served()
    took = [expect_eio(site.mount / "dir/never read")]
    assert site.fs_json("location", "/large")[0]["cached"][0]["blocks"] == [0]
    site.fs("free", "/large", "/dir/7")
    drop_kernel_caches()
    took += [expect_eio(site.mount / "dir/7")]
    assert (site.mount / "dir/8").read_bytes() == contents["dir/8"], "the others are still there"
    (site.mount / "written meanwhile").write_bytes(b"y" * 100_000)
    site.restart()
    drop_kernel_caches()
    assert (site.mount / "dir/8").read_bytes() == contents["dir/8"], "also after a restart"
    assert (site.mount / "written meanwhile").read_bytes() == b"y" * 100_000
    assert len(list((site.mount / "dir").iterdir())) == 21
    took += [expect_eio(site.mount / "large")]
    own_server.start()
    all_is_served()
    site.wait_persisted()
    assert bucket.get("written meanwhile") == b"y" * 100_000
    print("seconds until EIO:", [f"{one:.1f}" for one in took])


def test_a_silent_server_does_not_hold_up_what_is_known(local_daemon: Start, own_server: SeaweedS3) -> None:
    bucket = Bucket(own_server, "silent")
    for name in ("dir/read", "dir/unread"):
        bucket.put(name, b"x" * 5000)
    options = {**own_server.options, "timeout_s": "1"}
    site = local_daemon("s3://silent", options=options, arguments=["--sync-interval", "0"])
    assert (site.mount / "dir/read").read_bytes() == b"x" * 5000
    assert own_server.pid is not None
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        drop_kernel_caches()
        began = time.monotonic()
        assert (site.mount / "dir/read").read_bytes() == b"x" * 5000
        assert sorted(os.listdir(site.mount / "dir")) == ["read", "unread"]
        assert time.monotonic() - began < NO_SERVER_LIMIT_S
        print("seconds until EIO:", expect_eio(site.mount / "dir/unread"))
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    assert (site.mount / "dir/unread").read_bytes() == b"x" * 5000
