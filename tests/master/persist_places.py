"""Under storages of both kinds for the tests of the persist log and the loader."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from botocore.exceptions import ClientError  # type: ignore[import-untyped]
from servers import SeaweedS3

from alluxiofuse.ufs.base import UnderStorage
from alluxiofuse.ufs.registry import open_ufs

BUCKET = "persist-tests"


@dataclass
class Place:
    """Where a world keeps its state, and an empty under storage."""

    state: Path
    uri: str
    open_ufs: Callable[[str, dict[str, str]], UnderStorage]
    is_s3: bool


@pytest.fixture(scope="session", params=["local", "s3"])
def s3_or_none(request: pytest.FixtureRequest) -> SeaweedS3 | None:
    """Of session scope, so that the server is there before any test's own fixtures."""
    if request.param == "local":
        return None
    server: SeaweedS3 = request.getfixturevalue("s3_server")
    try:
        server.create_bucket(BUCKET)
    except ClientError as exc:  # pytest sets this up again when it comes back from "local"
        if exc.response["Error"]["Code"] != "BucketAlreadyOwnedByYou":
            raise
    return server


@pytest.fixture
def place(s3_or_none: SeaweedS3 | None, tmp_path: Path) -> Place:
    return local_at(tmp_path) if s3_or_none is None else s3_at(s3_or_none, tmp_path)


@pytest.fixture
def local_place(tmp_path: Path) -> Place:
    return local_at(tmp_path)


def s3_at(server: SeaweedS3, tmp_path: Path) -> Place:
    uri = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    return Place(tmp_path / "state", uri, lambda u, o: open_ufs(u, {**server.options, **o}), True)


def local_at(tmp_path: Path) -> Place:
    directory = tmp_path / "data"
    directory.mkdir()
    return Place(tmp_path / "state", str(directory), lambda u, o: open_ufs(u, {"fsync": "false", **o}), False)
