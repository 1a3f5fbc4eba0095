"""A daemon's state that every test damages in its own way."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from daemons import LocalDaemon
from fsck_tree import build, copy

from alluxiofuse.cli.cmd_fsck import fsck

NO_UPLOADS = {"ALLUXIOFUSE_MASTER_PERSIST_DELAY_S": "1h"}
PARTS = ("state", "ssd", "ufs")


@pytest.fixture(scope="module")
def template() -> Iterator[LocalDaemon]:
    """A killed daemon's state, kept beside the one that tests damage."""
    with pytest.MonkeyPatch.context() as patch:
        if os.path.isdir("/dev/shm"):  # noqa: S108 - RocksDB's many fsyncs cost nothing there
            patch.setattr(tempfile, "tempdir", "/dev/shm")  # noqa: S108
        site = LocalDaemon(env=NO_UPLOADS)
    site.start()
    build(site)
    site.kill()
    for part in PARTS:
        copy(site.base / part, site.base / "kept" / part)
    yield site
    assert site.close() == []


@pytest.fixture
def site(template: LocalDaemon) -> LocalDaemon:
    for part in PARTS:
        copy(template.base / "kept" / part, template.base / part)
    return template


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """run(site, *arguments): the command in this process; its JSON document."""

    def call(site: LocalDaemon, *arguments: str) -> dict[str, Any]:
        return _run(site, capsys, *arguments)

    return call


def _run(site: LocalDaemon, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        fsck.main(["--json", "--state", str(site.state), *arguments], standalone_mode=False)
    gc.collect()
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == caught.value.code
    return found
