"""The S3 connector against a real server: the contract, what S3 stores that no path can name, uploads in
parts, and every way in which a server fails."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cutting_proxy import CuttingProxy
from servers import SeaweedS3
from under_storage import Outside, UnderStorageContract, names, open_fds, pattern, put

from alluxiofuse.errors import (
    UfsChangedError,
    UfsError,
    UfsNotFoundError,
    UfsPermissionError,
    UfsUnavailableError,
)
from alluxiofuse.ufs.s3 import S3UnderStorage
from alluxiofuse.ufs.s3_options import S3Options, key_of, parse_options, path_of
from alluxiofuse.ufs.s3_upload import S3Uploader

BUCKET = "contract"
MIB = 1 << 20
_numbers = itertools.count()


class OutsideBucket(Outside):
    def __init__(self, client: Any, prefix: str) -> None:
        self.client, self.prefix = client, prefix

    def write(self, path: bytes, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=self.prefix + path.decode(), Body=data)

    def read(self, path: bytes) -> bytes:
        answer = self.client.get_object(Bucket=BUCKET, Key=self.prefix + path.decode())
        return bytes(answer["Body"].read())

    def keys(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=self.prefix)
        return [item["Key"][len(self.prefix) :] for page in pages for item in page.get("Contents", ())]

    def leftovers(self) -> list[str]:
        found = self.client.list_multipart_uploads(Bucket=BUCKET, Prefix=self.prefix)
        return [upload["Key"] for upload in found.get("Uploads", ())]


@pytest.fixture(scope="module")
def server(s3_server: SeaweedS3) -> SeaweedS3:
    s3_server.create_bucket(BUCKET)
    return s3_server


@pytest.fixture
def options(server: SeaweedS3) -> S3Options:
    """A prefix of its own for each test, and parts as small as S3 allows."""
    uri = f"s3://{BUCKET}/tests/{next(_numbers)}"
    return parse_options(uri, {**server.options, "part_bytes": "5MiB", "multipart_bytes": "5MiB"}, {})


@pytest.fixture
def store(options: S3Options) -> Iterator[S3UnderStorage]:
    found = S3UnderStorage(options)
    yield found
    found.close()


@pytest.fixture
def outside(server: SeaweedS3, options: S3Options) -> OutsideBucket:
    return OutsideBucket(server.client(), options.prefix)


@pytest.fixture
def proxy(server: SeaweedS3) -> Iterator[CuttingProxy]:
    address = urlsplit(server.endpoint)
    found = CuttingProxy((str(address.hostname), int(address.port or 0)))
    yield found
    found.close()


@pytest.fixture
def proxied(proxy: CuttingProxy, options: S3Options) -> Iterator[S3UnderStorage]:
    changed = dataclasses.replace(options, endpoint=f"http://127.0.0.1:{proxy.port}", timeout_s=5.0)
    found = S3UnderStorage(changed)
    yield found
    found.close()


class TestS3(UnderStorageContract):
    pass


class TestS3WholeBucket:
    def test_no_prefix(self, server: SeaweedS3) -> None:
        bucket = server.create_bucket("whole-bucket")
        store = S3UnderStorage(parse_options(f"s3a://{bucket}/", server.options, {}))
        store.check()
        put(store, b"a/b", b"1")
        assert names(store) == [b"a"]
        assert names(store, b"a") == [b"a/b"]
        assert server.client().get_object(Bucket=bucket, Key="a/b")["Body"].read() == b"1"
        store.close()


# --- what S3 stores ------------------------------------------------------------------------------


def test_marker_of_another_tool_is_that_directory(store: S3UnderStorage, outside: OutsideBucket) -> None:
    outside.write(b"d/", b"")
    outside.write(b"e/", b"")
    outside.write(b"e/f", b"1")
    assert store.stat(b"d").is_dir
    assert [(entry.path, entry.is_dir) for entry in store.list(b"").entries] == [(b"d", True), (b"e", True)]
    assert names(store, b"d") == []
    assert names(store, b"e") == [b"e/f"]
    assert store.hidden_count == 0
    store.delete(b"d")
    with pytest.raises(UfsNotFoundError):
        store.stat(b"d")
    store.delete(b"e")
    assert outside.keys() == ["e/f"]


@pytest.mark.parametrize("limit", [1000, 2, 1])
def test_file_wins_over_directory_of_its_name(
    store: S3UnderStorage, outside: OutsideBucket, limit: int
) -> None:
    for path in (b"f", b"f/g", b"f!x", b"f.txt", b"f-1/x", b"g"):
        outside.write(path, path)
    assert sorted(names(store, limit=limit)) == [b"f", b"f!x", b"f-1", b"f.txt", b"g"]
    assert store.hidden_count == 1
    assert store.stat(b"f").is_file


class ForeignServer(BaseHTTPRequestHandler):
    """Answers every listing with keys that SeaweedFS would not store."""

    def do_GET(self) -> None:
        item = "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;e&quot;</ETag><Size>1</Size>"
        keys = ["p/good", "p/..", "p/" + "n" * 256, "p/nul%00", "q/elsewhere", "p/also%20good", "p/d/"]
        contents = "".join(f"<Contents><Key>{key}</Key>{item}</Contents>" for key in keys)
        prefixes = ["p/./", "p//", "p/dir/", "p/" + "m" * 256 + "/"]
        commons = "".join(f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>" for name in prefixes)
        head = "<IsTruncated>false</IsTruncated><EncodingType>url</EncodingType>"
        body = f"<ListBucketResult>{head}{contents}{commons}</ListBucketResult>".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_keys_that_are_no_paths_are_hidden_and_counted() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), ForeignServer) as foreign:
        serving = threading.Thread(target=foreign.serve_forever)
        serving.start()
        keys = {"access_key": "a", "secret_key": "s", "endpoint": f"http://127.0.0.1:{foreign.server_port}"}
        store = S3UnderStorage(parse_options("s3://bucket/p", keys, {}))
        try:
            assert names(store) == [b"also good", b"dir", b"good"]
            assert store.hidden_count == 8
        finally:
            store.close()
            foreign.shutdown()
            serving.join()


def test_paths_and_keys() -> None:
    assert key_of("p/", "\u00fc/x".encode()) == "p/\u00fc/x"
    assert path_of("p/", "p/a/b") == b"a/b"
    for key in ("p/", "p/a//b", "p/a/", "p//a", "p/../a", "q/a", "p/\0", "p/\udc80"):
        assert path_of("p/", key) is None
    with pytest.raises(UfsError) as caught:
        key_of("p/", b"/".join([b"n" * 200] * 6))
    assert caught.value.errno == errno.ENAMETOOLONG


def test_fingerprints_survive_parts(store: S3UnderStorage, options: S3Options) -> None:
    whole = dataclasses.replace(options, part_bytes=16 * MIB, multipart_bytes=64 * MIB)
    other = S3UnderStorage(whole)
    made = put(other, b"big", pattern(70 * MIB))
    assert b"-5:" in made.fingerprint
    assert store.stat(b"big").fingerprint == made.fingerprint
    assert bytes(store.read(b"big", 69 * MIB, 9 * MIB, made.fingerprint)) == pattern(70 * MIB)[69 * MIB :]
    other.close()


def test_md5_uploads(options: S3Options, outside: OutsideBucket) -> None:
    store = S3UnderStorage(dataclasses.replace(options, checksum="md5"))
    put(store, b"small", b"1")
    put(store, b"big", pattern(11 * MIB))
    assert outside.read(b"small") == b"1"
    assert outside.read(b"big") == pattern(11 * MIB)
    store.close()


def test_copy_in_parts(options: S3Options, outside: OutsideBucket) -> None:
    store = S3UnderStorage(dataclasses.replace(options, copy_limit_bytes=5 * MIB))
    data = pattern(12 * MIB)
    put(store, b"a b", data)
    made = store.copy(b"a b", b"c")
    assert outside.read(b"c") == data
    assert store.stat(b"c").fingerprint == made.fingerprint
    assert store.rename(b"c", b"d").size == len(data)
    assert sorted(outside.keys()) == ["a b", "d"]
    assert outside.leftovers() == []
    store.close()


def test_content_type_follows_the_name(
    store: S3UnderStorage, outside: OutsideBucket, options: S3Options
) -> None:
    put(store, b"page.html", b"<p>")
    seen = outside.client.head_object(Bucket=BUCKET, Key=options.prefix + "page.html")
    assert seen["ContentType"] == "text/html"


def test_parts_grow_with_the_object(options: S3Options) -> None:
    assert options.part_size(40_000 * MIB) == 5 * MIB
    for size in (50_001 * MIB, 5 << 40):
        part = options.part_size(size)
        assert part % MIB == 0
        assert part * 10_000 >= size > (part - MIB) * 10_000
    with pytest.raises(UfsError) as caught:
        options.part_size(1 << 60)
    assert caught.value.errno == errno.EFBIG


def test_parts_in_memory_are_bounded(options: S3Options, store: S3UnderStorage) -> None:
    """Many big puts at once share one pool of `parallel_parts` threads."""
    before = threading.active_count()
    writers = [
        threading.Thread(target=put, args=(store, b"w%d" % number, pattern(11 * MIB))) for number in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert threading.active_count() <= before + options.parallel_parts
    assert len(names(store)) == 4


# --- failures ------------------------------------------------------------------------------------


def assert_says(error: UfsError, *words: str) -> None:
    for word in words:
        assert word in error.message
    assert "\n" not in error.message
    assert "secret" not in error.message


@pytest.mark.parametrize(
    ("change", "word"),
    [({"secret_key": "wrong"}, "secret"), ({"access_key": "unknown"}, "key"), ({"anonymous": True}, "cred")],
)
def test_wrong_credentials(options: S3Options, change: dict[str, Any], word: str) -> None:
    if change.get("anonymous"):
        change = {"anonymous": True, "access_key": None, "secret_key": None}
    store = S3UnderStorage(dataclasses.replace(options, **change))
    for call in (
        store.check,
        lambda: store.stat(b"f"),
        lambda: store.list(b""),
        lambda: store.read(b"f", 0, 1),
        lambda: put(store, b"f", b""),
        lambda: store.delete(b"f"),
        lambda: store.copy(b"f", b"g"),
    ):
        with pytest.raises(UfsPermissionError) as caught:
            call()
        assert BUCKET in caught.value.message
        assert str(options.endpoint) in caught.value.message
        assert "testsecret" not in caught.value.message
        assert "testkey" not in caught.value.message
    with pytest.raises(UfsPermissionError, match=word):
        store.check()
    store.close()


def test_no_credentials_at_all(options: S3Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    store = S3UnderStorage(dataclasses.replace(options, access_key=None, secret_key=None))
    for call in (store.check, lambda: store.read(b"f", 0, 1), lambda: put(store, b"f", b"")):
        with pytest.raises(UfsPermissionError, match="AWS_ACCESS_KEY_ID"):
            call()
    store.close()


def test_credentials_of_the_environment(
    options: S3Options, server: SeaweedS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    store = S3UnderStorage(dataclasses.replace(options, access_key=None, secret_key=None))
    made = put(store, b"f", b"1")
    assert bytes(store.read(b"f", 0, 1, made.fingerprint)) == b"1"
    store.close()


def test_missing_bucket(options: S3Options) -> None:
    store = S3UnderStorage(dataclasses.replace(options, bucket="no-such-bucket"))
    for call in (
        store.check,
        lambda: store.stat(b"f"),
        lambda: store.list(b""),
        lambda: store.read(b"f", 0, 1),
        lambda: put(store, b"f", b"x"),
    ):
        with pytest.raises(UfsNotFoundError) as caught:
            call()
        assert_says(caught.value, "no-such-bucket", str(options.endpoint), "no such bucket")
    store.close()


def test_read_only_identity(server: SeaweedS3) -> None:
    bucket = server.create_bucket(SeaweedS3.READ_ONLY_BUCKET)
    server.client().put_object(Bucket=bucket, Key="f", Body=b"1")
    keys = {"access_key": server.ro_access_key, "secret_key": server.ro_secret_key}
    store = S3UnderStorage(parse_options(f"s3://{bucket}", {**server.options, **keys}, {}))
    store.check()
    assert bytes(store.read(b"f", 0, 1, store.stat(b"f").fingerprint)) == b"1"
    for call in (
        lambda: put(store, b"g", b"x"),
        lambda: store.delete(b"f"),
        lambda: store.copy(b"f", b"g"),
    ):
        with pytest.raises(UfsPermissionError):
            call()
    assert names(store) == [b"f"]
    store.close()


def test_unreachable_endpoint(options: S3Options) -> None:
    store = S3UnderStorage(dataclasses.replace(options, endpoint="http://127.0.0.1:9", timeout_s=2.0))
    for call in (
        store.check,
        lambda: store.stat(b"f"),
        lambda: store.read(b"f", 0, 1),
        lambda: put(store, b"f", b"x"),
    ):
        with pytest.raises(UfsUnavailableError) as caught:
            call()
        assert_says(caught.value, BUCKET, "http://127.0.0.1:9", "no answer")
    store.close()


def test_silent_server_is_given_up(options: S3Options) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        store = S3UnderStorage(dataclasses.replace(options, endpoint=endpoint, timeout_s=1.0))
        with pytest.raises(UfsUnavailableError):
            store.check()
        with pytest.raises(UfsUnavailableError):
            store.read(b"f", 0, 1)
        store.close()


def test_answer_cut_short_is_never_short_data(
    proxied: S3UnderStorage, proxy: CuttingProxy, store: S3UnderStorage
) -> None:
    made = put(store, b"f", pattern(MIB))
    made_odd = put(store, b"odd\nname", pattern(MIB))
    assert bytes(proxied.read(b"f", 0, MIB, made.fingerprint)) == pattern(MIB)
    proxy.cut_after = 300_000
    for path, entry in ((b"f", made), (b"odd\nname", made_odd)):
        for fingerprint in (entry.fingerprint, None):
            try:
                data = bytes(proxied.read(path, 0, MIB, fingerprint))
            except UfsUnavailableError:
                continue
            assert data == pattern(MIB), "resumed by the library, else an error"
    proxy.cut_after = None
    assert bytes(proxied.read(b"f", 0, MIB, made.fingerprint)) == pattern(MIB)


@pytest.mark.parametrize("size", [100_000, 11 * MIB])
@pytest.mark.parametrize("checksum", ["crc32", "md5"])
def test_damaged_upload_is_refused(
    proxy: CuttingProxy, options: S3Options, outside: OutsideBucket, size: int, checksum: str
) -> None:
    changed = dataclasses.replace(
        options, endpoint=f"http://127.0.0.1:{proxy.port}", timeout_s=5.0, checksum=checksum
    )
    store = S3UnderStorage(changed)
    proxy.damage = lambda chunk: chunk.replace(b"Z" * 1000, b"z" * 1000)
    with pytest.raises(UfsError):
        put(store, b"f", b"Z" * size)
    assert outside.keys() == []
    assert outside.leftovers() == []
    proxy.damage = lambda chunk: chunk
    put(store, b"f", b"Z" * size)
    assert outside.read(b"f") == b"Z" * size
    store.close()


def test_failed_part_aborts_the_upload(
    proxied: S3UnderStorage, proxy: CuttingProxy, outside: OutsideBucket, store: S3UnderStorage
) -> None:
    put(store, b"f", b"old")
    seen = 0

    def damage(chunk: bytes) -> bytes:
        nonlocal seen
        if b"partNumber=3" in chunk:
            seen += 1
            return chunk.replace(b"PUT ", b"XXX ", 1)
        return chunk

    proxy.damage = damage
    with pytest.raises(UfsError):
        put(proxied, b"f", pattern(16 * MIB))
    assert seen >= 1
    assert outside.leftovers() == []
    assert outside.read(b"f") == b"old"


def test_lost_answer_of_the_completion(
    proxied: S3UnderStorage, proxy: CuttingProxy, outside: OutsideBucket
) -> None:
    """The server completes, the answer never arrives, the library asks again: that is a success."""
    completions = 0

    def damage(chunk: bytes) -> bytes:
        nonlocal completions
        if chunk.startswith(b"POST") and b"uploadId=" in chunk:
            completions += 1
            proxy.cut_after = 0 if completions == 1 else None
        return chunk

    proxy.damage = damage
    made = put(proxied, b"f", pattern(11 * MIB))
    assert completions >= 2
    assert outside.read(b"f") == pattern(11 * MIB)
    assert proxied.stat(b"f").fingerprint == made.fingerprint


def test_changed_between_parts_of_a_copy(options: S3Options, store: S3UnderStorage) -> None:
    from alluxiofuse.ufs.s3_client import S3Client

    first = put(store, b"a", b"one")
    put(store, b"a", b"two")
    client = S3Client(options)
    uploader = S3Uploader(options, client)
    etag = '"' + first.fingerprint.decode().partition(":")[0] + '"'
    with pytest.raises(UfsChangedError):
        uploader.copy(options.prefix + "a", options.prefix + "b", "a", 3, etag)
    assert names(store) == [b"a"]
    uploader.close()
    client.close()


def test_server_goes_and_comes_back() -> None:
    with SeaweedS3() as server:
        bucket = server.create_bucket("comes-back")
        store = S3UnderStorage(parse_options(f"s3://{bucket}/p", {**server.options, "timeout_s": "3"}, {}))
        made = put(store, b"f", b"kept")
        assert bytes(store.read(b"f", 0, 4)) == b"kept"  # the library's own descriptors are open now
        before = open_fds()
        server.stop()
        for call in (
            lambda: store.read(b"f", 0, 4, made.fingerprint),
            lambda: store.stat(b"f"),
            lambda: put(store, b"g", b"x"),
            lambda: put(store, b"g", pattern(65 * MIB)),
        ):
            with pytest.raises(UfsUnavailableError):
                call()
        server.start()
        assert bytes(store.read(b"f", 0, 4, made.fingerprint)) == b"kept"
        assert names(store) == [b"f"]
        assert open_fds() <= before + 2
        store.close()


def _certificates(tool: str, place: Path) -> tuple[str, str, str]:
    """Files: (a private authority, a certificate it signed for 127.0.0.1, its key)."""
    (place / "extensions").write_text("subjectAltName=IP:127.0.0.1\n")

    def run(command: str) -> None:
        subprocess.run([tool, *command.split()], check=True, capture_output=True, cwd=place)

    run("req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca")
    run("req -newkey rsa:2048 -nodes -subj /CN=server -keyout key -out request")
    run("x509 -req -in request -CA ca -CAkey ca.key -days 2 -extfile extensions -out certificate")
    return str(place / "ca"), str(place / "certificate"), str(place / "key")


def test_tls_with_a_private_authority(
    server: SeaweedS3, options: S3Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = shutil.which("openssl")
    if tool is None:
        pytest.skip("no openssl to make a certificate with")
    authority, certificate, key = _certificates(tool, tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    address = urlsplit(server.endpoint)
    proxy = CuttingProxy((str(address.hostname), int(address.port or 0)), context)
    changed = dataclasses.replace(options, endpoint=f"https://127.0.0.1:{proxy.port}", timeout_s=5.0)
    try:
        monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
        distrustful = S3UnderStorage(changed)
        for call in (distrustful.check, lambda: distrustful.read(b"f", 0, 1)):
            with pytest.raises(UfsUnavailableError, match="certificate"):
                call()
        distrustful.close()
        monkeypatch.setenv("AWS_CA_BUNDLE", authority)
        store = S3UnderStorage(changed)
        data = pattern(11 * MIB)
        made = put(store, b"big", data)
        assert bytes(store.read(b"big", 0, 11 * MIB, made.fingerprint)) == data
        checks = store._verifier.begin("big")
        assert store._reader.read(options.prefix + "big", 0, 10, None, checks)[0] == data[:10]
        proxy.damage = lambda chunk: chunk.replace(b"Z" * 1000, b"z" * 1000)
        with pytest.raises(UfsError):
            put(store, b"small", b"Z" * 5000)
        proxy.damage = lambda chunk: chunk
        store.close()
    finally:
        proxy.close()
