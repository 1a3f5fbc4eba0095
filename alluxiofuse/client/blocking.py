"""The client for programs without trio: usable from any thread."""

from __future__ import annotations

import io
from types import TracebackType

from alluxiofuse.client.paths import AnyPath
from alluxiofuse.config import ClientConfig
from alluxiofuse.rpc.security import Security
from alluxiofuse.wire.types import Attr


class BlockingFileSystem:
    """Runs trio in a thread of its own; a context manager. Methods mirror `paths.Paths`; all may be
    called from any thread but that one."""

    def close(self) -> None:
        """Commit what is being written and end. Idempotent."""
        raise NotImplementedError

    def __enter__(self) -> BlockingFileSystem:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def open(self, path: AnyPath, mode: str = "rb", buffering: int = -1) -> io.RawIOBase | io.BufferedIOBase:
        """Like the built-in open, binary modes only."""
        raise NotImplementedError

    def stat(self, path: AnyPath, *, follow: bool = True) -> Attr:
        raise NotImplementedError


def connect(
    address: str,
    *,
    security: Security | None = None,
    config: ClientConfig | None = None,
    name: str = "python",
) -> BlockingFileSystem:
    """Dial the master at `address`; the errors of `connect.open_filesystem`."""
    raise NotImplementedError
