"""Cache tiers at start-up: the default ones, and checks before anything is written.

Without --tier, `local` takes two. MEM: /dev/shm/alluxiofuse-<uid>-<hash of the state directory>, up
to a quarter of the memory that is available, at most 1 GB. SSD: <state>/cache, half of what was free
on its disk at the first start, at most 20 GB (remembered in <state>/default-tiers.json).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path

from alluxiofuse.config import DirectoryConfig, TierConfig
from alluxiofuse.errors import StateError, UserError
from alluxiofuse.units import format_size

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of our own below it, mode 0700
MAX_DEFAULT_MEM_BYTES = 1 << 30
MAX_DEFAULT_SSD_BYTES = 20 << 30
MIN_DEFAULT_BYTES = 64 << 20
REMEMBERED = "default-tiers.json"


def default_tiers(state: Path) -> list[TierConfig]:
    """MEM (where there is memory to spare) and SSD."""
    tiers = []
    mem_bytes = _default_mem_bytes()
    if mem_bytes >= MIN_DEFAULT_BYTES:
        tiers.append(_tier("MEM", default_mem_directory(state), mem_bytes))
    tiers.append(_tier("SSD", state / "cache", _default_ssd_bytes(state)))
    return tiers


def default_mem_directory(state: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(state)).hexdigest()[:12]
    return SHARED_MEMORY / f"alluxiofuse-{os.geteuid()}-{digest}"


def _tier(alias: str, path: Path, quota_bytes: int) -> TierConfig:
    return TierConfig(alias=alias, directories=[DirectoryConfig(path=str(path), quota_bytes=quota_bytes)])


def _default_mem_bytes() -> int:
    try:
        free = os.statvfs(SHARED_MEMORY)
        with open("/proc/meminfo", encoding="ascii") as file:
            info = dict(line.split(":", 1) for line in file)
        available = int(info["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 0
    return min(MAX_DEFAULT_MEM_BYTES, available // 4, free.f_bavail * free.f_frsize // 2)


def _default_ssd_bytes(state: Path) -> int:
    """What was chosen at the first start: what is free later says little, our own cache is in it."""
    file = state / REMEMBERED
    try:
        chosen = int(json.loads(file.read_text())["ssd_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        chosen = min(MAX_DEFAULT_SSD_BYTES, shutil.disk_usage(state).free // 2)
        if chosen < MIN_DEFAULT_BYTES:
            raise UserError(
                f"only {format_size(2 * chosen)} are free at {state}: make room, or name a place with --tier"
            ) from None
        file.write_text(json.dumps({"ssd_bytes": chosen}) + "\n")
        file.chmod(0o600)
    return chosen


def check_tiers(tiers: list[TierConfig]) -> None:
    """Before anything is made: directories that can be used, quotas that their disks can hold.
    UserError or StateError naming the directory."""
    seen: dict[str, str] = {}
    by_disk: dict[int, list[DirectoryConfig]] = defaultdict(list)
    for tier in tiers:
        for directory in tier.directories:
            path = os.path.realpath(directory.path)
            for other in seen:
                if os.path.commonpath([path, other]) in (path, other):
                    raise UserError(
                        f"tier directories {directory.path} and {seen[other]} overlap: name separate ones"
                    )
            seen[path] = directory.path
            by_disk[os.stat(_existing_parent(Path(path))).st_dev].append(directory)
    for directories in by_disk.values():
        _check_quotas(directories)


def _existing_parent(path: Path) -> Path:
    """The nearest directory that is there; it must allow what is missing to be made."""
    here = path
    while not os.path.lexists(here):
        here = here.parent
    if not here.is_dir():
        raise StateError(f"tier directory {path}: {here} is not a directory")
    if not os.access(here, os.W_OK | os.X_OK):
        raise StateError(f"tier directory {path}: this user can't write to {here}")
    return here


def _check_quotas(directories: list[DirectoryConfig]) -> None:
    """Of directories on one disk."""
    total = shutil.disk_usage(_existing_parent(Path(directories[0].path))).total
    wanted = sum(directory.quota_bytes for directory in directories)
    if wanted > total:
        names = ", ".join(f"{d.path} ({format_size(d.quota_bytes)})" for d in directories)
        raise UserError(
            f"quota larger than the disk: {names} on a disk of {format_size(total)}: choose a smaller one"
        )
