"""The command line's parts without daemons: help, errors, addresses, tiers, state directories."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from daemons import run_cli

from alluxiofuse import __version__
from alluxiofuse.cli import mount_helper, outcome
from alluxiofuse.cli.address import expand, split_source, target_of
from alluxiofuse.cli.cmd_fs import fs
from alluxiofuse.cli.fs_change import local_path
from alluxiofuse.cli.fs_show import bits
from alluxiofuse.cli.main import COMMANDS, Commands, cli, is_mount_helper_call
from alluxiofuse.cli.options import parse_ufs_options
from alluxiofuse.cli.state_dir import StateDir
from alluxiofuse.cli.tiers import check_tiers, default_tiers
from alluxiofuse.config_load import parse_tier
from alluxiofuse.errors import ConnectionLost, FsError, StateError, UfsPermissionError, UserError
from alluxiofuse.units import parse_size


def all_commands(command: click.Command, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [words]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            found += all_commands(below, (*words, name))
    return found


# --- help and errors ------------------------------------------------------------------------------


@pytest.mark.parametrize("words", all_commands(cli), ids=" ".join)
def test_every_command_has_help(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli, [*words, "--help"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Usage:")
    described = result.output.split("\n\n", 1)[1].strip()
    assert not described.startswith("Options:"), "says nothing about what it does"


def test_every_option_is_explained() -> None:
    for words in all_commands(cli):
        command: click.Command = cli
        for word in words:
            assert isinstance(command, click.Group)
            found = command.get_command(click.Context(command), word)
            assert found is not None
            command = found
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{' '.join(words)} {parameter.opts}"


def test_version_and_usage_errors() -> None:
    assert run_cli("--version").stdout == f"alluxiofuse {__version__}\n"
    for words in (["nonsense"], ["fs", "nonsense"], ["fs", "ls", "--nonsense"], ["local"], ["fs", "cat"]):
        done = run_cli(*words, check=False)
        assert done.returncode == 2, words
        assert done.stdout == ""
        assert done.stderr.startswith("alluxiofuse: error: ")
        assert done.stderr.count("\n") == 1, done.stderr


def test_help_and_fs_commands_do_not_import_the_daemons() -> None:
    code = (
        "import sys\nfrom alluxiofuse.cli.main import cli\n"
        "from alluxiofuse.cli import cmd_admin, cmd_daemons, cmd_format, cmd_fs, cmd_local, cmd_mount\n"
        "heavy = {'rocksdict', 'boto3', 'pyfuse3', 'obstore', 'alluxiofuse.master', 'alluxiofuse.worker'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("say it"), 2, "alluxiofuse: error: say it\n"),
        (StateError("damaged"), 2, "alluxiofuse: error: damaged\n"),
        (UfsPermissionError("denied"), 1, "alluxiofuse: error: denied\n"),
        (FsError(2, "/a/b"), 1, "alluxiofuse: error: /a/b: No such file or directory\n"),
        (FsError(2), 1, "alluxiofuse: error: No such file or directory\n"),
        (ConnectionLost("gone\nand\x1b[1m more"), 1, "alluxiofuse: error: gone and\\x1b[1m more\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x"),
            1,
            "alluxiofuse: error: x: No such file or directory\n",
        ),
        (KeyboardInterrupt(), 130, ""),
        (
            ExceptionGroup("g", [ValueError(), ExceptionGroup("h", [UserError("deep")])]),
            2,
            "alluxiofuse: error: deep\n",
        ),
    ],
)
def test_an_error_is_one_line_and_a_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome.report(error, debug=False) == code
    assert capsys.readouterr().err == line


def test_a_bug_is_called_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome.report(KeyError("k"), debug=False) == 1
    assert "this is a bug: KeyError" in capsys.readouterr().err
    try:
        raise KeyError("k")
    except KeyError as exc:
        outcome.report(exc, debug=True)
    assert "Traceback" in capsys.readouterr().err


def test_what_fails_at_the_start_is_a_mistake() -> None:
    with pytest.raises(UserError, match="denied"), outcome.starting():
        raise ExceptionGroup("g", [UfsPermissionError("denied")])
    with pytest.raises(UserError, match="/x: Permission denied"), outcome.starting():
        raise PermissionError(13, "Permission denied", "/x")
    with pytest.raises(ZeroDivisionError), outcome.starting():
        raise ZeroDivisionError


# --- addresses and paths ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("h:1", ("h:1", "")),
        ("h:1/a/b", ("h:1", "/a/b")),
        ("[::1]:1/a", ("[::1]:1", "/a")),
        ("unix:/s/master.sock", ("unix:/s/master.sock", "")),
        ("unix:/s/master.sock/a/b", ("unix:/s/master.sock", "/a/b")),
        ("unix:/s/other", ("unix:/s/other", "")),
        ("", ("", "")),
    ],
)
def test_a_source_is_an_address_and_a_path(source: str, parts: tuple[str, str]) -> None:
    assert split_source(source) == parts


def test_paths_that_are_below_no_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert target_of("/a/../b//c/").path == b"/b/c"
    assert target_of("//").path == b"/"
    assert target_of("alluxiofuse:/x").path == b"/x"
    assert target_of("/\udcff").path == b"/\xff"
    for text in ("a", "./a", "alluxiofuse:a"):
        with pytest.raises(UserError, match="relative"):
            target_of(text)


def test_a_state_directory_is_an_address(tmp_path: Path) -> None:
    assert expand(str(tmp_path)) == f"unix:{tmp_path}/master.sock"
    assert expand("h:1") == "h:1"


def test_local_sides_of_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_path("/a") is None
    assert local_path("file:/a/b") == "/a/b"
    assert local_path("file:///a/b") == "/a/b"
    assert local_path("file:x") == str(tmp_path / "x")
    assert local_path("file:") == str(tmp_path)
    with pytest.raises(UserError, match="three slashes"):
        local_path("file://host/a")


def test_bitmaps() -> None:
    assert bits(b"\x05\x80") == [0, 2, 15]


# --- secrets ----------------------------------------------------------------------------------------


def test_secrets_are_refused_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="secret_key=@FILE") as caught:
        parse_ufs_options(["secret_key=hunter2"])
    assert "hunter2" not in caught.value.message
    (tmp_path / "key").write_text("from-file\n")
    monkeypatch.setenv("KEY", "from-variable")
    assert parse_ufs_options([f"secret_key=@{tmp_path}/key", "access_key=env:KEY", "region=r=1"]) == {
        "secret_key": "from-file",
        "access_key": "from-variable",
        "region": "r=1",
    }
    for bad, words in (
        ("x", "KEY=VALUE"),
        ("a=@/none", "can't be read"),
        ("a=env:NONE", "no environment variable"),
    ):
        with pytest.raises(UserError, match=words):
            parse_ufs_options([bad])


# --- mount(8) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "source", "directory", "options"),
    [
        ("h:1/p /mnt -o rw,noatime", "h:1/p", "/mnt", ["rw,noatime"]),
        ("h:1 /mnt -s -n -v -o rw", "h:1", "/mnt", ["rw"]),
        ("/mnt -o rw", "", "/mnt", ["rw"]),
        ("none /mnt -o rw -t fuse.alluxiofuse -N 7", "", "/mnt", ["rw"]),
    ],
)
def test_how_mount_calls_us(words: str, source: str, directory: str, options: list[str]) -> None:
    call = mount_helper.parse(words.split())
    assert (call.source, call.directory, call.options) == (source, directory, options)


def test_flags_of_mount() -> None:
    assert mount_helper.parse(["a:1", "/m", "-sf"]).is_sloppy
    assert mount_helper.parse(["a:1", "/m", "-sf"]).is_fake
    for bad in (["a", "b", "c"], [], ["a:1", "/m", "-o"], ["a:1", "/m", "-z"]):
        with pytest.raises(UserError):
            mount_helper.parse(bad)


def test_a_call_through_mount_fuse3_is_recognised() -> None:
    assert is_mount_helper_call(["h:1/p", "/mnt", "-o", "rw"])
    assert is_mount_helper_call(["/mnt", "-o", "rw,dev,suid"])
    assert not is_mount_helper_call(["mount", "h:1", "/mnt", "-o", "rw"])
    assert not is_mount_helper_call(["mount", "-o", "rw"])
    assert not is_mount_helper_call(["fs", "ls", "/"])
    assert not is_mount_helper_call(["--version"])
    assert not is_mount_helper_call([])
    assert set(COMMANDS) == set(Commands().list_commands(click.Context(cli)))
    assert {"ls", "cat", "cp", "mv", "rm", "mkdir", "stat", "du", "mount"} <= set(fs.commands)


# --- state directories --------------------------------------------------------------------------------


def test_a_state_directory_belongs_to_one(tmp_path: Path) -> None:
    path = tmp_path / "a/state"
    with StateDir(path) as state:
        assert path.stat().st_mode & 0o777 == 0o700
        assert (path / "lock").stat().st_mode & 0o777 == 0o600
        with pytest.raises(UserError, match=f"pid {os.getpid()}"), StateDir(path):
            pass
        state.master_directory.mkdir()
        state.is_started = True
    with StateDir(path):
        pass
    assert (path / "master").is_dir()


def test_a_start_that_stored_nothing_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with StateDir(tmp_path / "state"):
            raise UserError("no")

    with pytest.raises(UserError):
        fail()
    assert not (tmp_path / "state").exists()


def test_foreign_state_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/a.txt").write_text("dear")
    with pytest.raises(StateError, match=r"other files \(a.txt\)"), StateDir(tmp_path / "letters"):
        pass
    with (
        pytest.raises(StateError, match="can't be used: Not a directory"),
        StateDir(tmp_path / "letters/a.txt"),
    ):
        pass
    with pytest.raises(StateError, match="Not a directory"), StateDir(tmp_path / "letters/a.txt/b"):
        pass
    assert sorted(os.listdir(tmp_path / "letters")) == ["a.txt"]


# --- tiers --------------------------------------------------------------------------------------------


def test_default_tiers_are_the_same_at_the_next_start(tmp_path: Path) -> None:
    first = default_tiers(tmp_path)
    assert first[-1].alias == "SSD"
    assert first[-1].directories[0].path == str(tmp_path / "cache")
    assert parse_size("64MB") <= first[-1].directories[0].quota_bytes <= parse_size("20GB")
    assert default_tiers(tmp_path)[-1].directories == first[-1].directories
    if len(first) == 2:
        assert first[0].alias == "MEM"
        assert first[0].directories[0].path.startswith("/dev/shm/alluxiofuse-")  # noqa: S108
        assert first[0].directories[0].quota_bytes <= parse_size("1GB")
    check_tiers(first)


@pytest.mark.parametrize(
    ("tiers", "words"),
    [
        (["SSD:{base}/a:900TB"], "larger than the disk"),
        (["SSD:{base}/a:{half}", "HDD:{base}/b:{most}"], "larger than the disk"),
        (["SSD:{base}/a:1GB", "HDD:{base}/a/b:1GB"], "overlap"),
        (["SSD:{base}/file/a:1GB"], "is not a directory"),
    ],
)
def test_tiers_that_can_not_work(tmp_path: Path, tiers: list[str], words: str) -> None:
    (tmp_path / "file").write_text("")
    total_mb = os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize >> 20
    values = {"base": tmp_path, "half": f"{total_mb // 2}MB", "most": f"{total_mb * 3 // 4}MB"}
    with pytest.raises((UserError, StateError), match=words):
        check_tiers([parse_tier(one.format(**values)) for one in tiers])
    assert sorted(os.listdir(tmp_path)) == ["file"]
