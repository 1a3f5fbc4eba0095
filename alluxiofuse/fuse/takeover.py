"""Going on with a mount that another daemon had: its handles, and what the kernel believes."""

from __future__ import annotations

import logging

import trio

from alluxiofuse.errors import AlluxioFuseError
from alluxiofuse.fuse.handles import FileHandle, mode_of
from alluxiofuse.fuse.invalidation import Invalidator
from alluxiofuse.fuse.memory import IS_DIRECTORY, KILLS_PRIVILEGES, Former, Memory
from alluxiofuse.fuse.operations import Operations

log = logging.getLogger("alluxiofuse.fuse")

REOPENED_AT_ONCE = 64


async def take_over(operations: Operations, memory: Memory, invalidator: Invalidator) -> None:
    """Before the first request is answered. What was open and is gone is ESTALE for who has it open. News may
    have been missed: attributes and pages of all that is open are void, and later any inode may be one that
    the kernel knows. (Names are voided all at once, by `NativeDriver.resume`.)"""
    view = operations.view
    view.is_incomplete = True
    limit = trio.CapacityLimiter(REOPENED_AT_ONCE)
    passthrough = operations.passthrough
    for one in memory.former_handles:
        if not one.record.bits & IS_DIRECTORY:
            passthrough.restore(one.record.ino, mode_of(one.record))

    async def reopen(one: Former) -> None:
        ino, flags, bits = one.record.ino, one.record.flags, one.record.bits
        mode = mode_of(one.record)
        async with limit:
            try:
                file = await operations.fs.reopen(ino, flags, is_passing=mode.is_passing)
            except AlluxioFuseError as exc:
                log.warning("inode %d, which was open, can't be opened again: %s", ino, exc)
                operations.files.restore(one.fh, None)
                passthrough.lost(one.fh, ino, mode)
                return
        kills_privileges = bool(bits & KILLS_PRIVILEGES)
        handle = FileHandle(ino, flags, file, one.record.thread, kills_privileges, mode=mode)
        operations.files.restore(one.fh, handle)

    async with trio.open_nursery() as nursery:
        for one in memory.former_handles:
            if one.record.bits & IS_DIRECTORY:
                operations.dirs.restore(one.fh, operations.directory(one.record.ino))
            else:
                nursery.start_soon(reopen, one)
    invalidator.attr(view.kernels(view.root_ino))
    for one in memory.former_handles:
        order = invalidator.attr if one.record.bits & IS_DIRECTORY else invalidator.data
        order(view.kernels(one.record.ino))
