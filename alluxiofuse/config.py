"""Configuration: what can be set, its defaults, and where it comes from. Layer 0.

Precedence, weakest first: defaults here, `alluxiofuse.toml` (`--config FILE`, else
./alluxiofuse.toml, ~/.config/alluxiofuse/alluxiofuse.toml, /etc/alluxiofuse/alluxiofuse.toml,
the first that exists), environment `ALLUXIOFUSE_<SECTION>_<FIELD>`, command line.

Sizes are written as in `units.parse_size`, durations as in `units.parse_duration`. An unknown key,
a wrong type or a wrong unit is a UserError that names the key and the file or variable.
"""

from __future__ import annotations

import msgspec


class _Section(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class DirectoryConfig(_Section):
    """One storage directory of a tier."""

    path: str
    quota_bytes: int


class TierConfig(_Section):
    """One tier; the first in the list is the fastest."""

    alias: str
    directories: list[DirectoryConfig]

    @property
    def is_durable(self) -> bool:
        """Survives power loss: everything but MEM."""
        return self.alias.upper() != "MEM"


class ClusterConfig(_Section):
    master: str = ""
    """HOST:PORT or unix:PATH of the master; "": found by the client (see client.discovery)."""
    secret_file: str = ""


class MasterConfig(_Section):
    state_dir: str = ""
    host: str = "127.0.0.1"
    port: int = 19998
    """0: a free one; -1: no TCP at all."""
    unix_path: str = ""
    """"": none."""
    ufs: str = ""
    """URI of the root mount; kept in the metadata store from the first start on."""
    ufs_options: dict[str, str] = {}
    sync_interval_s: float | None = None
    """Of the root mount; None: the connector's default."""
    block_bytes: int = 64 << 20
    session_lease_s: float = 20.0
    worker_heartbeat_s: float = 1.0
    worker_timeout_s: float = 300.0
    persist_delay_s: float = 0.5
    """How long a changed file rests before it is uploaded, so that what is soon changed, renamed or
    removed again costs no upload."""
    persist_parallel: int = 16
    max_events: int = 100_000
    """Events kept for watching clients; one that falls behind further is told to drop its caches."""


class WorkerConfig(_Section):
    state_dir: str = ""
    host: str = "127.0.0.1"
    port: int = 29999
    unix_path: str = ""
    """"": <state_dir>/worker.sock."""
    tiers: list[TierConfig] = []
    high_watermark: float = 0.95
    low_watermark: float = 0.70
    fetch_parallel: int = 16
    """Ranges fetched from under storages at once."""
    persist_parallel: int = 4
    upload_process: bool = True
    """Uploads run in a process of their own, so that they don't hold up the data path."""
    read_ahead_bytes: int = 64 << 20
    """Most that is fetched ahead of a sequential reader."""
    session_grace_s: float = 10.0
    """How long locks for writing outlive their connection, so that a client can reconnect."""


class ClientConfig(_Section):
    write_type: str = "ASYNC_THROUGH"
    """ASYNC_THROUGH, or CACHE_THROUGH: close waits for the under storage."""
    max_cached_slabs: int = 256
    """Attached slabs (a lock, a descriptor) kept after their last close."""
    patience_s: float = 10.0
    """How long an operation waits for a worker that does not answer, before EIO."""
    master_patience_s: float = 60.0
    """The same for a master: how long it may be away before programs see EIO. Spent once for one outage."""
    persist_patience_s: float = 60.0
    """How long close (CACHE_THROUGH) and fsync (no durable tier) wait while nothing can be uploaded,
    before EIO. It is uploaded later all the same."""


class Config(_Section):
    cluster: ClusterConfig = msgspec.field(default_factory=ClusterConfig)
    master: MasterConfig = msgspec.field(default_factory=MasterConfig)
    worker: WorkerConfig = msgspec.field(default_factory=WorkerConfig)
    client: ClientConfig = msgspec.field(default_factory=ClientConfig)
