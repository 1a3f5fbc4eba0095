"""`fs` commands that change files: cp, mv, rm, mkdir."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import click

from alluxiofuse.cli.address import LOCAL_PREFIX
from alluxiofuse.cli.fs_context import FsContext, about, master_options, run
from alluxiofuse.cli.progress import byte_bar
from alluxiofuse.errors import FsError, UserError

if TYPE_CHECKING:
    from alluxiofuse.client.paths import Paths


@click.command()
@click.argument("targets", metavar="PATH...", nargs=-1, required=True)
@click.option("-p", "parents", is_flag=True, help="Make parents too; no error when it is there.")
@click.option("-m", "mode", default="755", metavar="MODE", help="Permission bits, octal; before the umask.")
@master_options
def mkdir(context: FsContext, targets: tuple[str, ...], parents: bool, mode: str) -> None:
    """Make directories."""
    wanted = [context.path(one) for one in targets]
    try:
        bits = int(mode, 8)
    except ValueError:
        raise UserError(f"-m {mode}: a mode is written in octal, for instance 755") from None

    async def make() -> None:
        async with context.paths() as paths:
            for path in wanted:
                with about(path):
                    await paths.mkdir(path, bits & ~_umask() & 0o7777, parents=parents)

    run(make)


def _umask() -> int:
    found = os.umask(0o077)
    os.umask(found)
    return found


@click.command()
@click.argument("targets", metavar="PATH...", nargs=-1, required=True)
@click.option("-r", "-R", "recursive", is_flag=True, help="Directories with all that is in them.")
@click.option("-f", "force", is_flag=True, help="No error for what is not there.")
@master_options
def rm(context: FsContext, targets: tuple[str, ...], recursive: bool, force: bool) -> None:
    """Remove files, symlinks and empty directories. They are removed from the under storage too."""
    wanted = [context.path(one) for one in targets]
    if b"/" in wanted:
        raise UserError("the root is not removed")

    async def remove() -> None:
        async with context.paths() as paths:
            for path in wanted:
                try:
                    with about(path):
                        await paths.remove(path, recursive=recursive)
                except FsError as exc:
                    if not (force and exc.errno == errno.ENOENT):
                        raise

    run(remove)


@click.command()
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.argument("target", metavar="TARGET")
@master_options
def mv(context: FsContext, sources: tuple[str, ...], target: str) -> None:
    """Rename, or move into the directory TARGET."""
    wanted = [context.path(one) for one in sources]
    to = context.path(target)

    async def move() -> None:
        async with context.paths() as paths:
            into = await is_directory(paths, to)
            _check_many(sources, into, target)
            for path in wanted:
                new = _into(to, path, into)
                with about(path, new):
                    await paths.rename(path, new)

    run(move)


def _check_many(sources: tuple[str, ...], is_into: bool, target: str) -> None:
    if len(sources) > 1 and not is_into:
        raise UserError(f"{target} is not a directory: several things can't become one")


async def is_directory(paths: Paths, path: bytes) -> bool:
    try:
        with about(path):
            return stat.S_ISDIR((await paths.stat(path)).mode)
    except FsError as exc:
        if exc.errno != errno.ENOENT:
            raise
        return False


@click.command()
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.argument("target", metavar="TARGET")
@click.option("-r", "-R", "recursive", is_flag=True, help="Directories with all that is in them.")
@master_options
def cp(context: FsContext, sources: tuple[str, ...], target: str, recursive: bool) -> None:
    """Copy files to TARGET, or into the directory TARGET.

    Paths on this machine's own disks are written file:PATH, for instance
    `fs cp file:/tmp/a.csv /data/a.csv` or `fs cp /data/a.csv file:.`
    """
    copy(context, list(sources), target, recursive)


@click.command("copyFromLocal")
@click.argument("source", metavar="LOCAL")
@click.argument("target", metavar="PATH")
@master_options
def copy_from_local(context: FsContext, source: str, target: str) -> None:
    """Copy a local file or directory into the namespace."""
    copy(context, [LOCAL_PREFIX + source], target, recursive=True)


@click.command("copyToLocal")
@click.argument("source", metavar="PATH")
@click.argument("target", metavar="LOCAL")
@master_options
def copy_to_local(context: FsContext, source: str, target: str) -> None:
    """Copy a file or directory of the namespace to a local path."""
    copy(context, [source], LOCAL_PREFIX + target, recursive=True)


def local_path(text: str) -> str | None:
    """The local path of file:PATH or file:///PATH; None for a path of the namespace."""
    if not text.startswith(LOCAL_PREFIX):
        return None
    path = text.removeprefix(LOCAL_PREFIX)
    if path.startswith("//"):
        host, _, rest = path[2:].partition("/")
        if host not in ("", "localhost"):
            raise UserError(f"{text}: write file:///PATH, with three slashes, or file:PATH")
        path = f"/{rest}"
    return os.path.abspath(path or ".")


def copy(context: FsContext, sources: list[str], target: str, recursive: bool) -> None:
    to = local_path(target)
    pairs = [(local_path(one), one) for one in sources]
    if to is not None and any(local is not None for local, _ in pairs):
        raise UserError("both sides are local: use cp(1)")
    inside = {one: context.path(one) for local, one in pairs if local is None}
    target_path = b"" if to is not None else context.path(target)
    is_local_directory = to is not None and os.path.isdir(to)

    async def work() -> None:
        async with context.paths() as paths:
            into = is_local_directory or (to is None and await is_directory(paths, target_path))
            _check_many(tuple(sources), into, target)
            for local, text in pairs:
                if local is not None:
                    await _copy_in(paths, local, _into(target_path, os.fsencode(local), into), recursive)
                elif to is not None:
                    name = os.fsdecode(os.path.basename(inside[text]))
                    await _copy_out(paths, inside[text], os.path.join(to, name) if into else to, recursive)
                else:
                    await _copy_within(paths, inside[text], _into(target_path, inside[text], into), recursive)

    run(work)


def _into(target: bytes, source: bytes, is_into: bool) -> bytes:
    return os.path.join(target, os.path.basename(source)) if is_into else target


async def _copy_in(paths: Paths, local: str, target: bytes, recursive: bool) -> None:
    found = os.stat(local)
    if stat.S_ISDIR(found.st_mode) and not recursive:
        raise FsError(errno.EISDIR, f"{local} (use -r)")
    total = None if stat.S_ISDIR(found.st_mode) else found.st_size
    with byte_bar(f"copy {Path(local).name}", total) as advance, about(target):
        await paths.copy_in(local, target, recursive=recursive, progress=advance)


async def _total(paths: Paths, source: bytes, recursive: bool) -> int | None:
    """For the progress bar: a file's size, None for a directory. EISDIR unless `recursive`."""
    with about(source):
        attr = await paths.stat(source)
    if not stat.S_ISDIR(attr.mode):
        return attr.size
    if not recursive:
        raise FsError(errno.EISDIR, f"{os.fsdecode(source)} (use -r)")
    return None


async def _copy_out(paths: Paths, source: bytes, local: str, recursive: bool) -> None:
    with byte_bar("copy", await _total(paths, source, recursive)) as advance, about(source):
        await paths.copy_out(source, local, recursive=recursive, progress=advance)


async def _copy_within(paths: Paths, source: bytes, target: bytes, recursive: bool) -> None:
    with byte_bar("copy", await _total(paths, source, recursive)) as advance, about(source, target):
        await paths.copy(source, target, recursive=recursive, progress=advance)
