"""Mounting a cluster's namespace at a directory: what `alluxiofuse mount` and mount(8) share."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from alluxiofuse.cli import options as shared
from alluxiofuse.cli.address import expand, master_address, split_source
from alluxiofuse.cli.apart import check_apart
from alluxiofuse.cli.fs_context import dial_master, security_of
from alluxiofuse.cli.lifecycle import Life, print_ready, running
from alluxiofuse.cli.outcome import complain
from alluxiofuse.config import Config
from alluxiofuse.errors import AlluxioFuseError, FsError, UserError
from alluxiofuse.wire.master_ops import ListMounts

if TYPE_CHECKING:
    from alluxiofuse.client.filesystem import FileSystem
    from alluxiofuse.fuse.keeping import Kept
    from alluxiofuse.fuse.mountopts import MountOptions


@dataclass(frozen=True)
class MountPlan:
    """Checked; everything in it is absolute, so that it holds after a change of directory."""

    address: str
    path: bytes
    """The directory of the namespace that becomes the root of the mount, b"" for its root."""
    directory: str
    options: MountOptions
    config: Config
    kept: Kept | None = None
    """Has taken over from a daemon that ended."""


def plan_mount(
    source: str, directory: str, options: MountOptions, overrides: dict[str, str | None]
) -> MountPlan:
    """UserError when something can't work: the mount point, the options, the configuration. A dead
    mount in the way is cleared. `source` "": the master is found as for other commands."""
    from alluxiofuse.fuse import keeping, mountpoint

    kept = keeping.taken_over()
    given: dict[str, Any] = {
        "client.write_type": options.write_type,
        "client.master_patience_s": options.master_patience_s,
        "cluster.secret_file": _absolute(options.secret_file),
    }
    config = shared.load_config(
        options.config_file, given | {k: v for k, v in overrides.items() if v is not None}
    )
    address, path = split_source(source)
    address = master_address(address or None, config)
    security_of(config)  # complains early
    options.log_file = _absolute(options.log_file)
    if kept is None:  # Else there is something mounted that answers when we do.
        for note in mountpoint.prepare(directory, is_nonempty_allowed=options.is_nonempty_allowed):
            complain(note, "note")
    inside = os.fsencode(path).strip(b"/")
    options.fsname = f"{expand(address)}/{os.fsdecode(inside)}" if inside else expand(address)
    directory = os.path.abspath(directory) if kept is None else kept.mountpoint
    return MountPlan(expand(address), inside, directory, options, config, kept)


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(path)


def mount_in_foreground(plan: MountPlan, log_level: str) -> None:
    """Until a signal or an unmount. Prints the ready line."""
    plan = with_keeper(plan)
    shared.set_up_logging(log_level)
    text = f"{plan.options.fsname} is mounted at {plan.directory}"
    _run(plan, lambda: print_ready(text, plan.kept.pid if plan.kept is not None else 0))


def mount_in_background(plan: MountPlan, log_level: str, failure_code: int) -> None:
    """Returns in the daemon only, when it has ended; the process that called exits 0 when the mount
    answers, else with `failure_code`."""
    from alluxiofuse.fuse.daemon import daemonize

    log_file = plan.options.log_file
    if plan.kept is not None:
        os.chdir("/")
        shared.set_up_logging(log_level if log_file else "error")
        _run(plan, lambda: None)
        return
    directory = os.getcwd()
    pipe = daemonize(Path(log_file) if log_file else None)
    plan = with_keeper(plan, directory)
    shared.set_up_logging(log_level if log_file else "error")
    try:
        _run(plan, pipe.ready)
    except AlluxioFuseError as exc:
        pipe.failed(f"error: {exc.message}", failure_code)
        sys.exit(failure_code)


def with_keeper(plan: MountPlan, directory: str = "") -> MountPlan:
    """From here on in the daemon, if the mount is to have a keeper. `directory`: as of `kept_by`."""
    return plan if plan.kept is not None else replace(plan, kept=kept_by(plan.options, directory))


def kept_by(options: MountOptions, directory: str = "") -> Kept | None:
    """Become a keeper and its daemon, which goes on here; None: not wanted. Further daemons are started by
    this process's own command line, in `directory` ("": where we are)."""
    from alluxiofuse.fuse import keeping

    if not keeping.is_wanted(options):
        return None
    return keeping.begin(program(), sys.argv[1:], directory)


def program() -> list[str]:
    """How to start what is installed; see `keeper.PROGRAM_WORDS`."""
    is_helper = os.path.basename(sys.argv[0]).startswith("mount")
    return [sys.executable, "-P", "-m", f"alluxiofuse.cli.{'mount_helper' if is_helper else 'main'}"]


def _run(plan: MountPlan, on_ready: Callable[[], None]) -> None:
    from alluxiofuse.client.bootclock import BootClock

    Life().run(lambda life: _mounted(plan, life), ready_of(plan.kept, on_ready), BootClock())


def ready_of(kept: Kept | None, on_ready: Callable[[], None]) -> Callable[[], None]:
    """`on_ready`, at the first start; and the keeper hears of each."""
    if kept is None:
        return on_ready

    def ready() -> None:
        kept.ready()  # Before anybody else can know.
        if not kept.is_takeover:
            try:
                on_ready()
            except BaseException:
                kept.is_stopping = True  # An error of the command, which is not to be repeated.
                raise
            kept.ready([1, 2])  # Our output may go elsewhere from now on.

    return ready


@asynccontextmanager
async def _mounted(plan: MountPlan, life: Life) -> AsyncIterator[None]:
    from alluxiofuse.client.connect import open_filesystem

    async with open_filesystem(
        plan.address,
        security=security_of(plan.config),
        config=plan.config.client,
        name=f"fuse {plan.directory}",
        intents=None if plan.kept is None else plan.kept.memory,
    ) as filesystem:
        if plan.kept is None or not plan.kept.is_takeover:
            await _check_apart(plan)
        if plan.path:
            plan.options.root_ino = await _root_of(filesystem, b"/" + plan.path)
        async with fuse_session(filesystem, plan.directory, plan.options, life, plan.kept):
            yield


async def _check_apart(plan: MountPlan) -> None:
    """The mount point lies in none of the under storages that are directories of this machine."""
    async with dial_master(plan.address, security_of(plan.config)) as master:
        for found in await master.call(ListMounts()):
            check_apart(found.uri, plan.directory, [])


async def _root_of(filesystem: FileSystem, path: bytes) -> int:
    import stat

    from alluxiofuse.wire.types import SUPERUSER

    try:
        attr = (await filesystem.resolve(SUPERUSER, path))[-1]
    except FsError as exc:
        raise UserError(f"{os.fsdecode(path)} in the namespace: {os.strerror(exc.errno)}") from None
    if not stat.S_ISDIR(attr.mode):
        raise UserError(
            f"{os.fsdecode(path)} in the namespace is not a directory: only directories are mounted"
        )
    return attr.ino


@asynccontextmanager
async def fuse_session(
    filesystem: FileSystem, directory: str, options: MountOptions, life: Life, kept: Kept | None = None
) -> AsyncIterator[None]:
    """The mount answers while the block runs. Unmounted from outside: `life.stop` is set. With a keeper it
    stays when the block ends by something else than a signal or that."""
    from alluxiofuse.fuse import session

    async def serve(*, task_status: trio.TaskStatus[None]) -> None:
        await session.serve(
            filesystem, directory, options, handle_signals=False, kept=kept, task_status=task_status
        )
        life.stop.set()

    async with running(serve):
        try:
            yield
        finally:
            if kept is not None:
                kept.is_stopping = kept.is_stopping or life.stop.is_set()
