"""A TCP relay that does to connections what networks do: cuts, resets, swallows, slows down.

    proxy = TcpProxy(("127.0.0.1", port))     # dial proxy.port instead
    proxy.arm(Fault(CUT, TO_CLIENT, after=12))  # the next connection to get there suffers it, once

Threads and real sockets, so either end may be another process.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from dataclasses import dataclass

CUT = "cut"
"""Both ends are closed in order (FIN)."""
RESET = "reset"
"""Both ends are reset (RST): what was on its way is lost too."""
SWALLOW = "swallow"
"""The connection stays, and nothing gets through any more in that direction."""
SLOW = "slow"
"""Byte by byte from there on."""
TO_SERVER, TO_CLIENT = "to server", "to client"
SLOW_PAUSE_S = 0.001
_LINGER_NOT = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Fault:
    kind: str
    direction: str
    after: int = 0
    """Bytes in that direction that still get through, counted from when it was armed."""


class _Link:
    """One connection and its two pumps."""

    def __init__(self, proxy: TcpProxy, near: socket.socket, far: socket.socket) -> None:
        self.proxy = proxy
        self.near, self.far = near, far
        self.swallowed: set[str] = set()
        self.slowed: set[str] = set()
        self._end_lock = threading.Lock()
        self._is_over = False
        self.threads = [
            threading.Thread(target=self._pump, args=(near, far, TO_SERVER), daemon=True),
            threading.Thread(target=self._pump, args=(far, near, TO_CLIENT), daemon=True),
        ]

    def _pump(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        try:
            while chunk := source.recv(65536):
                passed, fault = self.proxy.judge(direction, len(chunk))
                self._send(target, chunk[:passed], direction)
                if fault is not None and self.suffer(fault):
                    return
                self._send(target, chunk[passed:], direction)
        except OSError:
            pass
        self.end(is_reset=False)

    def _send(self, target: socket.socket, data: bytes, direction: str) -> None:
        if direction in self.swallowed:
            return
        if direction not in self.slowed:
            target.sendall(data)
            return
        for at in range(len(data)):
            target.sendall(data[at : at + 1])
            time.sleep(SLOW_PAUSE_S)

    def suffer(self, fault: Fault) -> bool:
        """True: that was its end."""
        if fault.kind == SWALLOW:
            self.swallowed.add(fault.direction)
        elif fault.kind == SLOW:
            self.slowed.add(fault.direction)
        else:
            self.end(is_reset=fault.kind == RESET)
            return True
        return False

    def end(self, *, is_reset: bool) -> None:
        with self._end_lock:
            if self._is_over:
                return
            self._is_over = True
        for one in (self.near, self.far):
            try:
                if is_reset:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
                    # Wakes the pump that sits in recv; the reset follows when the socket is closed.
                    one.shutdown(socket.SHUT_RD)
                else:
                    one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # It was gone already.
        for one in (self.near, self.far):
            one.close()
        self.proxy.ended(self)


class TcpProxy:
    """Relays 127.0.0.1:`port` to `target`. May be used from any thread."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.is_refusing = False
        """New connections are closed at once."""
        self.link_count = 0
        """Connections that were made so far."""
        self.fault_count = 0
        """Faults that happened."""
        self._lock = threading.Lock()
        self._armed: Fault | None = None
        self._left = 0
        self._links: set[_Link] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_armed(self) -> bool:
        return self._armed is not None

    @property
    def open_count(self) -> int:
        """Connections there are now."""
        return len(self._links)

    def arm(self, fault: Fault | None) -> None:
        """What happens next, to whichever connection gets there; None: nothing."""
        with self._lock:
            self._armed, self._left = fault, 0 if fault is None else fault.after

    def now(self, kind: str, *directions: str) -> None:
        """To all connections there are, at once."""
        for link in list(self._links):
            for direction in directions or (TO_SERVER, TO_CLIENT):
                if link.suffer(Fault(kind, direction)):
                    break

    def judge(self, direction: str, length: int) -> tuple[int, Fault | None]:
        """How many bytes get through before the fault, which is there for this connection."""
        with self._lock:
            fault = self._armed
            if fault is None or fault.direction != direction:
                return length, None
            if length < self._left or (length == self._left and length):
                self._left -= length
                return length, None
            passed, self._armed = self._left, None
            self.fault_count += 1
            return passed, fault

    def ended(self, link: _Link) -> None:
        self._links.discard(link)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.is_refusing:
                near.close()
                continue
            try:
                far = socket.create_connection(self.target, timeout=10)
                far.settimeout(None)
            except OSError:
                near.close()
                continue
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = _Link(self, near, far)
            self.link_count += 1
            self._links.add(link)
            self._threads = [thread for thread in self._threads if thread.is_alive()] + link.threads
            for thread in link.threads:
                thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join(10)
        self.now(CUT)
        for thread in self._threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in self._threads), "a relay hangs"
