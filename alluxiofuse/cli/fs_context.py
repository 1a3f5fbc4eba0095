"""What every `fs` command shares: its options, the master it talks to, and how it runs."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import click
import trio

from alluxiofuse.cli import options
from alluxiofuse.cli.address import DEFAULT_MASTER, Target, expand, master_address, target_of
from alluxiofuse.config import Config
from alluxiofuse.errors import FsError, UserError
from alluxiofuse.rpc.security import Security, load_secret_file
from alluxiofuse.wire.types import Caller

if TYPE_CHECKING:
    from alluxiofuse.client.paths import Paths
    from alluxiofuse.fuse.mountpoint import Mount
    from alluxiofuse.rpc.base import Connection

R = TypeVar("R")
DIAL_TIMEOUT_S = 10.0
PATH_HELP = "Each PATH is absolute in the namespace (/a/b) or a path below an alluxiofuse mount (mnt/a)."


@dataclass
class FsContext:
    """One invocation of a command."""

    config: Config
    asked_master: str | None
    mount: Mount | None = None
    """The FUSE mount that the paths so far were named through."""
    _targets: list[Target] = field(default_factory=list)

    def path(self, text: str) -> bytes:
        """The namespace path that an argument means. UserError: paths of different masters."""
        target = target_of(text)
        for other in self._targets:
            if self.asked_master is None and len({_address(other), _address(target)} - {None}) > 1:
                raise UserError("these paths belong to different masters: name one at a time")
        self._targets.append(target)
        self.mount = self.mount or target.mount
        return target.path

    @property
    def address(self) -> str:
        return master_address(self.asked_master, self.config, self.mount)

    @property
    def security(self) -> Security:
        return security_of(self.config)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """To the master, for operations that need no client session."""
        async with dial_master(self.address, self.security) as connection:
            yield connection

    @asynccontextmanager
    async def paths(self) -> AsyncIterator[Paths]:
        """A client, for operations on files."""
        from alluxiofuse.client.connect import open_filesystem
        from alluxiofuse.client.paths import Paths

        # A client waits for a master that is away; a person would rather know at once.
        async with dial_master(self.address, self.security):
            pass
        async with open_filesystem(
            self.address, security=self.security, config=self.config.client, name="cli"
        ) as filesystem:
            yield Paths(filesystem)


def _address(target: Target) -> str | None:
    return None if target.mount is None else target.mount.source


def security_of(config: Config) -> Security:
    """With the secret of `cluster.secret_file`, if there is one. UserError: it can't be used."""
    path = config.cluster.secret_file
    return Security(secret=load_secret_file(path) if path else None)


@asynccontextmanager
async def dial_master(address: str, security: Security) -> AsyncIterator[Connection]:
    """A plain connection to a master; UnavailableError when nobody answers."""
    from alluxiofuse.rpc.address import parse_address
    from alluxiofuse.rpc.client import connect

    where = parse_address(address, default_port=int(DEFAULT_MASTER.rpartition(":")[2]))
    async with trio.open_nursery() as nursery:
        connection = await connect(nursery, where, role="master", security=security, timeout_s=DIAL_TIMEOUT_S)
        yield connection
        await connection.aclose()
        nursery.cancel_scope.cancel()


@contextmanager
def about(path: bytes, and_path: bytes | None = None) -> Iterator[None]:
    """Name what an FsError is about, which the errors of system calls do not."""
    try:
        yield
    except FsError as exc:
        shown = os.fsdecode(path) if and_path is None else f"{os.fsdecode(path)} to {os.fsdecode(and_path)}"
        if shown in exc.message:
            raise
        raise FsError(exc.errno, f"{shown}: {exc.message}") from None


def me() -> Caller:
    """The user who runs this command."""
    return Caller(os.geteuid(), os.getegid(), sorted({os.getegid(), *os.getgroups()}))


def master_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--master, --secret-file and --config; the command gets a FsContext as first argument."""

    @functools.wraps(command)
    def with_context(
        master: str | None, secret_file: str | None, config_file: str | None, **arguments: Any
    ) -> Any:
        given = click.get_current_context().find_object(dict) or {}
        config = options.load_config(
            config_file or given.get("config_file"),
            {"cluster.secret_file": secret_file or given.get("secret_file")},
        )
        asked = master or given.get("master")
        return command(FsContext(config, expand(asked) if asked else None), **arguments)

    return click.option(
        "--master",
        metavar="ADDRESS",
        help="HOST:PORT, unix:PATH or a state directory. Default: the mount a PATH is below, else "
        "$ALLUXIOFUSE_MASTER, the configuration, the only mount of this machine, 127.0.0.1:19998.",
    )(options.secret_option(options.config_option(with_context)))


def run(action: Callable[[], Awaitable[R]]) -> R:
    """Run the command's work; errors come out as the one that matters."""
    from alluxiofuse.cli.outcome import cause

    try:
        return trio.run(action)
    except BaseExceptionGroup as group:
        raise cause(group) from None


def text_of(name: bytes) -> str:
    """A file name for people: control characters and undecodable bytes are escaped on a terminal,
    and passed as they are to files and pipes."""
    text = os.fsdecode(name)
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def say(text: str) -> None:
    """A line on stdout, any bytes of file names included."""
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape") + b"\n")


def say_json(value: object) -> None:
    """Bytes of names that are not UTF-8 appear as lone surrogates (\\udcXX), see os.fsdecode."""
    import json

    say(json.dumps(value, indent=2))
