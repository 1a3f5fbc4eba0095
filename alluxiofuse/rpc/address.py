"""Where a daemon listens: `HOST:PORT`, `[IPv6]:PORT`, `unix:/path` or `/path`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from alluxiofuse.errors import UserError

MAX_UNIX_PATH_BYTES = 107
"""sun_path of unix(7), without its closing NUL."""


@dataclass(frozen=True, slots=True)
class TcpAddress:
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress


def parse_address(text: str, default_port: int | None = None) -> Address:
    """The address that a person wrote. UserError says what is wrong with it.

    Without `default_port` the port must be there.
    """
    text = text.strip()
    if text.startswith("unix:"):
        return _unix(text.removeprefix("unix:"), text)
    if text.startswith("/"):
        return _unix(text, text)
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise UserError(f"{text!r} is not an address: write [IPv6]:PORT")
        return TcpAddress(_host(host, text), _port(rest[1:] if rest else None, text, default_port))
    if text.count(":") > 1:
        raise UserError(f"{text!r} is not an address: an IPv6 address stands in brackets, [::1]:19998")
    host, colon, port = text.partition(":")
    return TcpAddress(_host(host, text), _port(port if colon else None, text, default_port))


def _unix(path: str, text: str) -> UnixAddress:
    if not path.startswith("/"):
        raise UserError(f"{text!r} is not an address: the path of a Unix socket begins with /")
    if "\0" in path or len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
        raise UserError(
            f"{path!r} cannot be a Unix socket: its path may have at most {MAX_UNIX_PATH_BYTES} bytes"
        )
    return UnixAddress(path)


def _host(host: str, text: str) -> str:
    if not host or len(host) > 255 or any(char.isspace() or not char.isprintable() for char in host):
        raise UserError(f"{text!r} is not an address: write HOST:PORT, unix:/path or /path")
    return host


def _port(port: str | None, text: str, default_port: int | None) -> int:
    if port is None:
        if default_port is None:
            raise UserError(f"{text!r} has no port: write HOST:PORT")
        return default_port
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 <= int(port) <= 65535):
        raise UserError(f"{text!r} is not an address: the port is a number up to 65535")
    return int(port)
