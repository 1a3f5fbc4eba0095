"""`alluxiofuse local`: master, worker, client and mount in one process."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import trio

from alluxiofuse.cli import options as shared
from alluxiofuse.cli.apart import check_apart
from alluxiofuse.cli.fs_context import security_of
from alluxiofuse.cli.lifecycle import Life, print_ready, running
from alluxiofuse.cli.mounting import kept_by, ready_of
from alluxiofuse.cli.outcome import complain, starting
from alluxiofuse.cli.state_dir import StateDir
from alluxiofuse.cli.tiers import check_tiers, default_mem_directory, default_tiers
from alluxiofuse.config import Config
from alluxiofuse.config_load import merge_tiers, parse_tier
from alluxiofuse.errors import UserError
from alluxiofuse.rpc.address import TcpAddress, parse_address

if TYPE_CHECKING:
    from alluxiofuse.fuse.keeping import Kept
    from alluxiofuse.fuse.mountopts import MountOptions
    from alluxiofuse.master.persister import Persister

DRAIN_S = 5.0
"""How long a stop waits for uploads; a second signal ends that too."""
HINTS = """
{where} is mounted at {mount}. Try in another terminal:

    ls -l {mount}
    echo hello > {mount}/hello.txt        # in {where} a moment later
    {program} fs location {mount}/hello.txt
    {program} fs free {mount}/hello.txt
    {program} admin report

Ctrl-C unmounts it.
"""


@dataclass(frozen=True)
class Plan:
    config: Config
    state: StateDir
    mount: str
    options: MountOptions
    tcp: TcpAddress | None
    kept: Kept | None = None


@click.command()
@click.option(
    "--ufs", metavar="URI", help="Under storage: a directory or s3://bucket/prefix. Remembered by the state."
)
@click.option("--mount", required=True, metavar="DIR", help="Where to mount it; an empty directory.")
@click.option("--state", metavar="DIR", help="Where metadata and the cache are kept; made if need be.")
@shared.tier_option(
    "Default: MEM in /dev/shm (a quarter of the free memory, at most 1 GB) and SSD in STATE/cache (half of "
    "the free space, at most 20 GB)."
)
@click.option("-o", "mount_options", multiple=True, metavar="OPT[,OPT...]", help="As of `alluxiofuse mount`.")
@shared.ufs_options
@click.option(
    "--tcp", metavar="HOST:PORT", help="Let other processes and machines use it too (see --secret-file)."
)
@shared.secret_option
@shared.config_option
@shared.log_option
@click.option("--hints", is_flag=True, help="When it is ready say (on stderr) what to try.")
def local(
    ufs: str | None,
    mount: str,
    state: str | None,
    tiers: tuple[str, ...],
    mount_options: tuple[str, ...],
    options: tuple[str, ...],
    sync_interval: float | None,
    tcp: str | None,
    secret_file: str | None,
    config_file: str | None,
    log_level: str,
    hints: bool,
) -> None:
    """Mount an under storage with its own cache: everything in this one process.

    Stays in the foreground and prints one line that begins with "ready" when the mount answers.
    SIGTERM or Ctrl-C unmounts and ends it. Any number can run beside each other, each with its own
    --state and --mount.

    \b
    alluxiofuse local --ufs /data --mount /mnt --state /var/lib/alluxiofuse
    alluxiofuse local --ufs s3://bucket/prefix --mount ./mnt --state ./var
    """
    from alluxiofuse.fuse import keeping, mountopts, mountpoint

    with starting():
        kept = keeping.taken_over()
        parsed = mountopts.parse(mount_options)
        config = shared.load_config(
            config_file or parsed.config_file,
            {
                "master.state_dir": state,
                "master.ufs": absolute_uri(ufs) if ufs else None,
                "master.ufs_options": shared.parse_ufs_options(options) or None,
                "master.sync_interval_s": sync_interval,
                "worker.tiers": merge_tiers([parse_tier(one) for one in tiers]) or None,
                "client.write_type": parsed.write_type,
                "cluster.secret_file": secret_file or parsed.secret_file,
            },
        )
        if not config.master.state_dir:
            raise UserError("no state directory: give --state DIR")
        security_of(config)
        address = parse_address(tcp) if tcp else None
        if address is not None and not isinstance(address, TcpAddress):
            raise UserError(f"--tcp {tcp}: write HOST:PORT")
        check_tiers(config.worker.tiers)
        if kept is None:  # Else there is something mounted that answers when we do.
            check_apart(config.master.ufs, mount, own_directories(config, config.master.state_dir))
            for note in mountpoint.prepare(mount, is_nonempty_allowed=parsed.is_nonempty_allowed):
                complain(note, "note")
            kept = kept_by(parsed)
    shared.set_up_logging(log_level)
    with StateDir(config.master.state_dir) as directory:
        where = kept.mountpoint if kept is not None and kept.is_takeover else os.path.abspath(mount)
        plan = Plan(config, directory, where, parsed, address, kept)
        with starting():
            _fill_in(plan)

        def ready() -> None:
            directory.is_started = True
            text = f"{config.master.ufs or 'the namespace'} is mounted at {plan.mount}"
            print_ready(text, kept.pid if kept is not None else 0)
            if hints:
                say_hints(config.master.ufs, mount)

        Life().run(lambda life: _everything(plan, life), ready_of(kept, ready))


def own_directories(config: Config, state: str) -> list[tuple[str, str]]:
    """What is ours on disk: (what it is, directory)."""
    tiers = [one.path for tier in config.worker.tiers for one in tier.directories]
    return [("state directory", state), *(("tier directory", path) for path in tiers)]


def absolute_uri(uri: str) -> str:
    """A plain path is below the working directory of whoever typed it."""
    return uri if "://" in uri else os.path.abspath(uri)


def _fill_in(plan: Plan) -> None:
    """What depends on the state directory: sockets, default tiers, no TCP."""
    config, state = plan.config, plan.state
    config.master.state_dir = str(state.master_directory)
    config.master.unix_path = str(state.master_socket)
    config.master.port = plan.tcp.port if plan.tcp else -1
    config.master.host = plan.tcp.host if plan.tcp else config.master.host
    config.worker.state_dir = str(state.worker_directory)
    state.worker_directory.mkdir(mode=0o700, exist_ok=True)
    config.worker.unix_path = str(state.worker_socket)
    config.worker.port = 0 if plan.tcp else -1
    config.worker.host = config.master.host
    if not config.worker.tiers:
        config.worker.tiers = default_tiers(state.path)
        check_tiers(config.worker.tiers)
    plan.options.fsname = f"unix:{state.master_socket}"


@asynccontextmanager
async def _everything(plan: Plan, life: Life) -> AsyncIterator[None]:
    from alluxiofuse.cli import assembly
    from alluxiofuse.cli.mounting import fuse_session
    from alluxiofuse.client.filesystem import FileSystem
    from alluxiofuse.client.workers import WorkerPool
    from alluxiofuse.rpc.inprocess import InProcess

    config, security, hostname = plan.config, security_of(plan.config), assembly.this_host()
    kept = plan.kept
    is_takeover = kept is not None and kept.is_takeover
    memory = default_mem_directory(plan.state.path)
    async with (
        assembly.running_master(config.master, security, is_one_process=not is_takeover) as (master, _),
        assembly.running_worker(
            config.worker, InProcess(master.service, "worker"), security, hostname, memory
        ) as (
            worker,
            _,
        ),
    ):
        connection = InProcess(master.service, "mount")
        pool = WorkerPool(
            connection,
            hostname=hostname,
            security=security,
            patience_s=config.client.patience_s,
            in_process={await assembly.worker_id_of(worker): InProcess(worker.service, "mount")},
        )
        name = f"fuse {plan.mount}"
        intents = None if kept is None else kept.memory
        filesystem = FileSystem(
            connection, pool, config.client, name=name, hostname=hostname, intents=intents
        )
        async with (
            running(filesystem.run),
            fuse_session(filesystem, plan.mount, plan.options, life, kept),
        ):
            yield
        await _drain(master.persister)


async def _drain(persister: Persister) -> None:
    """What was written just before the end should be in the under storage when the command returns;
    what takes longer, or can't be done now, follows at the next start."""
    persister.hurry_all()
    with trio.move_on_after(DRAIN_S):
        while not persister.is_idle():  # noqa: ASYNC110 - idleness has no event, and this is rare
            await trio.sleep(0.02)
        return
    count = persister.pending_count()
    complain(f"{count} change(s) are not in the under storage yet: they follow at the next start", "note")


def say_hints(ufs: str, mount: str) -> None:
    where = ufs if "://" in ufs else f"{os.path.relpath(ufs)}/" if ufs else "the under storage"
    program = ".venv/bin/alluxiofuse" if Path(".venv/bin/alluxiofuse").exists() else "alluxiofuse"
    click.echo(HINTS.format(where=where, mount=mount.rstrip("/"), program=program), err=True)
