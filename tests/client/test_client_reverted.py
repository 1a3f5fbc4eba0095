"""The home found nothing changed and made the content its base again, and its client died before it told
the master of that."""

from __future__ import annotations

import pytest
from client_world import IN_PROCESS, ROOT, TCP, World, in_world, until

from alluxiofuse.ids import ROOT_INO
from alluxiofuse.rpc.inprocess import InProcess
from alluxiofuse.wire import master_ops
from alluxiofuse.wire.worker_ops import BeginWrite, EndWrite

DATA = b"what was there before" * 1000


def _is_stored(world: World, data: bytes) -> bool:
    path = world.ufs / "f"
    return path.exists() and path.read_bytes() == data


async def _open_in_vain_and_die(world: World) -> int:
    """The file's inode number."""
    async with world.client("dying") as dying:
        ino = (await dying.fs.lookup(ROOT, ROOT_INO, b"f")).ino
        session_id = dying.fs._session.id
        part = world.workers["w1"]
        await dying.master.call(master_ops.Open(ROOT, session_id, ino, True))
        layout = await dying.master.call(master_ops.BeginWrite(session_id, ino, part.worker_id, False))
        worker = InProcess(part.worker.service, "dying")
        request = BeginWrite(
            session_id, layout.container, layout.base_container, layout.base_size, layout.source, 0, False
        )
        grant = await worker.call(request)
        end = await worker.call(EndWrite(grant.lock_id, b"", True))
        assert end.is_reverted
        await worker.aclose()
    return ino


@pytest.mark.parametrize("kind", [IN_PROCESS, TCP])
@pytest.mark.parametrize("is_persisted", [False, True])
def test_others_read_and_write_the_base(kind: str, is_persisted: bool) -> None:
    async def test(world: World) -> None:
        async with world.client("other") as other:
            await other.put(b"f", DATA)
            if is_persisted:
                await until(lambda: _is_stored(world, DATA))
            ino = await _open_in_vain_and_die(world)
            assert await other.get(b"f") == DATA
            other_id = other.fs._session.id

            async def is_over() -> bool:
                opened = await other.master.call(master_ops.Open(ROOT, other_id, ino, False))
                await other.master.call(master_ops.Release(other_id, [ino]))
                return not opened.layout.home

            await until(is_over)
            assert await other.get(b"f") == DATA
            # And where the master does not know of it yet when the next one writes.
            await _open_in_vain_and_die(world)
            file = await other.open(b"f", 2)
            await file.write(len(DATA), b"more")
            await other.close(file)
            assert await other.get(b"f") == DATA + b"more"
            await until(lambda: _is_stored(world, DATA + b"more"))

    in_world(kind)(test)
