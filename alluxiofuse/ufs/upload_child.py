"""The upload process: carries out puts for a worker.

`python -m alluxiofuse.ufs.upload_child FD PARALLEL PARENT`: the socket, puts of one mount at once, and
the worker's process id.

Why a process: an upload is Python and many small system calls, and in the worker's process each of
them would fight with the data path for the interpreter. It holds no state worth keeping; when its
socket closes, it ends and what it was doing is done again by a later one."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from alluxiofuse.errors import AlluxioFuseError, UfsError, UfsUnavailableError, to_wire
from alluxiofuse.ufs import registry
from alluxiofuse.ufs.base import PutCancelled, UfsAttrs, UnderStorage
from alluxiofuse.ufs.upload_messages import MAX_PACKET_BYTES, Cancel, OpenMount, Order, Put, PutResult
from alluxiofuse.wire.codec import decode, encode

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
NICENESS = 5
"""Uploads give way to programs that wait."""


_EXHAUSTED = UfsUnavailableError("the upload process has too many open files")


class Child:
    """The main thread reads orders; the pool's threads put, and send their results themselves."""

    def __init__(self, sock: socket.socket, parallel: int) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self._parallel = parallel
        self._pools: dict[int, ThreadPoolExecutor] = {}
        """By mount id, so that a store that hangs holds up nobody else's uploads."""
        self._storages: dict[int, UnderStorage | AlluxioFuseError] = {}
        self._cancelled: set[int] = set()
        self._running: set[int] = set()
        """Guarded by the interpreter: single operations on sets only."""

    def run(self) -> None:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._sock, MAX_PACKET_BYTES, 1)
            except ConnectionResetError:  # the worker was killed with answers unread
                break
            if not data:
                break
            order: Order = decode(data, Order)  # type: ignore[arg-type]  # a union is a type to msgspec
            if isinstance(order, Put) and not fds:
                # The kernel drops what there is no number for.
                self._answer(PutResult(order.put_id, error=to_wire(_EXHAUSTED)))
            elif isinstance(order, Put):
                self._running.add(order.put_id)
                self._pools[order.mount_id].submit(self._put, order, fds[0])
            elif isinstance(order, Cancel):
                if order.put_id in self._running:
                    self._cancelled.add(order.put_id)
            else:
                self._open(order)
        self._cancelled.update(self._running)
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in self._pools.values():
            pool.shutdown()

    def _open(self, order: OpenMount) -> None:
        self._pools[order.mount_id] = ThreadPoolExecutor(self._parallel)
        try:
            storage = registry.open_ufs(order.uri, order.options)
        except AlluxioFuseError as exc:
            self._storages[order.mount_id] = exc
            return
        self._storages[order.mount_id] = storage
        if order.notes:
            self._pools[order.mount_id].submit(_resume, storage, Path(order.notes))

    def _put(self, order: Put, fd: int) -> None:
        result = PutResult(order.put_id)
        try:
            result.fingerprint = self._put_one(order, fd)
        except PutCancelled:
            result.is_cancelled = True
        except AlluxioFuseError as exc:
            result.error = to_wire(exc)
        except Exception:
            log.exception("upload failed: a bug in a connector")
            result.error = to_wire(UfsError("the upload failed inside the upload process: see the log"))
        finally:
            os.close(fd)
            self._running.discard(order.put_id)
            self._cancelled.discard(order.put_id)
        self._answer(result)

    def _answer(self, result: PutResult) -> None:
        result.counts = self._counts()
        with self._sending:
            try:
                self._sock.send(encode(result))
            except OSError:
                pass  # The worker is gone; the main thread sees it too.

    def _counts(self) -> dict[str, int]:
        """What went wrong with all mounts together, so far."""
        found: Counter[str] = Counter()
        for storage in list(self._storages.values()):
            if isinstance(storage, UnderStorage):
                found.update(storage.counts())
        return dict(found)

    def _put_one(self, order: Put, fd: int) -> bytes:
        storage = self._storages[order.mount_id]
        if isinstance(storage, AlluxioFuseError):
            raise storage
        attrs = UfsAttrs(order.mode, order.uid, order.gid, order.mtime_ns)
        if order.put_id in self._cancelled:
            raise PutCancelled
        entry = storage.put(order.path, fd, order.size, attrs, lambda: order.put_id in self._cancelled)
        return entry.fingerprint


def _resume(storage: UnderStorage, notes: Path) -> None:
    try:
        storage.resume(notes)
    except AlluxioFuseError as exc:
        log.warning("what an earlier process left is tidied up later: %s", exc.message)
    except Exception:
        log.exception("tidying up failed: a bug in a connector")


def _end_with(parent: int) -> None:
    """Be killed when the worker is: an upload that went on could land after those of the next one."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    _end_with(int(sys.argv[3]))
    # The worker decides when to end, by closing the socket; a Ctrl-C reaches the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(format="%(asctime)s %(levelname)s upload: %(message)s")
    os.nice(NICENESS)
    Child(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])).run()


if __name__ == "__main__":
    main()
