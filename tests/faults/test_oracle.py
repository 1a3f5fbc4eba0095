"""The oracle itself: it must find what may not be, and nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from actor import Actor, scan
from oracle import GRAIN_BYTES, Found, Op, World, content_differences
from stamps import describe, stamped
from workload import Workload

OLD = stamped(1, 1, 0, 3 * GRAIN_BYTES)
NEW = stamped(1, 2, 0, 3 * GRAIN_BYTES)


def world_of(*ops: Op) -> World:
    world = World(1)
    for op in ops:
        world.apply(op)
    return world


def found(data: bytes = b"", *, ino: int = 2, nlink: int = 1) -> Found:
    return Found("file", 0o644, nlink, ino, len(data), 0, data=data)


@pytest.mark.parametrize(
    "data",
    [
        OLD,
        NEW,
        NEW[:GRAIN_BYTES] + OLD[GRAIN_BYTES:],
        OLD[:GRAIN_BYTES] + NEW[GRAIN_BYTES : 2 * GRAIN_BYTES] + OLD[2 * GRAIN_BYTES :],
    ],
)
def test_old_or_new_by_pages(data: bytes) -> None:
    assert content_differences([OLD, NEW], data) == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        OLD[:-1],
        NEW + b"x",
        bytes(len(OLD)),
        OLD[:GRAIN_BYTES] + bytes(GRAIN_BYTES) + OLD[2 * GRAIN_BYTES :],
        NEW[:100] + OLD[100:],
        OLD[GRAIN_BYTES:] + OLD[:GRAIN_BYTES],
        stamped(2, 2, 0, len(OLD)),
    ],
)
def test_anything_else_is_wrong(data: bytes) -> None:
    assert content_differences([OLD, NEW], data)


def test_zeros_belong_only_where_a_version_has_a_hole() -> None:
    grown = OLD + bytes(GRAIN_BYTES) + stamped(1, 2, 4 * GRAIN_BYTES, 10)
    assert content_differences([OLD, grown], OLD + bytes(GRAIN_BYTES)) == []
    assert content_differences([OLD, OLD + NEW], OLD + bytes(GRAIN_BYTES))
    assert content_differences([b"", OLD], OLD[:GRAIN_BYTES]) == [], "stopped in the middle"
    assert content_differences([OLD], OLD[:GRAIN_BYTES]), "nobody made it shorter"


def test_fsync_and_close_end_what_may_be() -> None:
    write = Op("write", handle=1, length=100, file_id=9, version=1)
    for last in ("fsync", "close"):
        world = world_of(Op("create", "f", handle=1, mode=0o644), write, Op(last, handle=1))
        assert world.differences({"f": found()})
        assert world.differences({"f": found(stamped(9, 1, 0, 100))}) == []
    world = world_of(Op("create", "f", handle=1, mode=0o644), write)
    assert world.differences({"f": found()}) == []
    world.apply(Op("ftruncate", handle=1, length=50))
    assert world.differences({"f": found()}), "a truncation is never lost"
    assert world.differences({"f": found(bytes(50))}) == []
    assert world.differences({"f": found(stamped(9, 1, 0, 50))}) == []


def test_an_operation_of_unknown_outcome_was_done_or_not() -> None:
    world = world_of(Op("mkdir", "a", mode=0o755), Op("mkdir", "a/b", mode=0o755))
    outcomes = world.outcomes(Op("rename", "a", "c"))

    def explained(*paths: str) -> int:
        tree = {path: Found("directory", 0o755, 2, ino, 0, 0) for ino, path in enumerate(paths)}
        return sum(not one.differences(tree) for one in outcomes)

    assert explained("a", "a/b") == explained("c", "c/b") == 1
    assert explained("a", "c/b") == explained("c") == explained("a", "a/b", "c", "c/b") == 0


def test_links_are_one_inode() -> None:
    world = world_of(Op("create", "f", handle=1, mode=0o644), Op("link", "f", "g"), Op("close", handle=1))
    assert world.differences({"f": found(nlink=2), "g": found(nlink=2)}) == []
    assert world.differences({"f": found(nlink=2), "g": found(nlink=2, ino=3)})


def test_what_bytes_say() -> None:
    assert describe(OLD[64:], 64) == "bytes of file 0x1, write 1"
    assert "which belong at 64" in describe(OLD[64:], 4096)
    assert describe(bytes(70), 0) == "70 zeros"


@pytest.mark.parametrize("seed", range(3))
def test_a_plain_directory_agrees_with_it(tmp_path: Path, seed: int) -> None:
    """The workload and the oracle against a local filesystem, which is right by definition."""
    world, actor = World(1), Actor(str(tmp_path))
    workload = Workload(world, random.Random(seed))
    for _ in range(400):
        op = workload.next()
        data = actor.do(op)
        world.apply(op)
        if op.name == "read":
            assert data == world.names[op.path].versions[-1]
    actor.forget()
    tree = scan(str(tmp_path), 0)
    assert world.differences(tree) == []
    for path in list(tree):
        assert world.differences({name: one for name, one in tree.items() if name != path})
