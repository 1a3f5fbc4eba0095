"""Random operations against a model that knows every byte; everything is validated after each."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from worker_world import MB, TinyMaster, World, payload_of, running, trio_test

from alluxiofuse.errors import NoSpaceError
from alluxiofuse.wire.types import UfsSource
from alluxiofuse.wire.worker_ops import EndWrite, Read, Reserve, Truncate, Write
from alluxiofuse.worker import growth

STEPS = 120


@dataclass
class Content:
    data: bytes
    source: UfsSource | None


@dataclass
class Open:
    """A container being written."""

    lock_id: int
    fd: int
    data: bytearray
    granted_end: int


class Model:
    """What the worker should hold; `step` does one thing to both."""

    def __init__(self, root: Path, shm: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.root = root
        self.shm = shm
        self.sealed: dict[int, Content] = {}
        self.open: dict[int, Open] = {}
        self.attached: dict[int, tuple[int, int]] = {}
        """lock id -> (container, fd)"""
        self.next = 100
        self.lives = 0
        self.master = TinyMaster(root / "ufs")
        self.stack = AsyncExitStack()
        self.world: World

    async def start(self) -> None:
        base, shm = self.root / f"life{self.lives}", self.shm / f"life{self.lives}"
        tiers = {
            "MEM": [(shm, 4 * MB)],
            "SSD": [(base / "a", 6 * MB), (base / "b", 7 * MB)],
        }
        self.stack = AsyncExitStack()
        self.world = await self.stack.enter_async_context(
            running(base, tiers, master=self.master, check=False, session_grace_s=1000)
        )

    async def restart(self, *, crash: bool) -> None:
        """Again on the same files, or on a copy of the files as they were while it ran."""
        await self.world.settled()
        self._forget_connections()
        if crash:
            self.lives += 1
            for parent in (self.root, self.shm):
                old, new = parent / f"life{self.lives - 1}", parent / f"life{self.lives}"
                await trio.run_process(["cp", "-a", "--sparse=always", str(old), str(new)])
        await self.stack.aclose()
        await self.start()
        for container, content in list(self.sealed.items()):
            if content.source is None:
                slab = self.world.slabs.get(container)
                if slab is None:  # it was dirty in MEM, which is only as good as the machine
                    raise AssertionError(f"dirty container {container} was lost")
        for container, one in list(self.open.items()):
            grant, one.fd = await self.world.begin(container)
            assert grant.size == len(one.data)
            one.lock_id, one.granted_end = grant.lock_id, grant.granted_end

    def _forget_connections(self) -> None:
        for _, fd in self.attached.values():
            os.close(fd)
        self.attached.clear()
        for one in self.open.values():
            os.close(one.fd)

    async def close(self) -> None:
        self._forget_connections()
        await self.stack.aclose()

    # --- steps ------------------------------------------------------------------------------------

    async def step(self) -> str:
        names = ["read", "read", "attach", "attach", "detach", "begin", "write", "write", "end", "change"]
        names += ["persist", "persist", "free", "ufs_file", "truncate"]
        name = self.random.choice(names)
        if self.random.random() < 0.04:
            crash = self.random.random() < 0.5
            await self.restart(crash=crash)
            name = "crash" if crash else "restart"
        else:
            try:
                await getattr(self, name)()
            except NoSpaceError:
                name += " (no space)"
        await self.world.settled()
        self.world.validate()
        return name

    def pick(self, among: dict[int, object]) -> int | None:
        return self.random.choice(sorted(among)) if among else None

    def bytes(self, limit: int) -> bytes:
        size = self.random.choice([0, 1, 4096, 100_000, MB, self.random.randrange(limit)])
        return bytes(size) if self.random.random() < 0.1 else self.random.randbytes(min(size, limit))

    async def ufs_file(self) -> None:
        self.next += 1
        data = self.bytes(3 * MB)
        source = self.world.ufs_file(f"f{self.next}", data)
        self.sealed[self.next] = Content(data, source)

    async def read(self) -> None:
        container = self.pick({**self.sealed, **self.open})
        if container is None:
            return
        content = self.sealed.get(container) or Content(bytes(self.open[container].data), None)
        offset = self.random.randrange(len(content.data) + 1)
        length = self.random.choice([1, 4096, 2 * MB])
        request = Read(5, container, len(content.data), content.source, offset, length)
        answer = await self.world.client.exchange(request)
        assert payload_of(answer) == content.data[offset : offset + length]

    async def attach(self) -> None:
        container = self.pick(dict(self.sealed))
        if container is None or len(self.attached) > 4:
            return
        content = self.sealed[container]
        found, fd = await self.world.attach(container, content.source, len(content.data))
        if not found.lock_id:
            return
        self.attached[found.lock_id] = (container, fd)
        if not content.data:
            return
        offset = self.random.randrange(len(content.data))
        length = min(self.random.choice([1, MB, 3 * MB]), len(content.data) - offset)
        await self.world.fetch(found.lock_id, offset, length)
        assert os.pread(fd, length, offset) == content.data[offset : offset + length]

    async def detach(self) -> None:
        lock_id = self.pick(dict(self.attached))
        if lock_id is not None:
            _, fd = self.attached.pop(lock_id)
            os.close(fd)
            await self.world.detach(lock_id)

    async def begin(self) -> None:
        if len(self.open) < 3:
            self.next += 1
            grant, fd = await self.world.begin(self.next)
            self.open[self.next] = Open(grant.lock_id, fd, bytearray(), grant.granted_end)

    async def change(self) -> None:
        """A sealed container becomes another one. Whoever has it attached sees the changes."""
        container = self.pick(dict(self.sealed))
        if container is None or len(self.open) >= 3:
            return
        content = self.sealed[container]
        self.next += 1
        size = len(content.data)
        grant, fd = await self.world.begin(self.next, container, size, content.source)
        assert grant.size == size
        self.open[self.next] = Open(grant.lock_id, fd, bytearray(content.data), grant.granted_end)
        if content.source is None:
            del self.sealed[container]

    async def write(self) -> None:
        container = self.pick(dict(self.open))
        if container is None:
            return
        one = self.open[container]
        data = self.bytes(MB)
        offset = self.random.randrange(len(one.data) + MB)
        end = offset + len(data)
        if self.random.random() < 0.5:
            await self.world.client.call(Write(one.lock_id, offset), data)
        else:
            if end > one.granted_end:
                one.granted_end = (await self.world.client.call(Reserve(one.lock_id, end))).granted_end
            os.pwrite(one.fd, data, offset)
        if data:
            one.data.extend(bytes(max(0, end - len(one.data))))
            one.data[offset:end] = data

    async def truncate(self) -> None:
        container = self.pick(dict(self.open))
        if container is not None:
            one = self.open[container]
            size = self.random.randrange(3 * MB)
            await self.world.client.call(Truncate(one.lock_id, size))
            del one.data[size:]
            one.data.extend(bytes(size - len(one.data)))

    async def end(self) -> None:
        container = self.pick(dict(self.open))
        if container is None:
            return
        one = self.open.pop(container)
        found = await self.world.client.call(EndWrite(one.lock_id, None))
        assert (found.size, found.is_sealed) == (len(one.data), True)
        os.close(one.fd)
        await self.world.detach(one.lock_id)
        self.sealed[container] = Content(bytes(one.data), None)

    async def persist(self) -> None:
        dirty = {c: content for c, content in self.sealed.items() if content.source is None}
        container = self.pick(dict(dirty))
        if container is not None:
            content = dirty[container]
            content.source = self.world.ufs_file(f"p{container}", content.data)
            slab = self.world.slabs.get(container)
            assert slab is not None
            self.world.slabs.mark_clean(slab)

    async def free(self) -> None:
        container = self.pick(dict(self.sealed))
        slab = self.world.slabs.get(container or 0)
        if container is not None and slab is not None:
            keeps = self.random.random() < 0.7
            is_dirty = self.sealed[container].source is None
            freed = self.world.slabs.free(slab, keep_dirty=keeps)
            assert freed == (not (keeps and is_dirty))
            if freed and is_dirty:
                del self.sealed[container]


@pytest.fixture
def shm() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="alluxiofuse-test-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("seed", range(int(os.environ.get("WORKER_MODEL_SEEDS", "4"))))
def test_random_operations(tmp_path: Path, shm: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "PATIENCE_S", 0.0)

    @trio_test
    async def run() -> None:
        (tmp_path / "ufs").mkdir()
        model = Model(tmp_path, shm, seed)
        await model.start()
        steps: list[str] = []
        try:
            for _ in range(STEPS):
                steps.append(await model.step())
            while model.attached:
                await model.detach()
            for container, content in model.sealed.items():
                size = len(content.data)
                assert await model.world.read_all(container, content.source, size) == content.data
        except BaseException:
            print("steps:", steps)
            raise
        finally:
            await model.close()

    run()
