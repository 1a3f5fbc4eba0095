"""Where an S3 under storage is, how it is reached, and which key is which path. No I/O."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from alluxiofuse.errors import UfsError, UserError
from alluxiofuse.ids import MAX_NAME_BYTES
from alluxiofuse.ufs.paths import is_good_relative, show
from alluxiofuse.units import parse_size

_BUCKET = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]$")
_MIN_PART_BYTES = 5 << 20  # by S3's rules, but for the last part
_MAX_PART_BYTES = 5 << 30
MAX_PARTS = 10_000
MAX_KEY_BYTES = 1024
_ENDPOINT_VARIABLES = ("S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")

OPTIONS = {
    "endpoint": "URL of the server; default $S3_ENDPOINT, $AWS_ENDPOINT_URL_S3, $AWS_ENDPOINT_URL, else AWS",
    "region": "default: as the AWS tools find it, else us-east-1",
    "access_key": "default: as the AWS tools find credentials (environment, profile, instance role)",
    "secret_key": "belongs to access_key",
    "session_token": "belongs to temporary keys",
    "anonymous": "true: send no credentials, for public buckets",
    "path_style": "auto, true or false: bucket in the path of the URL; auto: when there is an endpoint",
    "timeout_s": "how long to wait for an answer, and for a retried request in all; default 30",
    "multipart_bytes": "objects of this size or more are uploaded in parts; default 64MiB",
    "part_bytes": "size of a part, larger for objects of more than 10,000 parts; default 16MiB",
    "parallel_parts": "parts in memory and on their way at once; default 4",
    "verify": "true or false: compare objects that are read whole with their MD5 (ETag); default true",
    "checksum": "crc32 (md5 where the server ignores it) or md5: what uploads are verified with",
}


@dataclass(frozen=True)
class S3Options:
    """Parsed and checked; the repr shows no secret."""

    bucket: str
    prefix: str
    """"" or "a/b/"."""
    endpoint: str | None = None
    region: str | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    anonymous: bool = False
    path_style: bool = False
    timeout_s: float = 30.0
    multipart_bytes: int = 64 << 20
    part_bytes: int = 16 << 20
    parallel_parts: int = 4
    checksum: str = "crc32"
    verify: bool = True
    copy_limit_bytes: int = 5 << 30
    """The most that one CopyObject takes; above, the store copies in parts."""

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def place(self) -> str:
        """For messages."""
        return f"bucket {self.bucket} at {self.endpoint or 'AWS'}"

    def part_size(self, size: int) -> int:
        """So large that `size` fits in MAX_PARTS parts, in whole MiB. UfsError(EFBIG) where none does."""
        part = self.part_bytes
        if part * MAX_PARTS < size:
            part = -(-size // (MAX_PARTS << 20)) << 20
        if part > _MAX_PART_BYTES:
            raise UfsError(f"{size} bytes are more than an object can have", errno=errno.EFBIG)
        return part


def parse_options(uri: str, options: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> S3Options:
    """`s3://bucket/prefix` and the options as written. UserError with one line."""
    bucket, _, prefix = uri.partition("://")[2].partition("/")
    prefix = prefix.strip("/")
    if not _BUCKET.match(bucket):
        raise UserError(f"{uri}: {bucket!r} is not a bucket name: write s3://BUCKET or s3://BUCKET/PREFIX")
    if prefix and not is_good_relative(prefix.encode("utf-8", "surrogateescape")):
        raise UserError(f"{uri}: the prefix may have no empty, '.' or '..' part")
    endpoint = options.get("endpoint") or next(filter(None, map(environ.get, _ENDPOINT_VARIABLES)), None)
    if endpoint is not None:
        endpoint = _endpoint(endpoint)
    if bool(options.get("access_key")) != bool(options.get("secret_key")):
        raise UserError(f"{uri}: access_key and secret_key belong together: give both or neither")
    part_bytes = _size(options, "part_bytes", 16 << 20)
    if not _MIN_PART_BYTES <= part_bytes <= _MAX_PART_BYTES:
        raise UserError(f"option part_bytes={options['part_bytes']}: a part has from 5MiB to 5GiB")
    styles = {"auto": endpoint is not None, "true": True, "false": False}
    return S3Options(
        bucket=bucket,
        prefix=prefix + "/" if prefix else "",
        endpoint=endpoint,
        region=options.get("region"),
        access_key=options.get("access_key"),
        secret_key=options.get("secret_key"),
        session_token=options.get("session_token"),
        anonymous=_choice(options, "anonymous", {"true": True, "false": False}, False),
        path_style=_choice(options, "path_style", styles, styles["auto"]),
        timeout_s=_number(options, "timeout_s", 30.0, 1.0, 3600.0),
        multipart_bytes=max(part_bytes, _size(options, "multipart_bytes", 64 << 20)),
        part_bytes=part_bytes,
        parallel_parts=int(_number(options, "parallel_parts", 4, 1, 64)),
        verify=_choice(options, "verify", {"true": True, "false": False}, True),
        checksum="md5" if _choice(options, "checksum", {"crc32": False, "md5": True}, False) else "crc32",
    )


def _endpoint(text: str) -> str:
    try:
        parts = urlsplit(text)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_good = False
    if not is_good:
        raise UserError("the S3 endpoint is not a URL: write for instance http://127.0.0.1:9000")
    if "@" in parts.netloc:
        raise UserError("the S3 endpoint holds credentials: use the options access_key and secret_key")
    return text.rstrip("/")


def _size(options: Mapping[str, str], name: str, default: int) -> int:
    text = options.get(name)
    try:
        return default if text is None else parse_size(text)
    except UserError as error:
        raise UserError(f"option {name}: {error.message}") from None


def _number(options: Mapping[str, str], name: str, default: float, low: float, high: float) -> float:
    text = options.get(name)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise UserError(f"option {name}={text}: write a number from {low:g} to {high:g}")
    return value


def _choice(options: Mapping[str, str], name: str, choices: dict[str, bool], default: bool) -> bool:
    text = options.get(name)
    if text is None:
        return default
    if text.lower() not in choices:
        raise UserError(f"option {name}={text}: write one of {', '.join(choices)}")
    return choices[text.lower()]


def key_of(prefix: str, path: bytes) -> str:
    """The key of a good path. UfsError: EILSEQ for bytes that are no UTF-8, ENAMETOOLONG."""
    try:
        key = prefix + path.decode("utf-8")
    except UnicodeDecodeError:
        text = f"{show(path)}: S3 can't store a name that is not UTF-8"
        raise UfsError(text, errno=errno.EILSEQ) from None
    if len(key.encode()) > MAX_KEY_BYTES:
        text = f"{show(path)}: longer than an S3 key can be"
        raise UfsError(text, errno=errno.ENAMETOOLONG)
    return key


def path_of(prefix: str, key: str) -> bytes | None:
    """The path of a listed key; None where it breaks the rule of paths and is hidden."""
    if not key.startswith(prefix):
        return None
    try:
        path = key[len(prefix) :].encode("utf-8")
    except UnicodeEncodeError:
        return None
    return path if is_good_relative(path) else None


@dataclass(frozen=True)
class ListToken:
    """Where a listing goes on: the store's own token, and the names of files already listed under
    which a directory of the same name may still come ("f" sorts before "f.txt" before "f/")."""

    store_token: str
    open_names: tuple[bytes, ...]

    def pack(self) -> str:
        return json.dumps([self.store_token, [name.decode() for name in self.open_names]])

    @classmethod
    def unpack(cls, text: str) -> ListToken:
        try:
            store_token, names = json.loads(text)
            return cls(str(store_token), tuple(str(name).encode() for name in names))
        except (ValueError, TypeError):
            raise UfsError("not a list token of this connector", errno=errno.EINVAL) from None


def still_open(names: list[bytes], last: bytes) -> tuple[bytes, ...]:
    """Those of `names` whose directory may sort after `last`: they are prefixes of it. At most as
    many as a name has bytes."""
    return tuple(name for name in names if last.startswith(name) and len(name) <= MAX_NAME_BYTES)
