"""A TCP relay that can be told to cut answers short or damage requests: failures no server makes to order."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable


class CuttingProxy:
    """Relays 127.0.0.1:`port` to a server. `cut_after`: close both ends once so many bytes of one
    connection's answers were relayed (None: never). `damage`: applied to each chunk towards the server."""

    def __init__(self, target: tuple[str, int], tls: ssl.SSLContext | None = None) -> None:
        """With `tls` it speaks TLS to its clients, plainly to the server."""
        self._tls = tls
        self._target = target
        self.cut_after: int | None = None
        self.damage: Callable[[bytes], bytes] = lambda chunk: chunk
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in list(self._open):
            self._end(one)
        for thread in self._threads:
            thread.join(10)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._tls is not None:
                try:
                    near = self._tls.wrap_socket(near, server_side=True)
                except OSError:
                    continue  # the client did not like the certificate
            far = socket.create_connection(self._target)
            self._open |= {near, far}
            self._start(self._relay, near, far, True)
            self._start(self._relay, far, near, False)

    def _relay(self, source: socket.socket, target: socket.socket, is_request: bool) -> None:
        relayed = 0
        try:
            while chunk := source.recv(65536):
                if is_request:
                    chunk = self.damage(chunk)
                elif self.cut_after is not None and relayed + len(chunk) > self.cut_after:
                    target.sendall(chunk[: self.cut_after - relayed])
                    break
                target.sendall(chunk)
                relayed += len(chunk)
        except OSError:
            pass
        finally:
            self._end(source)
            self._end(target)

    def _end(self, one: socket.socket) -> None:
        try:
            one.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        one.close()
        self._open.discard(one)
