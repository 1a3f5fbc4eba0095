"""A client's machine is suspended: its leases run out meanwhile."""

from __future__ import annotations

import time

from client_world import UNIX, World, in_world, until

from alluxiofuse.client.bootclock import BootClock

LEASE_S = 20.0


class Resets:
    def __init__(self) -> None:
        self.count = 0

    def attr_changed(self, ino: int) -> None: ...

    def data_changed(self, ino: int) -> None: ...

    def entry_changed(self, parent: int, name: bytes) -> None: ...

    def reset(self) -> None:
        self.count += 1


def test_a_lease_is_over_after_a_suspend() -> None:
    suspended_s = 0.0

    async def test(world: World) -> None:
        nonlocal suspended_s
        async with world.client() as client:
            seen = Resets()
            client.fs.set_listener(seen)
            await until(lambda: client.fs.is_watch_healthy)
            suspended_s += LEASE_S / 2
            assert client.fs.is_watch_healthy
            await client.put(b"f", b"data")
            suspended_s += LEASE_S + 1
            assert not client.fs.is_watch_healthy
            await until(lambda: seen.count == 1 and client.fs.is_watch_healthy)
            assert await client.get(b"f") == b"data"

    clock = BootClock(lambda: time.clock_gettime(time.CLOCK_BOOTTIME) + suspended_s)
    in_world(UNIX, clock=clock, master={"session_lease_s": LEASE_S})(test)


def test_the_boot_clock_counts_what_the_kernel_counts() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    clock = BootClock()
    now = clock.current_time()
    assert before <= now <= time.clock_gettime(time.CLOCK_BOOTTIME)
    assert clock.deadline_to_sleep_time(now + 5) <= 5
