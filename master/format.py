"""The first start on an empty state directory: the cluster's id and the root directory."""

from __future__ import annotations

import os
import stat
import uuid

from alluxiofuse.errors import StateError
from alluxiofuse.ids import ROOT_INO, ROOT_MOUNT_ID
from alluxiofuse.master.records import InodeRecord
from alluxiofuse.master.store import Transaction

_CLUSTER_ID = b"cluster_id"


def ensure_formatted(tx: Transaction, now_ns: int) -> str:
    """The cluster id. Creates it and the root inode when the store is new; the caller commits. The root
    belongs to the process's user and is mounted from the under storage with id ROOT_MOUNT_ID.
    StateError when the store has only one of them."""
    cluster_id, root = tx.get("meta", _CLUSTER_ID), tx.inode(ROOT_INO)
    if cluster_id is not None and root is not None:
        if cluster_id.isascii():
            return cluster_id.decode()
        raise StateError(f"{tx.store.directory} is damaged: stop, and run `alluxiofuse fsck`")
    if cluster_id is not None or root is not None:
        raise StateError(
            f"{tx.store.directory} is damaged: it has no cluster id or no root directory: run `alluxiofuse "
            "fsck`"
        )
    tx.store.take_number(b"next_ino")  # the first number is the root's
    root = new_root(now_ns)
    fresh = str(uuid.uuid4())
    tx.put_inode(ROOT_INO, root)
    tx.put("meta", _CLUSTER_ID, fresh.encode())
    return fresh


def new_root(now_ns: int) -> InodeRecord:
    """The record of a root directory of which nothing is known yet."""
    root = InodeRecord(
        stat.S_IFDIR | 0o755, 2, os.geteuid(), os.getegid(), 0, 0, now_ns, now_ns, now_ns, now_ns,
        ROOT_INO, b"", ROOT_MOUNT_ID,
    )  # fmt: skip
    root.is_in_ufs = True
    return root
