"""What a filesystem's daemon spends: its CPU time and memory, that of its children included."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from benchmark.place import Place, Workload, drop_caches
from benchmark.small import create_all

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_REST_SHARE = 0.1
_REST_LOOK_S = 0.5


def _stat_fields(pid: int) -> list[str]:
    """Of /proc/PID/stat, from field 3 (state) on; a name may hold blanks and brackets."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def family(pid: int) -> list[int]:
    """The process and all below it."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                children.setdefault(int(_stat_fields(int(name))[1]), []).append(int(name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of the family, with children that have ended."""
    ticks = 0
    for one in family(pid):
        try:
            ticks += sum(int(field) for field in _stat_fields(one)[11:15])
        except (FileNotFoundError, ProcessLookupError):
            if one == pid:
                raise
    return ticks / _TICKS_PER_S


def peak_memory_bytes(pid: int) -> int:
    """The most that was resident, summed over the family."""
    total = 0
    for one in family(pid):
        try:
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return total


def wait_for_rest(pids: Iterable[int], limit_s: float) -> bool:
    """Until each of them uses less than a tenth of a CPU: uploads of what was measured last must
    not slow down what is measured next. False: not within `limit_s`."""
    watched = list(pids)
    if not watched or limit_s <= 0:
        return True
    end = time.monotonic() + limit_s
    before = [cpu_seconds(pid) for pid in watched]
    while time.monotonic() < end:
        time.sleep(_REST_LOOK_S)
        after = [cpu_seconds(pid) for pid in watched]
        if all(b - a <= _REST_SHARE * _REST_LOOK_S for a, b in zip(before, after, strict=True)):
            return True
        before = after
    return False


def cpu_per_file(place: Place, is_upload_included: bool) -> float:
    """Milliseconds for each small file that is created."""
    assert place.pid is not None
    drop_caches([])
    before = cpu_seconds(place.pid)
    create_all(place)
    if is_upload_included and not wait_for_rest([place.pid], 120):
        place.notes.add("its daemon did not come to rest after the small files: CPU counted for 120 s")
    return (cpu_seconds(place.pid) - before) / place.file_count * 1000


def memory(place: Place) -> float:
    assert place.pid is not None
    return peak_memory_bytes(place.pid) / 1e6


WORKLOADS = {
    "cpu": Workload(
        "daemon's CPU per small file, until it is closed",
        "ms",
        lambda place: cpu_per_file(place, is_upload_included=False),
        is_less_better=True,
        needs_pid=True,
    ),
    "cpu-all": Workload(
        "daemon's CPU per small file, until it rests",
        "ms",
        lambda place: cpu_per_file(place, is_upload_included=True),
        is_less_better=True,
        needs_pid=True,
    ),
    "memory": Workload("daemon's memory, most", "MB", memory, is_less_better=True, needs_pid=True),
}
