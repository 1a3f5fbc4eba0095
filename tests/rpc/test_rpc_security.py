from __future__ import annotations

import os
from pathlib import Path

import pytest

from alluxiofuse.errors import UserError
from alluxiofuse.rpc.security import Security, load_secret_file

SECRET = b"correct horse battery staple"


def write(path: Path, data: bytes, mode: int = 0o600) -> str:
    path.write_bytes(data)
    path.chmod(mode)
    return str(path)


def test_secret_without_surrounding_white_space(tmp_path: Path) -> None:
    path = write(tmp_path / "secret", b"\n" + SECRET + b" \n", 0o400)
    assert load_secret_file(path) == SECRET
    assert Security(load_secret_file(path)).secret == SECRET


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o666, 0o610])
def test_file_that_others_may_use(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "secret", SECRET, mode)
    with pytest.raises(UserError, match="chmod 600") as caught:
        load_secret_file(path)
    assert SECRET.decode() not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"short", b" " * 50 + b"123456789012345"])
def test_secret_that_is_too_short(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UserError, match="fewer than 16"):
        load_secret_file(write(tmp_path / "secret", data))


def test_file_that_is_too_large(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too large"):
        load_secret_file(write(tmp_path / "secret", b"x" * 5000))


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(UserError, match="not a regular file"):
        load_secret_file(str(tmp_path / "fifo"))
    with pytest.raises(UserError, match="not a regular file"):
        load_secret_file(str(tmp_path))
    with pytest.raises(UserError, match="No such file"):
        load_secret_file(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="not a path"):
        load_secret_file("a\0b")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_file_of_another_user(tmp_path: Path) -> None:
    path = write(tmp_path / "secret", SECRET)
    os.chown(path, 65534, 65534)
    with pytest.raises(UserError, match="another user"):
        load_secret_file(path)
