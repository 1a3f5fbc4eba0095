"""The group `alluxiofuse fs`."""

from __future__ import annotations

import click

from alluxiofuse.cli import fs_change, fs_manage, fs_show
from alluxiofuse.cli.options import config_option, secret_option


@click.group()
@click.option("--master", metavar="ADDRESS", help="HOST:PORT, unix:PATH or a state directory.")
@secret_option
@config_option
@click.pass_context
def fs(ctx: click.Context, master: str | None, secret_file: str | None, config_file: str | None) -> None:
    """Work with files by path, and with the cache and under storages.

    Each PATH is absolute in the namespace (/a/b), or a path below an alluxiofuse mount of this machine
    (mnt/a, or a when the working directory is there). `alluxiofuse:/a` is always in the namespace.
    """
    ctx.obj = {"master": master, "secret_file": secret_file, "config_file": config_file}


for command in (
    fs_show.ls,
    fs_show.cat,
    fs_change.cp,
    fs_change.mv,
    fs_change.rm,
    fs_change.mkdir,
    fs_show.stat_command,
    fs_show.du,
    fs_manage.mount_command,
    fs_manage.unmount,
    fs_manage.free,
    fs_manage.load,
    fs_manage.persist,
    fs_show.location,
    fs_manage.sync,
    fs_change.copy_from_local,
    fs_change.copy_to_local,
):
    fs.add_command(command)
