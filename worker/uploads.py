"""Uploads to under storages: PersistCommands of the master, carried out by the upload process, or in
threads where there is none."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import trio

from alluxiofuse.errors import AlluxioFuseError
from alluxiofuse.ufs.base import PutCancelled, UfsAttrs, UnderStorage
from alluxiofuse.ufs.upload_process import QUEUED_PER_THREAD, Cancellation, UploadProcess
from alluxiofuse.wire.types import PersistCommand
from alluxiofuse.worker.fetcher import Fetcher
from alluxiofuse.worker.mounts import Mounts
from alluxiofuse.worker.room import storage_error
from alluxiofuse.worker.slab import WRITING, Slab
from alluxiofuse.worker.slabs import Slabs

log = logging.getLogger(__name__)

STALE = "stale"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a PersistCommand: what PersistDone says."""

    fingerprint: bytes = b""
    error_code: str = ""
    error_message: str = ""


class Upload:
    """One upload under way. It pins its slab and reads it only until `done`."""

    def __init__(self, command: PersistCommand) -> None:
        self.command = command
        self.cancellation = Cancellation()
        self.done = trio.Event()

    @property
    def is_cancelled(self) -> bool:
        return self.cancellation.is_cancelled

    def cancel(self) -> None:
        self.cancellation.cancel()

    async def stop(self) -> None:
        """Cancel, and wait until nothing reads the slab any more. What it had made visible before
        is complete and of the old content; nothing becomes visible afterwards."""
        self.cancel()
        await self.done.wait()


class Uploads:
    """At most `parallel` of a mount run at once; the rest wait, some of them in the process."""

    def __init__(
        self,
        slabs: Slabs,
        fetcher: Fetcher,
        mounts: Mounts,
        *,
        parallel: int,
        process: UploadProcess | None = None,
    ) -> None:
        self._slabs = slabs
        self._fetcher = fetcher
        self._mounts = mounts
        self._process = process
        self._at_once = parallel * (1 if process is None else QUEUED_PER_THREAD)
        self._limiters: dict[int, trio.CapacityLimiter] = {}
        """By mount id, so that a store that hangs holds up nobody else's uploads."""
        self._tasks: dict[int, Upload] = {}

    def ufs_counts(self) -> dict[str, int]:
        """What this worker's connectors counted, those of the upload process too."""
        found = self._mounts.counts()
        if self._process is not None:
            found.update(self._process.counts())
        return dict(found)

    async def resume(self) -> None:
        """Have what an earlier life left half done in under storages undone, in the background."""
        for mount_id in [] if self._process is None else self._process.left_over():
            try:
                assert self._process is not None
                await self._process.resume(await self._mounts.info(mount_id))
            except AlluxioFuseError as exc:
                log.warning("what was left half done in mount %d stays: %s", mount_id, exc.message)

    def cancel(self, task_id: int) -> None:
        upload = self._tasks.get(task_id)
        if upload is not None:
            upload.cancel()

    async def run(self) -> None:
        """When cancelled, lets uploads know, so that they stop soon."""
        try:
            await trio.sleep_forever()
        finally:
            for upload in self._tasks.values():
                upload.cancel()

    async def persist(self, command: PersistCommand) -> Outcome | None:
        """Upload; None when the same command is under way already. Cancelled: returns when the thread
        has stopped."""
        if command.task_id in self._tasks:
            return None
        upload = self._tasks[command.task_id] = Upload(command)
        try:
            outcome = await self._outcome(upload)
        finally:
            del self._tasks[command.task_id]
        self._slabs.counters["uploads_failed" if outcome.error_code else "uploads_done"] += 1
        if outcome.error_code not in ("", STALE):
            log.warning("upload of container %x failed: %s", command.container, outcome.error_message)
        return outcome

    async def _outcome(self, upload: Upload) -> Outcome:
        command = upload.command
        try:
            while True:
                slab = self._slabs.get(command.container)
                if slab is None or slab.state == WRITING or slab.size != command.size:
                    return Outcome(b"", STALE, "the container is not here as it was committed")
                if slab.upload is None:
                    break
                await slab.upload.done.wait()
            return Outcome(await self._upload(slab, upload))
        except PutCancelled:
            return Outcome(b"", STALE, "cancelled")
        except AlluxioFuseError as exc:
            return Outcome(b"", exc.code, exc.message)
        except Exception:
            log.exception("upload of container %x failed: a bug in a connector", command.container)
            return Outcome(b"", AlluxioFuseError.code, "the upload failed inside the worker: see its log")

    async def _upload(self, slab: Slab, upload: Upload) -> bytes:
        """The slab is sealed; who wants to change it stops this upload first."""
        slab.upload = upload
        self._slabs.pin(slab)
        try:
            await self._fetcher.verify(slab)
            await self._mounts.info(upload.command.mount_id)
            fd = os.dup(self._slabs.fds.for_reading(slab))
            try:
                return await self._put(fd, upload)
            finally:
                os.close(fd)
        except OSError as exc:
            raise storage_error(exc, slab.directory, self._slabs.counters) from None
        finally:
            slab.upload = None
            upload.done.set()
            self._slabs.unpin(slab)

    async def _put(self, fd: int, upload: Upload) -> bytes:
        """The new fingerprint. PutCancelled also when it was cancelled while it waited for its turn."""
        command = upload.command
        attrs = UfsAttrs(command.mode, command.uid, command.gid, command.mtime_ns)
        limiter = self._limiters.setdefault(command.mount_id, trio.CapacityLimiter(self._at_once))
        if self._process is None:
            storage = await self._mounts.storage(command.mount_id)
            return await trio.to_thread.run_sync(_put, storage, fd, upload, attrs, limiter=limiter)
        async with limiter:
            if upload.is_cancelled:
                raise PutCancelled
            return await self._process.put(
                self._mounts.known_info(command.mount_id),
                command.path,
                fd,
                command.size,
                attrs,
                upload.cancellation,
            )


def _put(storage: UnderStorage, fd: int, upload: Upload, attrs: UfsAttrs) -> bytes:
    """Blocking."""
    if upload.is_cancelled:
        raise PutCancelled
    command = upload.command
    return storage.put(command.path, fd, command.size, attrs, lambda: upload.is_cancelled).fingerprint
