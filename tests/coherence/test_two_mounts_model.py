"""Two mounts against a plain directory: see `two_mount_model`.

`FAULTS_OPERATIONS=100000 pytest tests/coherence/test_two_mounts_model.py` looks further; `SEED=n`
repeats a run, FAULTS_HOLD=SECONDS leaves everything as it is when there is a difference.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from two_mount_model import Model
from two_mounts import TwoMounts

OPERATIONS = int(os.environ.get("FAULTS_OPERATIONS", "700"))
"""Of each of the three layouts."""
SEED = int(os.environ.get("SEED", "0")) or random.SystemRandom().randrange(1, 1 << 31)

SESSIONS = os.environ.get("FAULTS_SESSIONS", "native,pyfuse3").split(",")
"""Of the first mount, and of the second."""


@contextmanager
def running(site: TwoMounts) -> Iterator[TwoMounts]:
    try:
        yield site.start()
    except BaseException:
        for daemon in site.daemons:
            print(f"--- {daemon.name}\n{daemon.log_text()[-3000:]}")
        site.expects_clean_end = False
        site.close()
        raise
    wrong = site.close()
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("workers", ["own", "one", "remote"])
def test_random_operations(workers: str, tmp_path: Path) -> None:
    print(f"SEED={SEED} FAULTS_OPERATIONS={OPERATIONS} -k {workers}")
    options = f"session={SESSIONS[0]}", f"session={SESSIONS[-1]}"
    site = TwoMounts(workers=workers, mount_options=options, master_arguments=["--sync-interval", "-1"])
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108 - a fast directory
    with running(site), tempfile.TemporaryDirectory(prefix="af-plain-", dir=shm) as plain:
        model = Model(site.mounts, Path(plain), SEED)
        try:
            model.run(OPERATIONS)
        except BaseException:
            print("\n".join(model.trace))
            time.sleep(float(os.environ.get("FAULTS_HOLD", "0")))
            raise
        finally:
            model.abandon()
        print(f"agreed after {model.late:.3f} s at most, {model.late_count} times after more than 1 s")
