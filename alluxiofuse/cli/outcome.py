"""How a command ends: one line on stderr, and an exit code.

0 done. 1 the operation failed (no such file, nobody answers, the under storage refused). 2 a mistake
in arguments, configuration or the environment, or a daemon that could not start. 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import click

from alluxiofuse.errors import AlluxioFuseError, FsError, StateError, UserError

PROGRAM = "alluxiofuse"
FAILED = 1
MISTAKE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
"""As if killed by SIGPIPE."""


def complain(text: str, kind: str = "error") -> None:
    """One line on stderr. Control characters (of file names, say) are shown escaped."""
    flat = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split("\n")))
    print(f"{PROGRAM}: {kind}: {flat}", file=sys.stderr, flush=True)


def cause(exc: BaseException) -> BaseException:
    """The error to report, of a group that tasks raised together: a mistake or failure of ours
    before anything else, and Ctrl-C before a bug."""
    if not isinstance(exc, BaseExceptionGroup):
        return exc
    leaves = [cause(one) for one in exc.exceptions]
    for kind in (UserError, AlluxioFuseError, click.ClickException, KeyboardInterrupt, OSError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return leaves[0]


@contextmanager
def starting() -> Iterator[None]:
    """Around the start of a daemon: whatever fails on purpose in here is a start-up error."""
    try:
        yield
    except BaseException as exc:
        raise as_mistake(exc) from None


def as_mistake(exc: BaseException) -> BaseException:
    """A failure (a bucket that is missing, a port in use) as a UserError; other things unchanged."""
    found = cause(exc)
    if isinstance(found, AlluxioFuseError) and not isinstance(found, UserError):
        return UserError(found.message or os.strerror(found.errno), errno=found.errno)
    if isinstance(found, OSError) and found.filename is not None:
        return UserError(f"{_name(found.filename)}: {found.strerror}", errno=found.errno)
    return found


def report(exc: BaseException, *, debug: bool) -> int:
    """Say what happened in one line and give the exit code. With `debug` the traceback too."""
    found = cause(exc)
    if isinstance(found, click.exceptions.Exit):
        return found.exit_code
    if isinstance(found, SystemExit):
        return found.code if isinstance(found.code, int) else FAILED
    if debug and not isinstance(found, click.ClickException):
        traceback.print_exception(exc)
    if isinstance(found, KeyboardInterrupt | click.Abort):
        return INTERRUPTED
    if isinstance(found, BrokenPipeError):
        _forget_stdout()
        return BROKEN_PIPE
    if isinstance(found, click.exceptions.NoArgsIsHelpError):
        print(found.format_message(), file=sys.stderr)
        return MISTAKE
    if isinstance(found, click.UsageError):
        complain(_with_help(found))
        return MISTAKE
    if isinstance(found, click.ClickException):
        complain(found.format_message())
        return found.exit_code
    if isinstance(found, AlluxioFuseError):
        complain(_sentence(found))
        return MISTAKE if isinstance(found, UserError | StateError) else FAILED
    if isinstance(found, OSError):
        name = f"{_name(found.filename)}: " if found.filename is not None else ""
        complain(f"{name}{found.strerror or found}")
        return FAILED
    complain(f"this is a bug: {type(found).__name__}: {found} (run with --debug for the traceback)")
    return FAILED


def _sentence(error: AlluxioFuseError) -> str:
    """What went wrong; the errno's meaning is added to an FsError that only says what it is about."""
    meaning = os.strerror(error.errno)
    if isinstance(error, FsError) and meaning not in error.message and ": " not in error.message:
        return f"{error.message}: {meaning}"
    return error.message or meaning


def _with_help(error: click.UsageError) -> str:
    where = f" (see '{error.ctx.command_path} --help')" if error.ctx is not None else ""
    return f"{error.format_message().rstrip('.')}{where}"


def _name(filename: object) -> str:
    return os.fsdecode(filename) if isinstance(filename, bytes | str) else str(filename)


def _forget_stdout() -> None:
    """Nobody reads stdout any more: keep the interpreter from flushing into it at exit."""
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
    except (OSError, ValueError):
        pass
