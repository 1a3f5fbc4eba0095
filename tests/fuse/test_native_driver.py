"""The native session's loop, with a socket in the place of /dev/fuse and the test as the kernel."""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pyfuse3
import pytest
import trio
from trio.testing import trio_test

from alluxiofuse.fuse.native import abi
from alluxiofuse.fuse.native.abi import IN_HEADER, OUT_HEADER, REQUESTS, Op
from alluxiofuse.fuse.native.device import Device
from alluxiofuse.fuse.native.dispatch import Dispatcher
from alluxiofuse.fuse.native.driver import MAX_TASKS, NativeDriver


class Recorder:
    """Operations of which a test decides when and how they end."""

    def __init__(self) -> None:
        self.gates: dict[int, trio.Event] = {}
        self.running = 0
        self.most_running = 0
        self.forgotten: list[tuple[int, int]] = []
        self.written: list[bytes] = []

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if fh in self.gates:
                await self.gates[fh].wait()
            if fh == 13:
                raise pyfuse3.FUSEError(errno.ENOSPC)
            if fh == 14:
                raise ZeroDivisionError
            return b"%d" % fh
        finally:
            self.running -= 1

    async def write(self, fh: int, offset: int, data: memoryview, is_mapped: bool) -> int:
        if fh in self.gates:
            await self.gates[fh].wait()
        self.written.append(bytes(data))
        return len(data)

    async def forget(self, pairs: list[tuple[int, int]]) -> None:
        self.forgotten += pairs


class Kernel:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = trio.socket.from_stdlib_socket(sock)

    async def send(self, op: int, body: bytes, unique: int) -> None:
        size = IN_HEADER.size + len(body)
        await self._sock.send(IN_HEADER.pack(size, op, unique, 1, 0, 0, 1, 0, 0) + body)

    async def raw(self, data: bytes) -> None:
        await self._sock.send(data)

    async def read(self, unique: int, fh: int) -> None:
        await self.send(Op.READ, REQUESTS[Op.READ].struct.pack(fh, 0, 100, 0, 0, 0), unique)

    async def answer(self) -> tuple[int, int, bytes]:
        """(unique, errno, payload)"""
        data = await self._sock.recv(1 << 21)
        size, error, unique = OUT_HEADER.unpack_from(data)
        assert size == len(data)
        return unique, -error, data[16:]


@asynccontextmanager
async def session() -> AsyncIterator[tuple[Kernel, Recorder, NativeDriver]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    driver, operations = NativeDriver(), Recorder()
    driver._device = Device(theirs.detach())
    driver._dispatcher = Dispatcher(operations)  # type: ignore[arg-type]
    kernel = Kernel(ours)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver.answer)
            await kernel.send(Op.INIT, abi.INIT_IN.pack(7, 45, 1 << 20, 0xFFFFFFFF, 0xFFFFFFFF), 1)
            unique, code, payload = await kernel.answer()
            assert (unique, code, len(payload)) == (1, 0, 64)
            yield kernel, operations, driver
            for gate in operations.gates.values():
                gate.set()
            driver.terminate()
    driver.close(is_unmount=False)
    ours.close()


@trio_test
async def test_answers_in_any_order() -> None:
    async with session() as (kernel, operations, _):
        operations.gates = {1: trio.Event(), 2: trio.Event()}
        await kernel.read(11, 1)
        await kernel.read(12, 2)
        await kernel.read(13, 3)
        assert await kernel.answer() == (13, 0, b"3")
        operations.gates[2].set()
        assert await kernel.answer() == (12, 0, b"2")
        operations.gates[1].set()
        assert await kernel.answer() == (11, 0, b"1")


@trio_test
async def test_requests_beyond_the_limit_wait_and_are_answered() -> None:
    async with session() as (kernel, operations, _):
        gate = trio.Event()
        operations.gates = {1: gate}
        count = MAX_TASKS + 20
        for unique in range(2, 2 + count):
            await kernel.read(unique, 1)
        while operations.running < MAX_TASKS:  # noqa: ASYNC110 - the driver knows nothing of tests
            await trio.sleep(0.001)
        gate.set()
        assert {(await kernel.answer())[0] for _ in range(count)} == set(range(2, 2 + count))
        assert operations.most_running == MAX_TASKS
        await kernel.read(1, 5)
        assert await kernel.answer() == (1, 0, b"5")


@trio_test
async def test_data_of_a_write_that_waits_is_not_overwritten() -> None:
    async with session() as (kernel, operations, _):
        operations.gates = {fh: trio.Event() for fh in range(10)}
        for fh in range(10):
            body = REQUESTS[Op.WRITE].struct.pack(fh, 0, 1000, 0, 0, 0) + bytes([fh]) * 1000
            await kernel.send(Op.WRITE, body, fh + 2)
        for fh in reversed(range(10)):
            operations.gates[fh].set()
            assert (await kernel.answer())[:2] == (fh + 2, 0)
        assert operations.written == [bytes([fh]) * 1000 for fh in reversed(range(10))]


@trio_test
async def test_errors_are_answers() -> None:
    async with session() as (kernel, _, __):
        await kernel.read(2, 13)
        assert await kernel.answer() == (2, errno.ENOSPC, b"")
        await kernel.read(3, 14)
        assert await kernel.answer() == (3, errno.EIO, b"")
        await kernel.send(Op.IOCTL, bytes(32), 4)
        assert await kernel.answer() == (4, errno.ENOSYS, b"")
        await kernel.send(4242, b"", 5)
        assert await kernel.answer() == (5, errno.ENOSYS, b"")


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("CRITICAL", "alluxiofuse.fuse")
    return caplog


@trio_test
async def test_garbage_never_stops_the_loop(quiet: pytest.LogCaptureFixture) -> None:
    chance = random.Random(5)
    async with session() as (kernel, _, __):
        for unique in range(2, 300):
            body = chance.randbytes(chance.randrange(0, 120))
            op = chance.choice([*REQUESTS, 0, 63, 4095])
            if op in (Op.DESTROY, Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT):
                continue
            await kernel.send(op, body, unique)
            assert (await kernel.answer())[0] == unique
            await kernel.raw(chance.randbytes(chance.randrange(1, 40)))  # no header: no answer
        await kernel.read(1000, 3)
        assert await kernel.answer() == (1000, 0, b"3")


@trio_test
async def test_an_interrupted_request_is_answered() -> None:
    async with session() as (kernel, operations, _):
        operations.gates = {1: trio.Event()}
        await kernel.read(2, 1)
        await kernel.read(4, 3)
        assert (await kernel.answer())[0] == 4, "the first one waits"
        await kernel.send(Op.INTERRUPT, struct.pack("=Q", 2), 3)
        assert await kernel.answer() == (2, errno.EINTR, b"")
        await kernel.send(Op.INTERRUPT, struct.pack("=Q", 2), 5)  # too late: no such request
        await kernel.read(6, 3)
        assert await kernel.answer() == (6, 0, b"3")


@trio_test
async def test_forgets_are_not_answered() -> None:
    async with session() as (kernel, operations, _):
        await kernel.send(Op.FORGET, struct.pack("=Q", 4), 2)
        pair = struct.pack("=QQ", 8, 1)
        await kernel.send(Op.BATCH_FORGET, struct.pack("=II", 2, 0) + pair + pair, 3)
        await kernel.read(4, 3)
        assert (await kernel.answer())[0] == 4
        assert operations.forgotten == [(1, 4), (8, 1), (8, 1)]


@trio_test
async def test_a_kernel_of_another_major_version() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    driver = NativeDriver()
    driver._device = Device(theirs.detach())
    driver._dispatcher = Dispatcher(Recorder())  # type: ignore[arg-type]
    kernel = Kernel(ours)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver.answer)
            await kernel.send(Op.INIT, abi.INIT_IN.pack(8, 1, 1 << 20, 0, 0), 1)
            _, code, payload = await kernel.answer()
            assert code == 0
            assert abi.INIT_OUT.unpack(payload)[0] == 7, "the kernel then begins anew with our version"
            await kernel.send(Op.INIT, abi.INIT_IN.pack(7, 45, 1 << 20, 0, 0), 2)
            assert (await kernel.answer())[1] == 0
            driver.terminate()
    driver.close(is_unmount=False)
    ours.close()


def test_a_device_that_is_gone() -> None:
    reader, writer = os.pipe()
    device: Any = Device(writer)
    os.close(reader)
    device.close()
    device.close()
    device.send(b"nobody hears it")
