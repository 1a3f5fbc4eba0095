"""Uploads while programs are busy."""

from __future__ import annotations

import os

import pytest
import trio
from client_world import IN_PROCESS, World, in_world, until

from alluxiofuse.master import persister
from alluxiofuse.master.persist_pace import BUSY_PER_S, SAMPLE_S


@pytest.mark.parametrize("write_type", ["ASYNC_THROUGH", "CACHE_THROUGH"])
def test_uploads_wait_for_a_burst_to_end(write_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is waited for does not."""
    monkeypatch.setattr(persister, "DELAYS_TO_GIVE_WAY", 1_000_000)
    is_busy = True

    async def test(world: World) -> None:
        counted = world.master.replies

        async def burst() -> None:
            while is_busy:
                counted.change_count += round(BUSY_PER_S * SAMPLE_S)
                await trio.sleep(SAMPLE_S / 4)

        async with trio.open_nursery() as nursery, world.client(write_type=write_type) as client:
            nursery.start_soon(burst)
            await trio.sleep(3 * SAMPLE_S)
            await client.put(b"f", b"1")
            nonlocal is_busy
            if write_type == "ASYNC_THROUGH":
                await trio.sleep(5 * SAMPLE_S)
                assert not os.listdir(world.ufs)
                is_busy = False
                await until(world.master.persister.is_idle)
            is_busy = False
            assert os.listdir(world.ufs) == ["f"]

    in_world(IN_PROCESS)(test)
