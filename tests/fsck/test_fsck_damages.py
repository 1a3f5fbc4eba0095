"""Each kind of damage is found, named and mended; what was not damaged is as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from daemons import LocalDaemon
from damage import Damage, container_of
from damages import DAMAGES
from fsck_tree import expected, tree_of
from fsck_world import damage_of, find, store_of

Run = Callable[..., dict[str, Any]]


def changed(site: LocalDaemon, one: Damage) -> dict[str, bytes | str]:
    """What is expected after the repair; numbers put into names."""
    numbers = {"NEW": 0, "DIRTY": 0, "BINARY": 0}
    with store_of(site) as store:
        numbers["NEW"], numbers["DIRTY"] = find(store, "new"), find(store, "dir/dirty")
    numbers["BINARY"] = container_of(site, "dirty.bin")
    wanted: dict[str, bytes | str] = expected()
    for name, value in one.changes.items():
        for word, number in numbers.items():
            name = name.replace(f"#{word}", f"#{number}").replace(f"-{word}", f"-{number}")
        if value is None:
            wanted.pop(name)
        else:
            wanted[name] = value
    return wanted


def test_the_template_is_clean(site: LocalDaemon, run: Run) -> None:
    found = run(site, "--verify-data")
    assert damage_of(found) == []
    assert tree_of(site) == expected()


@pytest.mark.parametrize("one", DAMAGES, ids=[one.name for one in DAMAGES])
def test_damage(one: Damage, site: LocalDaemon, run: Run) -> None:
    wanted = changed(site, one)
    one.do(site)
    found = run(site, *one.arguments)
    codes = {item["code"] for item in damage_of(found)}
    assert found["exit_code"] == 4
    assert codes <= one.codes | one.left | {"link-count"}, found  # counts often follow
    assert codes
    assert not any(item["is_mended"] for item in found["findings"])
    mended = run(site, "--repair", *one.arguments)
    assert one.codes <= codes | {item["code"] for item in damage_of(mended)}, mended
    assert any(one.named in item["text"] + item["advice"] for item in damage_of(mended)), mended
    assert set(mended["left"]) <= one.left, mended
    assert mended["exit_code"] == (4 if one.left else 1)
    again = run(site, *one.arguments)
    assert {item["code"] for item in damage_of(again)} <= one.left, again
    if one.left <= {"bytes-lost", "file-lost"}:
        found_now = tree_of(site)
        for name, value in wanted.items():
            if value != "other":
                assert found_now.get(name) == value, name
        assert found_now.keys() == wanted.keys()
    if not one.left:
        assert again["exit_code"] == 0
    assert not (Path(site.base) / "ssd" / "lost+found").exists()
