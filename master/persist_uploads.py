"""Uploads by workers, as the persister keeps them."""

from __future__ import annotations

from dataclasses import dataclass

from alluxiofuse.master.containers import inode_of_container
from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.store import Store
from alluxiofuse.wire.master_ops import PersistDone
from alluxiofuse.wire.types import PersistCommand


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
