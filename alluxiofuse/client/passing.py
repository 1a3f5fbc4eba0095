"""Files that the kernel reads and writes itself (docs/adr/0001-passthrough.md): finding the one slab that
holds all of a file, and holding on to it."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import msgspec

from alluxiofuse.client.content import Content
from alluxiofuse.client.slabs import Slab
from alluxiofuse.errors import AlluxioFuseError
from alluxiofuse.wire import worker_ops

if TYPE_CHECKING:
    from alluxiofuse.client.open_file import OpenFile

log = logging.getLogger(__name__)

CHECK_BYTES = 8 << 20
"""Up to this size the worker is asked to check what it has not used since its start; larger files are
checked as they are read, in ordinary mode."""


async def descriptor(file: OpenFile, content: Content) -> int:
    """See `OpenFile.pass_on`. What goes wrong here the ordinary way meets again, and tells."""
    if not content.core.passes:
        return -1
    try:
        fd = await (_for_writing(file, content) if file.is_writer else _for_reading(content))
        if fd >= 0 and file.flags & os.O_DIRECT:
            os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT))  # As the kernel will.
        return fd
    except (AlluxioFuseError, OSError) as exc:
        log.debug("inode %d is not passed to the kernel: %s", content.ino, exc)
        return -1


async def _for_reading(content: Content) -> int:
    writing = content.writing
    if writing is not None:
        slab = writing.slab
        if slab is None or not writing.is_passing or not slab.is_readable:
            return -1
    else:
        slab = await _whole(content)
    if slab is None:
        return -1
    content.pin(slab)
    return slab.fd


async def _whole(content: Content) -> Slab | None:
    """The local worker's slab, if that has all of the content, checked."""
    core = content.core
    if content.is_stale:
        await content.refresh(is_patient=False)
    layout, worker_id = content.layout, core.workers.local_worker_id
    if content.writing is not None or not layout.container or not worker_id:
        return None
    if layout.home:
        if layout.home != worker_id:
            return None
        layout = msgspec.structs.replace(layout, source=None)  # All there is of it is there.
    elif not layout.size or not (worker_id in layout.workers or core.slabs.has_idle(layout.container)):
        return None  # Not there, and what is just being attached is not complete.
    slab = content.slab
    if slab is None or not slab.is_good or slab.container != layout.container:
        connection = await core.workers.connection(worker_id)
        if not connection.can_pass_fds:
            return None
        slab = await content.attached(layout, worker_id, connection)
    if slab is None or slab.fd < 0 or not slab.passes:
        return None
    if not slab.is_complete and layout.size <= CHECK_BYTES:
        slab.learn(await slab.connection.call(worker_ops.Fetch(slab.lock_id, 0, layout.size)))
    if not slab.is_complete or not slab.is_good:
        return None
    if layout.home:
        slab.write_no_more()
    return slab


async def _for_writing(file: OpenFile, content: Content) -> int:
    """Begins writing: of the first byte that the kernel writes nobody hears."""
    core = content.core
    worker_id = core.workers.local_worker_id
    home = content.layout.home if content.writing is None else content.writing.worker_id
    if not core.passes_writes or not worker_id or home not in (0, worker_id):
        return -1
    if content.writing is None and content.layout.size and await _whole(content) is None:
        return -1
    writing = await content.begun(0)
    if not writing.is_durable:
        return -1  # fsync is an upload there, of what nobody writes to meanwhile.
    if file.flags & os.O_DSYNC:
        # Each write is then synced by the kernel; whose bytes they are must be durable before.
        await file.fsync()
    fd = writing.pass_on()
    if fd >= 0:
        assert writing.slab is not None
        content.pin(writing.slab)
    return fd
