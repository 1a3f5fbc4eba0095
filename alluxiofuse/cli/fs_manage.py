"""`fs` commands about the cache and the under storages: mount, unmount, free, load, persist, sync."""

from __future__ import annotations

import os

import click
import trio

from alluxiofuse.cli import options as shared
from alluxiofuse.cli.address import master_address
from alluxiofuse.cli.fs_context import FsContext, about, master_options, me, run, say, say_json, text_of
from alluxiofuse.cli.fs_show import json_option
from alluxiofuse.cli.outcome import complain
from alluxiofuse.cli.progress import byte_bar, count_bar
from alluxiofuse.errors import UfsUnavailableError, UserError
from alluxiofuse.rpc.base import Connection
from alluxiofuse.units import format_size
from alluxiofuse.wire import master_ops as ops
from alluxiofuse.wire.types import MountInfo

POLL_S = 0.2


def mount_json(info: MountInfo) -> dict[str, object]:
    from alluxiofuse.ufs.registry import redact

    return {
        "mount_id": info.mount_id,
        "path": os.fsdecode(info.path),
        "uri": info.uri,
        "readonly": info.is_readonly,
        "sync_interval_s": info.sync_interval_s,
        "options": redact(info.options),
    }


def mount_line(info: MountInfo) -> str:
    interval = {-1.0: "never", 0.0: "always"}.get(info.sync_interval_s, f"{info.sync_interval_s:g} s")
    mode = "read-only" if info.is_readonly else "read-write"
    return f"{text_of(info.path):20} {info.uri}  ({mode}, sync {interval})"


@click.command("mount")
@click.argument("path", required=False)
@click.argument("uri", required=False)
@click.option("--readonly", is_flag=True, help="Nothing below PATH can be changed through the namespace.")
@shared.ufs_options
@json_option
@master_options
def mount_command(
    context: FsContext,
    path: str | None,
    uri: str | None,
    readonly: bool,
    options: tuple[str, ...],
    sync_interval: float | None,
    as_json: bool,
) -> None:
    """Mount the under storage URI at PATH of the namespace; without arguments list the mounts.

    URI is a directory of the master's and workers' machines or s3://bucket/prefix.
    """
    if path is not None and uri is None:
        raise UserError("name an under storage too: fs mount PATH URI")
    request = None
    if path is not None and uri is not None:
        if "://" not in uri:
            uri = os.path.abspath(uri)
        where = context.path(path)
        check_not_mounted_from(context, uri)
        found = shared.parse_ufs_options(options)
        request = ops.MountUfs(me(), where, uri, readonly, sync_interval, found)

    async def work() -> None:
        async with context.connection() as master:
            if request is None:
                done = await master.call(ops.ListMounts())
            else:
                with about(request.path):
                    done = [await master.call(request)]
        if as_json:
            say_json([mount_json(one) for one in done])
        else:
            for one in done:
                say(mount_line(one))

    run(work)


def check_not_mounted_from(context: FsContext, uri: str) -> None:
    """UserError when the under storage lies on a FUSE mount of the same master: it would wait for itself."""
    from alluxiofuse.fuse.mountpoint import find_mount
    from alluxiofuse.ufs.registry import local_directory

    directory = local_directory(uri)
    place = None if directory is None else find_mount(directory)
    if place is not None and master_address(None, context.config, place.mount) == context.address:
        raise UserError(f"{uri} is on a mount of this same master: name the place where its files really are")


@click.command()
@click.argument("path")
@master_options
def unmount(context: FsContext, path: str) -> None:
    """Take the under storage at PATH out of the namespace. Nothing in it is changed."""
    request = ops.UnmountUfs(me(), context.path(path))

    async def work() -> None:
        async with context.connection() as master:
            with about(request.path):
                await master.call(request)

    run(work)


@click.command()
@click.argument("targets", metavar="PATH...", nargs=-1, required=True)
@click.option("-R", "-r", "recursive", is_flag=True, help="All files below a directory.")
@master_options
def free(context: FsContext, targets: tuple[str, ...], recursive: bool) -> None:
    """Drop the cached copies of files. The files stay; they are read from the under storage again.

    What is not in the under storage yet is skipped."""
    wanted = [context.path(one) for one in targets]

    async def work() -> None:
        freed = dirty = in_use = 0
        async with context.connection() as master:
            for path in wanted:
                with about(path):
                    result = await master.call(ops.Free(me(), path, recursive))
                freed += result.file_count
                dirty += result.dirty_count
                in_use += result.in_use_count
        notes = [f"{in_use} in use, freed when closed"] if in_use else []
        if dirty:
            notes.append(f"{dirty} skipped: not in the under storage yet, see fs persist")
        say(f"freed {freed} file(s)" + (f" ({'; '.join(notes)})" if notes else ""))

    run(work)


@click.command()
@click.argument("targets", metavar="PATH...", nargs=-1, required=True)
@click.option("--parallel", default=8, show_default=True, type=click.IntRange(1, 256), help="Files at once.")
@master_options
def load(context: FsContext, targets: tuple[str, ...], parallel: int) -> None:
    """Fill the cache with everything below PATH, ahead of reads."""
    wanted = [context.path(one) for one in targets]

    async def work() -> None:
        async with context.paths() as paths:
            for path in wanted:
                with about(path):
                    total = await paths.du(path)
                with byte_bar(f"load {text_of(path)}", total.size_bytes) as advance, about(path):
                    done = await paths.load(path, parallel=parallel, progress=advance)
                say(f"loaded {done.file_count} file(s), {format_size(done.size_bytes)}")

    run(work)


@click.command()
@click.argument("targets", metavar="PATH...", nargs=-1, required=True)
@click.option("--no-wait", is_flag=True, help="Only start it.")
@click.option(
    "--timeout", type=shared.DURATION, metavar="DURATION", help="Give up waiting after this. Default: never."
)
@master_options
def persist(context: FsContext, targets: tuple[str, ...], no_wait: bool, timeout: float | None) -> None:
    """Write what is below PATH to the under storage now, and wait until it is there.

    Files that are open for writing are waited for: they are persisted once they are closed."""
    wanted = [context.path(one) for one in targets]

    async def work() -> None:
        limit = float("inf") if timeout is None or timeout < 0 else timeout
        with trio.move_on_after(limit) as scope:
            async with context.connection() as master:
                for path in wanted:
                    await persist_one(master, path, no_wait)
        if scope.cancelled_caught:
            raise UfsUnavailableError("not everything is in the under storage yet: see admin report")

    run(work)


async def persist_one(master: Connection, path: bytes, no_wait: bool) -> None:
    with about(path):
        left = total = await master.call(ops.Persist(me(), path))
    if no_wait:
        say(f"{left} file(s) of {text_of(path)} are being persisted")
        return
    told: set[str] = set()
    if left:
        await note_open(master, path)
    with count_bar(f"persist {text_of(path)}", total, "file") as advance:
        while left:
            await trio.sleep(POLL_S)
            now = await master.call(ops.Persist(me(), path))
            advance(max(0, left - now))
            left = now
            if left:
                for failure in (await master.call(ops.ReportState())).persist_failing:
                    if failure not in told:
                        told.add(failure)
                        complain(failure, "warning")
    say(f"persisted {text_of(path)}")


async def note_open(master: Connection, path: bytes) -> None:
    """Say so when it is a file that is being waited for until somebody closes it."""
    found = await master.call(ops.Locations(me(), path))
    if found.layout.home:
        complain(f"{text_of(path)} is open for writing: it is persisted once it is closed", "note")


@click.command()
@click.argument("targets", metavar="PATH...", nargs=-1, required=True)
@click.option("--no-recursive", is_flag=True, help="Only the directory itself, not what is below.")
@master_options
def sync(context: FsContext, targets: tuple[str, ...], no_recursive: bool) -> None:
    """Compare PATH with its under storage now, and take over what was changed there."""
    wanted = [context.path(one) for one in targets]

    async def work() -> None:
        async with context.connection() as master:
            for path in wanted:
                with about(path):
                    await master.call(ops.SyncPath(me(), path, not no_recursive))

    run(work)
