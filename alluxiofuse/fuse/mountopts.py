"""`-o` options: ours, the kernel's, and those of fstab that mean nothing to us."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from alluxiofuse.errors import UserError
from alluxiofuse.units import parse_duration, parse_size

DEFAULT_CACHE_LIMIT_S = 3600.0

_KERNEL = frozenset(
    {"ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "async", "sync", "dirsync"}
    | {"atime", "noatime", "nodiratime", "norelatime", "nostrictatime", "allow_other", "default_permissions"}
)
"""What libfuse passes on to mount(2). (relatime and strictatime, lazytime, it does not know.)"""
_IGNORED = frozenset(
    {"defaults", "_netdev", "nofail", "fail", "auto", "noauto", "user", "nouser", "users", "owner"}
    | {"group", "relatime", "strictatime", "diratime", "lazytime", "nolazytime", "iversion"}
    | {"noiversion", "big_writes"}
)
"""For mount(8), systemd, or accepted by other FUSE filesystems; without meaning here."""
_IGNORED_PREFIXES = ("x-", "X-", "comment=", "context=", "fscontext=", "defcontext=", "rootcontext=")
_SESSIONS = ("auto", "pyfuse3", "native")
_WRITE_TYPES = ("ASYNC_THROUGH", "CACHE_THROUGH")


@dataclass(slots=True)
class MountOptions:
    """What a mount is asked to be. None: not given, the configuration decides."""

    fsname: str = ""
    """The source shown in /proc/mounts; "" for `alluxiofuse`. Not the user's to set by -o."""
    root_ino: int = 1
    """Which directory is the root of the mount; the caller resolves a subtree's path."""
    is_readonly: bool = False
    allow_other: bool | None = None
    """None: when we are root."""
    kernel: list[str] = field(default_factory=list)
    """Further options for the kernel, as given."""
    cache_limit_s: float = DEFAULT_CACHE_LIMIT_S
    """Upper bound of what the kernel may cache without asking (names, attributes); 0 nothing."""
    read_ahead_bytes: int | None = None
    """Of the mount, only root may set it; None: a good one."""
    session: str = "auto"
    keeper: bool | None = None
    """The mount outlives its daemon, by a native session; None: where that is the one to take, and the kernel
    can (`keeping.is_wanted`)."""
    is_nonempty_allowed: bool = False
    master_patience_s: float | None = None
    """How long programs wait for a master that is away, before EIO."""
    write_type: str | None = None
    secret_file: str | None = None
    config_file: str | None = None
    log_file: str | None = None

    @property
    def is_allowed_for_others(self) -> bool:
        return os.geteuid() == 0 if self.allow_other is None else self.allow_other


def parse(given: Iterable[str], *, sloppy: bool = False) -> MountOptions:
    """Of all `-o` arguments together; the last of two contradicting ones holds. A comma in a value is
    written `\\,`. UserError names what is unknown or wrong; `sloppy` (mount -s) skips the unknown."""
    options = MountOptions()
    for item in [item for text in given for item in _split(text)]:
        name, has_value, value = item.partition("=")
        if item in _KERNEL:
            _kernel_option(options, item)
        elif name in _VALUED:
            if not has_value or not value:
                raise UserError(f"mount option {name} needs a value: {name}=...")
            _VALUED[name](options, value)
        elif item == "nonempty":
            options.is_nonempty_allowed = True
        elif item == "remount":
            raise UserError("an alluxiofuse mount cannot be remounted: unmount it and mount it again")
        elif item not in _IGNORED and not item.startswith(_IGNORED_PREFIXES) and not sloppy:
            raise UserError(f"unknown mount option {name!r}: see `alluxiofuse mount --help`")
    if options.keeper:
        if options.session == "pyfuse3":
            raise UserError("keeper=on needs session=native")
        options.session = "native"
    return options


def _split(text: str) -> list[str]:
    items, current, is_escaped = [], "", False
    for char in text:
        if is_escaped:
            current, is_escaped = current + char, False
        elif char == "\\":
            is_escaped = True
        elif char == ",":
            items.append(current)
            current = ""
        else:
            current += char
    items.append(current + "\\" * is_escaped)
    return [item.strip() for item in items if item.strip()]


def _kernel_option(options: MountOptions, item: str) -> None:
    if item in ("ro", "rw"):
        options.is_readonly = item == "ro"
    elif item == "allow_other":
        options.allow_other = True
    elif item != "default_permissions":  # always on
        opposite = item[2:] if item.startswith("no") else f"no{item}"
        if opposite in options.kernel:
            options.kernel.remove(opposite)
        if item not in options.kernel:
            options.kernel.append(item)


def _session(options: MountOptions, value: str) -> None:
    if value not in _SESSIONS:
        raise UserError(f"session={value}: choose from {', '.join(_SESSIONS)}")
    options.session = value


_KEEPER = {"auto": None, "on": True, "off": False}


def _keeper(options: MountOptions, value: str) -> None:
    if value not in _KEEPER:
        raise UserError(f"keeper={value}: choose from {', '.join(_KEEPER)}")
    options.keeper = _KEEPER[value]


def _write_type(options: MountOptions, value: str) -> None:
    if value.upper() not in _WRITE_TYPES:
        raise UserError(f"write_type={value}: choose from {', '.join(_WRITE_TYPES)}")
    options.write_type = value.upper()


def _seconds(name: str, value: str) -> float:
    """As in `units`, and a bare number is seconds, as mount options are written."""
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return parse_duration(value)
    except UserError as exc:
        raise UserError(f"mount option {name}: {exc.message}") from None


def _attr_timeout(options: MountOptions, value: str) -> None:
    seconds = _seconds("attr_timeout", value)
    if not 0 <= seconds <= 1e9:
        raise UserError(f"attr_timeout={value}: write seconds, 0 to ask every time")
    options.cache_limit_s = seconds


def _master_patience(options: MountOptions, value: str) -> None:
    seconds = _seconds("master_patience", value)
    if not 0 <= seconds <= 1e9:
        raise UserError(f"master_patience={value}: write seconds, 0 for an error at once")
    options.master_patience_s = seconds


def _sync_interval(options: MountOptions, value: str) -> None:
    raise UserError(
        "sync_interval belongs to an under storage, not to a mount of the namespace: give --sync-interval to "
        "`alluxiofuse local`, `master` or `fs mount`; -o attr_timeout bounds what this machine caches"
    )


def _worker(options: MountOptions, value: str) -> None:
    raise UserError("mount option worker comes with a later version: workers of the same host are preferred")


def _read_ahead(options: MountOptions, value: str) -> None:
    try:
        options.read_ahead_bytes = parse_size(value)
    except UserError as exc:
        raise UserError(f"mount option read_ahead: {exc.message}") from None


def _text(attribute: str, options: MountOptions, value: str) -> None:
    setattr(options, attribute, value)


_VALUED: dict[str, Callable[[MountOptions, str], None]] = {
    "session": _session,
    "keeper": _keeper,
    "write_type": _write_type,
    "attr_timeout": _attr_timeout,
    "master_patience": _master_patience,
    "sync_interval": _sync_interval,
    "read_ahead": _read_ahead,
    "secret_file": lambda options, value: _text("secret_file", options, value),
    "config": lambda options, value: _text("config_file", options, value),
    "worker": _worker,
    "log_file": lambda options, value: _text("log_file", options, value),
}
