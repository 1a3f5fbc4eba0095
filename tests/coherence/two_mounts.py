"""One namespace, two mounts: processes of their own, each with the worker of "its machine"."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from daemons import Cluster, Daemon, mount_arguments

_NAME_HOST = "import os,socket,sys; socket.sethostname(sys.argv[1]); os.execvp(sys.argv[2], sys.argv[2:])"


def on_host(name: str) -> list[str]:
    """Prefix of a daemon that shall believe to be on the machine of that name: a UTS namespace."""
    return ["unshare", "--uts", sys.executable, "-c", _NAME_HOST, name]


class TwoMounts(Cluster):
    """`mounts[0]` and `mounts[1]` show the same namespace. `workers`: "own": each mount has a worker
    on its machine; "one": the first has, the other reaches it by TCP; "remote": both by TCP."""

    def __init__(self, *, workers: str = "own", mount_options: tuple[str, str] = ("", ""), **options: object):
        if os.geteuid() != 0:
            pytest.skip("hostnames of their own need root")
        super().__init__(workers=0, **options)  # type: ignore[arg-type]
        self._layout = workers
        self._options_of = mount_options
        self.mounts.append(self.base / "mnt2")
        self.mounts[1].mkdir()
        self.clients: list[Daemon] = []

    def start(self) -> TwoMounts:
        hosts = {"own": ["h0", "h1"], "one": ["h0"], "remote": ["w0", "w1"]}[self._layout]
        self.master.start()
        place = self.master.arguments.index("--port") + 1
        self.master.arguments[place] = self.address.rpartition(":")[2]
        for host in hosts:
            self.add_worker(host)
        for number, place_of in enumerate(self.mounts):
            self.clients.append(self._mount_on(place_of, f"h{number}", self._options_of[number]))
        return self

    def _mount_on(self, place: Path, host: str, options: str) -> Daemon:
        arguments = ["mount", "--foreground", self.address, str(place), *mount_arguments("", options)]
        mount = self._daemon(f"mount-{place.name}", arguments)
        mount.prefix = on_host(host)
        mount.start()
        return mount
