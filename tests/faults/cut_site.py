"""Two mounts with a worker beside each, and a master, each on a "machine" of its own in a network that can
be cut."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Mapping, Sequence

from daemons import Daemon, Site, require_fuse
from kinds import Aim
from netns import KINDS, Network

PORT = 19998
LEASE_S = 5.0
GRACE_S = 2.0
TIMES = {
    "ALLUXIOFUSE_MASTER_SESSION_LEASE": f"{LEASE_S:.0f}s",
    "ALLUXIOFUSE_MASTER_PERSIST_DELAY": "100ms",
    "ALLUXIOFUSE_CLIENT_PATIENCE": "60s",
    "ALLUXIOFUSE_WORKER_SESSION_GRACE": f"{GRACE_S:.0f}s",
}
HOSTS = ("h0", "h1")


class CutSite(Site):
    """`mounts[n]` and `workers[n]` are on host "h<n>", the master on "m"; `network` cuts them off."""

    def __init__(self, env: Mapping[str, str] | None = None, mount_options: Sequence[str] = ("", "")) -> None:
        super().__init__()
        self.env = {**TIMES, **(env or {})}
        self.network = Network(["m", *HOSTS])
        self.ufs_dir = self.base / "ufs"
        self.ufs_dir.mkdir()
        secret = self.base / "secret"
        secret.touch(mode=0o600)
        secret.write_text(secrets.token_hex(32))
        self._secret = ["--secret-file", str(secret)]
        self.mounts.append(self.base / "mnt2")
        self.mounts[1].mkdir()
        self._options = mount_options
        self.workers: list[Daemon] = []
        self.clients: list[Daemon] = []

    @property
    def address(self) -> str:
        """Its Unix socket, which no cut concerns."""
        return str(self.base / "master")

    def _daemon(self, name: str, host: str, *arguments: str) -> Daemon:
        words = [*arguments, *self._secret]
        daemon = Daemon(name, words, self.base / f"{name}.log", self.env)
        daemon.prefix = self.network.prefix(host)
        self.daemons.append(daemon)
        daemon.start()
        return daemon

    def start(self) -> CutSite:
        require_fuse()
        self.network.__enter__()
        master = f"{self.network.address('m')}:{PORT}"
        listen = ["--host", self.network.address("m"), "--port", str(PORT)]
        arguments = ["--state", str(self.base / "master"), "--ufs", str(self.ufs_dir), *listen]
        arguments += ["--sync-interval", "-1"]
        self._daemon("master", "m", "master", *arguments)
        for number, host in enumerate(HOSTS):
            listen = ["--host", self.network.address(host), "--port", "29999", "--hostname", host]
            tier = f"SSD:{self.base}/tier{number}:1GB"
            arguments = ["--master", master, "--state", str(self.base / f"worker{number}")]
            arguments += ["--tier", tier, *listen]
            self.workers.append(self._daemon(f"worker{number}", host, "worker", *arguments))
        for number, host in enumerate(HOSTS):
            options = ["-o", self._options[number]] if self._options[number] else []
            arguments = ["--foreground", master, str(self.mounts[number]), *options]
            self.clients.append(self._daemon(f"mount{number}", host, "mount", *arguments))
        return self

    def close(self) -> list[str]:
        try:
            self.network.heal()
            return super().close()
        finally:
            self.network.close()


class Cut:
    """A `kinds.Fault`: two places cut off from each other for a while, in seconds `shortest_s` to
    `longest_s`. For longer than the lease: any session may end ("link" cuts one place off from all)."""

    def __init__(
        self,
        site: CutSite,
        first: str,
        second: str,
        *,
        shortest_s: float = 0.2,
        longest_s: float = 0.6 * LEASE_S,
    ) -> None:
        self._is_long = longest_s > LEASE_S
        self.name = f"cut {first}-{second}" + (" for longer than the lease" if self._is_long else "")
        self._site = site
        self._ends = first, second
        self._times_s = shortest_s, longest_s
        self._kind = ""

    def aim(self, dice: random.Random) -> Aim:
        self._kind = dice.choice(KINDS)
        lapsed = self._site.mounts if self._is_long else []
        return Aim(frozenset(), frozenset(self._site.mounts), frozenset(lapsed))

    def strike(self) -> None:
        self._site.network.cut(*self._ends, self._kind)

    def heal(self, dice: random.Random) -> None:
        time.sleep(dice.uniform(*self._times_s))
        self._site.network.heal()
