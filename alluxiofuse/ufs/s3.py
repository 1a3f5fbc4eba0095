"""A bucket, or a prefix of one, as an under storage: file `a/b.csv` is object `<prefix>a/b.csv`.

boto3 asks and changes, obstore reads (`s3_data`), `s3_upload` writes.

Directories do not exist in S3: one is there while a key lies below it, or an empty object "d/", which
other tools make to mark one, stands for it. Where a key "f" and keys "f/..." exist together the file
wins, and what is below the other is hidden. Hidden too is a key that is no path (an empty, "." or ".."
component, a name above 255 bytes). `hidden_count` counts what listings hid, each time they did.

Some servers go on naming a prefix for a while after its last key was deleted (SeaweedFS, tens of
seconds): such a directory is listed, empty, until the server forgets it.

The fingerprint is the ETag with the size. The mtime is the store's LastModified.
"""

from __future__ import annotations

import errno
import re
import stat as stat_bits
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from alluxiofuse.errors import UfsChangedError, UfsError, UfsNotFoundError
from alluxiofuse.ufs.base import (
    Buffer,
    Capabilities,
    ListPage,
    UfsAttrs,
    UfsEntry,
    UnderStorage,
    stopping,
)
from alluxiofuse.ufs.paths import check_new_path, check_path, show
from alluxiofuse.ufs.s3_client import S3Client, error_code, translate
from alluxiofuse.ufs.s3_data import S3Reader, Unclear
from alluxiofuse.ufs.s3_options import ListToken, S3Options, key_of, path_of, still_open
from alluxiofuse.ufs.s3_pace import NoAnswer
from alluxiofuse.ufs.s3_upload import S3Uploader
from alluxiofuse.ufs.s3_verify import WHOLE_BYTES, Bodies, Checks, Verifier

_DELETE_BATCH = 1000
_MAX_LIST = 1000
_PLAIN_ETAG = re.compile(r"[!#-~]{1,200}")
_NO_BATCH_CODES = {"NotImplemented", "InvalidRequest", "MethodNotAllowed", "MissingContentMD5"}


class S3UnderStorage(UnderStorage):
    """Constant after construction, but for the counter (under `_lock`) and `_has_batches`."""

    scheme = "s3"
    capabilities = Capabilities(
        has_directories=False,
        has_posix_attrs=False,
        has_symlinks=False,
        has_atomic_rename=False,
        has_strong_versions=True,
        default_sync_interval_s=60.0,
        max_parallel_reads=8,
        preferred_read_bytes=WHOLE_BYTES,
        whole_read_bytes=WHOLE_BYTES,
    )

    def __init__(self, options: S3Options) -> None:
        """Asks the server nothing yet. UfsPermissionError for credentials that can't even be found."""
        self._options = options
        self.uri = options.uri
        self._client = S3Client(options)
        self._api = self._client.api
        self._reader = S3Reader(options, self._client)
        self._verifier = Verifier(options, self._client)
        self._bodies = Bodies()
        if not options.verify:
            self.capabilities = replace(self.capabilities, whole_read_bytes=0)
        self._uploader = S3Uploader(options, self._client)
        self._lock = threading.Lock()
        self._has_batches = True
        """Until the server refuses DeleteObjects. Only ever turned off."""
        self.hidden_count = 0

    def check(self) -> None:
        self._list("list", Prefix=self._options.prefix, MaxKeys=1)

    def close(self) -> None:
        self._uploader.close()
        self._client.close()

    def counts(self) -> dict[str, int]:
        found = self._client.pace.counts()
        if self.hidden_count:
            found["ufs_hidden_names"] = self.hidden_count
        return found

    def resume(self, notes: Path) -> None:
        with suppress(OSError):
            self._uploader.unfinished.keep_in(notes)
        self._uploader.undo()

    def stat(self, path: bytes) -> UfsEntry:
        check_path(path)
        if not path:
            return _directory(path)
        try:
            seen = self._head(self._key(path), path)
        except UfsNotFoundError:
            if self._has_below(path):
                return _directory(path)
            raise
        return _file(path, seen["ETag"], seen["ContentLength"], _ns(seen["LastModified"]))

    def list(self, path: bytes, token: str | None = None, limit: int = 1000) -> ListPage:
        """In the store's order, where a directory sorts as if its name ended in a slash."""
        check_path(path)
        above = self._key(path) + "/" if path else self._options.prefix
        at = ListToken.unpack(token) if token is not None else None
        wanted: dict[str, Any] = {"Prefix": above, "Delimiter": "/"}
        if at is not None:
            wanted["ContinuationToken"] = at.store_token
        page = self._list(self._what(path), **wanted, MaxKeys=max(1, min(limit, _MAX_LIST)))
        entries: dict[bytes, UfsEntry] = {}
        names = {*at.open_names} if at is not None else set()
        last = b""
        for item in page.get("Contents", ()):
            last = max(last, item["Key"][len(above) :].encode("utf-8", "replace"))
            if item["Key"] == above:
                continue  # the marker of the directory itself
            found = self._child(above, item["Key"], path)
            if found is None:
                continue
            entries[found] = _file(found, item["ETag"], item["Size"], _ns(item["LastModified"]))
            names.add(found.rpartition(b"/")[2])
        for item in page.get("CommonPrefixes", ()):
            last = max(last, item["Prefix"][len(above) :].encode("utf-8", "replace"))
            found = self._child(above, item["Prefix"].removesuffix("/"), path)
            if found is None:
                continue
            if found.rpartition(b"/")[2] in names:
                self._hide(1)
            else:
                entries[found] = _directory(found)
        go_on = None
        if page.get("IsTruncated"):
            go_on = ListToken(page["NextContinuationToken"], still_open(sorted(names), last)).pack()
        return ListPage(sorted(entries.values(), key=_store_order), go_on)

    def read(self, path: bytes, offset: int, length: int, fingerprint: bytes | None = None) -> Buffer:
        check_path(path)
        if fingerprint is None:
            return self._read(path, offset, length, None, None) if length > 0 else b""
        etag, size = _parse(fingerprint)
        length = min(length, size - offset)
        if length <= 0:
            return b""
        if length == size or not self._verifier.needs_whole(size, etag):
            return self._read(path, offset, length, etag, fingerprint)
        key = self._key(path)
        body = self._bodies.get(key, fingerprint)
        if body is None:
            body = self._read(path, 0, size, etag, fingerprint)
            self._bodies.keep(key, fingerprint, body)
        return memoryview(body)[offset : offset + length]

    def _read(
        self, path: bytes, offset: int, length: int, etag: str | None, fingerprint: bytes | None
    ) -> Buffer:
        """One request; what it gives is compared where it is a whole object."""
        key = self._key(path)
        checks = self._verifier.begin(key)
        data: Buffer
        try:
            data, now_size, now_etag = self._reader.read(key, offset, length, etag, checks)
        except Unclear:
            data, now_size, now_etag = self._read_slowly(key, path, offset, length, etag, checks)
        if fingerprint is not None and _fingerprint(now_etag, now_size) != fingerprint:
            raise UfsChangedError(f"{self.uri}/{show(path)} was changed outside")
        return data

    def put(
        self,
        path: bytes,
        fd: int,
        size: int,
        attrs: UfsAttrs,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> UfsEntry:
        """The mtime returned is that of `attrs`; a later `stat` has the time of the upload."""
        check_new_path(path)
        go_on = stopping(is_cancelled, self._what(path))
        etag = self._uploader.put(self._key(path), self._what(path), fd, size, go_on)
        return _file(path, etag, size, attrs.mtime_ns)

    def mkdir(self, path: bytes, attrs: UfsAttrs) -> UfsEntry:
        if path:
            check_new_path(path)
            self._key(path)
        return _directory(path)

    def symlink(self, path: bytes, target: bytes, attrs: UfsAttrs) -> UfsEntry:
        raise UfsError(f"{self.uri}/{show(path)}: S3 has no symlinks", errno=errno.EOPNOTSUPP)

    def set_attrs(self, path: bytes, attrs: UfsAttrs) -> UfsEntry:
        return self.stat(path)

    def rename(self, source: bytes, target: bytes) -> UfsEntry:
        made = self.copy(source, target)
        if source != target:
            self._delete_keys([self._key(source)])
        return made

    def copy(self, source: bytes, target: bytes) -> UfsEntry:
        check_path(source)
        check_new_path(target)
        old, new = self._key(source), self._key(target)
        seen = self._head(old, source)
        size = seen["ContentLength"]
        if old == new:
            return _file(target, seen["ETag"], size, _ns(seen["LastModified"]))
        etag = self._uploader.copy(old, new, self._what(source), size, seen["ETag"])
        return _file(target, etag, size, _ns(seen["LastModified"]))

    def delete(self, path: bytes) -> None:
        self.delete_many([path])

    def delete_many(self, paths: Sequence[bytes]) -> None:
        """The marker "d/" of a directory goes with it, else the directory would stay listed."""
        keys = []
        for path in paths:
            check_path(path)
            if not path:
                raise UfsError("the mounted place itself can't be deleted", errno=errno.EBUSY)
            try:
                key = self._key(path)
            except UfsError:
                continue  # such a key can't exist
            keys += [key, key + "/"]
        self._delete_keys(keys)

    # --- helpers ---------------------------------------------------------------------------------

    def _key(self, path: bytes) -> str:
        return key_of(self._options.prefix, path)

    def _what(self, path: bytes) -> str:
        return self._options.prefix + show(path)

    def _hide(self, count: int) -> None:
        with self._lock:
            self.hidden_count += count

    def _child(self, above: str, key: str, path: bytes) -> bytes | None:
        """The path of a listed key or prefix; None, and counted, where it is to be hidden."""
        found = path_of(self._options.prefix, key)
        if found is None or b"/" in found[len(path) + 1 if path else 0 :]:
            self._hide(1)
            return None
        return found

    def _head(self, key: str, path: bytes) -> Any:
        return self._client.call(
            self._what(path), self._api.head_object, Bucket=self._options.bucket, Key=key
        )

    def _list(self, what: str, **wanted: Any) -> Any:
        return self._client.call(what, self._api.list_objects_v2, Bucket=self._options.bucket, **wanted)

    def _has_below(self, path: bytes) -> bool:
        page = self._list(self._what(path), Prefix=self._key(path) + "/", MaxKeys=1)
        return bool(page.get("Contents"))

    def _read_slowly(
        self, key: str, path: bytes, offset: int, length: int, etag: str | None, checks: Checks
    ) -> tuple[bytes, int, str]:
        """By boto3: as `S3Reader.read`, any key, and with exact errors."""
        wanted = {"IfMatch": etag} if etag is not None else {}
        what = self._what(path)
        try:
            found: tuple[bytes, int, str] | None = self._client.call(
                what, self._range, key=key, offset=offset, length=length, wanted=wanted, checks=checks
            )
        except UfsNotFoundError:
            if self._has_below(path):
                raise UfsError(f"{self.uri}/{show(path)} is a directory", errno=errno.EISDIR) from None
            raise
        if found is None:
            seen = self._head(key, path)
            return b"", seen["ContentLength"], seen["ETag"]
        return found

    def _range(
        self, key: str, offset: int, length: int, wanted: dict[str, str], checks: Checks
    ) -> tuple[bytes, int, str] | None:
        """One attempt. None where the object ends before `offset`."""
        try:
            answer = self._api.get_object(
                Bucket=self._options.bucket,
                Key=key,
                Range=f"bytes={offset}-{offset + length - 1}",
                **wanted,
            )
        except self._api.exceptions.ClientError as error:
            if error_code(error) in ("InvalidRange", "416"):
                return None
            raise
        body = answer["Body"].read()
        size = int(answer["ContentRange"].rpartition("/")[2])
        if len(body) != min(length, size - offset):
            raise NoAnswer(f"{self._options.place}: an answer was cut short")
        checks.check(offset, body, size, answer["ETag"])
        return body, size, answer["ETag"]

    def _delete_keys(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), _DELETE_BATCH):
            batch = keys[start : start + _DELETE_BATCH]
            if not (self._has_batches and self._delete_batch(batch)):
                for key in batch:
                    self._client.call(key, self._api.delete_object, Bucket=self._options.bucket, Key=key)

    def _delete_batch(self, keys: Sequence[str]) -> bool:
        """False where the server knows no DeleteObjects."""
        names = {"Objects": [{"Key": key} for key in keys], "Quiet": True}

        def send() -> bool:
            try:
                answer = self._api.delete_objects(Bucket=self._options.bucket, Delete=names)
            except self._api.exceptions.ClientError as error:
                if error_code(error) in _NO_BATCH_CODES:
                    return False
                raise
            for failed in answer.get("Errors", ()):
                if failed.get("Code") != "NoSuchKey":
                    found = self._api.exceptions.ClientError(
                        {"Error": {"Code": failed.get("Code")}}, "Delete"
                    )
                    raise translate(found, self._options, show(str(failed.get("Key")).encode()))
            return True

        self._has_batches = bool(self._client.call("delete", send))
        return self._has_batches


def _ns(moment: Any) -> int:
    return int(moment.timestamp()) * 1_000_000_000


def _fingerprint(etag: str, size: int) -> bytes:
    return f"{etag.strip(chr(34))}:{size}".encode()


def _parse(fingerprint: bytes) -> tuple[str | None, int]:
    """(ETag for If-Match, size); None for a weak or odd ETag, which no If-Match can name: then only
    the ETag of the answer decides."""
    etag, _, size = fingerprint.decode("utf-8", "replace").rpartition(":")
    if not etag or not (size.isascii() and size.isdecimal()):
        raise UfsChangedError("the fingerprint is none of this store")
    return f'"{etag}"' if _PLAIN_ETAG.fullmatch(etag) else None, int(size)


def _file(path: bytes, etag: str, size: int, mtime_ns: int) -> UfsEntry:
    return UfsEntry(path, stat_bits.S_IFREG, size, mtime_ns, _fingerprint(etag, size))


def _directory(path: bytes) -> UfsEntry:
    return UfsEntry(path, stat_bits.S_IFDIR, 0, 0, b"")


def _store_order(entry: UfsEntry) -> bytes:
    return entry.path + b"/" if entry.is_dir else entry.path
