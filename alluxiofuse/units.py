"""Sizes and durations as people write them, and the range of times. Layer 0."""

from __future__ import annotations

import re

from alluxiofuse.errors import UserError

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)(i?B?)\s*$", re.IGNORECASE)
_SIZE_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ms|s|m|min|h|d)\s*$")
_MAX_NS = (1 << 63) - 1
_DURATION_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str) -> int:
    """Bytes of "64MB", "8GiB", "512k", "4096"; powers of 1024 as in Alluxio. UserError otherwise."""
    match = _SIZE.match(text)
    if not match:
        raise UserError(f"{text!r} is not a size: write for instance 512MB or 8GB")
    return int(float(match[1]) * 1024 ** _SIZE_POWER[match[2].upper()])


def parse_duration(text: str) -> float:
    """Seconds of "100ms", "5s", "2min", "1h", "-1" (never). UserError otherwise."""
    if text.strip() in ("-1", "never"):
        return -1.0
    if text.strip() == "0":
        return 0.0
    match = _DURATION.match(text)
    if not match:
        raise UserError(f"{text!r} is not a duration: write for instance 500ms, 30s or 5min")
    return float(match[1]) * _DURATION_S[match[2]]


def clamp_ns(time_ns: int) -> int:
    """Into what nanoseconds since 1970 can say in 64 bits (the years 1677 to 2262): as filesystems do
    with times that they can't keep (utimensat(2))."""
    return max(-_MAX_NS - 1, min(_MAX_NS, time_ns))


def format_size(size_bytes: float) -> str:
    """With at most one decimal, as "1.5 GiB"."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")
