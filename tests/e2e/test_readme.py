"""What the README tells people to type, typed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from daemons import LocalDaemon, clean_environment, require_fuse
from servers import free_ports

from alluxiofuse import config_load

README = Path(__file__).parents[2] / "README.md"
TIMEOUT_S = 120
STOP_ALL = "trap 'kill $(jobs -p) 2> /dev/null || true; wait' EXIT\n"


def blocks(heading: str, language: str = "sh") -> list[str]:
    """Code blocks below a heading, up to the next one."""
    text = README.read_text("utf-8")
    section = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None, heading
    found = re.findall(rf"^```{language}$(.*?)^```$", section[1], re.MULTILINE | re.DOTALL)
    assert found, heading
    return list(found)


def type_in(script: str, directory: Path, env: dict[str, str] | None = None) -> str:
    program = f"set -e -o pipefail\n{STOP_ALL}{script}"
    place = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", program],
        cwd=directory,
        env=clean_environment({"PATH": place, **(env or {})}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT_S,
        check=False,
    )
    output = os.fsdecode(done.stdout)
    print(output)
    assert done.returncode == 0, f"exit code {done.returncode} of\n{script}\n{output}"
    return output


def test_the_walk_through(local_daemon: Callable[..., LocalDaemon]) -> None:
    site = local_daemon()
    (site.base / "data").symlink_to(site.ufs_dir)
    (site.base / ".venv").symlink_to(sys.prefix)
    env = {"ALLUXIOFUSE_MASTER": str(site.state)}
    (script,) = blocks("A walk through")
    output = type_in(script, site.base, env)
    assert "the same" in output
    assert "# one line more" in output
    (script,) = blocks("The cache")
    output = type_in(script, site.base, env)
    assert "1 alive of 1" in output
    (script,) = blocks("More under storages in one namespace")
    assert "hello" in type_in(script, site.base, env).splitlines()


def test_several_machines_on_one() -> None:
    require_fuse()
    (script,) = blocks("Several machines")
    for number, port in zip(("19998", "29999", "30001"), free_ports(3), strict=True):
        assert number in script
        script = script.replace(number, str(port))
    with tempfile.TemporaryDirectory(prefix="af-") as directory:
        output = type_in(script, Path(directory))
        assert Path(directory, "data/hello.txt").read_text() == "hello\n"
        assert os.listdir(Path(directory, "mnt")) == []
    assert "2 alive of 2" in output


def test_the_configuration(tmp_path: Path) -> None:
    (text,) = blocks("Configuration", "toml")
    (tmp_path / "alluxiofuse.toml").write_text(text)
    config = config_load.load(str(tmp_path / "alluxiofuse.toml"), environ={})
    assert config.master.sync_interval_s == 30.0
    assert [tier.alias for tier in config.worker.tiers] == ["MEM", "SSD"]
    assert [one.path for one in config.worker.tiers[1].directories] == ["/ssd1/cache", "/ssd2/cache"]
