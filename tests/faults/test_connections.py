"""Connections that are cut, reset, swallowed or slow, in either direction, at any byte: programs see a
pause, everything happens once, and nothing is left over."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
from daemons import Cluster
from tcp_proxy import CUT, RESET, SLOW, SWALLOW, TO_CLIENT, TO_SERVER, Fault, TcpProxy

sys.path.insert(0, str(Path(__file__).parents[1] / "client"))

from client_world import TCP, World, in_world, until

from alluxiofuse.ids import PAGE_BYTES
from alluxiofuse.wire import worker_ops

WAIT_S = 90.0
CUTS = int(os.environ.get("FAULTS_CUTS", "20"))
"""Per kind; `make test-faults` does hundreds."""
SEED = int(os.environ.get("FAULTS_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 31)
PLACES = (0, 3, 8, 30)
"""Bytes that get through before: within the lengths of a frame, behind them, within a header."""


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def sockets(pid: int) -> int:
    """Descriptors of connections. Those of slabs are kept open on purpose, up to a limit."""
    count = 0
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            count += os.readlink(entry.path).startswith("socket:")
        except OSError:
            continue  # closed meanwhile
    return count


def no_more(now: dict[str, int], before: dict[str, int]) -> bool:
    return all(now[name] <= count for name, count in before.items())


class Relayed:
    """A cluster whose worker and mount reach the master through a relay each."""

    def __init__(self, site: Cluster, stack: ExitStack) -> None:
        self.site = site
        host, _, port = site.address.rpartition(":")
        self.of_worker = stack.enter_context(TcpProxy((host, int(port))))
        self.of_client = stack.enter_context(TcpProxy((host, int(port))))
        site.dialled = f"127.0.0.1:{self.of_worker.port}"
        site.add_worker(os.uname().nodename)
        site.dialled = f"127.0.0.1:{self.of_client.port}"
        self.client = site.add_mount()
        self._number = 0

    def work(self) -> None:
        """What a program does: any error, and any change that happens twice or not at all, fails."""
        self._number += 1
        place = self.site.mount / f"{self._number}"
        data = os.urandom(5000)
        os.mkdir(place)
        with open(place / "a", "xb") as file:
            file.write(data)
        os.rename(place / "a", place / "b")
        os.link(place / "b", place / "c")
        os.symlink("b", place / "d")
        assert (place / "d").read_bytes() == data
        os.unlink(place / "b")
        with open(place / "c", "ab") as file:
            file.write(data)
        assert (place / "c").read_bytes() == data + data
        assert sorted(os.listdir(place)) == ["c", "d"]

    def held(self) -> dict[str, int]:
        """What may not grow."""
        pids = {"client": self.client.pid, "worker": self.site.workers[0].pid, "master": self.site.master.pid}
        found = {name: sockets(pid) for name, pid in pids.items()}
        report = self.site.report()
        found["sessions"] = len(report["sessions"])
        found["workers"] = sum(one["is_alive"] for one in report["workers"])
        return found


@pytest.fixture
def relayed(cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch) -> Iterator[Relayed]:
    monkeypatch.setattr(Cluster, "start", _start_master_only)
    with ExitStack() as stack:
        here = Relayed(cluster(), stack)
        wait_until(lambda: _works(here))
        yield here
        here.of_client.arm(None)
        here.of_worker.arm(None)
        # The daemons end before the relays do.
        for daemon in reversed(here.site.daemons):
            assert daemon.stop() == 0, daemon.log_text()[-4000:]
    assert here.of_client.open_count == here.of_worker.open_count == 0


def _start_master_only(self: Cluster) -> Cluster:
    self.master.start()
    return self


def _works(here: Relayed) -> bool:
    try:
        here.work()
    except OSError:
        return False
    return True


def test_every_kind_of_fault_is_a_pause(relayed: Relayed) -> None:
    """Between client and master. Swallowed is what takes longest to notice, so it comes once each way."""
    print(f"FAULTS_SEED={SEED}")
    chance = random.Random(SEED)
    faults = [
        Fault(chance.choice((CUT, RESET)), direction, after)
        for direction in (TO_SERVER, TO_CLIENT)
        for after in [*PLACES, *(chance.randrange(4000) for _ in range(CUTS // 4))]
    ]
    faults += [Fault(SLOW, direction, 3) for direction in (TO_SERVER, TO_CLIENT)]
    faults += [Fault(SWALLOW, TO_SERVER, 30), Fault(SWALLOW, TO_CLIENT, 0)]
    for fault in faults:
        relayed.of_client.arm(fault)
        relayed.work()
        while relayed.of_client.is_armed:
            relayed.work()
        if fault.kind == SLOW:
            relayed.of_client.now(CUT)
    assert relayed.of_client.fault_count == len(faults)
    counters = relayed.site.report()["counters"]
    assert counters["sessions_expired"] == 0

    def told() -> bool:
        found: dict[str, int] = relayed.site.report()["counters"]
        return found.get("client_reconnects", 0) > 0 and found.get("client_connections_silent", 0) > 0

    wait_until(told)


def test_the_same_between_worker_and_master(relayed: Relayed) -> None:
    """The worker registers anew; uploads are given to it again."""
    faults = [
        Fault(kind, direction, after)
        for kind, after in ((CUT, 3), (RESET, 30), (SLOW, 8), (SWALLOW, 0))
        for direction in (TO_SERVER, TO_CLIENT)
    ]
    for fault in faults:
        relayed.of_worker.arm(fault)
        relayed.work()
        wait_until(lambda: not relayed.of_worker.is_armed)
        if fault.kind == SLOW:
            relayed.of_worker.now(CUT)
    relayed.work()
    relayed.site.wait_persisted()
    for number in range(1, relayed._number + 1):
        name = f"{number}/c"
        assert (relayed.site.ufs_dir / name).read_bytes() == (relayed.site.mount / name).read_bytes()


def test_many_cuts_leave_nothing_over(relayed: Relayed) -> None:
    print(f"FAULTS_SEED={SEED}")
    relayed.site.wait_persisted()  # The upload process is there, with its socket.
    before = relayed.held()
    chance = random.Random(SEED)
    for number in range(CUTS):
        proxy = chance.choice((relayed.of_client, relayed.of_worker))
        if chance.random() < 0.5:
            proxy.now(chance.choice((CUT, RESET)))
        else:
            direction = chance.choice((TO_SERVER, TO_CLIENT))
            proxy.arm(Fault(chance.choice((CUT, RESET)), direction, chance.randrange(100)))
        if number % 2 == 0:
            relayed.work()
    relayed.of_client.arm(None)
    relayed.of_worker.arm(None)
    relayed.work()
    deadline = time.monotonic() + WAIT_S
    while not no_more(held := relayed.held(), before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert no_more(held, before), held
    assert relayed.site.report()["counters"]["sessions_resumed"] > CUTS // 10


@pytest.mark.parametrize("kind", [CUT, RESET])
def test_between_client_and_worker(kind: str) -> None:
    """Bytes travel here, and locks end with connections."""

    async def test(world: World) -> None:
        chance = random.Random(kind)
        with ExitStack() as stack:
            proxies: list[TcpProxy] = []

            def relay(port: int) -> int:
                proxies.append(stack.enter_context(TcpProxy(("127.0.0.1", port))))
                return proxies[-1].port

            await world.stop_worker("w1")
            part = await world.start_worker("w2", hostname="elsewhere", relay=relay)
            (proxy,) = proxies
            async with world.client() as client:
                data = os.urandom(PAGE_BYTES // 2)
                await client.put(b"warm", data)
                # The upload process is there, with its socket.
                await until(lambda: (world.ufs / "warm").exists())
                before = {"locks": 0, "sockets": sockets(os.getpid())}
                before["tasks"] = trio.lowlevel.current_statistics().tasks_living
                for number in range(CUTS):
                    direction = chance.choice((TO_SERVER, TO_CLIENT))
                    proxy.arm(Fault(kind, direction, chance.choice((0, 5, 40, 3000, 200_000))))
                    name = b"%d" % number
                    await client.put(name, data)
                    assert await client.get(name) == data
                proxy.arm(None)
                assert proxy.fault_count > CUTS // 3

                async def held() -> dict[str, int]:
                    client.fs._core.slabs.drop_idle()
                    state = await part.connection.call(worker_ops.WorkerReport())
                    return {
                        "locks": state.counters["locks"],
                        "tasks": trio.lowlevel.current_statistics().tasks_living,
                        "sockets": sockets(os.getpid()),
                    }

                async def is_as_before() -> bool:
                    return no_more(await held(), before)

                with trio.move_on_after(30):
                    await until(is_as_before, 60)
                assert no_more(found := await held(), before), found
                for number in range(CUTS):
                    assert await client.get(b"%d" % number) == data
            await world.stop_worker("w2")

    in_world(TCP, master={"session_lease_s": 20.0})(test)
