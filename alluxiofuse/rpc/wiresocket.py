"""A non-blocking stream socket that carries frames; both ends use it.

It works on the bare socket with `wait_readable`/`wait_writable` and tries each system call first:
a small request then costs one wake-up at either end, and nothing else in between.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import sys
import termios
from collections import deque
from collections.abc import Iterable, Sequence

import trio

from alluxiofuse.errors import ConnectionLost, ProtocolError
from alluxiofuse.rpc.base import Buffer, FileRange
from alluxiofuse.rpc.filerange import CHUNK_BYTES, is_in_memory
from alluxiofuse.wire.framing import MAX_FDS, Frame, FrameReader, Limits

MAX_JOIN_BYTES = 32 << 10
"""Up to here pieces are joined (one copy, cheaper than a vector); above they are sent in place."""
MAX_PIECES = 512
"""Most pieces of one sendmsg; below the kernel's IOV_MAX."""
_FD_BYTES = array.array("i").itemsize
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_FDS * _FD_BYTES)


class WireSocket:
    """Frames over a socket that it owns.

    `receive` and `next_frame` belong to one task. `send`, `flush` and `send_file` may be called
    by any; each sends whole frames, which never interleave. Errors: ConnectionLost (end, reset,
    closed here), ProtocolError (garbage); after either the socket must be closed.

    Cancelled: `receive` has taken nothing; `send` before its first byte has sent nothing, later
    it leaves the rest to the next `send` or to `flush` (`is_mid_send`); `send_file` breaks the
    stream and closes the socket.
    """

    def __init__(self, sock: socket.socket, limits: Limits, *, takes_fds: bool = False) -> None:
        """`takes_fds`: keep descriptors that arrive (else the kernel drops them)."""
        sock.setblocking(False)
        self._sock = sock
        self._reader = FrameReader(limits)
        self._takes_fds = takes_fds
        self._fds: deque[int] = deque()
        """Arrived and not yet taken with their frame, in order."""
        self._lock = trio.Lock()
        """Guards the sending half: `_unsent`, `_unsent_fds`, `_sent_bytes`."""
        self._unsent: list[Buffer] = []
        self._unsent_fds: Sequence[int] = ()
        """Go with the first byte of `_unsent`."""
        self._sent_bytes = 0
        self._is_in_thread = False
        """A thread uses the descriptor: `close` must not free its number yet."""
        self.is_closed = False

    # --- receiving --------------------------------------------------------------------------------

    def set_limits(self, limits: Limits) -> None:
        """For the frames after the one that was taken last."""
        self._reader.limits = limits

    async def receive(self) -> None:
        """Wait until some bytes came, and take them. Always yields, so a peer that never stops
        sending does not keep others waiting."""
        while True:
            self._check_open()
            try:
                await trio.lowlevel.wait_readable(self._sock)
            except trio.ClosedResourceError:
                raise _closed() from None
            self._check_open()
            if self._receive_now():
                return

    def _receive_now(self) -> bool:
        """False: nothing was there. Contains no await: frames and descriptors stay in step."""
        try:
            if self._takes_fds:
                count = self._receive_with_fds()
            else:
                count = self._sock.recv_into(self._reader.buffer())
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as exc:
            raise _broken(exc) from None
        if count == 0:
            where = " in the middle of a message" if self._reader.is_mid_frame else ""
            raise ConnectionLost(f"the other end closed the connection{where}")
        self._reader.received(count)
        return True

    def _receive_with_fds(self) -> int:
        count, ancillary, flags, _ = self._sock.recvmsg_into(
            [self._reader.buffer()], _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                arrived = array.array("i")
                arrived.frombytes(data[: len(data) - len(data) % _FD_BYTES])
                self._fds.extend(arrived)
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError("descriptors were lost on their way: is the limit of open files reached?")
        return count

    def next_frame(self) -> Frame | None:
        """The next frame of what was received, None: receive more. ProtocolError: garbage."""
        frame = self._reader.next_frame()
        if frame is None and len(self._fds) > (MAX_FDS if self._reader.is_mid_frame else 0):
            raise ProtocolError("descriptors came without a frame that names them")
        return frame

    def take_fds(self, count: int) -> list[int]:
        """The descriptors of the frame that was just given; the caller's to close."""
        if count > len(self._fds):
            raise ProtocolError("a frame came without the descriptors it names")
        return [self._fds.popleft() for _ in range(count)]

    # --- sending ----------------------------------------------------------------------------------

    def progress(self) -> tuple[int, int]:
        """(bytes that the other machine has taken so far, bytes on their way to it), without ranges
        of files; of a Unix socket, that the other process has taken. tcp(7), SIOCOUTQ."""
        if self.is_closed:
            return self._sent_bytes, 0
        answer = fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4))
        waiting = int.from_bytes(answer, sys.byteorder)
        return self._sent_bytes - waiting, waiting

    @property
    def is_mid_send(self) -> bool:
        """A cancelled send left the rest of a frame: `flush` it."""
        return bool(self._unsent) and not self._lock.locked()

    async def send(self, pieces: Iterable[Buffer], fds: Sequence[int] = ()) -> None:
        """Send the pieces of whole frames, in place; `fds` go with the first byte and stay the
        caller's. Does not yield when the socket takes all at once."""
        await self._acquire()
        try:
            if self._unsent:
                await self._send_unsent()
            self._check_open()
            self._unsent, self._unsent_fds = _joined(pieces), fds
            before = self._sent_bytes
            try:
                await self._send_unsent()
            except BaseException:
                # The buffers are the caller's again: keep a copy of the rest of a begun frame.
                is_begun = self._sent_bytes != before
                self._unsent = [b"".join(self._unsent)] if is_begun else []
                self._unsent_fds = ()
                raise
        finally:
            self._lock.release()

    async def flush(self) -> None:
        """Send what a cancelled `send` left."""
        await self._acquire()
        try:
            await self._send_unsent()
        finally:
            self._lock.release()

    async def send_file(self, head: bytes, source: FileRange, fds: Sequence[int] = ()) -> None:
        """Send a frame whose payload is a range of a file. A file that is shorter than promised
        is ConnectionLost here and at the other end."""
        await self._acquire()
        try:
            if self._unsent:
                await self._send_unsent()
            self._check_open()
            self._unsent, self._unsent_fds = [head], fds
            await self._send_unsent(socket.MSG_MORE if source.length else 0)
            await self._send_range(source)
        except BaseException:
            self.close()
            raise
        finally:
            self._lock.release()

    async def _acquire(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()
        if self.is_closed:
            self._lock.release()
            raise _closed()

    async def _send_unsent(self, flags: int = 0) -> None:
        while self._unsent:
            self._check_open()
            try:
                sent = self._send_now(flags)
            except (BlockingIOError, InterruptedError):
                await self._writable()
                continue
            except OSError as exc:
                raise _broken(exc) from None
            self._sent_bytes += sent
            self._unsent_fds = ()
            _advance(self._unsent, sent)

    def _send_now(self, flags: int) -> int:
        if self._unsent_fds:
            rights = array.array("i", self._unsent_fds)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
            return self._sock.sendmsg(self._unsent[:MAX_PIECES], ancillary, flags)
        if len(self._unsent) == 1:
            return self._sock.send(self._unsent[0], flags)
        return self._sock.sendmsg(self._unsent[:MAX_PIECES], (), flags)

    async def _send_range(self, source: FileRange) -> None:
        offset, end = source.offset, source.offset + source.length
        while offset < end:
            self._check_open()
            count = min(CHUNK_BYTES, end - offset)
            try:
                sent = await self._sendfile(source.fd, offset, count)
            except (BlockingIOError, InterruptedError):
                await self._writable()
                continue
            except OSError as exc:
                raise _broken(exc) from None
            if sent == 0:
                raise ConnectionLost("the answer's file is shorter than promised")
            offset += sent
            if sent == CHUNK_BYTES:
                await trio.lowlevel.checkpoint()

    async def _sendfile(self, fd: int, offset: int, count: int) -> int:
        if is_in_memory(fd, offset, count):
            return os.sendfile(self._sock.fileno(), fd, offset, count)
        self._is_in_thread = True
        try:
            return await trio.to_thread.run_sync(os.sendfile, self._sock.fileno(), fd, offset, count)
        finally:
            self._is_in_thread = False
            if self.is_closed:
                self._sock.close()

    async def _writable(self) -> None:
        try:
            await trio.lowlevel.wait_writable(self._sock)
        except trio.ClosedResourceError:
            raise _closed() from None

    # --- closing ----------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self.is_closed:
            raise _closed()

    def close(self) -> None:
        """Close now; whoever waits gets ConnectionLost. Idempotent."""
        if self.is_closed:
            return
        self.is_closed = True
        while self._fds:
            os.close(self._fds.popleft())
        trio.lowlevel.notify_closing(self._sock)
        if self._is_in_thread:
            self._shut_down()  # Ends the thread's call; `_sendfile` frees the descriptor.
        else:
            self._sock.close()

    def _shut_down(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # The other end was faster.


def _closed() -> ConnectionLost:
    return ConnectionLost("the connection was closed")


def _broken(exc: OSError) -> ConnectionLost:
    return ConnectionLost(f"the connection broke: {exc.strerror}")


def _joined(pieces: Iterable[Buffer]) -> list[Buffer]:
    """Without empty pieces; neighbours that are small in sum become one."""
    result: list[Buffer] = []
    small: list[Buffer] = []
    small_bytes = 0
    for piece in pieces:
        size = piece.nbytes if isinstance(piece, memoryview) else len(piece)
        if small and small_bytes + size > MAX_JOIN_BYTES:
            result.append(b"".join(small))
            small, small_bytes = [], 0
        if size > MAX_JOIN_BYTES:
            result.append(piece)
        elif size:
            small.append(piece)
            small_bytes += size
    if small:
        result.append(small[0] if len(small) == 1 else b"".join(small))
    return result


def _advance(pieces: list[Buffer], sent: int) -> None:
    """Take the first `sent` bytes away from `pieces`."""
    done = 0
    for piece in pieces:
        size = piece.nbytes if isinstance(piece, memoryview) else len(piece)
        if sent < size:
            break
        sent -= size
        done += 1
    del pieces[:done]
    if sent:
        pieces[0] = memoryview(pieces[0]).cast("B")[sent:]
