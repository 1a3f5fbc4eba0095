"""Random operations on a few files, compared with byte arrays after each step."""

from __future__ import annotations

import os
import random

import pytest
from client_world import IN_PROCESS, ROOT, TCP, UNIX, Client, World, in_world, until

from alluxiofuse.client.filesystem import OpenFile
from alluxiofuse.ids import PAGE_BYTES, ROOT_INO

NAMES = [b"a", b"b", b"c"]
STEPS = 150
MAX_BYTES = 3 * PAGE_BYTES


class Model:
    """What the files must hold, and the handles that are open on them."""

    def __init__(self, clients: list[Client], rng: random.Random) -> None:
        self.clients = clients
        self.rng = rng
        self.files: dict[bytes, bytearray] = {}
        self.handles: list[tuple[OpenFile, bytearray]] = []
        """The array is the inode's: it stays when the name goes."""

    def position(self, size: int) -> int:
        """Mostly inside, often at the edges of pages."""
        near = self.rng.choice([0, size, PAGE_BYTES, 2 * PAGE_BYTES])
        place = self.rng.choice([self.rng.randrange(size + 1), near, near + self.rng.randrange(-9, 9)])
        return min(max(0, place), MAX_BYTES)

    async def step(self) -> None:
        choices = [self.create, self.open, self.write, self.write, self.read, self.truncate]
        choices += [self.flush, self.close, self.close, self.unlink, self.rename, self.fsync, self.by_path]
        await self.rng.choice(choices)()

    async def create(self) -> None:
        name = self.rng.choice(NAMES)
        if name in self.files:
            return
        flags = self.rng.choice([os.O_RDWR, os.O_RDWR | os.O_APPEND])
        client = self.rng.choice(self.clients)
        _, file = await client.fs.create(ROOT, ROOT_INO, name, 0o644, flags | os.O_EXCL)
        self.files[name] = bytearray()
        self.handles.append((file, self.files[name]))

    async def open(self) -> None:
        if not self.files or len(self.handles) > 6:
            return
        name = self.rng.choice(sorted(self.files))
        flags = self.rng.choice([os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_TRUNC])
        file = await self.rng.choice(self.clients).open(name, flags)
        if flags & os.O_TRUNC:
            self.files[name].clear()
        self.handles.append((file, self.files[name]))

    def handle(self, *, is_writer: bool) -> tuple[OpenFile, bytearray] | None:
        found = [item for item in self.handles if item[0].is_writer or not is_writer]
        return self.rng.choice(found) if found else None

    async def write(self) -> None:
        found = self.handle(is_writer=True)
        if found is None:
            return
        file, content = found
        data = self.rng.randbytes(self.rng.choice([1, 100, 4096, 70_000, 300_000]))
        offset = len(content) if file.is_append else self.position(len(content))
        assert await file.write(offset, data) == len(data)
        if offset > len(content):
            content.extend(bytes(offset - len(content)))
        content[offset : offset + len(data)] = data
        assert file.attr.size == len(content)

    async def read(self) -> None:
        found = self.handle(is_writer=False)
        if found is not None:
            file, content = found
            offset = self.position(len(content))
            size = self.rng.choice([1, 4096, 200_000, MAX_BYTES])
            assert bytes(await file.read(offset, size)) == content[offset : offset + size]

    async def truncate(self) -> None:
        found = self.handle(is_writer=True)
        if found is not None:
            file, content = found
            size = self.rng.choice([0, self.position(len(content))])
            await file.truncate(size)
            content[size:] = bytes(max(0, size - len(content)))

    async def by_path(self) -> None:
        """truncate(2), and a whole read by another handle."""
        if not self.files:
            return
        name = self.rng.choice(sorted(self.files))
        client, content = self.rng.choice(self.clients), self.files[name]
        attr = await client.fs.lookup(ROOT, ROOT_INO, name)
        assert attr.size == len(content)
        if self.rng.random() < 0.3:
            size = self.position(len(content))
            await client.fs.setattr(ROOT, attr.ino, size=size)
            content[size:] = bytes(max(0, size - len(content)))
        assert await client.get(name) == content

    async def flush(self) -> None:
        found = self.handle(is_writer=False)
        if found is not None:
            await found[0].flush()

    async def fsync(self) -> None:
        found = self.handle(is_writer=False)
        if found is not None:
            await found[0].fsync()

    async def close(self) -> None:
        if self.handles:
            file, _ = self.handles.pop(self.rng.randrange(len(self.handles)))
            await file.flush()
            await file.release()

    async def unlink(self) -> None:
        if self.files and self.rng.random() < 0.3:
            name = self.rng.choice(sorted(self.files))
            await self.rng.choice(self.clients).fs.unlink(ROOT, ROOT_INO, name)
            del self.files[name]

    async def rename(self) -> None:
        if self.files:
            old, new = self.rng.choice(sorted(self.files)), self.rng.choice(NAMES)
            await self.rng.choice(self.clients).fs.rename(ROOT, ROOT_INO, old, ROOT_INO, new)
            self.files[new] = self.files.pop(old)

    async def check_all(self) -> None:
        while self.handles:
            await self.close()
        for client in self.clients:
            for name, content in self.files.items():
                assert await client.get(name) == content
        ufs = self.clients[0].world.ufs

        def is_persisted() -> bool:
            there = {os.fsencode(path.name): path for path in ufs.iterdir()}
            return set(there) == set(self.files) and all(
                there[name].read_bytes() == content for name, content in self.files.items()
            )

        await until(is_persisted)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_one_client(kind: str, seed: int) -> None:
    async def test(world: World) -> None:
        async with world.client() as client:
            model = Model([client], random.Random(seed))
            for _ in range(STEPS):
                await model.step()
            await model.check_all()

    in_world(kind)(test)


async def close_after_each_step(model: Model) -> None:
    for _ in range(STEPS // 2):
        await model.open()
        await model.step()
        while model.handles:
            await model.close()
    await model.check_all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX])
def test_reopened_after_each_step(kind: str, seed: int) -> None:
    """Everything closed between two steps: all content goes through seals and layouts."""

    async def test(world: World) -> None:
        async with world.client() as client:
            model = Model([client], random.Random(1000 + seed))
            await close_after_each_step(model)

    in_world(kind)(test)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [IN_PROCESS, UNIX, TCP])
def test_two_clients_closed_after_each_step(kind: str, seed: int) -> None:
    """Close-to-open: what one closed the other sees at its next open."""

    async def test(world: World) -> None:
        async with world.client("one") as one, world.client("two") as two:
            model = Model([one, two], random.Random(2000 + seed))
            await close_after_each_step(model)

    in_world(kind)(test)


@pytest.mark.parametrize("kind", [UNIX, TCP])
def test_daemons_restart_between_steps(kind: str) -> None:
    """Programs with open files see nothing of it."""

    async def test(world: World) -> None:
        async with world.client(patience_s=20.0) as client:
            model = Model([client], random.Random(3000))
            for number in range(STEPS):
                await model.step()
                if number % 25 == 10:
                    await world.stop_worker()
                    await world.start_worker()
                elif number % 25 == 20:
                    await world.stop_master()
                    await world.start_master()
            await model.check_all()

    in_world(kind)(test)
