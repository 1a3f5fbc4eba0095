"""An HTTP proxy in front of a real S3 server that fails on demand: what a store does on its bad days.

Requests go through unchanged (Host too, so that signatures stay valid) unless a `Rule` says
otherwise. Real sockets, a thread for each connection, in the test's process:

    with S3Proxy(server.endpoint) as proxy:
        rule = proxy.add(Rule("PutObject", action=Answer(503, "SlowDown"), times=3))
        ...
        assert rule.used == 3

A `Hold` stops a request at a chosen moment (before the server sees it, or when it is done and only
the answer is missing), so that a test can kill somebody just then.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

MAX_HEAD_BYTES = 64 << 10
SERVER_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """Answer with an error; `is_done`: after the server did what was asked (a lost success)."""

    status: int
    code: str
    is_done: bool = False


@dataclass(frozen=True)
class Cut:
    """Reset the connection; `is_done`: after the server did it, so that only the answer is lost."""

    is_done: bool = False


@dataclass(frozen=True)
class Hang:
    """Never answer, until the client gives up or the proxy is closed."""

    is_done: bool = False


@dataclass
class Hold:
    """Wait until `release`; then go on as if nothing had been, or forget the request (`drop`)."""

    is_done: bool = False
    reached: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)
    is_dropped: bool = False

    def release(self) -> None:
        self.let_go.set()

    def drop(self) -> None:
        """The client is not answered, and where `is_done` is False the server never hears of it."""
        self.is_dropped = True
        self.let_go.set()


@dataclass(frozen=True)
class Damage:
    """Of the answer to a GET. `flip`: one bit of the body; `keep`: only this share of the body is sent
    (then the connection ends), and with `is_length_right` the headers say so too; `etag`: another
    ETag; `chunk_s`: a pause before each 64 KiB."""

    flip: bool = False
    keep: float = 1.0
    is_length_right: bool = False
    etag: str = ""
    chunk_s: float = 0.0


Action = Answer | Cut | Hang | Hold | Damage


@dataclass
class Rule:
    """Which requests, and what happens to them. The first rule that matches counts."""

    operation: str = ".*"
    """A regular expression for the whole name: "PutObject", "Get.*|Head.*"."""
    action: Action = Answer(500, "InternalError")
    key: str = ".*"
    fraction: float = 1.0
    skip: int = 0
    """How many that match go through first."""
    times: int | None = None
    """How many are treated so; None: all."""
    over: int = 0
    """Only while more than so many that match are on their way."""
    used: int = 0
    seen: int = 0
    running: int = 0


@dataclass(frozen=True)
class Seen:
    """One request, as it came."""

    operation: str
    key: str
    at_s: float
    treated: str
    """The name of the action; "" for none."""


@dataclass
class _Request:
    head: bytes
    """Request line and headers, to be sent on."""
    method: str
    operation: str
    key: str
    body: bytes
    is_last: bool


def operation_of(method: str, target: str, headers: dict[str, str]) -> tuple[str, str]:
    """(S3's name of the operation, the key; "" for the bucket itself), of a path-style request."""
    parts = urlsplit(target)
    query = parse_qs(parts.query, keep_blank_values=True)
    _, _, key = unquote(parts.path).lstrip("/").partition("/")
    if not key:
        if method == "POST" and "delete" in query:
            return "DeleteObjects", ""
        if method == "GET":
            return ("ListMultipartUploads" if "uploads" in query else "ListObjectsV2"), ""
        return method, ""
    if "uploads" in query:
        return "CreateMultipartUpload", key
    if "uploadId" in query:
        is_copy = "x-amz-copy-source" in headers
        names = {
            "PUT": "UploadPartCopy" if is_copy else "UploadPart",
            "POST": "CompleteMultipartUpload",
            "DELETE": "AbortMultipartUpload",
            "GET": "ListParts",
        }
        return names.get(method, method), key
    if method == "PUT":
        return ("CopyObject" if "x-amz-copy-source" in headers else "PutObject"), key
    return {"GET": "GetObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"}.get(method, method), key


class S3Proxy:
    """See the module. Threads may add and drop rules at any time."""

    def __init__(self, endpoint: str, seed: int = 1) -> None:
        """`endpoint`: of the real server. `seed` decides for rules with a fraction."""
        parts = urlsplit(endpoint)
        self._target = (str(parts.hostname), int(parts.port or 80))
        self._dice = random.Random(seed)
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self.seen: list[Seen] = []
        """Guarded by the lock; `operations` counts them."""
        self._hanging = threading.Event()
        """Set, and replaced, when what hangs is to be cut off."""
        self._is_closed = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def __enter__(self) -> S3Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- what is to happen ------------------------------------------------------------------------

    def add(self, rule: Rule) -> Rule:
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """No more faults; what hangs now is cut off, what is held goes on."""
        with self._lock:
            rules, self._rules = self._rules, []
            hanging, self._hanging = self._hanging, threading.Event()
        hanging.set()
        for rule in rules:
            if isinstance(rule.action, Hold):
                rule.action.release()

    def operations(self, treated: bool | None = None) -> Counter[str]:
        """How many requests of each kind came; only those with (without) a fault."""
        with self._lock:
            return Counter(
                one.operation for one in self.seen if treated is None or bool(one.treated) is treated
            )

    def forget(self) -> None:
        with self._lock:
            self.seen.clear()

    @contextlib.contextmanager
    def failing(self, *rules: Rule) -> Iterator[None]:
        """These rules inside, none afterwards."""
        for rule in rules:
            self.add(rule)
        try:
            yield
        finally:
            self.clear()

    def close(self) -> None:
        self.clear()
        self._is_closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._cut_all()
        for thread in list(self._threads):
            thread.join(30)

    # --- the work ---------------------------------------------------------------------------------

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        with self._lock:
            self._threads = [one for one in self._threads if one.is_alive()]
            self._threads.append(thread)
        thread.start()

    def _cut_all(self) -> None:
        with self._lock:
            sockets = list(self._sockets)
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._is_closed.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, near)

    def _serve(self, near: socket.socket) -> None:
        with self._lock:
            self._sockets.add(near)
        far: socket.socket | None = None
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader = near.makefile("rb")
        try:
            while (request := self._read_request(near, reader)) is not None:
                action, matched = self._choose(request)
                if far is None:
                    far = socket.create_connection(self._target, timeout=SERVER_TIMEOUT_S)
                    far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    is_kept = self._answer(near, far, request, action)
                finally:
                    with self._lock:
                        for rule in matched:
                            rule.running -= 1
                if not is_kept or request.is_last:
                    break
        except OSError:
            pass
        finally:
            with self._lock:
                self._sockets.discard(near)
            reader.close()
            near.close()
            if far is not None:
                far.close()

    def _read_request(self, near: socket.socket, reader: BufferedReader) -> _Request | None:
        lines = _read_head(reader)
        if not lines:
            return None
        method, target, _ = lines[0].decode("latin-1").split(" ", 2)
        headers = _headers(lines[1:])
        if headers.get("expect", "").lower() == "100-continue":
            near.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = _read_exactly(reader, int(headers.get("content-length", "0")))
        if body is None:
            return None
        kept = [line for line in lines[1:] if not line.lower().startswith(b"expect:")]
        head = b"\r\n".join([lines[0], *kept]) + b"\r\n\r\n"
        operation, key = operation_of(method, target, headers)
        is_last = headers.get("connection", "").lower() == "close"
        return _Request(head, method, operation, key, body, is_last)

    def _choose(self, request: _Request) -> tuple[Action | None, list[Rule]]:
        """What to do, and the rules that count this request as running until it is answered."""
        chosen: Action | None = None
        matched: list[Rule] = []
        with self._lock:
            for rule in self._rules:
                if not re.fullmatch(rule.operation, request.operation):
                    continue
                if not re.fullmatch(rule.key, request.key):
                    continue
                rule.seen += 1
                rule.running += 1
                matched.append(rule)
                if self._applies(rule):
                    rule.used += 1
                    chosen = rule.action
                    break
            name = "" if chosen is None else type(chosen).__name__
            self.seen.append(Seen(request.operation, request.key, time.monotonic(), name))
        return chosen, matched

    def _applies(self, rule: Rule) -> bool:
        if rule.seen <= rule.skip or (rule.times is not None and rule.used >= rule.times):
            return False
        if rule.running <= rule.over:
            return False
        return rule.fraction >= 1.0 or self._dice.random() < rule.fraction

    def _answer(
        self, near: socket.socket, far: socket.socket, request: _Request, action: Action | None
    ) -> bool:
        """False: this connection is over."""
        is_early = isinstance(action, Answer | Cut | Hang | Hold) and not action.is_done
        if is_early and not self._treat(near, request, action):
            return isinstance(action, Answer)
        far.sendall(request.head + request.body)
        answered = far.makefile("rb")
        try:
            while True:
                lines = _read_head(answered)
                if not lines:
                    return False
                if b" 100 " not in lines[0]:
                    break
            headers = _headers(lines[1:])
            body = _read_body(answered, request, lines[0], headers)
        finally:
            answered.close()
        is_late = isinstance(action, Answer | Cut | Hang | Hold) and action.is_done
        if is_late and not self._treat(near, request, action):
            return isinstance(action, Answer)
        if isinstance(action, Damage):
            return _send_damaged(near, lines, body, action)
        near.sendall(_head_of(lines, None if request.method == "HEAD" else len(body)) + body)
        return headers.get("connection", "").lower() != "close"

    def _treat(self, near: socket.socket, request: _Request, action: Action | None) -> bool:
        """True: go on as usual."""
        assert isinstance(action, Answer | Cut | Hang | Hold)
        if isinstance(action, Answer):
            text = f"<Error><Code>{action.code}</Code><Message>as told</Message></Error>".encode()
            body = b"" if request.method == "HEAD" else text
            head = f"HTTP/1.1 {action.status} Told\r\nContent-Type: application/xml\r\n"
            near.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + body)
            return False
        if isinstance(action, Cut):
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # RST
            return False
        if isinstance(action, Hang):
            with self._lock:
                hanging = self._hanging
            _wait_or_closed(near, hanging)
            return False
        action.reached.set()
        action.let_go.wait()
        return not action.is_dropped


def _wait_or_closed(near: socket.socket, hanging: threading.Event) -> None:
    """Until the fault is taken back or the client has given up."""
    near.settimeout(0.2)
    while not hanging.is_set():
        try:
            if not near.recv(1):
                return
        except TimeoutError:
            continue


def _read_head(reader: BufferedReader) -> list[bytes]:
    lines: list[bytes] = []
    size = 0
    while True:
        line = reader.readline(MAX_HEAD_BYTES)
        size += len(line)
        if not line or size > MAX_HEAD_BYTES:
            return []
        line = line.rstrip(b"\r\n")
        if not line:
            if lines:
                return lines
            continue
        lines.append(line)


def _headers(lines: list[bytes]) -> dict[str, str]:
    pairs = (line.decode("latin-1").partition(":") for line in lines)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _read_exactly(reader: BufferedReader, size: int) -> bytes | None:
    data: bytes = reader.read(size) if size else b""
    return data if len(data) == size else None


def _read_body(reader: BufferedReader, request: _Request, status: bytes, headers: dict[str, str]) -> bytes:
    code = status.split(b" ", 2)[1]
    if request.method == "HEAD" or code in (b"204", b"304"):
        return b""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = b""
        while True:
            size = int(reader.readline().split(b";")[0] or b"0", 16)
            body += _read_exactly(reader, size) or b""
            reader.readline()
            if not size:
                return body
    return _read_exactly(reader, int(headers.get("content-length", "0"))) or b""


def _head_of(lines: list[bytes], length: int | None) -> bytes:
    """The head with this Content-Length (None: as it is) and no chunks."""
    kept = lines
    if length is not None:
        dropped = (b"content-length:", b"transfer-encoding:")
        kept = [line for line in lines if not line.lower().startswith(dropped)]
        if b" 204 " not in lines[0] and b" 304 " not in lines[0]:
            kept = [*kept, b"Content-Length: %d" % length]
    return b"\r\n".join(kept) + b"\r\n\r\n"


def _send_damaged(near: socket.socket, lines: list[bytes], body: bytes, damage: Damage) -> bool:
    if damage.etag:
        lines = [
            b'ETag: "' + damage.etag.encode() + b'"' if line.lower().startswith(b"etag:") else line
            for line in lines
        ]
    data = bytearray(body)
    if damage.flip and data:
        data[len(data) // 2] ^= 0x10
    kept = bytes(data[: int(len(data) * damage.keep)])
    is_cut = len(kept) < len(data) and not damage.is_length_right
    near.sendall(_head_of(lines, len(kept) if damage.is_length_right else len(data)))
    for start in range(0, len(kept), 65536):
        if damage.chunk_s:
            time.sleep(damage.chunk_s)
        near.sendall(kept[start : start + 65536])
    return not is_cut
