"""`fs` commands that only look: ls, cat, stat, du, location."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
import sys
import time
from collections.abc import AsyncIterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import click

from alluxiofuse.cli.address import target_of
from alluxiofuse.cli.fs_context import FsContext, about, master_options, me, run, say, say_json, text_of
from alluxiofuse.errors import FsError, UserError
from alluxiofuse.units import format_size
from alluxiofuse.wire import master_ops as ops
from alluxiofuse.wire.types import PERSISTENCE_NAMES, Attr

if TYPE_CHECKING:
    from alluxiofuse.client.paths import Paths
    from alluxiofuse.rpc.base import Connection

READ_BYTES = 4 << 20
json_option = click.option("--json", "as_json", is_flag=True, help="For scripts.")
KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


@lru_cache(maxsize=1024)
def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@lru_cache(maxsize=1024)
def group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def when(time_ns: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_ns // 1_000_000_000))


def attr_json(path: bytes, attr: Attr) -> dict[str, Any]:
    """What scripts get of one inode; times in nanoseconds since 1970."""
    return {
        "path": os.fsdecode(path),
        "type": KINDS.get(stat.S_IFMT(attr.mode), "unknown"),
        "ino": attr.ino,
        "mode": f"{stat.S_IMODE(attr.mode):04o}",
        "nlink": attr.nlink,
        "uid": attr.uid,
        "gid": attr.gid,
        "size_bytes": attr.size,
        "atime_ns": attr.atime_ns,
        "mtime_ns": attr.mtime_ns,
        "ctime_ns": attr.ctime_ns,
        "persistence": PERSISTENCE_NAMES[attr.persistence],
        "container": attr.container,
        "mount_id": attr.mount_id,
        "is_open_for_write": attr.home != 0,
    }


def long_line(name: bytes, attr: Attr, human: bool) -> str:
    size = format_size(attr.size) if human else str(attr.size)
    persistence = "-" if stat.S_ISDIR(attr.mode) else PERSISTENCE_NAMES[attr.persistence]
    return (
        f"{stat.filemode(attr.mode)} {attr.nlink:3} {user_name(attr.uid):8} {group_name(attr.gid):8} "
        f"{size:>12} {persistence:16} {when(attr.mtime_ns)} {text_of(name)}"
    )


def default_directory() -> str:
    try:
        target_of(".")
    except UserError:
        return "/"
    return "."


async def entries_of(paths: Paths, path: bytes, recursive: bool) -> AsyncIterator[tuple[bytes, Attr]]:
    """What `ls PATH` shows: (path, attributes) of a file itself, or of what is in a directory."""
    attr = await paths.stat(path, follow=True)
    if not stat.S_ISDIR(attr.mode):
        yield path, attr
    elif recursive:
        async for below, found in paths.walk(path):
            if below != path:
                yield below, found
    else:
        for entry in await paths.list(path):
            yield os.path.join(path, entry.name), entry.attr


@click.command()
@click.argument("targets", metavar="[PATH]...", nargs=-1)
@click.option("-l", "is_long", is_flag=True, help="Mode, owner, size, persistence state, time.")
@click.option("-R", "recursive", is_flag=True, help="What is below directories too, with full paths.")
@click.option("-h", "human", is_flag=True, help="Sizes as 1.5 GiB.")
@json_option
@master_options
def ls(
    context: FsContext, targets: tuple[str, ...], is_long: bool, recursive: bool, human: bool, as_json: bool
) -> None:
    """List files and directories. Default: the working directory if it is below a mount, else the root."""
    wanted = [context.path(one) for one in targets or [default_directory()]]

    async def show() -> None:
        found: list[dict[str, Any]] = []
        async with context.paths() as paths:
            for number, path in enumerate(wanted):
                if len(wanted) > 1 and not as_json:
                    say(f"{chr(10) if number else ''}{text_of(path)}:")
                with about(path):
                    async for below, attr in entries_of(paths, path, recursive):
                        name = below if recursive else os.path.basename(below) or b"/"
                        if as_json:
                            found.append(attr_json(below, attr))
                        else:
                            say(long_line(name, attr, human) if is_long else text_of(name))
        if as_json:
            say_json(found)

    run(show)


@click.command()
@click.argument("targets", metavar="PATH...", nargs=-1, required=True)
@master_options
def cat(context: FsContext, targets: tuple[str, ...]) -> None:
    """Write files to standard output."""
    wanted = [context.path(one) for one in targets]

    async def show() -> None:
        async with context.paths() as paths:
            for path in wanted:
                with about(path):
                    await write_out(paths, path)

    run(show)


async def write_out(paths: Paths, path: bytes) -> None:
    if stat.S_ISDIR((await paths.stat(path)).mode):
        raise FsError(errno.EISDIR, os.fsdecode(path))
    file = await paths.open(path)
    try:
        offset = 0
        while data := await file.read(offset, READ_BYTES):
            sys.stdout.buffer.write(data)
            offset += len(data)
        sys.stdout.buffer.flush()
    finally:
        await file.release()


async def locate(master: Connection, wanted: list[bytes]) -> list[tuple[bytes, ops.LocationReport]]:
    """What the master knows of each path."""
    found = []
    for path in wanted:
        with about(path):
            found.append((path, await master.call(ops.Locations(me(), path))))
    return found


@click.command("stat")
@click.argument("targets", metavar="PATH...", nargs=-1, required=True)
@json_option
@master_options
def stat_command(context: FsContext, targets: tuple[str, ...], as_json: bool) -> None:
    """Everything that is known about a path: attributes, persistence, where its bytes are."""
    wanted = [context.path(one) for one in targets]

    async def show() -> None:
        async with context.connection() as master:
            reports = await locate(master, wanted)
        found = [attr_json(path, one.attr) | location_json(one) for path, one in reports]
        if as_json:
            say_json(found)
        else:
            say("\n\n".join(stat_text(one) for one in found))

    run(show)


def stat_text(found: dict[str, Any]) -> str:
    owner = f"{user_name(found['uid'])}:{group_name(found['gid'])}"
    lines = [
        f"path         {text_of(os.fsencode(found['path']))}",
        f"type         {found['type']}, inode {found['ino']}, {found['nlink']} link(s)",
        f"size         {found['size_bytes']} bytes ({format_size(found['size_bytes'])})",
        f"access       {found['mode']} {owner}",
        f"modified     {when(found['mtime_ns'])}",
        f"changed      {when(found['ctime_ns'])}",
        f"persistence  {found['persistence']}",
        f"under        {found['ufs_uri'] or '(nowhere)'}",
    ]
    if found["type"] == "file":
        lines.append(f"blocks       {found['block_count']} of {format_size(found['block_bytes'])}")
        lines += [
            f"cached       {len(c['blocks'])} block(s) on worker {c['worker_id']}" for c in found["cached"]
        ]
    return "\n".join(lines)


def bits(bitmap: bytes) -> list[int]:
    """Numbers of the bits that are set."""
    return [8 * byte + bit for byte, value in enumerate(bitmap) for bit in range(8) if value >> bit & 1]


def location_json(report: ops.LocationReport) -> dict[str, Any]:
    layout = report.layout
    count = -(-layout.size // layout.block_bytes) if layout.block_bytes else 0
    return {
        "ufs_uri": report.ufs_uri,
        "block_bytes": layout.block_bytes,
        "block_count": count,
        "home_worker_id": layout.home,
        "cached": [
            {"worker_id": worker, "blocks": bits(blocks)} for worker, blocks in sorted(report.blocks.items())
        ],
    }


@click.command()
@click.argument("targets", metavar="PATH...", nargs=-1, required=True)
@json_option
@master_options
def location(context: FsContext, targets: tuple[str, ...], as_json: bool) -> None:
    """Which workers have which blocks of a file, and where it is in the under storage."""
    wanted = [context.path(one) for one in targets]

    async def show() -> None:
        async with context.connection() as master:
            reports = await locate(master, wanted)
            workers = {one.address.worker_id: one for one in await master.call(ops.ListWorkers())}
        found = [{"path": os.fsdecode(path), **location_json(one)} for path, one in reports]
        for one in found:
            for cached in one["cached"]:
                worker = workers.get(cached["worker_id"])
                cached["hostname"] = worker.address.hostname if worker else ""
        if as_json:
            say_json(found)
        else:
            say("\n".join(location_text(one) for one in found))

    run(show)


def location_text(found: dict[str, Any]) -> str:
    lines = [f"{text_of(os.fsencode(found['path']))}: {found['ufs_uri'] or '(in no under storage)'}"]
    for cached in found["cached"]:
        count = f"{len(cached['blocks'])} of {found['block_count']} block(s)"
        lines.append(f"  worker {cached['worker_id']} ({cached['hostname']}): {count}")
    if not found["cached"]:
        lines.append("  no worker has a whole block of it")
    return "\n".join(lines)


@click.command()
@click.argument("targets", metavar="PATH...", nargs=-1, required=True)
@click.option(
    "-s", "summary", is_flag=True, help="One line for each PATH (without it, for what is in it too)."
)
@click.option("-h", "human", is_flag=True, help="Sizes as 1.5 GiB.")
@json_option
@master_options
def du(context: FsContext, targets: tuple[str, ...], summary: bool, human: bool, as_json: bool) -> None:
    """How many bytes and files there are below a path."""
    wanted = [context.path(one) for one in targets]

    async def show() -> None:
        found = []
        async with context.paths() as paths:
            for path in wanted:
                with about(path):
                    for one in [path] if summary else [*await children(paths, path), path]:
                        found.append((one, await paths.du(one)))
        if as_json:
            say_json([{"path": os.fsdecode(path), **usage._asdict()} for path, usage in found])
            return
        for path, usage in found:
            size = format_size(usage.size_bytes) if human else str(usage.size_bytes)
            say(f"{size:>12} {usage.file_count:>9} files  {text_of(path)}")

    run(show)


async def children(paths: Paths, path: bytes) -> list[bytes]:
    """The entries of a directory, none of anything else."""
    if not stat.S_ISDIR((await paths.stat(path)).mode):
        return []
    return [os.path.join(path, entry.name) for entry in await paths.list(path)]
