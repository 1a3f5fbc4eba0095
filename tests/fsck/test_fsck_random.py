"""Records with random damage: neither the check nor the daemon's start fails in a way that nobody
thought of, and a repair comes to an end."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from daemons import LocalDaemon
from fsck_tree import copy
from fsck_world import index_of, store_of
from rocksdict import WriteBatch

from alluxiofuse.master.records import COLUMN_FAMILIES

Run = Callable[..., dict[str, Any]]
Item = tuple[str, bytes, bytes]
SEEDS = int(os.environ.get("AF_FSCK_SEEDS", "8"))
STARTS = int(os.environ.get("AF_FSCK_STARTS", "2"))


def spoiled(dice: random.Random, value: bytes, others: list[bytes]) -> bytes:
    """Another value in its place."""
    what = dice.randrange(6)
    raw = bytearray(value)
    if what == 0 and raw:
        raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
    elif what == 1 and raw:
        raw[dice.randrange(len(raw))] = dice.randrange(256)
    elif what == 2:
        del raw[dice.randrange(len(raw) + 1) :]
    elif what == 3:
        raw = bytearray(dice.randbytes(dice.randrange(20)))
    elif what == 4:
        raw = bytearray(dice.choice(others))
    else:
        raw += dice.randbytes(3)
    return bytes(raw)


def spoil(site: LocalDaemon, dice: random.Random, count: int) -> None:
    """`count` records of the metadata store and the index are changed, moved or deleted."""
    with store_of(site) as store, index_of(site) as index:
        items: list[Item] = [
            (family, key, value) for family in COLUMN_FAMILIES for key, value in store.scan(family, b"")
        ]
        items += [("index", key, value) for key, value in index.items(b"")]
        tx, batch = store.transaction(), WriteBatch(raw_mode=True)
        for _ in range(count):
            family, key, value = dice.choice(items)
            others = [other for kind, _, other in items if kind == family]
            new_key = bytearray(key)
            fate = dice.randrange(5)
            if fate == 0:
                new_key[dice.randrange(len(new_key))] ^= 1 << dice.randrange(8)
            new_value = None if fate == 1 else spoiled(dice, value, others)
            if key in (b"format", b"mformat"):
                continue  # a newer format is refused
            if family == "index":
                batch.delete(key) if new_value is None else batch.put(bytes(new_key), new_value)
            elif new_value is None:
                tx.delete(family, key)
            else:
                tx.put(family, bytes(new_key), new_value)
        tx.commit()
        index._db.write(batch)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_damage(seed: int, site: LocalDaemon, run: Run) -> None:
    dice = random.Random(seed)
    spoil(site, dice, dice.choice((1, 3, 10, 40)))
    tier = f"SSD:{site.base / 'ssd'}:1GB"
    run(site, "--verify-data", "--tier", tier)
    mended = run(site, "--repair", "--tier", tier)
    again = run(site, "--repair", "--tier", tier)
    if again["mended"]:
        print(again["findings"][:6])
    assert again["mended"] == {}, "one repair does all that can be done"
    assert again["left"] == mended["left"]


@pytest.mark.parametrize("seed", range(STARTS))
def test_random_damage_and_a_start(seed: int, site: LocalDaemon) -> None:
    """Without a repair: it starts, or says in one line why it does not."""
    spoil(site, random.Random(1000 + seed), (2, 5, 20)[seed % 3])
    site.daemon.env.clear()
    site.daemon.log.unlink()
    try:
        site.daemon.start()
        subprocess.run(["ls", "-lR", str(site.mount)], capture_output=True, check=False, timeout=120)
    except AssertionError:
        assert not site.daemon.is_running
    finally:
        log = site.daemon.log_text()
        site.kill()
    assert "Traceback" not in log, log
    assert "this is a bug" not in log, log
    copy(site.base / "kept" / "state", site.base / "state")
