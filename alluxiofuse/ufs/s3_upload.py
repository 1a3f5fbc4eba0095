"""Writing S3 objects: one put, or parts in parallel, every request with a checksum that the store
verifies; and copies inside the store."""

from __future__ import annotations

import base64
import hashlib
import logging
import mimetypes
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from alluxiofuse.errors import UfsError, UfsNotFoundError
from alluxiofuse.ufs.s3_client import S3Client
from alluxiofuse.ufs.s3_options import S3Options
from alluxiofuse.ufs.unfinished import Note, Unfinished

log = logging.getLogger(__name__)
_COPY_PART_BYTES = 512 << 20

Part = dict[str, Any]
"""PartNumber, ETag and perhaps ChecksumCRC32, as CompleteMultipartUpload wants them."""
GoOn = Callable[[], None]
"""Raises to stop the upload."""


class S3Uploader:
    """Threads may share it: `_pool` bounds the parts of all uploads together, and so the memory."""

    def __init__(self, options: S3Options, client: S3Client) -> None:
        self._options = options
        self._client = client
        self._api = client.api
        self.unfinished = Unfinished()
        self._pool = ThreadPoolExecutor(options.parallel_parts, thread_name_prefix="s3-part")
        self._has_crc32 = options.checksum == "crc32"
        """Until an answer shows that the store ignores it; then MD5. Only ever turned off."""

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self.unfinished.close()

    def undo(self) -> None:
        """Abort the uploads of ours that are left behind, from this process or an earlier one. UfsError
        when the store refuses, UfsUnavailableError when it can't be asked."""
        for note in self.unfinished.left():
            self._abort(note)

    def put(self, key: str, what: str, fd: int, size: int, go_on: GoOn) -> str:
        """The new ETag. `go_on` is asked between parts and before the end. UfsError; what `go_on`
        raises. On any failure no part is left behind, unless the store no longer answers."""
        if size >= self._options.multipart_bytes:
            return self._put_parts(key, what, fd, size, go_on)
        body = pread_exactly(fd, size, 0)
        go_on()
        target = {"Bucket": self._options.bucket, "Key": key, "ContentType": content_type(key)}
        return str(self._send(what, self._api.put_object, body, target)["ETag"])

    def copy(self, source: str, target: str, what: str, size: int, etag: str) -> str:
        """The ETag of the copy. UfsChangedError when `source` is no longer the version `etag`."""
        origin = {"Bucket": self._options.bucket, "Key": source}
        place = {"Bucket": self._options.bucket, "Key": target}
        if size > self._options.copy_limit_bytes:
            return self._copy_parts(origin, place, what, size, etag)
        answer = self._client.call(
            what, self._api.copy_object, **place, CopySource=origin, CopySourceIfMatch=etag
        )
        return str(answer["CopyObjectResult"]["ETag"])

    def _put_parts(self, key: str, what: str, fd: int, size: int, go_on: GoOn) -> str:
        part_bytes = self._options.part_size(size)
        place = {"Bucket": self._options.bucket, "Key": key}
        extra: dict[str, Any] = {"ContentType": content_type(key)}
        if self._has_crc32:
            extra["ChecksumAlgorithm"] = "CRC32"

        def one(upload_id: str, number: int) -> Part:
            offset = (number - 1) * part_bytes
            body = pread_exactly(fd, min(part_bytes, size - offset), offset)
            target = place | {"UploadId": upload_id, "PartNumber": number}
            answer = self._send(what, self._api.upload_part, body, target)
            part = {"PartNumber": number, "ETag": answer["ETag"]}
            if answer.get("ChecksumCRC32"):
                part["ChecksumCRC32"] = answer["ChecksumCRC32"]
            return part

        return self._multipart(place, extra, what, -(-size // part_bytes), one, go_on)

    def _copy_parts(self, origin: Part, place: Part, what: str, size: int, etag: str) -> str:
        part_bytes = min(_COPY_PART_BYTES, self._options.copy_limit_bytes)

        def one(upload_id: str, number: int) -> Part:
            first = (number - 1) * part_bytes
            last = min(size, first + part_bytes) - 1
            answer = self._client.call(
                what,
                self._api.upload_part_copy,
                **place,
                UploadId=upload_id,
                PartNumber=number,
                CopySource=origin,
                CopySourceIfMatch=etag,
                CopySourceRange=f"bytes={first}-{last}",
            )
            return {"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]}

        extra = {"ContentType": content_type(place["Key"])}
        return self._multipart(place, extra, what, -(-size // part_bytes), one, lambda: None)

    def _multipart(
        self,
        place: Part,
        extra: Part,
        what: str,
        count: int,
        one: Callable[[str, int], Part],
        go_on: GoOn,
    ) -> str:
        go_on()
        upload_id = self._client.call(what, self._api.create_multipart_upload, **place, **extra)["UploadId"]
        note = (place["Key"], upload_id)
        self.unfinished.begun(note)
        running: deque[Future[Part]] = deque()
        try:
            parts = list(self._run(running, upload_id, count, one, go_on))
            go_on()
            etag = self._complete(place, what, upload_id, parts)
        except BaseException:
            for future in running:
                future.cancel()
            for future in running:  # an abort before the last part arrived would leave that part
                if not future.cancelled():
                    future.exception()
            self.unfinished.left_behind(note)
            self._try_to_undo()
            raise
        self.unfinished.ended(note)
        if self.unfinished.left():  # the store did not answer then; it does now
            self._try_to_undo()
        return etag

    def _try_to_undo(self) -> None:
        try:
            self.undo()
        except UfsError as error:
            log.warning("an unfinished upload is left for later: %s", error.message)

    def _abort(self, note: Note) -> None:
        key, upload_id = note
        place = {"Bucket": self._options.bucket, "Key": key}
        try:
            self._client.call(key, self._api.abort_multipart_upload, **place, UploadId=upload_id)
        except UfsNotFoundError:
            pass  # it is no more
        self.unfinished.ended(note)

    def _run(
        self,
        running: deque[Future[Part]],
        upload_id: str,
        count: int,
        one: Callable[[str, int], Part],
        go_on: GoOn,
    ) -> Iterator[Part]:
        """The parts in order; `running` are those on their way, never more than the pool has threads."""
        for number in range(1, count + 1):
            while len(running) >= self._options.parallel_parts:
                yield running.popleft().result()
            go_on()
            running.append(self._pool.submit(one, upload_id, number))
        while running:
            yield running.popleft().result()
            go_on()

    def _complete(self, place: Part, what: str, upload_id: str, parts: list[Part]) -> str:
        with_crc32 = all("ChecksumCRC32" in part for part in parts)
        if not with_crc32:
            parts = [{"PartNumber": part["PartNumber"], "ETag": part["ETag"]} for part in parts]
        try:
            answer = self._client.call(
                what,
                self._api.complete_multipart_upload,
                **place,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
            )
            return str(answer["ETag"])
        except UfsNotFoundError:
            # A second attempt after a lost answer: the upload is no more because it is done.
            etag = f'"{etag_of_parts(parts)}"'
            seen = self._client.call(what, self._api.head_object, **place)
            if seen["ETag"] != etag:
                raise
            return etag

    def _send(self, what: str, send: Callable[..., Any], body: bytes, target: dict[str, Any]) -> Any:
        if self._has_crc32:
            checksum = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
            answer = self._client.call(what, send, **target, Body=body, ChecksumCRC32=checksum)
            if answer.get("ChecksumCRC32") == checksum:
                return answer
            self._has_crc32 = False  # ignored, so nothing was verified: once more, the old way
            log.info("%s ignores CRC32 checksums: uploads are verified by MD5", self._options.place)
        digest = hashlib.md5(body, usedforsecurity=False).digest()
        content_md5 = base64.b64encode(digest).decode()
        return self._client.call(what, send, **target, Body=body, ContentMD5=content_md5)


def pread_exactly(fd: int, size: int, offset: int) -> bytes:
    """UfsError when the file ends earlier."""
    data = os.pread(fd, size, offset) if size else b""
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            raise UfsError("the file to be stored is shorter than announced")
        data += more
    return data


def content_type(key: str) -> str:
    return mimetypes.guess_type(key, strict=False)[0] or "application/octet-stream"


def etag_of_parts(parts: list[Part]) -> str:
    """What S3 gives to an object made of parts whose ETags are plain MD5s; "" for other ETags."""
    try:
        digests = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in parts)
    except ValueError:
        return ""
    return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"
