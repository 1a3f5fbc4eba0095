"""Options and parameter types that several commands share."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from alluxiofuse import config_load
from alluxiofuse.config import Config
from alluxiofuse.errors import UserError
from alluxiofuse.units import parse_duration, parse_size

F = TypeVar("F", bound=Callable[..., Any])
LOG_LEVELS = ("debug", "info", "warning", "error")


class SizeType(click.ParamType[int]):
    """ "64MB" as bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_size(value)
        except UserError as exc:
            self.fail(exc.message, param, ctx)


class DurationType(click.ParamType[float]):
    """ "30s" as seconds; "-1" is never."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return value if isinstance(value, float) else parse_duration(value)
        except UserError as exc:
            self.fail(exc.message, param, ctx)


SIZE = SizeType()
DURATION = DurationType()


def config_option(command: F) -> F:
    return click.option(
        "--config",
        "config_file",
        metavar="FILE",
        help="Configuration file; else the first of ./alluxiofuse.toml, "
        "~/.config/alluxiofuse/alluxiofuse.toml, /etc/alluxiofuse/alluxiofuse.toml.",
    )(command)


def secret_option(command: F) -> F:
    return click.option(
        "--secret-file",
        metavar="FILE",
        help="File (mode 0600) with the cluster's shared secret. Needed to listen on, or talk to, more than "
        "this machine.",
    )(command)


def log_option(command: F) -> F:
    return click.option(
        "--log-level",
        type=click.Choice(LOG_LEVELS),
        default="info",
        show_default=True,
        help="Logs go to stderr.",
    )(command)


def ufs_options(command: F) -> F:
    """--option and --sync-interval, of an under storage."""
    command = click.option(
        "--sync-interval",
        type=DURATION,
        metavar="DURATION",
        help="How long metadata of the under storage is trusted before it is compared again: 0 always "
        "compare, -1 never, or for instance 30s. Default: what suits the store.",
    )(command)
    return click.option(
        "--option",
        "options",
        multiple=True,
        metavar="KEY=VALUE",
        help="Option of the under storage, for instance endpoint=http://host:9000 or region=eu-west-1; VALUE "
        "may be @FILE (the content of a file) or env:NAME (an environment variable). May be repeated.",
    )(command)


def load_config(config_file: str | None, overrides: Mapping[str, Any]) -> Config:
    return config_load.load(config_file, os.environ, overrides)


def parse_ufs_options(pairs: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE pairs, with values from files and variables put in.

    UserError: not a pair, a file or variable that is not there, or a secret in plain sight (the
    command line is visible to every user of the machine)."""
    from alluxiofuse.ufs.registry import redact

    found: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--option {pair!r}: write KEY=VALUE")
        if value.startswith("@"):
            value = _value_of_file(key, value[1:])
        elif value.startswith("env:"):
            value = _value_of_variable(key, value[4:])
        elif redact({key: value}) != {key: value}:
            raise UserError(
                f"--option {key}=...: every user of this machine can see a command line; "
                f"write {key}=@FILE or {key}=env:NAME, or use the store's own environment variables"
            )
        found[key] = value
    return found


def _value_of_file(key: str, path: str) -> str:
    try:
        return Path(path).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise UserError(
            f"--option {key}: {path} can't be read: {getattr(exc, 'strerror', 'not text')}"
        ) from None


def _value_of_variable(key: str, name: str) -> str:
    if name not in os.environ:
        raise UserError(f"--option {key}: there is no environment variable {name}")
    return os.environ[name]


def set_up_logging(level: str) -> None:
    """Logs of all daemons in this process, to stderr. Libraries speak from warnings on. SIGUSR2 writes
    the stacks of all threads there, for a daemon that seems to hang."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("alluxiofuse").setLevel(level.upper())


def tier_option(default: str) -> Callable[[F], F]:
    """--tier; `default` says what happens without it."""
    return click.option(
        "--tier",
        "tiers",
        multiple=True,
        metavar="ALIAS:DIR:QUOTA",
        help="A cache directory, for instance SSD:/cache:100GB; ALIAS is MEM, SSD or HDD. Repeat it for "
        f"more, the fastest tier first. {default}",
    )
