"""Under storages by mount id: asked of the master once, opened when first needed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import trio

from alluxiofuse.errors import AlluxioFuseError
from alluxiofuse.rpc.base import Connection
from alluxiofuse.ufs.base import UnderStorage
from alluxiofuse.wire.master_ops import GetMount
from alluxiofuse.wire.types import MountInfo

log = logging.getLogger(__name__)

OpenUfs = Callable[[str, dict[str, str]], UnderStorage]


class Mounts:
    """Mount ids are never reused and a mount's URI never changes, so a connector is kept until
    `close`. Options hold secrets: they go nowhere but into the connector."""

    def __init__(self, master: Connection, open_ufs: OpenUfs) -> None:
        self._master = master
        self._open_ufs = open_ufs
        self._infos: dict[int, MountInfo] = {}
        self._storages: dict[int, UnderStorage] = {}
        self._opening: dict[int, trio.Lock] = {}

    def known(self, mount_id: int) -> UnderStorage | None:
        return self._storages.get(mount_id)

    def known_info(self, mount_id: int) -> MountInfo:
        """After `info` was awaited."""
        return self._infos[mount_id]

    async def info(self, mount_id: int) -> MountInfo:
        """PeerError when the master can't be asked (only the first time)."""
        found = self._infos.get(mount_id)
        if found is None:
            found = self._infos[mount_id] = await self._master.call(GetMount(mount_id))
        return found

    async def storage(self, mount_id: int) -> UnderStorage:
        """Single flight. UfsError when it can't be opened, PeerError when the master can't be asked
        (only the first time)."""
        found = self._storages.get(mount_id)
        if found is not None:
            return found
        async with self._opening.setdefault(mount_id, trio.Lock()):
            found = self._storages.get(mount_id)
            if found is None:
                info = await self.info(mount_id)
                found = await trio.to_thread.run_sync(self._open_ufs, info.uri, dict(info.options))
                self._storages[mount_id] = found
            return found

    def counts(self) -> Counter[str]:
        """What went wrong with all of them together (`UnderStorage.counts`)."""
        found: Counter[str] = Counter()
        for storage in self._storages.values():
            found.update(storage.counts())
        return found

    def close(self) -> None:
        """Idempotent. No fetch or upload may be running."""
        while self._storages:
            mount_id, storage = self._storages.popitem()
            try:
                storage.close()
            except AlluxioFuseError as exc:
                log.warning("closing under storage %d: %s", mount_id, exc.message)
