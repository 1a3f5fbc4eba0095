"""Two mounts for a whole file of tests: one with each kind of session."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import wait_until
from two_mounts import TwoMounts


@pytest.fixture(scope="module")
def site() -> Iterator[TwoMounts]:
    options = ("session=native", "session=pyfuse3")
    found = TwoMounts(mount_options=options, master_arguments=["--sync-interval", "-1"])
    try:
        yield found.start()
    finally:
        wrong = found.close()
    assert not wrong, "\n\n".join(wrong)


@pytest.fixture(params=[0, 1], ids=["first", "second"])
def pair(site: TwoMounts, request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path]]:
    """An empty directory as both mounts show it: that of the author, and that of the other."""
    name = f"{request.node.originalname}-{request.param}"
    (site.mounts[0] / name).mkdir()
    wait_until(lambda: (site.mounts[1] / name).is_dir(), "the other mount sees the directory")
    yield site.mounts[request.param] / name, site.mounts[1 - request.param] / name
    subprocess.run(["rm", "-rf", "--", str(site.mounts[0] / name)], check=True, timeout=120)
