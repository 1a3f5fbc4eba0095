"""Uploads by workers, as the persister keeps them."""

from __future__ import annotations

import stat
from collections import OrderedDict
from dataclasses import dataclass

from alluxiofuse.master.containers import inode_of_container
from alluxiofuse.master.persist_plan import is_clean
from alluxiofuse.master.persist_queue import MAX_KEYS
from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.store import Store
from alluxiofuse.wire.master_ops import PersistDone
from alluxiofuse.wire.types import PersistCommand

CANCEL_PATIENCE_S = 10.0
"""How long a worker has to answer the cancelling of an upload from an earlier life of the master."""


@dataclass(slots=True)
class Upload:
    """A PersistCommand that was given to a worker and has not ended."""

    task_id: int
    ino: int
    generation: int
    mount_id: int
    path: bytes
    container: int
    size: int
    worker_id: int
    sent_at_s: float
    is_cancelled: bool = False


class EndedTasks:
    """Uploads that surely write no more, though it is not known what they wrote; and those of an earlier
    life of the master that were told to stop."""

    def __init__(self) -> None:
        self._ended: OrderedDict[int, None] = OrderedDict()
        """The newest last; MAX_KEYS at most."""
        self._until_s: dict[int, float] = {}
        """Told to stop: how long the worker has to answer."""

    def __contains__(self, task_id: int) -> bool:
        return task_id in self._ended

    def add(self, task_id: int) -> None:
        self._ended[task_id] = None
        self._until_s.pop(task_id, None)
        if len(self._ended) > MAX_KEYS:
            self._ended.popitem(last=False)

    def stopping(self, task_id: int, now: float) -> tuple[bool, float]:
        """Whether it was told to stop before, and until when its answer is waited for."""
        is_told = task_id in self._until_s
        return is_told, self._until_s.setdefault(task_id, now + CANCEL_PATIENCE_S)


def is_upload(record: InodeRecord | None) -> bool:
    """What the log wants of it is an upload, as far as can be seen without planning."""
    if record is None or not stat.S_ISREG(record.mode) or record.is_local_only:
        return False
    return bool(record.container and record.size and not record.home and not is_clean(record))


def command_of(upload: Upload, record: InodeRecord) -> PersistCommand:
    """What the worker is told; `record` is the inode's, as it is now."""
    return PersistCommand(
        upload.task_id,
        upload.container,
        upload.size,
        upload.mount_id,
        upload.path,
        record.mode & 0o7777,
        record.uid,
        record.gid,
        record.mtime_ns,
    )


def earlier_upload(store: Store, request: PersistDone) -> Upload | None:
    """The upload of an earlier life of the master that this is the end of, by the intent that it left."""
    ino = inode_of_container(store, request.container)
    tx = store.transaction()
    record = None if ino is None else tx.inode(ino)
    entry = None if ino is None else tx.sync_entry(ino)
    if ino is None or record is None or entry is None or entry.intent is None:
        return None
    intent = tx.intent(record.mount_id, entry.intent)
    if intent is None or intent.ino != ino or intent.task_id != request.task_id:
        return None
    return Upload(
        request.task_id,
        ino,
        0,
        record.mount_id,
        entry.intent,
        request.container,
        request.size,
        request.worker_id,
        0.0,
    )
