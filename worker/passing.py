"""Slabs that kernels write to by themselves (docs/adr/0001-passthrough.md): what that takes."""

from __future__ import annotations

from alluxiofuse.worker.slab import Slab

MIN_ROOM_BYTES = 1 << 30
ROOM_SHARE = 0.25
"""Of the quota. Nothing stops what is written before it is charged, some GB/s for as long as it takes to
notice; so there must be far more room than that."""


def may_pass(slab: Slab) -> bool:
    """Its directory takes it, and has the room that can be had now, by evicting too."""
    directory = slab.directory
    needed = max(MIN_ROOM_BYTES, int(directory.quota_bytes * ROOM_SHARE))
    return directory.takes_passthrough and directory.reachable >= needed
