"""What mount(8) runs: `mount.fuse.alluxiofuse SOURCE DIR [-sfnv] -o OPTIONS`, and, through
mount.fuse3, `alluxiofuse [SOURCE] DIR -o OPTIONS`.

Exit codes are mount(8)'s: 0 the mount answers, 1 wrong use, 32 it could not be mounted. One line on
stderr says why.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from alluxiofuse.cli import outcome
from alluxiofuse.errors import AlluxioFuseError, UserError

WRONG_USE = 1
NOT_MOUNTED = 32
_VALUED_FLAGS = ("-N", "-t")
"""Options of mount(8) whose value we do not need."""


@dataclass
class Call:
    source: str = ""
    directory: str = ""
    options: list[str] = field(default_factory=list)
    is_sloppy: bool = False
    is_fake: bool = False


def parse(arguments: Sequence[str]) -> Call:
    """UserError when it is no such call."""
    call, words, rest = Call(), [], list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            words.append(word)
        elif word in ("-o", *_VALUED_FLAGS):
            if not rest:
                raise UserError(f"{word} needs a value")
            value = rest.pop(0)
            if word == "-o":
                call.options.append(value)
        else:
            _flags(call, word[1:])
    if not 1 <= len(words) <= 2:
        raise UserError("use: mount.fuse.alluxiofuse HOST:PORT[/PATH] DIR [-s] [-f] [-n] [-v] [-o OPTIONS]")
    call.directory = words[-1]
    call.source = words[0] if len(words) == 2 else ""
    if call.source in ("none", "alluxiofuse"):
        call.source = ""
    return call


def _flags(call: Call, letters: str) -> None:
    for letter in letters:
        if letter == "s":
            call.is_sloppy = True
        elif letter == "f":
            call.is_fake = True
        elif letter not in "nvrw":
            raise UserError(f"unknown option -{letter}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point `mount.fuse.alluxiofuse`."""
    debug = False
    try:
        code = run(parse(sys.argv[1:] if arguments is None else arguments))
    except UserError as exc:
        outcome.complain(exc.message)
        code = WRONG_USE
    except BaseException as exc:
        found = outcome.cause(exc)
        code = outcome.report(found, debug=debug)
        if isinstance(found, AlluxioFuseError | OSError):
            code = NOT_MOUNTED
    sys.exit(code)


def run(call: Call) -> int:
    from alluxiofuse.cli import mounting
    from alluxiofuse.fuse import mountopts

    options = mountopts.parse(call.options, sloppy=call.is_sloppy)
    plan = mounting.plan_mount(call.source, call.directory, options, {})
    if not call.is_fake:
        mounting.mount_in_background(plan, "info", NOT_MOUNTED)
    return 0


if __name__ == "__main__":
    main()
