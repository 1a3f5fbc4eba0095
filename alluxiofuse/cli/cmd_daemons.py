"""`alluxiofuse master` and `alluxiofuse worker`: the daemons of a cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import click

from alluxiofuse.cli import options as shared
from alluxiofuse.cli.address import DEFAULT_MASTER, expand
from alluxiofuse.cli.apart import check_apart
from alluxiofuse.cli.cmd_local import absolute_uri
from alluxiofuse.cli.fs_context import security_of
from alluxiofuse.cli.lifecycle import Life, print_ready
from alluxiofuse.cli.outcome import starting
from alluxiofuse.cli.state_dir import StateDir
from alluxiofuse.cli.tiers import check_tiers
from alluxiofuse.config import Config
from alluxiofuse.config_load import merge_tiers, parse_tier
from alluxiofuse.errors import UserError
from alluxiofuse.rpc.address import parse_address


@click.command()
@click.option("--state", metavar="DIR", help="Where metadata is kept; made if need be.")
@click.option(
    "--ufs",
    metavar="URI",
    help="Under storage of the root: a directory or s3://bucket/prefix. Remembered by the state.",
)
@shared.ufs_options
@click.option("--host", metavar="ADDRESS", help="Where to listen. Default: 127.0.0.1.")
@click.option("--port", metavar="PORT", help="Default: 19998; 0: a free one; -1: only the Unix socket.")
@click.option("--block-size", type=shared.SIZE, metavar="SIZE", help="Of new files. Default: 64MB.")
@click.option(
    "--worker-timeout",
    type=shared.DURATION,
    metavar="DURATION",
    help="A worker not heard of for this long is lost. Default: 5min.",
)
@shared.secret_option
@shared.config_option
@shared.log_option
def master(
    state: str | None,
    ufs: str | None,
    options: tuple[str, ...],
    sync_interval: float | None,
    host: str | None,
    port: str | None,
    block_size: int | None,
    worker_timeout: float | None,
    secret_file: str | None,
    config_file: str | None,
    log_level: str,
) -> None:
    """Run a master: the namespace, the mount table, and who has which block.

    Stays in the foreground and prints one line that begins with "ready". It listens on HOST:PORT and
    on the Unix socket STATE/master.sock. SIGTERM ends it; nothing is lost.
    """
    with starting():
        config = shared.load_config(
            config_file,
            {
                "master.state_dir": state,
                "master.ufs": absolute_uri(ufs) if ufs else None,
                "master.ufs_options": shared.parse_ufs_options(options) or None,
                "master.sync_interval_s": sync_interval,
                "master.host": host,
                "master.port": port,
                "master.block_bytes": block_size,
                "master.worker_timeout_s": worker_timeout,
                "cluster.secret_file": secret_file,
            },
        )
        if not config.master.state_dir:
            raise UserError("no state directory: give --state DIR")
        check_apart(config.master.ufs, None, [("state directory", config.master.state_dir)])
    shared.set_up_logging(log_level)
    with StateDir(config.master.state_dir) as directory:
        config.master.state_dir = str(directory.master_directory)
        config.master.unix_path = config.master.unix_path or str(directory.master_socket)
        life = Life()
        life.run(lambda _: _master(config, life), lambda: _ready(life, directory))


def _ready(life: Life, directory: StateDir) -> None:
    directory.is_started = True
    print_ready(life.ready_text)


@asynccontextmanager
async def _master(config: Config, life: Life) -> AsyncIterator[None]:
    from alluxiofuse.cli import assembly

    security = security_of(config)
    async with assembly.running_master(config.master, security, is_one_process=False) as (_, address):
        life.ready_text = f"master at {address or 'unix:' + config.master.unix_path}"
        yield


@click.command()
@click.option("--master", "master_address", metavar="HOST:PORT", help="Default: 127.0.0.1:19998.")
@click.option("--state", metavar="DIR", help="Where the index of the cache is kept; made if need be.")
@shared.tier_option("At least one, here or in the configuration.")
@click.option("--host", metavar="ADDRESS", help="Where to listen, and what others dial. Default: 127.0.0.1.")
@click.option("--port", metavar="PORT", help="Default: 29999; 0: a free one; -1: only the Unix socket.")
@click.option(
    "--hostname",
    metavar="NAME",
    help="What clients on the same machine know it by. Default: this host's name.",
)
@shared.secret_option
@shared.config_option
@shared.log_option
def worker(
    master_address: str | None,
    state: str | None,
    tiers: tuple[str, ...],
    host: str | None,
    port: str | None,
    hostname: str | None,
    secret_file: str | None,
    config_file: str | None,
    log_level: str,
) -> None:
    """Run a worker: it keeps cached and not yet persisted data on this machine.

    Stays in the foreground and prints one line that begins with "ready" when the master knows it; waits
    for a master that is not there yet. It listens on HOST:PORT and on the Unix socket STATE/worker.sock.
    SIGTERM ends it; its data stays.
    """
    with starting():
        config = shared.load_config(
            config_file,
            {
                "cluster.master": expand(master_address) if master_address else None,
                "worker.state_dir": state,
                "worker.tiers": merge_tiers([parse_tier(one) for one in tiers]) or None,
                "worker.host": host,
                "worker.port": port,
                "cluster.secret_file": secret_file,
            },
        )
        if not config.worker.state_dir:
            raise UserError("no state directory: give --state DIR")
        if not config.worker.tiers:
            raise UserError("no tier: give --tier, for instance --tier SSD:/cache:100GB")
        check_tiers(config.worker.tiers)
        parse_address(config.cluster.master or DEFAULT_MASTER)
    shared.set_up_logging(log_level)
    with StateDir(config.worker.state_dir) as directory:
        config.worker.state_dir = str(directory.worker_directory)
        directory.worker_directory.mkdir(mode=0o700, exist_ok=True)
        config.worker.unix_path = config.worker.unix_path or str(directory.worker_socket)
        life = Life()
        life.run(lambda _: _worker(config, life, hostname), lambda: _ready(life, directory))


@asynccontextmanager
async def _worker(config: Config, life: Life, hostname: str | None) -> AsyncIterator[None]:
    from alluxiofuse.cli import assembly

    security = security_of(config)
    where = parse_address(config.cluster.master or DEFAULT_MASTER)
    async with (
        assembly.reconnecting(where, security) as connection,
        assembly.running_worker(config.worker, connection, security, hostname or assembly.this_host()) as (
            running,
            address,
        ),
    ):
        worker_id = await assembly.worker_id_of(running)
        life.ready_text = f"worker {worker_id} at {address or 'unix:' + config.worker.unix_path}"
        yield
