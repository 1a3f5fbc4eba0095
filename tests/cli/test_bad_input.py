"""A user's mistakes, made with the real program: one clear line that names the thing and says what to
do, exit code 2, nothing half-started, nothing lost."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import LocalDaemon, mount_lines, require_fuse, run_cli
from servers import SeaweedS3, free_ports

Start = Callable[..., LocalDaemon]
PATIENCE_S = 60.0


class Place:
    """An under storage, an empty mount point and a state directory that is not there yet."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.ufs, self.mount, self.state = base / "ufs", base / "mnt", base / "state"
        self.ufs.mkdir()
        self.mount.mkdir()

    def local(
        self, *changes: str | Path, ufs: str | Path | None = None, mount: str | Path | None = None
    ) -> list[str]:
        """A correct command line, and what is added to it."""
        command = ["local", "--ufs", str(ufs or self.ufs), "--mount", str(mount or self.mount)]
        return [
            *command,
            "--state",
            str(self.state),
            "--tier",
            f"SSD:{self.base}/ssd:1GB",
            *map(str, changes),
        ]

    def refused(self, command: list[str], *words: str, env: dict[str, str] | None = None) -> str:
        """Run it, see that it is refused as it should be, and that it left nothing. Its line."""
        start = time.monotonic()
        done = run_cli(*command, check=False, env=env)
        assert time.monotonic() - start < PATIENCE_S
        lines = [
            line for line in done.stderr.splitlines() if " INFO " not in line and " WARNING " not in line
        ]
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("alluxiofuse: error: ")
        for word in words:
            assert word in lines[0], lines[0]
        assert mount_lines(self.mount) == []
        assert not self.state.exists() or not list(self.state.glob("*.sock"))
        return lines[0]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    require_fuse()
    return Place(tmp_path)


def works_now(local_daemon: Start, place: Place) -> None:
    """Nothing of what was refused is in the way of the right command."""
    site = local_daemon(place.ufs, arguments=["--state", str(place.state)])
    (site.mount / "x").write_text("x")
    assert (site.mount / "x").read_text() == "x"


# --- S3 -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(s3_server: SeaweedS3) -> str:
    return s3_server.create_bucket("bad-input")


def test_wrong_credentials(place: Place, s3_server: SeaweedS3, bucket: str) -> None:
    env = {**s3_server.environment, "AWS_SECRET_ACCESS_KEY": "not-the-secret-of-this-server"}
    line = place.refused(place.local(ufs=f"s3://{bucket}/p"), bucket, env=env)
    assert "not-the-secret" not in line
    assert not place.state.exists()
    env = {**s3_server.environment, "AWS_ACCESS_KEY_ID": "nobody"}
    place.refused(place.local(ufs=f"s3://{bucket}/p"), bucket, env=env)


def test_no_credentials(place: Place, s3_server: SeaweedS3, bucket: str) -> None:
    env = {"S3_ENDPOINT": s3_server.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
    place.refused(place.local(ufs=f"s3://{bucket}"), "credentials", env=env)


def test_missing_bucket(place: Place, s3_server: SeaweedS3) -> None:
    place.refused(place.local(ufs="s3://no-such-bucket/p"), "no-such-bucket", env=s3_server.environment)
    assert not place.state.exists()


def test_unreachable_endpoint(place: Place, s3_server: SeaweedS3) -> None:
    (port,) = free_ports(1)
    env = {**s3_server.environment, "S3_ENDPOINT": f"http://127.0.0.1:{port}"}
    place.refused(place.local(ufs="s3://bucket-1"), str(port), env=env)
    assert not place.state.exists()


def test_an_endpoint_that_never_answers(place: Place, s3_server: SeaweedS3) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        env = {**s3_server.environment, "S3_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        place.refused(place.local("--option", "timeout_s=3", ufs="s3://bucket-1"), "bucket-1", env=env)
    assert not place.state.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--option", "secret_key=hunter2"], ["secret_key=@FILE"]),
        (["--option", "nonsense=1"], ["nonsense"]),
        (["--option", "timeout_s=soon"], ["timeout_s"]),
        (["--option", "endpoint"], ["KEY=VALUE"]),
    ],
)
def test_wrong_options_of_the_store(
    place: Place, s3_server: SeaweedS3, bucket: str, changes: list[str], words: list[str]
) -> None:
    line = place.refused(place.local(*changes, ufs=f"s3://{bucket}"), *words, env=s3_server.environment)
    assert "hunter2" not in line


@pytest.mark.parametrize("uri", ["ftp://host/x", "s3://", "s3://x", "file://host/x"])
def test_uris_that_are_none(place: Place, uri: str) -> None:
    place.refused(place.local(ufs=uri))
    assert not place.state.exists()


def test_an_under_storage_that_is_no_directory(place: Place) -> None:
    (place.base / "file").write_text("")
    place.refused(place.local(ufs=place.base / "file"), str(place.base / "file"))
    place.refused(place.local(ufs=place.base / "none/below"), str(place.base / "none"))


def test_no_under_storage_at_all(place: Place) -> None:
    place.refused(["local", "--mount", str(place.mount), "--state", str(place.state)], "--ufs")


def test_another_under_storage_than_before(place: Place, local_daemon: Start, tmp_path: Path) -> None:
    site = local_daemon(place.ufs)
    (site.mount / "x").write_text("x")
    assert site.stop() == 0
    (tmp_path / "other").mkdir()
    command = place.local(ufs=tmp_path / "other")
    command[command.index("--state") + 1] = str(site.state)
    place.refused(command, str(place.ufs), str(tmp_path / "other"))
    site.daemon.start()
    assert (site.mount / "x").read_text() == "x"


# --- mount points -------------------------------------------------------------------------------------


def test_a_mount_point_that_is_missing(place: Place) -> None:
    place.refused(place.local(mount=place.base / "none"), str(place.base / "none"), "does not exist", "mkdir")
    assert not place.state.exists()


def test_a_mount_point_that_is_not_empty(place: Place) -> None:
    (place.mount / "mine").write_text("precious")
    place.refused(place.local(), str(place.mount), "not empty")
    assert (place.mount / "mine").read_text() == "precious"


def test_a_mount_point_that_is_a_file(place: Place) -> None:
    (place.base / "file").write_text("")
    place.refused(place.local(mount=place.base / "file"), str(place.base / "file"), "not a directory")


def test_a_mount_point_that_is_mounted(place: Place, local_daemon: Start) -> None:
    site = local_daemon()
    place.refused(place.local(mount=site.mount), str(site.mount), "already", "umount")
    (site.mount / "still").write_text("works")


def test_wrong_mount_options(place: Place) -> None:
    place.refused(place.local("-o", "nonsense"), "nonsense")
    place.refused(place.local("-o", "write_type=SOMETIMES"), "write_type", "ASYNC_THROUGH")
    place.refused(place.local("-o", "attr_timeout=long"), "attr_timeout")


# --- state, tiers, ports --------------------------------------------------------------------------------


def test_a_second_one_on_one_state_directory(place: Place, local_daemon: Start) -> None:
    site = local_daemon()
    command = place.local(ufs=site.ufs)
    command[command.index("--state") + 1] = str(site.state)
    place.refused(command, str(site.state), f"pid {site.daemon.pid}")
    place.refused(["master", "--state", str(site.state), "--ufs", site.ufs], str(site.state), "in use")
    place.refused(["format", "--force", "--state", str(site.state)], str(site.state), "in use")
    (site.mount / "still").write_text("works")


def test_a_foreign_state_directory(place: Place) -> None:
    place.state.mkdir()
    (place.state / "letter.txt").write_text("dear")
    place.refused(place.local(), str(place.state), "other files")
    assert sorted(os.listdir(place.state)) == ["letter.txt"]


def test_a_state_directory_that_is_a_file(place: Place) -> None:
    place.state.write_text("")
    place.refused(place.local(), str(place.state), "Not a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_state_directory(place: Place) -> None:
    place.state.mkdir(mode=0)
    place.refused(place.local(), str(place.state), "Permission denied")


def test_a_damaged_state(place: Place, local_daemon: Start) -> None:
    site = local_daemon(place.ufs)
    assert site.stop() == 0
    current = site.state / "master/meta/CURRENT"
    assert stat.S_ISREG(current.stat().st_mode)
    kept = current.read_bytes()
    current.write_bytes(b"nonsense\n")
    command = [*site.daemon.arguments]
    place.refused(command, str(site.state))
    current.write_bytes(kept)
    site.daemon.start()


def test_a_quota_larger_than_the_disk(place: Place) -> None:
    command = place.local()
    command[command.index("--tier") + 1] = f"SSD:{place.base}/ssd:900TB"
    place.refused(command, f"{place.base}/ssd", "larger than the disk")
    assert not (place.base / "ssd").exists()
    assert not place.state.exists()


@pytest.mark.parametrize(
    ("tier", "words"),
    [
        ("SSD:/x", ["ALIAS:DIRECTORY:QUOTA"]),
        ("SDD:/x:1GB", ["SDD", "SSD"]),
        ("SSD:/x:1 parsec", ["not a size", "8GB"]),
        ("SSD:/x:1KB", ["at least 16MB"]),
        ("SSD:/proc/cmdline/x:1GB", ["/proc/cmdline"]),
    ],
)
def test_wrong_tiers(place: Place, tier: str, words: list[str]) -> None:
    command = place.local()
    command[command.index("--tier") + 1] = tier
    place.refused(command, *words)
    assert not place.state.exists()


def test_a_storage_directory_of_another_worker(place: Place, local_daemon: Start) -> None:
    site = local_daemon()
    assert site.stop() == 0
    command = place.local()
    command[command.index("--tier") + 1] = f"SSD:{site.base}/ssd:1GB"
    place.refused(command, f"{site.base}/ssd", "another state directory")


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        yield busy.getsockname()[1]


def test_a_port_in_use(place: Place, busy_port: int, local_daemon: Start) -> None:
    port = str(busy_port)
    place.refused(
        ["master", "--state", str(place.state), "--ufs", str(place.ufs), "--port", port], port, "in use"
    )
    place.refused(place.local("--tcp", f"127.0.0.1:{port}"), port, "in use")
    assert not place.state.exists()
    works_now(local_daemon, place)


def test_listening_for_everybody_needs_a_secret(place: Place) -> None:
    (port,) = map(str, free_ports(1))
    command = [
        "master",
        "--state",
        str(place.state),
        "--ufs",
        str(place.ufs),
        "--host",
        ".".join("0000"),
        "--port",
        port,
    ]
    place.refused(command, "--secret-file")


def test_secret_files_that_others_can_read(place: Place) -> None:
    secret = place.base / "secret"
    secret.write_text("x" * 40)
    secret.chmod(0o644)
    place.refused(place.local("--secret-file", secret), str(secret), "chmod 600")
    secret.chmod(0o600)
    secret.write_text("short")
    line = place.refused(place.local("--secret-file", secret), str(secret))
    assert "short" not in line.replace(str(secret), "")
    place.refused(place.local("--secret-file", place.base / "none"), str(place.base / "none"))


# --- configuration --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[worker]\nfetch_paralel = 3\n", ["fetch_paralel", "did you mean 'fetch_parallel'"]),
        ("[mastr]\nport = 3\n", ["mastr", "did you mean 'master'"]),
        ("[master]\nblock = '64 parsecs'\n", ["master.block", "not a size"]),
        ("[master]\nworker_timeout = '5 sizes'\n", ["master.worker_timeout", "not a duration"]),
        ("[master]\nworker_timeout = 5\n", ["master.worker_timeout", "no unit"]),
        ("[master\n", ["TOML"]),
    ],
)
def test_wrong_configuration(place: Place, text: str, words: list[str]) -> None:
    path = place.base / "conf.toml"
    path.write_text(text)
    place.refused(place.local("--config", path), str(path), *words)
    assert not place.state.exists()


def test_wrong_environment(place: Place) -> None:
    place.refused(place.local(), "ALLUXIOFUSE_WORKER_PROT", env={"ALLUXIOFUSE_WORKER_PROT": "1"})


# --- mounting a master ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["foreground", "background"])
def test_mounting_where_no_master_answers(place: Place, where: str) -> None:
    (port,) = free_ports(1)
    config = place.base / "conf.toml"
    config.write_text('[client]\npatience = "2s"\n')
    command = ["mount", f"127.0.0.1:{port}", str(place.mount), "--config", str(config)]
    place.refused([*command, "--foreground"] if where == "foreground" else command, f"127.0.0.1:{port}")


def test_mounting_a_directory_that_is_not_there(place: Place, local_daemon: Start) -> None:
    site = local_daemon()
    (site.mount / "file").write_text("x")
    for path, words in (("none", "No such file"), ("file", "not a directory")):
        command = ["mount", f"unix:{site.state}/master.sock/{path}", str(place.mount)]
        place.refused(command, f"/{path}", words)


def test_unmounting_what_is_not_mounted(place: Place) -> None:
    place.refused(["umount", str(place.mount)], str(place.mount), "not mounted")


def test_formatting_needs_force(place: Place, local_daemon: Start) -> None:
    site = local_daemon(place.ufs)
    (site.mount / "x").write_text("kept in the under storage")
    site.wait_persisted()
    assert site.stop() == 0
    place.refused(["format", "--state", str(site.state)], str(site.state), "--force")
    assert (site.state / "master").is_dir()
    run_cli("format", "--force", "--state", site.state)
    assert not (site.state / "master").exists()
    place.refused(["format", "--force", "--state", str(place.base / "none")], "no state directory")
