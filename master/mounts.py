"""The mount table: which under storage is mounted where, and the open connectors.

Mount records are few: all are kept in memory, as they are in the store. Connectors are opened at
first use and closed at shutdown. Owned by the master's one thread.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import trio

from alluxiofuse.errors import StaleError, UfsError, UserError
from alluxiofuse.ids import ROOT_INO, ROOT_MOUNT_ID
from alluxiofuse.master import places
from alluxiofuse.master.records import MountRecord
from alluxiofuse.master.store import Store, Transaction, decode_record, u64
from alluxiofuse.ufs.base import Capabilities, UnderStorage
from alluxiofuse.ufs.registry import IDENTITY, NEW_IDENTITY, local_directory, redact
from alluxiofuse.wire.types import MountInfo

OpenUfs = Callable[[str, dict[str, str]], UnderStorage]
THREADS_PER_MOUNT = 32
"""Calls of one under storage at once, by the master."""


class MountTable:
    def __init__(
        self,
        store: Store,
        open_ufs: OpenUfs,
        redact: Callable[[dict[str, str]], dict[str, str]] = redact,
        notes_dir: Path | None = None,
    ) -> None:
        """Options that `redact` changes are secrets. `notes_dir`: for `notes`; made when needed."""
        self._notes_dir = notes_dir
        self._store = store
        self._open_ufs = open_ufs
        self._redact = redact
        self._records: dict[int, MountRecord] = {}
        self._storages: dict[int, UnderStorage] = {}
        self._limiters: dict[int, trio.CapacityLimiter] = {}
        for _, value in store.scan("mount", b""):
            record = decode_record(value, MountRecord, "the mount table")
            self._records[record.mount_id] = record

    # --- reading ----------------------------------------------------------------------------------

    def record(self, mount_id: int) -> MountRecord | None:
        return self._records.get(mount_id)

    def ids(self) -> list[int]:
        return sorted(self._records)

    def storage(self, mount_id: int) -> UnderStorage:
        """The connector; opened at first use (no I/O beyond reading credentials). StaleError when
        there is no such mount."""
        found = self._storages.get(mount_id)
        if found is None:
            record = self._existing(mount_id)
            found = self._storages[mount_id] = self._open_ufs(record.uri, dict(record.options))
        return found

    def open(self, uri: str, options: dict[str, str]) -> UnderStorage:
        """A connector that is not in the table (to probe it). Thread-safe; the caller closes it."""
        return self._open_ufs(uri, options)

    def counts(self) -> dict[str, int]:
        """What went wrong with the master's connectors together (`UnderStorage.counts`)."""
        found: Counter[str] = Counter()
        for storage in self._storages.values():
            found.update(storage.counts())
        return dict(found)

    def notes(self, mount_id: int) -> Path | None:
        """The file for `UnderStorage.resume` of the master's own connector."""
        if self._notes_dir is None:
            return None
        self._notes_dir.mkdir(mode=0o700, exist_ok=True)
        return self._notes_dir / str(mount_id)

    def limiter(self, mount_id: int) -> trio.CapacityLimiter:
        """For trio.to_thread.run_sync of this mount's calls."""
        if mount_id not in self._limiters:
            self._limiters[mount_id] = trio.CapacityLimiter(THREADS_PER_MOUNT)
        return self._limiters[mount_id]

    def capabilities(self, mount_id: int) -> Capabilities:
        return self.storage(mount_id).capabilities

    def is_readonly(self, mount_id: int) -> bool:
        record = self._records.get(mount_id)
        return record is None or record.is_readonly

    def sync_interval_s(self, mount_id: int) -> float:
        """-1 never, 0 always, else seconds."""
        record = self._records.get(mount_id)
        return -1.0 if record is None else record.sync_interval_s

    def mount_at(self, ino: int) -> int | None:
        """The mount whose root directory this is."""
        for mount_id, record in self._records.items():
            if record.ino == ino:
                return mount_id
        return None

    def info(self, mount_id: int, with_secrets: bool) -> MountInfo:
        record = self._existing(mount_id)
        inode = self._store.inode(record.ino)
        path = b"/" if inode is None else places.namespace_path(self._store, record.ino, inode)
        shown = record.options if with_secrets else self._redact(dict(record.options))
        options = {name: value for name, value in record.options.items() if shown.get(name) == value}
        if not with_secrets:
            options.pop(IDENTITY, None)  # of no use to people
        return MountInfo(mount_id, path, record.uri, record.is_readonly, record.sync_interval_s, options)

    def overlapping(self, uri: str, options: dict[str, str], is_readonly: bool) -> MountRecord | None:
        """A mount of the same place, of one within it or around it, when both can be written: each would
        take what the other writes for changes made outside."""
        for record in self._records.values():
            if is_readonly or record.is_readonly or record.options.get("endpoint") != options.get("endpoint"):
                continue
            one, other = place_of(uri), place_of(record.uri)
            if one.startswith(other) or other.startswith(one):
                return record
        return None

    # --- changing ---------------------------------------------------------------------------------

    def ensure_root(
        self, uri: str, options: dict[str, str], sync_interval_s: float | None, tx: Transaction | None = None
    ) -> MountRecord:
        """The root mount: created at the first start (in `tx`, when given: the caller commits); later
        the stored one, whose URI `uri` has to be, or "". New options replace the stored ones (so
        that credentials can change). UserError names both URIs when they differ."""
        known = self._records.get(ROOT_MOUNT_ID)
        if known is None and not uri:
            raise UserError("no under storage is configured: name one, for instance --ufs ./data")
        if known is not None and uri and uri != known.uri:
            raise UserError(
                f"this state directory belongs to {known.uri}, not to {uri}: name that one, or another "
                "state directory"
            )
        is_identified = known is not None and (
            known.options.get(IDENTITY, NEW_IDENTITY) != NEW_IDENTITY or local_directory(known.uri) is None
        )
        if known is not None and not options and sync_interval_s is None and is_identified:
            return known
        interval = sync_interval_s
        if known is None:
            record = MountRecord(ROOT_MOUNT_ID, ROOT_INO, uri, False, 0.0, dict(options))
        else:
            record = MountRecord(
                ROOT_MOUNT_ID, ROOT_INO, known.uri, known.is_readonly, known.sync_interval_s, known.options
            )
            record.options = dict(options) or record.options
            if known.options.get(IDENTITY) and IDENTITY not in record.options:
                record.options[IDENTITY] = known.options[IDENTITY]
        self._records[ROOT_MOUNT_ID] = record
        if known is not None and local_directory(known.uri) is not None:
            with suppress(UfsError):  # it may be away at this start: learned at a later one
                record.options = identified(record.options, self.storage(ROOT_MOUNT_ID))
        if interval is not None:
            record.sync_interval_s = interval
        elif known is None:
            record.sync_interval_s = self.capabilities(ROOT_MOUNT_ID).default_sync_interval_s
        own = self._store.transaction() if tx is None else tx
        own.put_mount(record)
        if tx is None:
            own.commit()
        return record

    def learn_root(self, tx: Transaction) -> None:
        """After the first start has found the root's under storage good. UfsError."""
        record = self._existing(ROOT_MOUNT_ID)
        record.options = identified(record.options, self.storage(ROOT_MOUNT_ID))
        tx.put_mount(record)

    def new_id(self) -> int:
        number = self._store.take_number(b"next_mount")
        return number if number > ROOT_MOUNT_ID else self._store.take_number(b"next_mount")

    def add(self, tx: Transaction, record: MountRecord, storage: UnderStorage) -> None:
        """Enter a probed mount; the table knows it once `tx` commits."""
        tx.put_mount(record)

        def enter() -> None:
            self._records[record.mount_id] = record
            self._storages[record.mount_id] = storage

        tx.after_commit(enter)

    def remove(self, tx: Transaction, mount_id: int) -> None:
        tx.delete("mount", u64(mount_id))

        def leave() -> None:
            self._records.pop(mount_id, None)
            self._limiters.pop(mount_id, None)
            storage = self._storages.pop(mount_id, None)
            if storage is not None:
                storage.close()

        tx.after_commit(leave)

    def close(self) -> None:
        """Close all connectors. Idempotent."""
        storages, self._storages = self._storages, {}
        for storage in storages.values():
            storage.close()

    def _existing(self, mount_id: int) -> MountRecord:
        record = self._records.get(mount_id)
        if record is None:
            raise StaleError(f"mount {mount_id} is gone")
        return record


def identified(options: dict[str, str], storage: UnderStorage) -> dict[str, str]:
    """The options with the identity of the place, unless one is known. Asks the store. UfsError."""
    known = options.get(IDENTITY, "")
    found = known if known and known != NEW_IDENTITY else storage.identity()
    return {**options, IDENTITY: found} if found else options


def place_of(uri: str) -> bytes:
    """What a URI names, ending with a slash, so that places within it begin with it."""
    directory = local_directory(uri)
    if directory is not None:
        return b"file://" + os.path.realpath(directory).rstrip(b"/") + b"/"
    scheme, _, rest = uri.partition("://")
    scheme = {"s3a": "s3"}.get(scheme.lower(), scheme.lower())
    return f"{scheme}://{rest.strip('/')}/".encode("utf-8", "surrogateescape")


__all__ = ["MountTable", "OpenUfs"]
