"""Credentials that a daemon is given appear in no log, listing, report, error text or command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import Cluster, LocalDaemon, run_cli
from servers import SeaweedS3

Start = Callable[..., LocalDaemon]


@pytest.fixture(params=["environment", "options", "files"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_s3_credentials(way: str, local_daemon: Start, s3_server: SeaweedS3, tmp_path: Path) -> None:
    bucket = s3_server.create_bucket(f"hidden-{way}")
    keys = {"access_key": s3_server.access_key, "secret_key": s3_server.secret_key}
    arguments = ["--log-level", "debug"]
    if way == "files":
        for name, value in keys.items():
            (tmp_path / name).write_text(value + "\n")
            arguments += ["--option", f"{name}=@{tmp_path / name}"]
    site = local_daemon(
        f"s3://{bucket}/p",
        arguments=arguments,
        options=keys if way == "options" else None,
        env=s3_server.environment if way == "environment" else {"S3_ENDPOINT": s3_server.endpoint},
    )
    (site.mount / "file").write_text("content")
    site.wait_persisted()
    run_cli("fs", "free", site.mount / "file")
    assert (site.mount / "file").read_text() == "content"
    again = [f"--option={name}=env:{name.upper()}" for name in keys]
    env = {name.upper(): value for name, value in keys.items()}
    run_cli("fs", "mount", *again, site.mount / "again", f"s3://{bucket}/other", env=env)
    seen = {
        "mounts": site.fs("mount"),
        "mounts as JSON": site.fs("mount", "--json"),
        "report": run_cli("admin", "report", "--json", "--master", site.address).stdout,
        "location": site.fs("location", "--json", "/file"),
        "mountinfo": Path("/proc/self/mountinfo").read_text(),
    }
    for task in Path(f"/proc/{site.daemon.pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            seen[f"command line of {child}"] = Path(f"/proc/{child}/cmdline").read_text()
    seen["command line"] = Path(f"/proc/{site.daemon.pid}/cmdline").read_text()
    # What goes wrong is told too, and logged.
    wrong = {**s3_server.environment, "AWS_SECRET_ACCESS_KEY": "another-secret-word"}
    command = ["fs", "mount", "--master", site.address, "/wrong", f"s3://{bucket}-none"]
    seen["an error"] = run_cli(*command, check=False, env=wrong).stderr
    (tmp_path / "bad").write_text("another-secret-word")
    command[-1] = f"s3://{bucket}"
    bad = [f"--option=access_key=@{tmp_path / 'bad'}", f"--option=secret_key=@{tmp_path / 'bad'}"]
    done = run_cli(*command, *bad, check=False)
    assert done.returncode == 1
    seen["a refusal"] = done.stderr
    assert site.stop() == 0
    seen["log"] = site.daemon.log_text()
    assert seen["log"]
    for where, text in seen.items():
        assert s3_server.secret_key not in text, where
        assert "another-secret-word" not in text, where


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ufs", "s3://key:hunter2@bucket-1/p"],
        ["--ufs", "s3://bucket-1", "--option", "endpoint=http://key:hunter2@127.0.0.1:1"],
        ["--ufs", "s3://bucket-1", "--option", "secret_key=hunter2"],
    ],
)
def test_secrets_in_the_wrong_place_are_refused_and_not_repeated(
    arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mnt").mkdir()
    done = run_cli(
        "local", "--mount", tmp_path / "mnt", "--state", tmp_path / "state", *arguments, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "hunter2" not in done.stderr + done.stdout
    assert not (tmp_path / "state").exists()


def test_the_shared_secret(cluster: Callable[..., Cluster]) -> None:
    site = cluster(workers=1, secret=True)
    assert site.secret_file is not None
    secret = site.secret_file.read_text()
    assert len(secret) > 30
    for daemon in site.daemons:
        assert secret not in Path(f"/proc/{daemon.pid}/cmdline").read_text()
    no_secret = run_cli("fs", "ls", "--master", site.address, "/", check=False)
    assert (no_secret.returncode, no_secret.stdout) == (1, "")
    assert "--secret-file" in no_secret.stderr
    wrong = Path(site.base) / "wrong"
    wrong.touch(mode=0o600)
    wrong.write_text("w" * 40)
    command = ["fs", "ls", "--master", site.address, "--secret-file", str(wrong), "/"]
    refused = run_cli(*command, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "secret" in refused.stderr
    assert refused.stderr.count("\n") == 1
    for daemon in site.daemons:
        assert secret not in daemon.log_text()
    assert "refused 127.0.0.1" in site.master.log_text()
