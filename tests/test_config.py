"""Loading configuration: precedence, units, and one clear sentence for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alluxiofuse.config import Config
from alluxiofuse.config_load import find_file, load, merge_tiers, parse_tier
from alluxiofuse.errors import UserError


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "alluxiofuse.toml"
    path.write_text(text)
    return str(path)


def test_without_anything_the_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(environ={"HOME": str(tmp_path)})
    assert config == Config()
    assert config.master.port == 19998
    assert config.worker.port == 29999


def test_file_environment_and_command_line_in_this_order(tmp_path: Path) -> None:
    path = write(tmp_path, '[master]\nport = 1\nhost = "a"\nufs = "file:/f"\n')
    config = load(
        path,
        {"ALLUXIOFUSE_MASTER_PORT": "2", "ALLUXIOFUSE_MASTER_HOST": "b"},
        {"master.port": "3", "master.ufs": None},
    )
    assert (config.master.port, config.master.host, config.master.ufs) == (3, "b", "file:/f")


def test_sizes_and_durations_with_units(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        [master]
        block = "8MB"
        worker_timeout = "5min"
        session_lease_s = 2
        sync_interval = "-1"
        [worker]
        read_ahead_bytes = 1048576
        [[worker.tiers]]
        alias = "mem"
        directories = [{ path = "/a", quota = "1GB" }, { path = "/b", quota_bytes = 33554432 }]
        [[worker.tiers]]
        alias = "HDD"
        directories = [{ path = "/c", quota = "1.5TB" }]
        """,
    )
    config = load(path, {})
    assert config.master.block_bytes == 8 << 20
    assert config.master.worker_timeout_s == 300
    assert config.master.session_lease_s == 2
    assert config.master.sync_interval_s == -1
    assert config.worker.read_ahead_bytes == 1 << 20
    assert [d.quota_bytes for t in config.worker.tiers for d in t.directories] == [1 << 30, 32 << 20, 3 << 39]


def test_tiers_as_text() -> None:
    config = load(environ={"ALLUXIOFUSE_WORKER_TIERS": "MEM:/m:1GB,SSD:/s:2GB, SSD:/t:with:colon:3GB"})
    assert [(t.alias, [d.path for d in t.directories]) for t in config.worker.tiers] == [
        ("MEM", ["/m"]),
        ("SSD", ["/s", "/t:with:colon"]),
    ]
    merged = merge_tiers([parse_tier("ssd:/a:1GB"), parse_tier("MEM:/b:1GB"), parse_tier("SSD:/c:1GB")])
    assert [(t.alias, len(t.directories)) for t in merged] == [("SSD", 2), ("MEM", 1)]


def test_options_of_the_under_storage_from_the_environment() -> None:
    config = load(environ={"ALLUXIOFUSE_MASTER_UFS_OPTIONS": "endpoint=http://h:1,region=r=1"})
    assert config.master.ufs_options == {"endpoint": "http://h:1", "region": "r=1"}


def test_addresses_have_variables_of_their_own() -> None:
    config = load(environ={"ALLUXIOFUSE_MASTER": "h:1", "ALLUXIOFUSE_SECRET_FILE": "/s"})
    assert (config.cluster.master, config.cluster.secret_file) == ("h:1", "/s")


MISTAKES: list[tuple[str, list[str]]] = [
    ("[master]\nprot = 1\n", ["'master.prot'", "did you mean 'port'"]),
    ("[mastre]\nport = 1\n", ["'mastre'", "did you mean 'master'"]),
    ("[master]\nport = 'many'\n", ["master.port", "int"]),
    ("[master]\nport = 99999\n", ["master.port", "65535"]),
    ("[master]\nblock = '8 parsecs'\n", ["master.block", "not a size", "8GB"]),
    ("[master]\nblock = 8\n", ["master.block", "no unit"]),
    ("[master]\nblock = '100KB'\n", ["master.block_bytes", "multiple of 1MB"]),
    ("[master]\nworker_timeout = '5 fortnights'\n", ["master.worker_timeout", "not a duration"]),
    ("[master]\nworker_timeout = 5\n", ["master.worker_timeout", "no unit", "30s"]),
    ("[master]\nworker_timeout_s = 0\n", ["master.worker_timeout_s", "zero"]),
    ("[worker]\nhigh_watermark = 1.5\n", ["watermark"]),
    ("[worker]\ntiers = ['SSD:/x']\n", ["worker.tiers", "ALIAS:DIRECTORY:QUOTA"]),
    ("[worker]\ntiers = ['SDD:/x:1GB']\n", ["SDD", "did you mean 'SSD'"]),
    ("[worker]\ntiers = [{alias='SSD', directories=[{path='/x', quta='1GB'}]}]\n", ["'quta'", "quota"]),
    ("[worker]\ntiers = [{alias='SSD', directories=[{path='/x'}]}]\n", ["quota_bytes must be given"]),
    ("[worker]\ntiers = [{alias='SSD', directories=[{path='/x', quota='1KB'}]}]\n", ["at least 16MB"]),
    ("[worker]\ntiers = 5\n", ["worker.tiers", "list"]),
    ("[client]\nwrite_type = 'THROUGH_AND_THROUGH'\n", ["client.write_type", "ASYNC_THROUGH"]),
    ("master = 5\n", ["[master]"]),
    ("[master\n", ["TOML"]),
]


@pytest.mark.parametrize(("text", "words"), MISTAKES)
def test_a_mistake_in_the_file_names_file_and_key(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load(path, {})
    assert all(word in caught.value.message for word in words), caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ALLUXIOFUSE_MASTER_PROT", "1", ["ALLUXIOFUSE_MASTER_PROT", "did you mean 'port'"]),
        ("ALLUXIOFUSE_MASTRE_PORT", "1", ["ALLUXIOFUSE_MASTRE_PORT", "ALLUXIOFUSE_MASTER_"]),
        ("ALLUXIOFUSE_MASTER_BLOCK", "much", ["ALLUXIOFUSE_MASTER_BLOCK", "not a size"]),
        ("ALLUXIOFUSE_MASTER_PORT", "x", ["ALLUXIOFUSE_MASTER_PORT", "int"]),
        ("ALLUXIOFUSE_MASTER_UFS_OPTIONS", "x", ["KEY=VALUE"]),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(name: str, value: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(environ={name: value})
    assert all(word in caught.value.message for word in words), caught.value.message


def test_a_file_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load(str(tmp_path / "none.toml"), {})
    with pytest.raises(UserError, match="No such file"):
        load(None, {"ALLUXIOFUSE_CONFIG": str(tmp_path / "none.toml")})


def test_the_usual_places_are_tried_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {"HOME": str(tmp_path / "home")}
    at_home = tmp_path / "home/.config/alluxiofuse/alluxiofuse.toml"
    at_home.parent.mkdir(parents=True)
    at_home.write_text("")
    assert find_file(None, environ) == at_home
    write(tmp_path, "")
    assert find_file(None, environ) == Path("alluxiofuse.toml")


def test_a_value_in_one_config_is_not_shared_with_another() -> None:
    first: Any = load(environ={})
    first.master.ufs_options["x"] = "y"
    first.worker.tiers.append(parse_tier("SSD:/a:1GB"))
    assert load(environ={}) == Config()
