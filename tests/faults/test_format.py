"""kill -9 of `alluxiofuse format`: what is left is never taken for a state directory."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from daemons import PROGRAM, LocalDaemon, clean_environment, run_cli
from servers import wait_until


def test_a_format_that_was_killed_is_ended_by_another(local_daemon: Callable[..., LocalDaemon]) -> None:
    site = local_daemon(tiers=[])
    (site.mount / "file").write_bytes(b"here")
    site.wait_persisted()
    assert site.stop() == 0
    ballast = site.state / "cache/slabs/00"
    for number in range(20_000):  # So that it takes a while.
        (ballast / f"ballast{number}").touch()
    names = {"master", "worker", "cache"}
    with subprocess.Popen(
        [*PROGRAM, "format", "--force", "--state", str(site.state)], env=clean_environment()
    ) as process:
        wait_until(lambda: (site.state / "erasing").exists() or process.poll() is not None, "it has begun")
        process.kill()
    left = {path.name for path in site.state.iterdir()} & names
    assert left, "it was killed too late to see anything"
    refused = run_cli(*site.daemon.arguments, check=False)
    assert refused.returncode == 2
    assert "interrupted" in refused.stderr
    assert "Traceback" not in refused.stderr
    run_cli("format", "--state", site.state)
    assert not {path.name for path in site.state.iterdir()} & (names | {"erasing"})
    site.daemon.start()
    assert (site.mount / "file").read_bytes() == b"here"
