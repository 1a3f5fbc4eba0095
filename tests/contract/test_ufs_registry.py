"""URIs and options as people write them, and that secrets stay unseen."""

from __future__ import annotations

from pathlib import Path

import pytest

from alluxiofuse.errors import UserError
from alluxiofuse.ufs.local import LocalUnderStorage
from alluxiofuse.ufs.registry import HIDDEN, SECRET_OPTIONS, open_ufs, redact, scheme_of
from alluxiofuse.ufs.s3 import S3UnderStorage
from alluxiofuse.ufs.s3_options import OPTIONS, parse_options

KEYS = {"access_key": "AKIDEXAMPLE", "secret_key": "very-secret", "endpoint": "http://127.0.0.1:9"}


def test_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in (
        f"file://{tmp_path}/d",
        f"{tmp_path}/d",
        "./d",
        "d",
        "file://localhost" + str(tmp_path / "d"),
    ):
        store = open_ufs(uri, {"fsync": "false"})
        assert isinstance(store, LocalUnderStorage)
        assert store.uri == f"file://{tmp_path}/d"
    assert open_ufs(f"{tmp_path}/100%20:x", {}).uri.endswith("/100%20:x")


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/", "s3a://bucket/a/b/", "S3://bucket/a"])
def test_buckets(uri: str) -> None:
    store = open_ufs(uri, KEYS)
    assert isinstance(store, S3UnderStorage)
    assert store.uri.startswith("s3://bucket")
    assert not store.uri.endswith("/")
    for text in (repr(store), str(store.__dict__), store.uri):
        assert "very-secret" not in text
        assert "AKIDEXAMPLE" not in text
    store.close()


@pytest.mark.parametrize(
    ("uri", "options", "words"),
    [
        ("ftp://host/x", {}, ["ftp://", "s3://", "file://"]),
        ("", {}, ["empty"]),
        ("file://host/dir", {}, ["file:///"]),
        ("file:relative://x", {}, ["file:relative://"]),
        ("/data", {"fsycn": "true"}, ["fsycn", "fsync"]),
        ("/data", {"fsync": "maybe"}, ["fsync=maybe"]),
        ("s3://", {}, ["bucket"]),
        ("s3://a_b!/x", {}, ["a_b!"]),
        ("s3://bucket/a//b", {}, ["prefix"]),
        ("s3://bucket/../b", {}, ["prefix"]),
        ("s3://bucket", {"acces_key": "x"}, ["acces_key", "access_key"]),
        ("s3://bucket", {"access_key": "x"}, ["secret_key"]),
        ("s3://bucket", {"endpoint": "127.0.0.1:9000"}, ["http://"]),
        ("s3://bucket", {"endpoint": "http://u:very-secret@h"}, ["endpoint", "credentials"]),
        ("s3://bucket", {"timeout_s": "soon"}, ["timeout_s=soon", "number"]),
        ("s3://bucket", {"timeout_s": "nan"}, ["timeout_s"]),
        ("s3://bucket", {"part_bytes": "1MiB"}, ["part_bytes", "5MiB"]),
        ("s3://bucket", {"part_bytes": "big"}, ["part_bytes", "size"]),
        ("s3://bucket", {"path_style": "perhaps"}, ["path_style", "auto"]),
        ("s3://bucket", {"checksum": "sha1"}, ["checksum", "md5"]),
        ("s3://bucket", {"parallel_parts": "0"}, ["parallel_parts"]),
    ],
)
def test_mistakes_are_one_line(uri: str, options: dict[str, str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        open_ufs(uri, options)
    assert "\n" not in caught.value.message
    assert "very-secret" not in caught.value.message
    for word in words:
        assert word in caught.value.message


def test_endpoint_from_the_environment() -> None:
    environ = {"AWS_ENDPOINT_URL": "http://third:1", "AWS_ENDPOINT_URL_S3": "http://second:1"}
    assert parse_options("s3://bucket", {}, environ).endpoint == "http://second:1"
    environ["S3_ENDPOINT"] = "http://first:1/"
    found = parse_options("s3://bucket", {}, environ)
    assert (found.endpoint, found.path_style) == ("http://first:1", True)
    found = parse_options("s3://bucket", {"endpoint": "https://own", "path_style": "false"}, environ)
    assert (found.endpoint, found.path_style) == ("https://own", False)
    assert parse_options("s3://bucket", {}, {}).endpoint is None


def test_redact() -> None:
    shown = redact({**KEYS, "region": "r", "session_token": "t", "future_password": "p"})
    assert shown == {
        "access_key": HIDDEN,
        "secret_key": HIDDEN,
        "session_token": HIDDEN,
        "future_password": HIDDEN,
        "endpoint": "http://127.0.0.1:9",
        "region": "r",
    }
    assert set(OPTIONS) >= SECRET_OPTIONS
    assert "very-secret" not in repr(parse_options("s3://bucket", KEYS, {}))


def test_schemes() -> None:
    assert scheme_of("/a/b://c") == "file"
    assert scheme_of("S3A://b") == "s3a"
    assert scheme_of("relative") == "file"
