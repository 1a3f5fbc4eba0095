"""Is a body that arrived the one that is stored? Decided by the checksum that the store shows.

The ETag of an object that was stored in one piece is the MD5 of its bytes, unless it is encrypted with
a key of its own (SSE-KMS, SSE-C) or the store makes ETags in another way. So one that does not fit is
first taken for damage, and the body is fetched again; when it comes the same again, the object's
other checksum decides (`x-amz-checksum-*`, which boto3 verifies). Where there is none, it is damage,
unless the store says that the object is encrypted so.

So of an object of up to `WHOLE_BYTES` a range is never taken as it comes: the object is fetched whole,
and compared. What has no checksum that a reader could compare cheaply, and so is not covered: larger
objects, and those that were stored in parts (their ETag has a dash).
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections import OrderedDict
from typing import Any

from alluxiofuse.ufs.base import Buffer
from alluxiofuse.ufs.s3_client import S3Client, calls
from alluxiofuse.ufs.s3_options import S3Options
from alluxiofuse.ufs.s3_pace import Damaged

log = logging.getLogger(__name__)

WHOLE_BYTES = 8 << 20
_MAX_BODIES = 2
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


class Verifier:
    """One of a connector; threads may share it."""

    def __init__(self, options: S3Options, client: S3Client) -> None:
        self._options = options
        self._client = client
        self._is_on = options.verify
        self.place = options.place

    def begin(self, key: str) -> Checks:
        """For one read with all its attempts."""
        return Checks(self, key)

    def is_wanted(self, etag: str) -> bool:
        return self._is_on and _MD5.fullmatch(etag) is not None

    def needs_whole(self, size: int, etag: str | None) -> bool:
        """A range of that object could not be compared."""
        return size <= WHOLE_BYTES and etag is not None and self.is_wanted(etag)

    def is_other_sum(self, key: str, body: bytes) -> bool:
        """The ETag is no MD5 of these bytes, though they are what is stored. Part of an attempt."""
        with calls(self._options, key):
            return self._is_other_sum(key, body)

    def _is_other_sum(self, key: str, body: bytes) -> bool:
        answer: Any = self._client.api.get_object(
            Bucket=self._options.bucket, Key=key, ChecksumMode="ENABLED"
        )
        is_encrypted = str(answer.get("ServerSideEncryption", "")).startswith("aws:kms")
        has_sum = any(name.startswith("Checksum") and name != "ChecksumType" for name in answer)
        is_same = answer["Body"].read() == body  # FlexibleChecksumError when its checksum does not fit
        if not is_same or not (has_sum or is_encrypted or "SSECustomerAlgorithm" in answer):
            return False
        if self._is_on:  # else each such object would be read three times
            log.info("%s: its ETags are no MD5 sums: reads are not compared with them", self._options.place)
            self._is_on = False
        return True


class Checks:
    """Of one read; used by one thread."""

    def __init__(self, verifier: Verifier, key: str) -> None:
        self._verifier = verifier
        self._key = key
        self._before = b""
        """The MD5 that came last time."""

    def check(self, offset: int, body: Buffer, size: int, etag: str) -> None:
        """What came from `offset` on of an object of `size` bytes. Damaged: try again."""
        if offset or len(body) != size or not self._verifier.is_wanted(etag):
            return
        digest = hashlib.md5(body, usedforsecurity=False).digest()
        if digest.hex() == etag.strip('"'):
            return
        if digest == self._before and self._verifier.is_other_sum(self._key, bytes(body)):
            return
        self._before = digest
        raise Damaged(f"{self._verifier.place}: {self._key}: what arrived is not what is stored")


class Bodies:
    """The last objects of which only ranges were wanted, for who asks for the next range. Used by threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, bytes], Buffer] = OrderedDict()  # guarded by _lock

    def get(self, key: str, fingerprint: bytes) -> Buffer | None:
        with self._lock:
            return self._kept.get((key, fingerprint))

    def keep(self, key: str, fingerprint: bytes, body: Buffer) -> None:
        with self._lock:
            self._kept[key, fingerprint] = body
            if len(self._kept) > _MAX_BODIES:
                self._kept.popitem(last=False)
