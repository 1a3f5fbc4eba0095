"""A worker's side of its upload process (`upload_child`): start it, hand it puts, await them."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import trio

from alluxiofuse.errors import UfsUnavailableError, from_wire
from alluxiofuse.ufs.base import PutCancelled, UfsAttrs
from alluxiofuse.ufs.upload_messages import MAX_PACKET_BYTES, Cancel, OpenMount, Put, PutResult
from alluxiofuse.wire.codec import decode, encode
from alluxiofuse.wire.types import MountInfo

log = logging.getLogger(__name__)

GATHER_S = 0.005
QUEUED_PER_THREAD = 16
"""Puts that may wait in the process for each of its threads; a caller bounds its puts by this."""
STOP_S = 5.0
"""How long the process may take to end; an upload under way cannot be interrupted any sooner."""


class Cancellation:
    """Of one put. `cancel` may be called at any time, more than once."""

    def __init__(self) -> None:
        self.is_cancelled = False
        self._tell: Callable[[], None] | None = None

    def cancel(self) -> None:
        if not self.is_cancelled:
            self.is_cancelled = True
            if self._tell is not None:
                self._tell()

    def tell(self, callback: Callable[[], None] | None) -> None:
        """Whom to tell from now on (also when it is cancelled already)."""
        self._tell = callback
        if callback is not None and self.is_cancelled:
            callback()


class _Waiting:
    def __init__(self) -> None:
        self.done = trio.Event()
        self.result: PutResult | None = None
        """None when done: the process died."""


class _Running:
    """One process, with the puts that it was given."""

    def __init__(self, parallel: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "alluxiofuse.ufs.upload_child"]
        command += [str(theirs.fileno()), str(parallel), str(os.getpid())]
        try:
            with theirs:
                self.process = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        self.stdlib_sock = ours
        self.sock = trio.socket.from_stdlib_socket(ours)
        self.sending = trio.Lock()
        self.mounts: set[int] = set()
        self.waiting: dict[int, _Waiting] = {}
        self.counts: dict[str, int] = {}

    def take(self, packet: bytes) -> None:
        result = decode(packet, PutResult)
        self.counts = result.counts
        waiting = self.waiting.get(result.put_id)
        if waiting is not None:
            waiting.result = result
            waiting.done.set()

    def cancel(self, put_id: int) -> None:
        """Best effort: when the process is gone, or has a full socket's worth of orders to read
        first, the put ends by itself."""
        try:
            self.stdlib_sock.send(encode(Cancel(put_id)), socket.MSG_DONTWAIT)
        except OSError as exc:
            log.info("an upload could not be cancelled: %s", exc.strerror)

    async def send(self, message: object, fd: int | None = None) -> None:
        data = encode(message)
        async with self.sending:
            if fd is None:
                await self.sock.send(data)
            else:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))
                await self.sock.sendmsg([data], [rights])


class UploadProcess:
    """Starts the process with the first put, and again after it died. Owned by `run`'s task; `put`
    may be called by many."""

    def __init__(self, parallel: int, notes_dir: Path | None = None) -> None:
        """`notes_dir`: where uploads that a crash would leave half done are noted, a file a mount."""
        self._parallel = parallel
        self._notes_dir = notes_dir
        self._running: _Running | None = None
        self._ended_counts: Counter[str] = Counter()
        """Of processes that have ended."""
        self._starting = trio.Event()
        self._put_count = 0

    async def run(self) -> None:
        """Takes results until cancelled; then ends the process, as soon as it can stop."""
        try:
            while True:
                await self._starting.wait()
                running = self._running
                assert running is not None
                try:
                    await self._take_results(running)
                finally:
                    self._starting = trio.Event()
                    self._running = None
                    self._ended_counts.update(running.counts)
                    await _end(running)
        finally:
            if self._running is not None:
                await _end(self._running)

    async def _take_results(self, running: _Running) -> None:
        """Until the process is gone. All results that are there are taken at once, and then none for
        a moment, so that many small uploads wake the data path's loop rarely."""
        while True:
            try:
                data = await running.sock.recv(MAX_PACKET_BYTES)
                while data:
                    running.take(data)
                    data = running.stdlib_sock.recv(MAX_PACKET_BYTES)
            except BlockingIOError:
                await trio.sleep(GATHER_S)
                continue
            except OSError:
                pass
            log.warning("the upload process ended; its uploads are started again")
            return

    def counts(self) -> Counter[str]:
        """What connectors in the process counted (`UnderStorage.counts`)."""
        found = Counter(self._ended_counts)
        if self._running is not None:
            found.update(self._running.counts)
        return found

    def left_over(self) -> list[int]:
        """Mounts of which an earlier process may have left something half done."""
        if self._notes_dir is None or not self._notes_dir.is_dir():
            return []
        notes = [one for one in self._notes_dir.iterdir() if one.name.isdigit()]
        return [int(one.name) for one in notes if one.stat().st_size]

    async def resume(self, mount: MountInfo) -> None:
        """Have what was left half done in this mount's store undone, in the background."""
        running = self._get()
        try:
            await self._open(running, mount)
        except (OSError, trio.ClosedResourceError):
            raise UfsUnavailableError("the upload process ended") from None

    def _get(self) -> _Running:
        if self._running is None:
            try:
                self._running = _Running(self._parallel)
            except OSError as exc:
                raise UfsUnavailableError(f"the upload process can't be started: {exc.strerror}") from None
            self._starting.set()
        return self._running

    async def _open(self, running: _Running, mount: MountInfo) -> None:
        if mount.mount_id not in running.mounts:
            running.mounts.add(mount.mount_id)
            notes = "" if self._notes_dir is None else str(self._notes_dir / str(mount.mount_id))
            await running.send(OpenMount(mount.mount_id, mount.uri, mount.options, notes))

    async def put(
        self,
        mount: MountInfo,
        path: bytes,
        fd: int,
        size: int,
        attrs: UfsAttrs,
        cancellation: Cancellation,
    ) -> bytes:
        """UnderStorage.put in the process; the new fingerprint. A put that is cancelled, by its
        Cancellation or because the task is, is still awaited, so that on return nothing reads `fd`'s
        file any more. UfsUnavailableError: the process died."""
        running = self._get()
        self._put_count += 1
        put_id, waiting = self._put_count, _Waiting()
        running.waiting[put_id] = waiting
        try:
            await self._open(running, mount)
            order = Put(put_id, mount.mount_id, path, size, attrs.mode, attrs.uid, attrs.gid, attrs.mtime_ns)
            await running.send(order, fd)
            cancellation.tell(lambda: running.cancel(put_id))
            try:
                await waiting.done.wait()
            except trio.Cancelled:
                running.cancel(put_id)
                with trio.CancelScope(shield=True):
                    await waiting.done.wait()
                raise
        except (OSError, trio.ClosedResourceError):
            raise UfsUnavailableError("the upload process ended") from None
        finally:
            cancellation.tell(None)
            del running.waiting[put_id]
        return _fingerprint(waiting.result)


def _fingerprint(result: PutResult | None) -> bytes:
    if result is None:
        raise UfsUnavailableError("the upload process ended")
    if result.is_cancelled:
        raise PutCancelled
    if result.error is not None:
        raise from_wire(*result.error)
    return result.fingerprint


async def _end(running: _Running) -> None:
    """No put is left waiting, no process running."""
    running.sock.close()
    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(_reap, running.process)
    for waiting in running.waiting.values():
        waiting.done.set()


def _reap(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
