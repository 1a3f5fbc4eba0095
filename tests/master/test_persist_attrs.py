"""Attributes that are set in the under storage when the master dies: nobody takes the file that was so
changed for one that was changed outside."""

from __future__ import annotations

import os

import pytest
import trio
from persist_places import Place
from persist_world import Killed, World, until

POINTS = ["intent committed", "before I/O", "after I/O"]


@pytest.mark.parametrize("is_changed_again", [False, True], ids=["once", "again"])
@pytest.mark.parametrize("point", POINTS)
def test_killed_while_attributes_are_set(local_place: Place, point: str, is_changed_again: bool) -> None:
    """ "again": and they were changed once more when the next life began."""

    async def main() -> None:
        place, contents = local_place, dict[int, bytes]()
        armed = False

        def at(name: str) -> None:
            if armed and name == point:
                raise Killed

        world = World(place.state, place.open_ufs, place.uri, contents, at=at)
        try:
            with trio.fail_after(30):
                async with world.running():
                    world.write("f", b"content")
                    await world.settle()
                    before = world.record("f")
                    armed = True
                    world.chmod("f", 0o600)
                    await until(lambda: False)
        except* Killed:
            pass
        finally:
            world.validate()
            world.close()
        world = World(place.state, place.open_ufs, place.uri, contents)
        try:
            with trio.fail_after(30):
                async with world.running():
                    if is_changed_again:
                        world.chmod("f", 0o640)
                    await world.settle()
                    seen = os.stat(f"{place.uri}/f")
                    assert seen.st_mode & 0o777 == (0o640 if is_changed_again else 0o600)
                    assert world.record("f").fingerprint == world.storage.stat(b"f").fingerprint
                    # The next comparison, and whoever reads it now, finds what it was.
                    await world.loader.refresh(world.find("f"), force=True)
                    assert world.record("f").container == before.container
                    world.check_equal()
        finally:
            world.close()

    trio.run(main)


def test_what_others_wrote_meanwhile_is_seen(local_place: Place) -> None:
    """As many bytes as before, after a kill."""

    async def main() -> None:
        place, contents = local_place, dict[int, bytes]()
        armed = False

        def at(name: str) -> None:
            if armed and name == "after I/O":
                raise Killed

        world = World(place.state, place.open_ufs, place.uri, contents, at=at)
        try:
            with trio.fail_after(30):
                async with world.running():
                    world.write("f", b"content")
                    await world.settle()
                    before = world.record("f")
                    armed = True
                    world.chmod("f", 0o600)
                    await until(lambda: False)
        except* Killed:
            pass
        finally:
            world.close()
        fd = os.open(f"{place.uri}/f", os.O_WRONLY)
        os.write(fd, b"CONTENT")
        os.close(fd)
        world = World(place.state, place.open_ufs, place.uri, contents)
        try:
            with trio.fail_after(30):
                async with world.running():
                    await world.settle()
                    await world.loader.refresh(world.find("f"), force=True)
                    assert world.record("f").container != before.container
        finally:
            world.close()

    trio.run(main)
