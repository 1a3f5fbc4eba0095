"""The entry point `alluxiofuse`."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import click

from alluxiofuse import __version__
from alluxiofuse.cli import outcome

COMMANDS: dict[str, str] = {
    "local": "alluxiofuse.cli.cmd_local:local",
    "master": "alluxiofuse.cli.cmd_daemons:master",
    "worker": "alluxiofuse.cli.cmd_daemons:worker",
    "mount": "alluxiofuse.cli.cmd_mount:mount",
    "umount": "alluxiofuse.cli.cmd_mount:umount",
    "format": "alluxiofuse.cli.cmd_format:format_command",
    "fsck": "alluxiofuse.cli.cmd_fsck:fsck",
    "fs": "alluxiofuse.cli.cmd_fs:fs",
    "admin": "alluxiofuse.cli.cmd_admin:admin",
}
"""Name -> where the command is; imported when it is asked for."""


class Commands(click.Group):
    """A group that imports a command when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = COMMANDS.get(cmd_name)
        if place is None:
            return None
        module, _, name = place.partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=Commands)
@click.version_option(__version__, prog_name="alluxiofuse", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """One namespace over S3 and local storage, mounted as an ordinary Linux filesystem, with the hot
    data kept in the memory and disks of the machines that use it.

    \b
    Start here:
      alluxiofuse local --ufs DIR --mount DIR --state DIR     everything in one process
      alluxiofuse fs ls /                                     look at it by path
    \b
    Several machines:
      alluxiofuse master --ufs s3://bucket --state DIR
      alluxiofuse worker --master HOST:PORT --state DIR --tier SSD:/cache:100GB
      alluxiofuse mount HOST:PORT /mnt
    """


def open_standard_files() -> None:
    """Whoever started us may have closed some of descriptors 0 to 2 (`>&-`). The next files opened would
    take their numbers, and what a library prints would go into a database."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            if os.open(os.devnull, os.O_RDWR) == number and getattr(sys, name) is None:
                setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - for all our life


def is_mount_helper_call(arguments: Sequence[str]) -> bool:
    """mount.fuse3 runs `alluxiofuse [SOURCE] DIR -o OPTIONS` for `mount -t fuse alluxiofuse#SOURCE`."""
    words = [word for word in arguments[:-2] if not word.startswith("-")]
    return (
        len(arguments) in (3, 4)
        and len(words) == len(arguments) - 2
        and arguments[-2] == "-o"
        and arguments[0] not in COMMANDS
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit. No traceback reaches a user unless --debug asks for it."""
    try:
        try:
            _main(arguments)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # How it ends is settled.
    except KeyboardInterrupt:  # it came while the end of the command was being reported
        _leave_interrupted()
    except SystemExit as exc:
        if exc.code == outcome.INTERRUPTED:
            _leave_interrupted()
        raise


def _leave_interrupted() -> NoReturn:
    """Without the interpreter's own end: where the signal came while it ran code that is made of text, of a
    dataclass say, it would kill itself by SIGINT, though we have caught that (pythonrun.c,
    unhandled_keyboard_interrupt)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for file in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            file.flush()
    os._exit(outcome.INTERRUPTED)


def _main(arguments: Sequence[str] | None) -> None:
    open_standard_files()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if is_mount_helper_call(arguments):
        from alluxiofuse.cli import mount_helper

        mount_helper.main(arguments)
        return
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    # Taken wherever it was written.
    arguments = [word for number, word in enumerate(arguments) if word != "--debug" or number > end]
    try:
        code = cli.main(list(arguments), prog_name=outcome.PROGRAM, standalone_mode=False)
        sys.stdout.flush()
    except BaseException as exc:
        code = outcome.report(exc, debug=debug)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
