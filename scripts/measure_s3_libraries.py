#!/usr/bin/env python3
"""Which library should move S3 data: the measurement behind docs/ufs.md.

Starts a SeaweedFS on loopback and lets each candidate, in a process of its own, fetch one object in
parallel ranges into a file on tmpfs (pwrite), fetch 4 KiB at random offsets, and upload the file.
Prints a Markdown table: median of the rounds, and the CPU seconds the client process spent (client
and server share the machine, so CPU is bandwidth).

    python scripts/measure_s3_libraries.py [--size-mib 1024] [--rounds 3] [--only boto3,obstore]

boto3's CRT candidate needs `pip install awscrt`; a candidate whose library is missing is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MIB = 1 << 20
RANGES = [(1, 8), (4, 8), (8, 4), (16, 4)]
"""(MiB of a range, how many at once)."""
UPLOADS = [(16, 4)]
LATENCY_READS = 300
KEY = "big"

Fetch = Callable[[int, int], Any]
"""(offset, length) -> buffer."""


class Boto3:
    """The SDK's calls in threads."""

    def __init__(self, place: dict[str, str]) -> None:
        import boto3  # type: ignore[import-untyped]
        from botocore.config import Config  # type: ignore[import-untyped]

        self.bucket = place["bucket"]
        self.client = boto3.session.Session().client(
            "s3",
            endpoint_url=place["endpoint"],
            region_name=place["region"],
            aws_access_key_id=place["access_key"],
            aws_secret_access_key=place["secret_key"],
            config=Config(s3={"addressing_style": "path"}, max_pool_connections=32),
        )
        self.etag = self.client.head_object(Bucket=self.bucket, Key=KEY)["ETag"]

    def fetch(self, offset: int, length: int) -> Any:
        answer = self.client.get_object(
            Bucket=self.bucket, Key=KEY, Range=f"bytes={offset}-{offset + length - 1}", IfMatch=self.etag
        )
        return answer["Body"].read()

    def upload(self, source: str, size: int, part: int, parallel: int) -> None:
        fd = os.open(source, os.O_RDONLY)
        client, bucket = self.client, self.bucket
        upload_id = client.create_multipart_upload(Bucket=bucket, Key="up")["UploadId"]

        def one(index: int) -> dict[str, Any]:
            body = os.pread(fd, min(part, size - index * part), index * part)
            answer = client.upload_part(
                Bucket=bucket, Key="up", UploadId=upload_id, PartNumber=index + 1, Body=body
            )
            return {"PartNumber": index + 1, "ETag": answer["ETag"]}

        with ThreadPoolExecutor(parallel) as pool:
            parts = list(pool.map(one, range((size + part - 1) // part)))
        client.complete_multipart_upload(
            Bucket=bucket, Key="up", UploadId=upload_id, MultipartUpload={"Parts": parts}
        )
        os.close(fd)


class Boto3Into(Boto3):
    """The same, the body received into one preallocated buffer."""

    def fetch(self, offset: int, length: int) -> Any:
        answer = self.client.get_object(
            Bucket=self.bucket, Key=KEY, Range=f"bytes={offset}-{offset + length - 1}", IfMatch=self.etag
        )
        buffer = memoryview(bytearray(length))
        body, filled = answer["Body"], 0
        while filled < length:
            got = body.readinto(buffer[filled:])
            if not got:
                raise OSError("short body")
            filled += got
        return buffer


class SignedHttp:
    """botocore signs, http.client moves the bytes: what the SDK costs beyond the socket."""

    def __init__(self, place: dict[str, str]) -> None:
        import threading
        from urllib.parse import urlsplit

        from botocore.auth import S3SigV4Auth  # type: ignore[import-untyped]
        from botocore.credentials import Credentials  # type: ignore[import-untyped]

        self.host = urlsplit(place["endpoint"]).netloc
        keys = Credentials(place["access_key"], place["secret_key"])
        self.signer = S3SigV4Auth(keys, "s3", place["region"])
        self.bucket, self.local = place["bucket"], threading.local()
        self.etag = Boto3(place).etag

    def connection(self) -> Any:
        import http.client

        if not hasattr(self.local, "connection"):
            self.local.connection = http.client.HTTPConnection(self.host, timeout=30)
        return self.local.connection

    def fetch(self, offset: int, length: int) -> Any:
        from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]

        request = AWSRequest("GET", f"http://{self.host}/{self.bucket}/{KEY}")
        request.headers["Range"] = f"bytes={offset}-{offset + length - 1}"
        request.headers["If-Match"] = self.etag
        self.signer.add_auth(request)
        connection = self.connection()
        connection.request("GET", f"/{self.bucket}/{KEY}", headers=dict(request.headers))
        answer = connection.getresponse()
        if answer.status != 206:
            raise OSError(f"status {answer.status}")
        buffer = memoryview(bytearray(length))
        filled = 0
        while filled < length:
            filled += answer.readinto(buffer[filled:])
        answer.read()
        return buffer

    upload = None


class Crt:
    """The C library under boto3's crt extra, called directly (its transfer manager knows only files)."""

    def __init__(self, place: dict[str, str]) -> None:
        from urllib.parse import urlsplit

        from awscrt.auth import AwsCredentialsProvider  # type: ignore[import-not-found,unused-ignore]
        from awscrt.io import (  # type: ignore[import-not-found,unused-ignore]
            ClientBootstrap,
            DefaultHostResolver,
            EventLoopGroup,
        )
        from awscrt.s3 import S3Client, create_default_s3_signing_config  # type: ignore[import-not-found,unused-ignore]

        self.host = urlsplit(place["endpoint"]).netloc
        self.bucket = place["bucket"]
        group = EventLoopGroup()
        bootstrap = ClientBootstrap(group, DefaultHostResolver(group))
        provider = AwsCredentialsProvider.new_static(place["access_key"], place["secret_key"])
        signing = create_default_s3_signing_config(region=place["region"], credential_provider=provider)
        from awscrt.s3 import S3RequestTlsMode

        self.client = S3Client(
            bootstrap=bootstrap,
            region=place["region"],
            signing_config=signing,
            tls_mode=S3RequestTlsMode.DISABLED,
            part_size=8 * MIB,
            throughput_target_gbps=10,
        )
        self.etag = Boto3(place).etag

    def request(self, method: str, path: str, headers: list[tuple[str, str]], body: Any = None) -> Any:
        from awscrt.http import HttpHeaders, HttpRequest  # type: ignore[import-not-found,unused-ignore]

        return HttpRequest(method, path, HttpHeaders([("Host", self.host), *headers]), body)

    def fetch(self, offset: int, length: int) -> Any:
        from awscrt.s3 import S3RequestType

        buffer = memoryview(bytearray(length))

        def on_body(chunk: bytes, offset: int, **_: Any) -> None:
            at = offset - start
            buffer[at : at + len(chunk)] = chunk

        start = offset
        headers = [("Range", f"bytes={offset}-{offset + length - 1}"), ("If-Match", self.etag)]
        self.client.make_request(
            type=S3RequestType.GET_OBJECT,
            request=self.request("GET", f"/{self.bucket}/{KEY}", headers),
            on_body=on_body,
        ).finished_future.result(120)
        return buffer

    def upload(self, source: str, size: int, part: int, parallel: int) -> None:
        from awscrt.s3 import S3RequestType

        self.client.make_request(
            type=S3RequestType.PUT_OBJECT,
            request=self.request("PUT", f"/{self.bucket}/up", [("Content-Length", str(size))]),
            send_filepath=source,
            part_size=part,
        ).finished_future.result(300)


class PyArrow:
    def __init__(self, place: dict[str, str]) -> None:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.fs  # type: ignore[import-untyped]

        pyarrow.set_io_thread_count(16)
        self.fs = pyarrow.fs.S3FileSystem(
            endpoint_override=place["endpoint"].removeprefix("http://"),
            scheme="http",
            region=place["region"],
            access_key=place["access_key"],
            secret_key=place["secret_key"],
        )
        self.bucket = place["bucket"]
        self.file = self.fs.open_input_file(f"{self.bucket}/{KEY}")

    def fetch(self, offset: int, length: int) -> Any:
        return self.file.read_at(length, offset)  # knows no If-Match

    def upload(self, source: str, size: int, part: int, parallel: int) -> None:
        fd = os.open(source, os.O_RDONLY)
        with self.fs.open_output_stream(f"{self.bucket}/up", buffer_size=None) as stream:
            for at in range(0, size, part):
                stream.write(os.pread(fd, min(part, size - at), at))
        os.close(fd)


class Obstore:
    def __init__(self, place: dict[str, str]) -> None:
        import obstore
        from obstore.store import S3Store

        self.obs = obstore
        self.store = S3Store(
            place["bucket"],
            endpoint=place["endpoint"],
            region=place["region"],
            access_key_id=place["access_key"],
            secret_access_key=place["secret_key"],
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )
        self.etag = obstore.head(self.store, KEY)["e_tag"]

    def fetch(self, offset: int, length: int) -> Any:
        answer = self.obs.get(
            self.store, KEY, options={"range": (offset, offset + length), "if_match": self.etag}
        )
        return answer.bytes()

    def upload(self, source: str, size: int, part: int, parallel: int) -> None:
        self.obs.put(self.store, "up", Path(source), chunk_size=part, max_concurrency=parallel)


class Connector:
    """This project's connector: what is left of the chosen libraries' speed."""

    def __init__(self, place: dict[str, str]) -> None:
        from alluxiofuse.ufs.registry import open_ufs

        options = {name: value for name, value in place.items() if name != "bucket"}
        self.store = open_ufs(f"s3://{place['bucket']}", options)
        self.version = self.store.stat(KEY.encode()).fingerprint

    def fetch(self, offset: int, length: int) -> Any:
        return self.store.read(KEY.encode(), offset, length, self.version)

    def upload(self, source: str, size: int, part: int, parallel: int) -> None:
        from alluxiofuse.ufs.base import UfsAttrs

        fd = os.open(source, os.O_RDONLY)
        self.store.put(b"up", fd, size, UfsAttrs(0, 0, 0, 0))  # parts of 16 MiB, 4 at once
        os.close(fd)


CANDIDATES: dict[str, Any] = {
    "boto3": Boto3,
    "boto3-into": Boto3Into,
    "signed-http": SignedHttp,
    "crt": Crt,
    "pyarrow": PyArrow,
    "obstore": Obstore,
    "alluxiofuse": Connector,
}


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_mib() -> float:
    """High water of this process's resident memory (ru_maxrss would include the parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


def download(fetch: Fetch, size: int, part: int, parallel: int, target: str) -> float:
    """Seconds to have [0, size) in a fresh file."""
    Path(target).unlink(missing_ok=True)
    fd = os.open(target, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, size)

    def one(at: int) -> int:
        return os.pwrite(fd, fetch(at, min(part, size - at)), at)

    started = time.perf_counter()
    with ThreadPoolExecutor(parallel) as pool:
        written = sum(pool.map(one, range(0, size, part)))
    took = time.perf_counter() - started
    os.close(fd)
    if written != size:
        raise OSError(f"{written} of {size} bytes")
    return took


def run_candidate(name: str, place: dict[str, str], size: int, source: str) -> dict[str, float]:
    """In the child: one round of one candidate; each transfer as MiB/s and, with " cpu", CPU seconds."""
    started = time.perf_counter()
    candidate = CANDIDATES[name](place)
    result = {"set-up s": time.perf_counter() - started, "idle MiB": peak_mib()}
    picker = random.Random(1)
    spans = []
    for _ in range(LATENCY_READS):
        at = picker.randrange(size // 4096) * 4096
        started = time.perf_counter()
        candidate.fetch(at, 4096)
        spans.append(time.perf_counter() - started)
    result["4 KiB ms"] = statistics.median(spans) * 1e3
    target = source + ".got"
    for part, parallel in RANGES:
        before = cpu_s()
        took = download(candidate.fetch, size, part * MIB, parallel, target)
        result[f"get {part}x{parallel}"] = size / MIB / took
        result[f"get {part}x{parallel} cpu"] = cpu_s() - before
    same = subprocess.run(["cmp", source, target], check=False).returncode == 0
    Path(target).unlink()
    if not same:
        raise OSError(f"{name} fetched other bytes")
    result["peak get MiB"] = peak_mib()
    for part, parallel in UPLOADS if candidate.upload else []:
        before, started = cpu_s(), time.perf_counter()
        candidate.upload(source, size, part * MIB, parallel)
        result[f"put {part}x{parallel}"] = size / MIB / (time.perf_counter() - started)
        result[f"put {part}x{parallel} cpu"] = cpu_s() - before
    result["peak put MiB"] = peak_mib()
    return result


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Medians of the rounds."""
    transfers = [f"get {part}x{parallel}" for part, parallel in RANGES]
    transfers += [f"put {part}x{parallel}" for part, parallel in UPLOADS]
    plain = {
        "set-up s": ".2f",
        "4 KiB ms": ".1f",
        "idle MiB": ".0f",
        "peak get MiB": ".0f",
        "peak put MiB": ".0f",
    }
    lines = ["| library | " + " | ".join([*transfers, *plain]) + " |"]
    lines.append("|---" + "|---:" * (len(transfers) + len(plain)) + "|")
    for name, rounds in results.items():
        middle = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        cells = [
            f"{middle[key]:.0f} ({middle[key + ' cpu']:.1f})" if key in middle else "-" for key in transfers
        ]
        cells += [format(middle[key], form) for key, form in plain.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def make_source(path: str, size: int) -> None:
    with open(path, "wb") as out:
        for _ in range(0, size, 16 * MIB):
            out.write(os.urandom(min(16 * MIB, size)))
        out.truncate(size)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(CANDIDATES))
    parser.add_argument("--tmpfs", default="/dev/shm")  # noqa: S108
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = arguments.size_mib * MIB
    if arguments.child:
        job = json.loads(sys.stdin.read())
        print(json.dumps(run_candidate(arguments.child, job["place"], size, job["source"])))
        return
    from tests.servers import SeaweedS3

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server and the files go too
    results: dict[str, list[dict[str, float]]] = {}
    with SeaweedS3() as server, tempfile.TemporaryDirectory(dir=arguments.tmpfs) as scratch:
        place = {**server.options, "bucket": server.create_bucket("measure")}
        source = f"{scratch}/source"
        make_source(source, size)
        server.client().upload_file(source, "measure", KEY)
        # Rounds outermost, so that a busy moment of the machine hits all candidates alike.
        for turn in range(arguments.rounds):
            for name in arguments.only.split(","):
                command = [sys.executable, __file__, "--child", name, "--size-mib", str(arguments.size_mib)]
                job = json.dumps({"place": place, "source": source})
                child = subprocess.run(command, input=job, capture_output=True, text=True, check=False)
                if child.returncode:
                    print(f"{name} left out: {child.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                    continue
                results.setdefault(name, []).append(json.loads(child.stdout))
                print(f"{turn} {name}: {child.stdout.strip()}", file=sys.stderr, flush=True)
    print("MiB/s (CPU seconds of the client); get and put: MiB of a range x how many at once\n")
    print(table(results))


if __name__ == "__main__":
    main()
