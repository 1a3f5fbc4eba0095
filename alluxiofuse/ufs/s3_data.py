"""Reading S3 objects by obstore (measured fastest and cheapest, see docs/ufs.md).

Only plain GETs with Range and If-Match; what obstore can't do (keys with control characters) or
reports too vaguely (why something was refused) is left to the caller, see `Unclear`."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import BaseError, PreconditionError
from obstore.store import S3Store

from alluxiofuse.errors import UfsChangedError, UfsUnavailableError
from alluxiofuse.ufs.s3_client import CONNECT_TIMEOUT_S, S3Client
from alluxiofuse.ufs.s3_options import S3Options
from alluxiofuse.ufs.s3_pace import NoAnswer, Throttled
from alluxiofuse.ufs.s3_verify import Checks

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig

_REQUEST_LIMIT_S = 600
"""A whole answer with its body; `read_timeout` is what notices a silent server."""
_CREDENTIALS_LIFE = timedelta(minutes=2)
"""How long obstore keeps what the credential chain said; the chain itself renews earlier than that."""


_NO_ANSWER = "HTTP error:"
"""In obstore's text: refused, timed out or cut off, as opposed to an answer with an error status."""
_STATUS = re.compile(r"non-2xx status code: (\d{3})")


class Unclear(Exception):
    """The fast path failed in a way that the control path should judge; nothing was returned."""


def _certificates() -> ClientConfig:
    """The private authorities that the AWS tools trust."""
    path = os.environ.get("AWS_CA_BUNDLE")
    try:
        return {"root_certificate": Path(path).read_bytes()} if path else {}
    except OSError:
        return {}  # the control path complains about it


class S3Reader:
    """Threads may share it."""

    def __init__(self, options: S3Options, client: S3Client) -> None:
        self._options = options
        self._client = client
        self._has_worked = False
        """Some answer has come. Only ever turned on."""
        keys: dict[str, Any] = {}
        if options.anonymous:
            keys["skip_signature"] = True
        elif options.access_key:
            keys["access_key_id"] = options.access_key
            keys["secret_access_key"] = options.secret_key
            if options.session_token:
                keys["session_token"] = options.session_token
        else:
            keys["credential_provider"] = self._credentials
        if options.endpoint:
            keys["endpoint"] = options.endpoint
        self._store = S3Store(
            options.bucket,
            region=client.region,
            virtual_hosted_style_request=not options.path_style,
            client_options={
                **_certificates(),
                "allow_http": True,
                "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
                "read_timeout": timedelta(seconds=options.timeout_s),
                "timeout": timedelta(seconds=_REQUEST_LIMIT_S),
            },
            # `Pace.run` tries again; here it would be many times as often.
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=options.timeout_s)},
            **keys,
        )

    def _credentials(self) -> Any:
        access_key, secret_key, token = self._client.credentials()
        return {
            "access_key_id": access_key,
            "secret_access_key": secret_key,
            "token": token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_LIFE,
        }

    def read(
        self, key: str, offset: int, length: int, etag: str | None, checks: Checks
    ) -> tuple[memoryview, int, str]:
        """([offset, offset + length) cut at the object's end, the object's size, its ETag).

        `length` > 0. With `etag` (quoted): UfsChangedError for another version. UfsUnavailableError
        for a body that is shorter than announced. Unclear: ask the control path."""

        def work() -> tuple[memoryview, int, str]:
            data, size, now_etag = self._attempt(key, offset, length, etag)
            checks.check(offset, data, size, now_etag)
            return data, size, now_etag

        return self._client.pace.run(work)

    def _attempt(self, key: str, offset: int, length: int, etag: str | None) -> tuple[memoryview, int, str]:
        wanted: GetOptions = {"range": (offset, offset + length)}
        if etag is not None:
            wanted["if_match"] = etag
        try:
            answer = obstore.get(self._store, key, options=wanted)
            meta = answer.meta
            data = memoryview(answer.bytes())
        except PreconditionError:
            raise UfsChangedError(f"{self._options.place}: the object was changed outside") from None
        except (BaseError, OSError, ValueError) as error:  # it maps to FileNotFoundError, ValueError, ...
            raise self._judge(error) from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # Rust's; no ordinary exception
                raise
            raise Unclear("panic") from None
        self._has_worked = True
        if len(data) != min(length, meta["size"] - offset):
            raise NoAnswer(f"{self._options.place}: an answer was cut short")
        return data, meta["size"], meta["e_tag"] or ""

    def _judge(self, error: Exception) -> Exception:
        text = str(error)
        # There is no use in trying the other way too, unless this way has never worked: its TLS and
        # proxy settings are not all the same as the control path's.
        if self._has_worked and _NO_ANSWER in text:
            return NoAnswer(f"{self._options.place}: no answer")
        found = _STATUS.search(text)
        status = int(found[1]) if found else 0
        if status in (429, 503):
            return Throttled(f"{self._options.place}: the store answered {status}")
        if status >= 500:
            return UfsUnavailableError(f"{self._options.place}: the store answered {status}")
        return Unclear(type(error).__name__)
