"""Two clients at the same moment: joining, sealing and emptying one file."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import trio
from client_world import IN_PROCESS, ROOT, TCP, UNIX, Client, World, in_world, until

from alluxiofuse.client.writing import Writing
from alluxiofuse.ids import ROOT_INO
from alluxiofuse.wire.types import Attr


@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_emptying_what_the_other_writes(kind: str) -> None:
    async def test(world: World) -> None:
        async with world.client("one") as one, world.client("two") as two:
            for number in range(10):
                writer = await one.create(b"f%d" % number)
                other = await two.open(b"f%d" % number, os.O_RDWR)
                await writer.write(0, b"to be emptied")
                emptied = await two.open(b"f%d" % number, os.O_RDWR | os.O_TRUNC)
                assert bytes(await writer.read(0, 100)) == b""
                await other.write(0, b"new")
                for client, file in ((one, writer), (two, other), (two, emptied)):
                    await client.close(file)
                assert await one.get(b"f%d" % number) == b"new"
                assert await two.get(b"f%d" % number) == b"new"

    in_world(kind)(test)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_one_of_the_versions_wins_whole(kind: str, seed: int) -> None:
    """Both replace a file at once; it ends as some mixture at worst of whole writes, sealed, the
    same for both, and in the under storage."""

    async def test(world: World) -> None:
        rng = random.Random(seed)
        async with world.client("one") as one, world.client("two") as two:

            async def replace(client: Client, letter: bytes) -> None:
                for _ in range(20):
                    await client.put(b"f", letter * 1000)
                    if rng.random() < 0.3:
                        await trio.sleep(0.001)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(replace, one, b"1")
                nursery.start_soon(replace, two, b"2")
            found = await one.get(b"f")
            assert found in (b"1" * 1000, b"2" * 1000)
            assert await two.get(b"f") == found
            attr: Attr = await one.paths.stat("/f")
            assert (attr.size, attr.home) == (1000, 0)

    in_world(kind)(test)


@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX])
def test_renamed_between_the_masters_word_and_the_workers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The under storage moved the bytes that a writer was about to have fetched."""

    async def test(world: World) -> None:
        async with world.client("one") as one, world.client("two") as two:
            (world.ufs / "f").write_bytes(b"old bytes")
            file = await one.open(b"f", os.O_RDWR)
            begin = Writing.begin

            async def moved_before(writing: Writing, *arguments: Any) -> None:
                monkeypatch.undo()
                await two.fs.rename(ROOT, ROOT_INO, b"f", ROOT_INO, b"g")
                await until((world.ufs / "g").exists)
                await begin(writing, *arguments)

            monkeypatch.setattr(Writing, "begin", moved_before)
            await file.write(0, b"new")
            await one.close(file)
            assert await two.get(b"g") == b"new bytes"

    in_world(kind)(test)
