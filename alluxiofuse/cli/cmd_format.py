"""`alluxiofuse format`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import click

from alluxiofuse.cli.state_dir import ERASING_NAME, LOCK_NAME, StateDir
from alluxiofuse.cli.tiers import REMEMBERED, default_mem_directory
from alluxiofuse.errors import UserError

OURS = ("master", "worker", "cache", REMEMBERED)
"""What daemons make in a state directory, beside sockets and the lock."""


@click.command("format")
@click.option(
    "--state", required=True, metavar="DIR", help="State directory of a local, master or worker daemon."
)
@click.option("--force", is_flag=True, help="Do not ask.")
def format_command(state: str, force: bool) -> None:
    """Erase a state directory: metadata, cache, and files that are in no under storage yet.

    Under storages are not touched. The daemon must not be running.
    """
    path = Path(state)
    if not path.is_dir():
        raise UserError(f"{state} is no state directory: there is nothing to format")
    with StateDir(path, is_formatting=True) as directory:
        mark = directory.path / ERASING_NAME
        found = sorted(name for name in _names(directory.path) if name in OURS)
        mem = default_mem_directory(directory.path)
        if found and not force and not mark.exists():
            _confirm(directory.path)
        # From here on it is erased, however often that takes: nothing is started on a part of it.
        mark.touch(mode=0o600)
        _sync(directory.path)
        for name in found:
            _remove(directory.path / name)
        if mem.is_dir() and not mem.is_symlink():
            shutil.rmtree(mem)
        _sync(directory.path)
        mark.unlink()
    click.echo(f"{directory.path} is empty now")


def _sync(directory: Path) -> None:
    """The names in it survive a power failure."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _names(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if entry.name != LOCK_NAME]


def _confirm(path: Path) -> None:
    if not sys.stdin.isatty():
        raise UserError(
            f"{path} holds data: everything not yet in an under storage would be lost; give --force"
        )
    text = f"{path}: erase metadata and cache, and with them all files that are in no under storage yet?"
    click.confirm(text, abort=True, err=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
