"""`make run` on a copy of the tree: default under storage, S3, and ending by signals. Installing is not
tried here (CI does it on a fresh machine): the copy borrows this environment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import clean_environment, mount_lines, require_fuse
from servers import SeaweedS3, wait_until

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """What `make run` needs, with an environment that counts as installed."""
    require_fuse()
    place = tmp_path / "tree"
    (place / "scripts").mkdir(parents=True)
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt", "scripts/install"):
        shutil.copy(ROOT / name, place / name)
    (place / ".venv").mkdir()
    (place / ".venv/bin").symlink_to(Path(sys.prefix) / "bin")
    for name in ("run", "test"):
        (place / f".venv/.installed-{name}").touch()
    yield place
    subprocess.run(["umount", "--lazy", place / "mnt"], check=False, capture_output=True)


def start(tree: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    with open(tree / "out", "wb") as out:
        process = subprocess.Popen(
            ["make", "run", *arguments],
            cwd=tree,
            stdout=out,
            stderr=out,
            env=clean_environment(env),
            start_new_session=True,
        )

    def is_ready() -> bool:
        assert process.poll() is None, (tree / "out").read_text()
        return "\nready: " in "\n" + (tree / "out").read_text()

    wait_until(is_ready, "make run is ready")
    return process


def test_the_default_and_ctrl_c(tree: Path) -> None:
    (tree / "data").mkdir()
    (tree / "data/there").write_text("before")
    process = start(tree)
    out = (tree / "out").read_text()
    assert "install" not in out
    assert "echo hello > mnt/hello.txt" in out
    assert (tree / "mnt/there").read_text() == "before"
    (tree / "mnt/hello.txt").write_text("hello")
    wait_until(lambda: (tree / "data/hello.txt").exists(), "it is a plain file")
    assert (tree / "data/hello.txt").read_text() == "hello"
    assert (tree / "var/data/lock").exists()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(30) != 0
    assert mount_lines(tree / "mnt") == []
    assert "Error" not in (tree / "out").read_text()


def test_a_bucket_and_sigterm(tree: Path, s3_server: SeaweedS3) -> None:
    bucket = s3_server.create_bucket("make-run")
    env = {name: value for name, value in s3_server.environment.items() if name.startswith("AWS_")}
    del env["AWS_ENDPOINT_URL"]
    process = start(tree, f"UFS=s3://{bucket}/pre", f"S3_ENDPOINT={s3_server.endpoint}", env=env)
    (tree / "mnt/key").write_text("value")
    client = s3_server.client()

    def is_there() -> bool:
        return bool(client.list_objects_v2(Bucket=bucket, Prefix="pre/key").get("Contents"))

    wait_until(is_there, "it is an object")
    assert client.get_object(Bucket=bucket, Key="pre/key")["Body"].read() == b"value"
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    wait_until(lambda: mount_lines(tree / "mnt") == [], "it is unmounted")
    assert not (tree / "data").exists()
