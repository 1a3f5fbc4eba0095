"""A network of its own for each daemon, and ways to cut it: `with Network(["m", "a", "b"]) as network`.

Each name is a network namespace with one address, joined by a router (a namespace too), so nothing touches
the machine's own network. A cut is made in the router, so both ends have no sign of it but silence; or
by taking a link down. Needs root and iproute2 (`require_network`).
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from types import TracebackType

import pytest

_numbers = itertools.count()
_NAME_HOST = "import os,socket,sys; socket.sethostname(sys.argv[1]); os.execvp(sys.argv[2], sys.argv[2:])"
KINDS = ("silent", "first to second", "second to first", "link")
"""Nothing passes in either direction; one direction only; the first one's link is down."""


def require_network() -> None:
    """Skips the test where namespaces can't be used; fails it with CI=true."""
    reason = ""
    if os.geteuid() != 0:
        reason = "network namespaces need root"
    elif shutil.which("ip") is None or shutil.which("nsenter") is None:
        reason = "no ip or nsenter: apt-get install iproute2"
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Network:
    """Context manager: nothing is left when it ends, whoever still runs in it."""

    def __init__(self, names: list[str]) -> None:
        self._places = {name: number + 1 for number, name in enumerate(names)}
        self._run = f"af{os.getpid()}x{next(_numbers)}"
        self._cuts: list[tuple[str, ...]] = []
        """Arguments of `ip` that undo what was cut."""

    def __enter__(self) -> Network:
        require_network()
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make(self) -> None:
        router = self._namespace("router")
        _ip("netns", "add", router)
        _ip("-n", router, "link", "set", "lo", "up")
        subprocess.run(
            ["ip", "netns", "exec", router, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"], check=True
        )
        for name, place in self._places.items():
            own, there = self._namespace(name), f"to{place}"
            _ip("netns", "add", own)
            _ip("link", "add", "eth0", "netns", own, "type", "veth", "peer", "name", there, "netns", router)
            for namespace, device, host in ((own, "eth0", 2), (router, there, 1)):
                _ip("-n", namespace, "addr", "add", f"10.77.{place}.{host}/24", "dev", device)
                _ip("-n", namespace, "link", "set", device, "up")
            _ip("-n", own, "link", "set", "lo", "up")
            _ip("-n", own, "route", "add", "default", "via", f"10.77.{place}.1")

    def close(self) -> None:
        """Idempotent. Sockets in the namespaces go on living in their processes, cut off."""
        for name in [*self._places, "router"]:
            subprocess.run(["ip", "netns", "del", self._namespace(name)], capture_output=True, check=False)

    def _namespace(self, name: str) -> str:
        return f"{self._run}-{name}"

    # --- for daemons --------------------------------------------------------------------------------

    def address(self, name: str) -> str:
        return f"10.77.{self._places[name]}.2"

    def prefix(self, name: str) -> list[str]:
        """Command that becomes a program in that place, on a machine of that name. What it mounts is
        seen everywhere."""
        enter = ["nsenter", f"--net=/run/netns/{self._namespace(name)}", "unshare", "--uts"]
        return [*enter, sys.executable, "-c", _NAME_HOST, name]

    def packets(self, name: str) -> int:
        """How many have been sent and received there."""
        found = subprocess.run(
            [*self.prefix(name), "cat", "/proc/net/dev"], capture_output=True, text=True, check=True
        )
        line = next(line for line in found.stdout.splitlines() if line.strip().startswith("eth0:"))
        fields = line.partition(":")[2].split()
        return int(fields[1]) + int(fields[9])

    # --- cutting ------------------------------------------------------------------------------------

    def cut(self, first: str, second: str, kind: str = "silent") -> None:
        """One of KINDS, between two places; "link" cuts the first off from all."""
        if kind == "link":
            own = self._namespace("router"), f"to{self._places[first]}"
            _ip("-n", own[0], "link", "set", own[1], "down")
            self._cuts.append(("-n", own[0], "link", "set", own[1], "up"))
            return
        if kind in ("silent", "first to second"):
            self._drop(first, second)
        if kind in ("silent", "second to first"):
            self._drop(second, first)

    def _drop(self, source: str, target: str) -> None:
        rule = ("from", self.address(source), "to", self.address(target), "blackhole")
        router = self._namespace("router")
        _ip("-n", router, "rule", "add", *rule)
        self._cuts.append(("-n", router, "rule", "del", *rule))

    def heal(self) -> None:
        """All that was cut."""
        while self._cuts:
            _ip(*self._cuts.pop())
