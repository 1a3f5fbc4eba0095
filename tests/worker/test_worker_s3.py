"""Against a real S3 server: parallel ranges in, multipart out, and reading with the server gone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from servers import SeaweedS3
from worker_world import MB, TinyMaster, eventually, pattern, running, trio_test

from alluxiofuse.errors import UfsChangedError
from alluxiofuse.ufs import registry
from alluxiofuse.wire.types import UfsSource


def test_read_write_and_server_gone(tmp_path: Path) -> None:
    with SeaweedS3() as server:  # not the shared one: this one is stopped
        read_write_and_stop(tmp_path, server, server.create_bucket("worker-tests"))


def read_write_and_stop(tmp_path: Path, s3_server: SeaweedS3, bucket: str) -> None:
    data = pattern(40 * MB + 11)
    client = s3_server.client()
    client.put_object(Bucket=bucket, Key="in/a", Body=data)
    options = {name: str(value) for name, value in s3_server.options.items()}

    @trio_test
    async def run() -> None:
        master = TinyMaster(tmp_path / "ufs")
        master.uri, master.options = f"s3://{bucket}/in", options
        storage = registry.open_ufs(master.uri, options)
        source = UfsSource(1, b"a", len(data), storage.stat(b"a").fingerprint)
        async with running(tmp_path, master=master) as world:
            attached, fd = await world.attach(11, source)
            await world.fetch(attached.lock_id, 39 * MB, 4096)
            await world.settled()
            assert world.slabs.counters["ufs_read_bytes"] == MB
            await world.fetch(attached.lock_id, 0, len(data))
            assert os.pread(fd, len(data), 0) == data
            os.close(fd)

            container, _ = await world.write_new(data[::-1])
            world.persist(container, len(data), b"out/b")
            await eventually(lambda: bool(master.done), "the upload ends")
            assert master.done[0].error_code == ""
            assert master.done[0].fingerprint == storage.stat(b"out/b").fingerprint
            found = client.get_object(Bucket=bucket, Key="in/out/b")["Body"].read()
            assert found == data[::-1]

            client.put_object(Bucket=bucket, Key="in/a", Body=b"new")
            with pytest.raises(UfsChangedError):
                await world.read_all(12, source)
        storage.close()
        s3_server.stop()
        async with running(tmp_path, master=master) as world:
            assert await world.read_all(11, source) == data

    run()
