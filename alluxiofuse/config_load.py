"""Where configuration comes from: file < environment < command line. Layer 0.

Keys are the fields of `config.Config`'s sections. A field whose name ends in `_bytes` or `_s` may
be written without that ending; its value is then text with a unit (`quota = "8GB"`,
`worker_timeout = "5min"`). With the ending a plain number is taken too (`quota_bytes = 4096`).
A bare number without either would leave the unit to guesswork and is refused.

Every mistake is a UserError that names the key and the file, variable or option it came from.
"""

from __future__ import annotations

import difflib
import os
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, Union, get_args, get_origin

import msgspec

from alluxiofuse import ids
from alluxiofuse.config import Config, DirectoryConfig, TierConfig
from alluxiofuse.errors import UserError
from alluxiofuse.units import parse_duration, parse_size

FILE_NAME: Final = "alluxiofuse.toml"
ENV_PREFIX: Final = "ALLUXIOFUSE_"
OTHER_VARIABLES: Final = ("ALLUXIOFUSE_MASTER", "ALLUXIOFUSE_CONFIG", "ALLUXIOFUSE_SECRET_FILE")
"""Variables of ours that are no `<SECTION>_<FIELD>`: the master's address, the file's path, and the
secret's file."""
TIER_ALIASES: Final = ("MEM", "SSD", "HDD")
WRITE_TYPES: Final = ("ASYNC_THROUGH", "CACHE_THROUGH")

S = TypeVar("S", bound=msgspec.Struct)


def load(
    path: str | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration in force.

    `path`: the file of `--config` (UserError when it is not there); None: the first that exists of
    the usual places, or none. `overrides`: "section.field" -> value (text or the field's own type);
    None values are skipped, so that options that were not given can be passed as they are.
    """
    environ = os.environ if environ is None else environ
    config = Config()
    found = find_file(path, environ)
    if found is not None:
        _merge(config, _read_file(found), str(found))
    _merge_environment(config, environ)
    for key, value in (overrides or {}).items():
        if value is not None:
            section, _, field = key.partition(".")
            _set(getattr(config, section), field, value, f"--{field.replace('_', '-')}")
    check(config)
    return config


def find_file(path: str | None, environ: Mapping[str, str]) -> Path | None:
    """The file to read: as asked for (`--config`, ALLUXIOFUSE_CONFIG), else the usual places."""
    asked = path or environ.get("ALLUXIOFUSE_CONFIG")
    if asked:
        return Path(asked)
    home = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", "/"), ".config")
    for place in (Path(), Path(home) / "alluxiofuse", Path("/etc/alluxiofuse")):
        if (place / FILE_NAME).is_file():
            return place / FILE_NAME
    return None


def parse_tier(text: str, source: str = "--tier") -> TierConfig:
    """ "SSD:/cache:100GB" as a tier of one directory. UserError otherwise."""
    alias, colon, rest = text.partition(":")
    directory, second, quota = rest.rpartition(":")
    if not (colon and second and alias and directory):
        raise UserError(f"{source} {text!r}: write ALIAS:DIRECTORY:QUOTA, for instance SSD:/cache:100GB")
    return TierConfig(
        alias=alias.upper(), directories=[DirectoryConfig(path=directory, quota_bytes=_size(quota, source))]
    )


def merge_tiers(tiers: list[TierConfig]) -> list[TierConfig]:
    """One tier per alias, in the order of first mention, with all its directories."""
    merged: dict[str, TierConfig] = {}
    for tier in tiers:
        alias = tier.alias.upper()
        if alias in merged:
            merged[alias].directories.extend(tier.directories)
        else:
            merged[alias] = TierConfig(alias=alias, directories=list(tier.directories))
    return list(merged.values())


def check(config: Config) -> None:
    """What types cannot say. UserError naming the key."""
    master, worker, client = config.master, config.worker, config.client
    for name, port, lowest in (("master.port", master.port, -1), ("worker.port", worker.port, -1)):
        if not lowest <= port <= 65535:
            raise UserError(f"{name} = {port}: a port is 0 (a free one) to 65535, or -1 for none")
    if master.block_bytes < ids.PAGE_BYTES or master.block_bytes % ids.PAGE_BYTES:
        raise UserError("master.block_bytes: a block is a multiple of 1MB (64MB is the default)")
    if not 0 < worker.low_watermark <= worker.high_watermark <= 1:
        raise UserError("worker.low_watermark and high_watermark: 0 < low <= high <= 1")
    if client.write_type not in WRITE_TYPES:
        raise UserError(f"client.write_type = {client.write_type!r}: it is one of {', '.join(WRITE_TYPES)}")
    for name in ("session_lease_s", "worker_heartbeat_s", "worker_timeout_s"):
        if getattr(master, name) <= 0:
            raise UserError(f"master.{name} must be more than zero")
    for tier in worker.tiers:
        _check_tier(tier)


def _check_tier(tier: TierConfig) -> None:
    if tier.alias.upper() not in TIER_ALIASES:
        hint = _hint(tier.alias.upper(), TIER_ALIASES)
        raise UserError(f"tier {tier.alias!r}: the alias is one of {', '.join(TIER_ALIASES)}{hint}")
    if not tier.directories:
        raise UserError(f"tier {tier.alias}: it has no directory")
    for directory in tier.directories:
        if not directory.path:
            raise UserError(f"tier {tier.alias}: a directory without a path")
        if directory.quota_bytes < 16 * ids.PAGE_BYTES:
            raise UserError(f"tier {tier.alias}, {directory.path}: a quota is at least 16MB")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as exc:
        raise UserError(f"{path}: the configuration can't be read: {exc.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UserError(f"{path}: this is not TOML: {exc}") from None


def _merge(target: msgspec.Struct, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
    """Set the fields that `values` names; a nested section only where it is named."""
    for key, value in values.items():
        field = _field_of(type(target), key, source, prefix)
        here = getattr(target, field.name, None)
        if isinstance(here, msgspec.Struct):
            if not isinstance(value, Mapping):
                raise UserError(f"{source}: {prefix}{key} is a section: write [{prefix}{key}]")
            _merge(here, value, source, f"{prefix}{key}.")
        else:
            setattr(target, field.name, _convert(value, field, key, f"{source}: {prefix}{key}"))


def _merge_environment(config: Config, environ: Mapping[str, str]) -> None:
    sections = {f.name.upper(): f.name for f in msgspec.structs.fields(Config)}
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX) or name in OTHER_VARIABLES or not environ[name]:
            continue
        section, _, field = name[len(ENV_PREFIX) :].partition("_")
        if section not in sections or not field:
            known = [f"{ENV_PREFIX}{s}_..." for s in sections]
            raise UserError(f"environment variable {name}: no such setting; there are {', '.join(known)}")
        _set(getattr(config, sections[section]), field.lower(), environ[name], f"environment variable {name}")
    if environ.get("ALLUXIOFUSE_MASTER"):
        config.cluster.master = environ["ALLUXIOFUSE_MASTER"]
    if environ.get("ALLUXIOFUSE_SECRET_FILE"):
        config.cluster.secret_file = environ["ALLUXIOFUSE_SECRET_FILE"]


def _set(section: msgspec.Struct, key: str, value: Any, source: str) -> None:
    field = _field_of(type(section), key, source, "")
    setattr(section, field.name, _convert(value, field, key, source))


def _field_of(cls: type[msgspec.Struct], key: str, source: str, prefix: str) -> msgspec.structs.FieldInfo:
    fields = {f.name: f for f in msgspec.structs.fields(cls)}
    for name in (key, f"{key}_bytes", f"{key}_s"):
        if name in fields:
            return fields[name]
    hint = _hint(key, list(fields))
    raise UserError(f"{source}: unknown key {prefix + key!r}{hint}")


def _hint(key: str, known: list[str] | tuple[str, ...]) -> str:
    bare = {name.removesuffix("_bytes").removesuffix("_s"): name for name in known}
    close = difflib.get_close_matches(key, [*known, *bare], n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _convert(value: Any, field: msgspec.structs.FieldInfo, key: str, source: str) -> Any:
    """`value` as the field's type; text is parsed (units, numbers, booleans, lists)."""
    wants_unit = field.name.endswith(("_bytes", "_s"))
    if wants_unit:
        if isinstance(value, str):
            return _size(value, source) if field.name.endswith("_bytes") else _duration(value, source)
        if key != field.name:
            example = "8GB" if field.name.endswith("_bytes") else "30s"
            raise UserError(f'{source} = {value!r} has no unit: write for instance "{example}"')
    if isinstance(value, str):
        value = _from_text(value, field.type, source)
    if field.type == list[TierConfig]:
        return [
            tier if isinstance(tier, TierConfig) else _tier(tier, source) for tier in _as_list(value, source)
        ]
    try:
        return msgspec.convert(value, field.type)
    except msgspec.ValidationError as exc:
        raise UserError(f"{source}: {_sentence(exc)}") from None


def _from_text(text: str, type_: Any, source: str) -> Any:
    """Text of a variable or an option for a field that is no text."""
    if _is(type_, str):
        return text
    if type_ == list[TierConfig]:
        return merge_tiers([parse_tier(one.strip(), source) for one in text.split(",") if one.strip()])
    if get_origin(type_) is dict:
        pairs = [one.partition("=") for one in text.split(",") if one]
        if not all(equals for _, equals, _ in pairs):
            raise UserError(f"{source}: write KEY=VALUE[,KEY=VALUE...]")
        return {name.strip(): value for name, _, value in pairs}
    try:
        return msgspec.convert(text, type_, strict=False)
    except msgspec.ValidationError as exc:
        raise UserError(f"{source}: {_sentence(exc)}") from None


def _tier(value: Any, source: str) -> TierConfig:
    """A tier from a file: a "SSD:/cache:100GB" text, or a table with alias and directories."""
    if isinstance(value, str):
        return parse_tier(value, source)
    directories = []
    for one in _as_list(_table(value, TierConfig, source).get("directories"), f"{source}.directories"):
        directories.append(_struct(one, DirectoryConfig, f"{source}.directories"))
    tier = _struct({**value, "directories": []}, TierConfig, source)
    tier.directories = directories
    return tier


def _table(value: Any, cls: type[msgspec.Struct], source: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{source}: this is a table of {', '.join(cls.__struct_fields__)}")
    return value


def _struct(value: Any, cls: type[S], source: str) -> S:
    found: dict[str, Any] = {}
    for key, one in _table(value, cls, source).items():
        field = _field_of(cls, key, source, "")
        found[field.name] = _convert(one, field, key, f"{source}.{key}")
    missing = [name for name in cls.__struct_fields__ if name not in found]
    if missing:
        raise UserError(f"{source}: {' and '.join(missing)} must be given")
    return cls(**found)


def _as_list(value: Any, source: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{source}: this is a list")
    return value


def _is(type_: Any, wanted: type) -> bool:
    if get_origin(type_) in (Union, types.UnionType):
        return wanted in get_args(type_)
    return bool(type_ is wanted)


def _size(text: str, source: str) -> int:
    try:
        return parse_size(text)
    except UserError as exc:
        raise UserError(f"{source}: {exc.message}") from None


def _duration(text: str, source: str) -> float:
    try:
        return parse_duration(text)
    except UserError as exc:
        raise UserError(f"{source}: {exc.message}") from None


def _sentence(exc: msgspec.ValidationError) -> str:
    """msgspec's "Expected `int`, got `str`" as part of a sentence."""
    text = str(exc).replace("`", "")
    return text[:1].lower() + text[1:]
