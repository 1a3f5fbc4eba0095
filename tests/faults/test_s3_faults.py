"""The S3 connector behind a proxy that fails on demand, in front of a real S3 server: what a caller sees,
what is counted, and that all is well afterwards."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from s3_proxy import Action, Answer, Cut, Damage, Hang, Hold, Rule, S3Proxy
from servers import SeaweedS3

from alluxiofuse.errors import UfsChangedError, UfsError, UfsUnavailableError
from alluxiofuse.ufs.base import PutCancelled, UfsAttrs, UfsEntry
from alluxiofuse.ufs.s3 import S3UnderStorage
from alluxiofuse.ufs.s3_data import Unclear
from alluxiofuse.ufs.s3_options import parse_options
from alluxiofuse.ufs.s3_pace import ATTEMPTS, MOST_AT_ONCE, Pace, Throttled

MIB = 1 << 20
ATTRS = UfsAttrs(0o644, 0, 0, 0)
TIMEOUT_S = 2
ROUNDS = int(os.environ.get("FAULTS_S3_ROUNDS") or 60)
LONG = pytest.mark.skipif(not os.environ.get("FAULTS_S3_ROUNDS"), reason="long: with FAULTS_S3_ROUNDS set")


@pytest.fixture(scope="module")
def bucket(s3_server: SeaweedS3) -> str:
    return s3_server.create_bucket("faults")


@pytest.fixture
def proxy(s3_server: SeaweedS3) -> Iterator[S3Proxy]:
    with S3Proxy(s3_server.endpoint) as found:
        yield found


@pytest.fixture
def opened(
    bucket: str, s3_server: SeaweedS3, proxy: S3Proxy, request: pytest.FixtureRequest
) -> Iterator[Any]:
    """Makes connectors that go through the proxy, in a prefix of the test's own."""
    made: list[S3UnderStorage] = []
    prefix = "".join(char if char.isalnum() else "-" for char in request.node.name)

    def make(**options: str) -> S3UnderStorage:
        small = {"part_bytes": "5MiB", "multipart_bytes": "5MiB", "timeout_s": str(TIMEOUT_S)}
        chosen = {**s3_server.options, **small, "endpoint": proxy.endpoint, **options}
        made.append(S3UnderStorage(parse_options(f"s3://{bucket}/{prefix}", chosen, {})))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def store(opened: Any) -> S3UnderStorage:
    found: S3UnderStorage = opened()
    return found


def put(store: S3UnderStorage, path: bytes, data: bytes, is_cancelled: Any = lambda: False) -> UfsEntry:
    fd = os.memfd_create("data")
    try:
        os.write(fd, data)
        return store.put(path, fd, len(data), ATTRS, is_cancelled)
    finally:
        os.close(fd)


def uploads_left(s3_server: SeaweedS3, bucket: str, store: S3UnderStorage) -> list[str]:
    """With parts or without."""
    prefix = store.uri.partition(f"{bucket}/")[2]
    found = s3_server.client().list_multipart_uploads(Bucket=bucket, Prefix=prefix)
    return [one["Key"] for one in found.get("Uploads", ())]


PASSING: list[Action] = [
    Answer(500, "InternalError"),
    Answer(503, "SlowDown"),
    Answer(500, "InternalError", is_done=True),
    Cut(),
    Cut(is_done=True),
]


@pytest.mark.parametrize(
    "action", [*PASSING[:2], pytest.param(PASSING[2], marks=LONG), *PASSING[3:]], ids=str
)
def test_what_fails_once_is_done_again(store: S3UnderStorage, proxy: S3Proxy, action: Action) -> None:
    """Every operation, its first request failing, or only the answer to it lost."""

    def once(operation: str, work: Any) -> Any:
        rule = proxy.add(Rule(operation, action, times=1))
        try:
            return work()
        finally:
            assert rule.used == 1, operation
            proxy.clear()

    once("PutObject", lambda: put(store, b"a", b"one"))
    big = os.urandom(6 * MIB)
    once("UploadPart", lambda: put(store, b"big", big))
    once("CompleteMultipartUpload", lambda: put(store, b"big", big))
    once("CopyObject", lambda: store.copy(b"a", b"b"))
    assert once("HeadObject", lambda: store.stat(b"b")).size == 3
    assert [entry.path for entry in once("ListObjectsV2", lambda: store.list(b"")).entries] == [
        b"a",
        b"b",
        b"big",
    ]
    assert bytes(once("GetObject", lambda: store.read(b"a", 0, 3))) == b"one"
    assert bytes(store.read(b"big", 0, len(big))) == big
    once("DeleteObjects", lambda: store.delete_many([b"a", b"b"]))
    assert [entry.path for entry in store.list(b"").entries] == [b"big"]
    counts = store.counts()
    assert 7 <= counts["ufs_retries"] <= 8  # obstore's very first request is tried again by boto3
    assert "ufs_given_up" not in counts


@pytest.mark.parametrize("action", [Answer(500, "InternalError"), pytest.param(Cut(), marks=LONG)], ids=str)
def test_what_always_fails_is_given_up_after_a_few_attempts(
    store: S3UnderStorage, proxy: S3Proxy, s3_server: SeaweedS3, bucket: str, action: Action
) -> None:
    put(store, b"a", b"one")
    assert bytes(store.read(b"a", 0, 3)) == b"one"
    calls: list[tuple[str, Any]] = [
        ("GetObject", lambda: store.read(b"a", 0, 3)),
        ("HeadObject", lambda: store.stat(b"a")),
        ("ListObjectsV2", lambda: store.list(b"")),
        ("PutObject", lambda: put(store, b"c", b"two")),
        ("DeleteObjects", lambda: store.delete(b"a")),
    ]
    for operation, call in calls:
        proxy.forget()
        with proxy.failing(Rule(action=action)), pytest.raises(UfsUnavailableError):
            call()
        assert proxy.operations() == {operation: ATTEMPTS}
    with proxy.failing(Rule("UploadPart", action)), pytest.raises(UfsUnavailableError):
        put(store, b"big", bytes(6 * MIB))
    assert uploads_left(s3_server, bucket, store) == []
    assert store.counts()["ufs_given_up"] > len(calls)
    assert bytes(store.read(b"a", 0, 3)) == b"one", "all is well again"


@LONG
def test_a_tenth_of_the_requests_fails(store: S3UnderStorage, proxy: S3Proxy) -> None:
    """In every way, at once. What still fails after three attempts is an error, never wrong bytes."""
    ways: list[Action] = [
        *PASSING,
        Damage(flip=True),
        Damage(keep=0.5),
        Damage(keep=0.5, is_length_right=True),
        Damage(etag="0" * 32),
    ]
    share = 0.1 / len(ways)
    rules = [Rule("GetObject" if isinstance(way, Damage) else ".*", way, fraction=share) for way in ways]
    wanted: dict[bytes, bytes] = {}
    failed = 0
    with proxy.failing(*rules):
        for number in range(ROUNDS):
            path, data = b"f%d" % (number % 30), os.urandom(number * 500)
            try:
                put(store, path, data)
                wanted[path] = data
                other = b"f%d" % (number * 7 % 30)
                if other in wanted:
                    size = store.stat(other).size
                    assert bytes(store.read(other, 0, size)) == wanted[other]
            except (UfsUnavailableError, UfsChangedError):
                failed += 1
                wanted.pop(path, None)
    assert failed < ROUNDS / 4
    for path, data in wanted.items():
        assert bytes(store.read(path, 0, len(data))) == data
    assert store.counts()["ufs_retries"] > 1


@pytest.mark.parametrize("is_done", [False, pytest.param(True, marks=LONG)])
def test_a_silent_store_costs_one_timeout(store: S3UnderStorage, proxy: S3Proxy, is_done: bool) -> None:
    put(store, b"a", b"one")
    assert bytes(store.read(b"a", 0, 3)) == b"one"
    calls: list[Any] = [
        lambda: store.read(b"a", 0, 3),
        lambda: store.stat(b"a"),
        lambda: put(store, b"b", b"two"),
    ]
    for call in calls:
        proxy.forget()
        with proxy.failing(Rule(action=Hang(is_done))), pytest.raises(UfsUnavailableError):
            call()
        assert sum(proxy.operations().values()) == 1, "not asked again after the whole patience"
    assert store.counts()["ufs_no_answer"] == len(calls)
    assert bytes(store.read(b"a", 0, 3)) == b"one"


@LONG
def test_a_slow_body_is_no_silence(store: S3UnderStorage, proxy: S3Proxy) -> None:
    data = os.urandom(MIB)
    put(store, b"a", data)
    with proxy.failing(Rule("GetObject", Damage(chunk_s=0.3))):
        assert bytes(store.read(b"a", 0, MIB)) == data  # 4.8 s in all, more than the timeout


# --- damaged bodies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [Damage(flip=True), Damage(keep=0.7), Damage(keep=0.7, is_length_right=True), Damage(keep=0.0)],
    ids=str,
)
def test_a_damaged_body_is_fetched_again(store: S3UnderStorage, proxy: S3Proxy, damage: Damage) -> None:
    data = os.urandom(300_000)
    made = put(store, b"a", data)
    assert bytes(store.read(b"a", 0, 1)) == data[:1]  # a first request that fails is tried by boto3 too
    with proxy.failing(Rule("GetObject", damage, times=2)):
        assert bytes(store.read(b"a", 0, len(data), made.fingerprint)) == data
    counts = store.counts()
    assert counts.get("ufs_damaged_bodies", 0) + counts.get("ufs_no_answer", 0) == 2
    with proxy.failing(Rule("GetObject", damage)), pytest.raises(UfsUnavailableError):
        store.read(b"a", 0, len(data), made.fingerprint)
    assert bytes(store.read(b"a", 0, len(data), made.fingerprint)) == data


def test_a_range_of_a_small_object_is_compared_too(store: S3UnderStorage, proxy: S3Proxy) -> None:
    """By fetching all of it; once for ranges that follow each other."""
    data = os.urandom(3 * MIB)
    made = put(store, b"a", data)
    with proxy.failing(Rule("GetObject", Damage(flip=True))), pytest.raises(UfsUnavailableError):
        store.read(b"a", MIB, MIB, made.fingerprint)
    proxy.forget()
    for start in range(0, len(data), 100_000):
        assert bytes(store.read(b"a", start, 100_000, made.fingerprint)) == data[start : start + 100_000]
    assert proxy.operations() == {"GetObject": 1}


def test_what_the_control_path_reads_is_compared_too(
    store: S3UnderStorage, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the data path's first request fails."""
    data = os.urandom(300_000)
    made = put(store, b"a", data)

    def fail(*_: object) -> None:
        raise Unclear("as told")

    monkeypatch.setattr(store._reader, "_attempt", fail)
    with proxy.failing(Rule("GetObject", Damage(flip=True))), pytest.raises(UfsUnavailableError):
        store.read(b"a", 0, len(data), made.fingerprint)
    assert bytes(store.read(b"a", 0, len(data), made.fingerprint)) == data


def test_another_etag_is_another_version(store: S3UnderStorage, proxy: S3Proxy) -> None:
    made = put(store, b"a", b"one")
    with proxy.failing(Rule("GetObject", Damage(etag="1" * 32))), pytest.raises(UfsError):
        store.read(b"a", 0, 3, made.fingerprint)
    with proxy.failing(Rule("GetObject", Damage(etag="odd-1"))), pytest.raises(UfsChangedError):
        store.read(b"a", 0, 3, made.fingerprint)
    assert bytes(store.read(b"a", 0, 3, made.fingerprint)) == b"one"


def test_a_store_whose_etags_are_no_md5(opened: Any, proxy: S3Proxy) -> None:
    """The other checksum that the store shows says that the body is good."""
    store = opened()
    put(store, b"a", b"one")
    with proxy.failing(Rule("GetObject", Damage(etag="2" * 32))):
        assert bytes(store.read(b"a", 0, 3)) == b"one"
        proxy.forget()
        assert bytes(store.read(b"a", 0, 3)) == b"one"
        assert proxy.operations() == {"GetObject": 1}, "learned"


def test_checking_can_be_switched_off(opened: Any, proxy: S3Proxy) -> None:
    store = opened(verify="false")
    put(store, b"a", b"one")
    with proxy.failing(Rule("GetObject", Damage(flip=True))):
        assert bytes(store.read(b"a", 0, 3)) != b"one", "this is what checking is for"


# --- throttling ----------------------------------------------------------------------------------------


def test_slow_down_means_fewer_requests(opened: Any, proxy: S3Proxy) -> None:
    """A store that refuses more than two requests at once gets what it can do, and all reads succeed."""
    store = opened(timeout_s="60")
    for number in range(8):
        put(store, b"f%d" % number, b"x" * number)
    crowded = proxy.add(Rule("GetObject", Answer(503, "SlowDown"), over=2))
    with ThreadPoolExecutor(24) as pool:
        reads = [pool.submit(store.read, b"f%d" % (n % 8), 0, 100) for n in range(120)]
        done = [read.exception() is None and len(read.result()) == n % 8 for n, read in enumerate(reads)]
    counts = store.counts()
    assert counts["ufs_throttled"] >= 1
    assert done.count(False) == 0
    assert crowded.used < 60, "no storm: with 24 threads and no limit most would be refused"


class Clock:
    """Time that only waiting moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def now(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        self.now_s += seconds


def test_the_pace_falls_and_recovers() -> None:
    clock = Clock()
    pace = Pace(30.0, now=clock.now, wait=clock.wait)

    def refuse() -> None:
        raise Throttled("slow down")

    for _ in range(10):
        with pytest.raises(Throttled):
            pace.run(refuse)
    assert pace.limit == 1
    assert pace.counts()["ufs_requests_at_most"] == 1
    began_s = clock.now()
    pace.run(lambda: None)
    assert clock.now() - began_s < 8.0, "the pause is bounded"
    count = 0
    while pace.limit < MOST_AT_ONCE:
        pace.run(lambda: None)
        count += 1
    assert count <= MOST_AT_ONCE**2, "fewer than one a request of each round"
    assert "ufs_requests_at_most" not in pace.counts()


# --- uploads in parts ----------------------------------------------------------------------------------


def test_an_upload_that_could_not_be_aborted_is_aborted_later(
    store: S3UnderStorage, proxy: S3Proxy, s3_server: SeaweedS3, bucket: str, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    store.resume(notes)
    with proxy.failing(Rule("UploadPart|AbortMultipartUpload")), pytest.raises(UfsUnavailableError):
        put(store, b"big", bytes(6 * MIB))
    assert len(uploads_left(s3_server, bucket, store)) == 1
    assert notes.stat().st_size
    put(store, b"other", bytes(6 * MIB))
    assert uploads_left(s3_server, bucket, store) == []
    assert notes.stat().st_size == 0


def test_what_a_dead_process_left_is_aborted_and_nothing_else(
    opened: Any, proxy: S3Proxy, s3_server: SeaweedS3, bucket: str, tmp_path: Path
) -> None:
    notes, first = tmp_path / "notes", opened()
    first.resume(notes)
    prefix = first.uri.partition(f"{bucket}/")[2]
    others = s3_server.client().create_multipart_upload(Bucket=bucket, Key=f"{prefix}/big")["UploadId"]
    held = Hold()
    proxy.add(Rule("UploadPart", held))
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(put, first, b"big", bytes(6 * MIB), stop.is_set)
        assert held.reached.wait(60)
        later = opened()  # as if the first were dead
        later.resume(notes)
        left = s3_server.client().list_multipart_uploads(Bucket=bucket, Prefix=prefix)["Uploads"]
        assert [one["UploadId"] for one in left] == [others]
        assert notes.stat().st_size == 0
        stop.set()
        proxy.clear()
        with pytest.raises((UfsError, PutCancelled)):
            upload.result()
    s3_server.client().abort_multipart_upload(Bucket=bucket, Key=f"{prefix}/big", UploadId=others)


def test_torn_notes_are_no_obstacle(opened: Any, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.write_bytes(b'["+", "k", "nobody-knows-this-id"]\n["+", "k2')
    store = opened()
    store.resume(notes)
    put(store, b"a", b"x")
    put(store, b"big", bytes(6 * MIB))
    assert notes.stat().st_size == 0
