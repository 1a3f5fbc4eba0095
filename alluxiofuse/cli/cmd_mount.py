"""`alluxiofuse mount` and `alluxiofuse umount`."""

from __future__ import annotations

import os
import time

import click

from alluxiofuse.cli import options as shared
from alluxiofuse.cli.outcome import MISTAKE
from alluxiofuse.errors import UserError

IN_USE_S = 1.0
"""For so long umount tries: a daemon that has just begun looks at its own mount for a moment."""


@click.command()
@click.argument("source", metavar="HOST:PORT[/PATH]", required=False)
@click.argument("directory", metavar="DIR", required=False)
@click.option("-o", "mount_options", multiple=True, metavar="OPT[,OPT...]", help="Mount options, see below.")
@click.option(
    "--foreground", "-f", is_flag=True, help="Stay in the foreground; prints a line when it is ready."
)
@click.option(
    "--upgrade",
    metavar="DIR",
    help="Have what is mounted at DIR (with keeper=on, also by `local`) served by the installed version from "
    "now on. Programs that use it see a pause.",
)
@shared.secret_option
@shared.config_option
@shared.log_option
def mount(
    source: str | None,
    directory: str | None,
    mount_options: tuple[str, ...],
    foreground: bool,
    upgrade: str | None,
    secret_file: str | None,
    config_file: str | None,
    log_level: str,
) -> None:
    """Mount the namespace (or the directory PATH of it) of the master at HOST:PORT on DIR.

    Returns when the mount answers; a daemon goes on serving it. The source may also be unix:SOCKET or
    a master's state directory.

    \b
    Mount options, beside the kernel's (ro, noatime, noexec, ...):
      allow_other            other users may use it (default as root)
      attr_timeout=SECONDS   most that names and attributes are cached for; 0: always ask
      master_patience=SECONDS  how long programs wait for a master that is away, then EIO (60)
      write_type=TYPE        ASYNC_THROUGH, or CACHE_THROUGH: close waits for the under storage
      read_ahead=SIZE        of the kernel, on this mount
      secret_file=FILE, config=FILE, log_file=FILE, nonempty, session=auto|native|pyfuse3
      keeper=auto|on|off     the mount outlives a crash of its daemon (auto: as root on Linux 6.16 and newer)

    \b
    The same by mount(8) and /etc/fstab:
      mount -t fuse alluxiofuse#HOST:PORT /mnt
      mount -t fuse.alluxiofuse HOST:PORT /mnt -o ro
      HOST:PORT/path  /mnt  fuse.alluxiofuse  _netdev,ro  0  0
    """
    from alluxiofuse.cli import mounting
    from alluxiofuse.cli.address import expand
    from alluxiofuse.fuse import keeping, mountopts

    if upgrade is not None:
        if source is not None or mount_options or foreground:
            raise UserError("--upgrade DIR stands alone: the mount keeps its options")
        keeping.upgrade(_resolved(upgrade), mounting.program())
        return
    if source is None or directory is None:
        raise click.UsageError(f"Missing argument '{'DIR' if source else 'HOST:PORT[/PATH]'}'.")
    options = mountopts.parse(mount_options)
    options.config_file = config_file or options.config_file
    plan = mounting.plan_mount(expand(source), directory, options, {"cluster.secret_file": secret_file})
    if foreground:
        mounting.mount_in_foreground(plan, log_level)
    else:
        mounting.mount_in_background(plan, log_level, MISTAKE)


@click.command()
@click.argument("directory", metavar="DIR")
@click.option("--lazy", "-l", is_flag=True, help="Detach it at once, even if it is in use.")
def umount(directory: str, lazy: bool) -> None:
    """Unmount DIR. Its daemon writes back what is left and ends."""
    from alluxiofuse.fuse import mountpoint

    deadline = time.monotonic() + IN_USE_S
    while True:
        try:
            return mountpoint.umount(_resolved(directory), is_lazy=lazy)
        except mountpoint.InUseError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _resolved(directory: str) -> str:
    """Without symlinks; the mount itself may be dead, and is not asked."""
    parent, name = os.path.split(os.path.abspath(directory))
    return os.path.join(os.path.realpath(parent), name)
