"""From an address to a running FileSystem."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from alluxiofuse.client.filesystem import FileSystem
from alluxiofuse.config import ClientConfig
from alluxiofuse.rpc.security import Security


@asynccontextmanager
async def open_filesystem(
    address: str,
    *,
    security: Security | None = None,
    config: ClientConfig | None = None,
    name: str = "python",
    hostname: str = "",
) -> AsyncIterator[FileSystem]:
    """A FileSystem on the master at `address` ("HOST:PORT", "unix:PATH"), running until the block
    ends. UnavailableError when nobody answers within `config.patience_s`."""
    raise NotImplementedError
    yield
