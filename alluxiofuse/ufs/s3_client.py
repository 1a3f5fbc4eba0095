"""The only module that imports boto3: makes the client, and says in our words what went wrong.

No text of the library ever gets into a message: a server's error body may quote the key id and the
string that was signed."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import boto3  # type: ignore[import-untyped]
from botocore import UNSIGNED  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
)
from botocore.exceptions import (
    ConnectionError as NoConnectionError,
)

from alluxiofuse.errors import (
    UfsChangedError,
    UfsError,
    UfsNotFoundError,
    UfsPermissionError,
    UfsUnavailableError,
)
from alluxiofuse.ufs.s3_options import S3Options
from alluxiofuse.ufs.s3_pace import Damaged, NoAnswer, Pace, Throttled

CONNECT_TIMEOUT_S = 5.0
MAX_SKEW_S = 600.0
"""AWS refuses from 15 minutes on (RequestTimeTooSkewed)."""
_POOL_CONNECTIONS = 48
_DENIED = {
    "AccessDenied": "the credentials do not allow it",
    "403": "the credentials are wrong or do not allow it",
    "401": "the credentials are wrong",
    "Forbidden": "the credentials are wrong or do not allow it",
    "InvalidAccessKeyId": "the access key is not known there",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "ExpiredToken": "the session token has expired",
    "InvalidToken": "the session token is not valid",
    "AccountProblem": "the account is blocked",
}
_NOT_FOUND = {"404", "NoSuchKey", "NotFound", "NoSuchUpload"}
_CHANGED = {"412", "PreconditionFailed"}
_OTHER = {
    "KeyTooLongError": errno.ENAMETOOLONG,
    "EntityTooLarge": errno.EFBIG,
    "QuotaExceeded": errno.EDQUOT,
    "NotImplemented": errno.EOPNOTSUPP,
    "XMinioStorageFull": errno.ENOSPC,
}
_SLOW_DOWN = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    "TooManyRequests",
    "TooManyRequestsException",
    "BandwidthLimitExceeded",
    "429",
}
_PASSING = {"InternalError", "ServiceUnavailable", "RequestTimeout", "OperationAborted"}
"""Codes of failures that pass, also where they come in the body of a 200 (DeleteObjects, copies)."""
_WRONG_REGION = {
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "301",
}


def error_code(error: Exception) -> str:
    """The S3 code of a ClientError such as "NoSuchKey"; "" for others."""
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return ""


class S3Client:
    """The boto3 client (`api`) and what belongs to it. Threads may share it."""

    def __init__(self, options: S3Options) -> None:
        self._options = options
        self.pace = Pace(options.timeout_s)
        with calls(options, "the credentials"):
            session = boto3.session.Session(region_name=options.region)
            self.region: str = session.region_name or "us-east-1"
            self.api: Any = session.client(
                "s3",
                endpoint_url=options.endpoint,
                region_name=self.region,
                aws_access_key_id=options.access_key,
                aws_secret_access_key=options.secret_key,
                aws_session_token=options.session_token,
                config=self._config(),
            )
            self._chain = None if options.access_key else session.get_credentials()

    def _config(self) -> Any:
        options = self._options
        return Config(
            signature_version=UNSIGNED if options.anonymous else None,
            s3={"addressing_style": "path" if options.path_style else "auto"},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=options.timeout_s,
            retries={"mode": "standard", "total_max_attempts": 1},  # `call` tries again
            max_pool_connections=_POOL_CONNECTIONS,
            # We send checksums ourselves, in headers that servers which do not know them ignore.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )

    def call(self, what: str, send: Callable[..., Any], **arguments: Any) -> Any:
        """One request by the library, tried again as `Pace.run` says. UfsErrors that name `what`."""

        def work() -> Any:
            with calls(self._options, what):
                return send(**arguments)

        return self.pace.run(work)

    def credentials(self) -> tuple[str, str, str | None]:
        """(access key, secret key, session token) as of now; a role's are renewed in time.
        UfsPermissionError when there are none."""
        options = self._options
        if options.access_key and options.secret_key:
            return options.access_key, options.secret_key, options.session_token
        with calls(options, "the credentials"):
            if self._chain is None:
                raise NoCredentialsError
            frozen = self._chain.get_frozen_credentials()
            return frozen.access_key, frozen.secret_key, frozen.token

    def close(self) -> None:
        self.api.close()


@contextmanager
def calls(options: S3Options, what: str) -> Iterator[None]:
    """Around calls of the library: its errors become `UfsError`s that name `what` and the place."""
    try:
        yield
    except (ClientError, BotoCoreError) as error:
        raise translate(error, options, what) from None


def translate(error: Exception, options: S3Options, what: str) -> UfsError:
    if isinstance(error, ClientError):
        metadata = error.response.get("ResponseMetadata", {})
        status = int(metadata.get("HTTPStatusCode", 0))
        if status == 403 and _is_skewed(metadata.get("HTTPHeaders", {}).get("date", "")):
            return UfsUnavailableError(f"{options.place}: the clock of this machine is wrong ({what})")
        return _by_code(error_code(error), status, options, what)
    if isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError):
        return UfsPermissionError(
            f"{options.place}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "or the options access_key and secret_key"
        )
    if isinstance(error, ProfileNotFound):
        return UfsPermissionError(f"{options.place}: the profile that AWS_PROFILE names does not exist")
    if isinstance(error, SSLError):
        return UfsUnavailableError(f"{options.place}: TLS failed; is its certificate trusted here?")
    if isinstance(error, FlexibleChecksumError):
        return Damaged(f"{options.place}: {what}: what arrived is not what is stored")
    if isinstance(error, NoConnectionError | HTTPClientError):  # refused, timed out, cut off, no such host
        return NoAnswer(f"{options.place}: no answer ({type(error).__name__})")
    return UfsError(f"{options.place}: {what}: {type(error).__name__}")


def _is_skewed(date: str) -> bool:
    """The store's clock, in an answer's Date, and ours are too far apart for signatures. Asked by HEAD it
    can't say so in words."""
    try:
        theirs = parsedate_to_datetime(date)
        return abs((datetime.now(UTC) - theirs).total_seconds()) > MAX_SKEW_S
    except (TypeError, ValueError):
        return False


def _by_code(code: str, status: int, options: S3Options, what: str) -> UfsError:
    if code == "NoSuchBucket":
        return UfsNotFoundError(f"{options.place}: there is no such bucket")
    if code in _WRONG_REGION:
        return UfsError(f"{options.place}: the bucket is in another region; set the option region")
    if code in _DENIED:
        return UfsPermissionError(f"{options.place}: {_DENIED[code]} ({what})")
    if code in _NOT_FOUND or status == 404:
        return UfsNotFoundError(f"{options.place}: no {what}")
    if code in _CHANGED or status == 412:
        return UfsChangedError(f"{options.place}: {what} was changed outside")
    if code in _OTHER:
        return UfsError(f"{options.place}: {what}: {code}", errno=_OTHER[code])
    if status in (401, 403):
        return UfsPermissionError(f"{options.place}: {_DENIED['403']} ({what})")
    if code in _SLOW_DOWN or status in (429, 503):
        return Throttled(f"{options.place}: {what}: the store answered {code or status}")
    if status >= 500 or status == 408 or code in _PASSING or code == "BadDigest":
        return UfsUnavailableError(f"{options.place}: {what}: the store answered {code or status}")
    return UfsError(f"{options.place}: {what}: the store answered {code or status}")
