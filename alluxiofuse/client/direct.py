"""Reading straight from the under storage, when no worker can serve."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from alluxiofuse.client.session import ask_again
from alluxiofuse.errors import UfsUnavailableError
from alluxiofuse.rpc.base import Buffer, Connection
from alluxiofuse.ufs.base import UnderStorage
from alluxiofuse.wire import master_ops
from alluxiofuse.wire.types import UfsSource

log = logging.getLogger(__name__)

MAX_PARALLEL_READS = 16
"""Of one under storage."""
PATIENCE_S = 60.0
OpenUfs = Callable[[str, dict[str, str]], UnderStorage]


def _open_ufs(uri: str, options: dict[str, str]) -> UnderStorage:
    # Here, so that a client that has workers never loads an S3 library.
    from alluxiofuse.ufs.registry import open_ufs

    return open_ufs(uri, options)


class DirectReader:
    """Connectors by mount, opened when first needed. Owned by the FileSystem's trio thread."""

    def __init__(self, master: Connection, open_ufs: OpenUfs = _open_ufs) -> None:
        self._master = master
        self._open_ufs = open_ufs
        self._storages: dict[int, UnderStorage] = {}
        self._opening = trio.Lock()
        self._limiters: dict[int, trio.CapacityLimiter] = {}
        """By mount id, so that a store that hangs holds up nobody else's reads."""

    async def read(self, source: UfsSource, offset: int, length: int) -> Buffer:
        """Bytes of that version of the object; short only at its end. UfsErrors (UfsChangedError:
        it is another version now), or the master's errors about the mount."""
        length = min(length, source.size - offset)
        if length <= 0:
            return b""
        storage = self._storages.get(source.mount_id) or await self._open(source.mount_id)
        limiter = self._limiters.get(source.mount_id)
        if limiter is None:
            limiter = self._limiters[source.mount_id] = trio.CapacityLimiter(MAX_PARALLEL_READS)
        data: Buffer | None = None
        with trio.move_on_after(PATIENCE_S):
            data = await trio.to_thread.run_sync(
                storage.read,
                source.path,
                offset,
                length,
                source.fingerprint,
                limiter=limiter,
                abandon_on_cancel=True,
            )
        if data is None:
            raise UfsUnavailableError(f"the under storage did not answer within {PATIENCE_S:g} s")
        if len(data) != length:
            raise UfsUnavailableError(f"the under storage gave {len(data)} of {length} bytes")
        return data

    async def _open(self, mount_id: int) -> UnderStorage:
        async with self._opening:
            storage = self._storages.get(mount_id)
            if storage is None:
                info = await ask_again(self._master, master_ops.GetMount(mount_id))
                log.info("no worker serves: reading from %s directly", info.uri)
                storage = await trio.to_thread.run_sync(self._open_ufs, info.uri, info.options)
                self._storages[mount_id] = storage
            return storage

    async def close(self) -> None:
        storages, self._storages = self._storages, {}
        for storage in storages.values():
            await trio.to_thread.run_sync(storage.close)
