"""The native session: takes requests from the kernel one after another and answers them.

One task at a time *leads*: it reads requests and handles each as far as it goes without waiting.
A handler that must wait makes its task give the lead to another one first, and goes on when what it
waits for has come. So what is in memory is answered without any switch between tasks.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import pyfuse3
import trio

from alluxiofuse.client.intents import asked_by
from alluxiofuse.client.reading import InSlab
from alluxiofuse.errors import UserError
from alluxiofuse.fuse.keeping import Kept
from alluxiofuse.fuse.memory import Memory
from alluxiofuse.fuse.native import abi, messages
from alluxiofuse.fuse.native.abi import Init, Op
from alluxiofuse.fuse.native.device import Device, Ended, max_read_bytes, mount
from alluxiofuse.fuse.native.dispatch import Dispatcher, Handler, Info, Payload, reply_entry
from alluxiofuse.fuse.native.messages import Malformed, Request

log = logging.getLogger("alluxiofuse.fuse")

MAX_TASKS = 256
"""Requests under way at once; further ones wait in the kernel."""
MAX_IDLE_TASKS = 4
YIELD_S = 0.002
"""Other tasks of the process get their turn at least this often."""
SPIN_S = 0.00005
"""After an answer the next request is looked for again and again for so long: a program that does one
thing after another sends it by then, and a turn of the event loop and being woken cost more than that."""
MAX_MISSES = 4
"""Looked in vain so many times in a row: no more, until requests follow each other soon again."""
INIT_TIMEOUT_S = 10.0
_WANTED = (
    Init.ASYNC_READ
    | Init.ATOMIC_O_TRUNC
    | Init.EXPORT_SUPPORT
    | Init.BIG_WRITES
    | Init.AUTO_INVAL_DATA
    | Init.DO_READDIRPLUS
    | Init.ASYNC_DIO
    | Init.PARALLEL_DIROPS
    | Init.ABORT_ERROR
    | Init.MAX_PAGES
    | Init.INIT_EXT
    | Init.HANDLE_KILLPRIV_V2
    | Init.DIRECT_IO_ALLOW_MMAP
    | Init.HAS_RESEND
    | Init.PASSTHROUGH
)
_INTERRUPTIBLE = frozenset(
    {Op.LOOKUP, Op.GETATTR, Op.READ, Op.READDIR, Op.READDIRPLUS, Op.GETXATTR, Op.LISTXATTR}
    | {Op.STATFS, Op.READLINK, Op.ACCESS, Op.FSYNC, Op.FSYNCDIR, Op.SETLKW}
)
"""What a signal may end early: nothing is half done then."""


class Stepped:
    """Awaits a coroutine; calls `on_wait` (once) before it waits for anything."""

    __slots__ = ("_coroutine", "_on_wait")

    def __init__(self, coroutine: Coroutine[Any, Any, Payload], on_wait: Callable[[], None]) -> None:
        self._coroutine = coroutine
        self._on_wait = on_wait

    def __await__(self) -> Generator[Any, Any, Payload]:
        coroutine = self._coroutine
        try:
            trap = coroutine.send(None)
            self._on_wait()
            while True:
                try:
                    value = yield trap
                except BaseException as exc:
                    trap = coroutine.throw(exc)
                else:
                    trap = coroutine.send(value)
        except StopIteration as done:
            result: Payload = done.value
            return result


class NativeKernel:
    """Notifications; see `invalidation.Kernel`."""

    def __init__(self, device: Callable[[], Device | None]) -> None:
        self._device = device

    def invalidate_inode(self, inode: int, attr_only: bool = False) -> None:
        self._notify(messages.invalidate_inode(inode, attr_only=attr_only))

    def invalidate_entry(self, inode_p: int, name: bytes) -> None:
        self._notify(messages.invalidate_entry(inode_p, name))

    def _notify(self, message: bytes) -> None:
        device = self._device()
        if device is None:
            return
        try:
            device.notify(message)
        except OSError as exc:
            if exc.errno != errno.ENOENT:
                raise


class _Task:
    """What belongs to one task: its buffer, which a request's data lies in until it is answered."""

    __slots__ = ("buffer", "is_leading", "view")

    def __init__(self) -> None:
        self.buffer = bytearray(abi.BUFFER_BYTES)
        self.view = memoryview(self.buffer)
        self.is_leading = False


class NativeDriver:
    """See `session.Driver`."""

    name = "native"
    reply_entry = staticmethod(reply_entry)
    new_attributes: Any = messages.Attributes
    new_info: Any = Info

    def __init__(self) -> None:
        self._device: Device | None = None
        self._max_read_bytes = max_read_bytes()
        self.kernel = NativeKernel(lambda: self._device)
        self._dispatcher: Dispatcher | None = None
        self._nursery: trio.Nursery | None = None
        self._lot = trio.lowlevel.ParkingLot()
        self._task_count = 0
        self._has_leader = False
        self._is_over = False
        self._scope = trio.CancelScope()
        """Of the leader's waiting for requests; cancelled by `terminate`."""
        self._waiting: dict[int, trio.CancelScope] = {}
        """unique -> of a request that may be interrupted and whose handler waits."""
        self._malformed_count = 0
        self._memory: Memory | None = None
        self._is_resumed = False
        self._flags = self._minor = 0
        self._on_negotiated: Callable[[], None] = lambda: None
        self._offers_passthrough = self._passes = False

    @property
    def max_read_bytes(self) -> int:
        return self._max_read_bytes

    def mount(self, operations: Any, mountpoint: str, options: Any, fsname: str) -> None:
        self._dispatcher, self._memory = Dispatcher(operations), operations.memory
        self._device = mount(mountpoint, options, fsname, self._max_read_bytes)

    def keep(self, kept: Kept, mountpoint: str) -> None:
        """Let the mount outlive this daemon, if this kernel can do that."""
        assert self._device is not None
        kept.mounted(self._device.fd, mountpoint)

        def negotiated() -> None:
            if self._flags & Init.HAS_RESEND and self._minor >= abi.INC_EPOCH_MINOR:
                kept.can_resume(
                    {"flags": self._flags, "max_read": self._max_read_bytes, "passes": self._passes}
                )
            else:
                log.warning("the mount does not outlive its daemon: that takes Linux 6.16 or newer")

        self._on_negotiated = negotiated

    def resume(self, operations: Any, fd: int, negotiated: dict[str, int]) -> None:
        """Instead of `mount`: go on where a former daemon ended."""
        self._dispatcher, self._memory = Dispatcher(operations), operations.memory
        self._device, self._is_resumed = Device(fd), True
        self._flags, self._max_read_bytes = negotiated["flags"], negotiated["max_read"]
        self._dispatcher.negotiated(self._flags)
        self._passes = bool(negotiated["passes"])
        if self._passes:
            self._dispatcher.pass_by(self._device)

    # --- INIT -------------------------------------------------------------------------------------------

    async def _start(self, device: Device) -> None:
        """The first request is INIT (again, with a lower version, if ours is too high for it)."""
        task = _Task()
        with trio.move_on_after(INIT_TIMEOUT_S):
            while True:
                count = device.receive(task.buffer)
                if not count:
                    await trio.lowlevel.wait_readable(device.fd)
                    continue
                request = messages.decode(task.view[:count])
                if request.opcode != Op.INIT:
                    device.send(messages.failure(request.unique, errno.EIO))
                    continue
                if self._answer_init(device, request):
                    self._try_passthrough(device)
                    self._on_negotiated()
                    return
        raise UserError("the kernel did not begin the FUSE session")

    def _answer_init(self, device: Device, request: Request) -> bool:
        major, minor, max_readahead, offered = messages.init_fields(request)
        if major > abi.VERSION:
            answer = abi.INIT_OUT.pack(abi.VERSION, abi.MINOR, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
            device.send(messages.header(request.unique, len(answer)), answer)
            return False
        if major < abi.VERSION or minor < abi.MIN_MINOR:
            device.send(messages.failure(request.unique, errno.EPROTO))
            raise UserError(f"the kernel's FUSE protocol {major}.{minor} is too old")
        flags = int(_WANTED) & offered
        self._flags, self._minor = flags, minor
        assert self._dispatcher is not None
        self._dispatcher.negotiated(flags)
        self._offers_passthrough = bool(flags & Init.PASSTHROUGH)
        answer = abi.INIT_OUT.pack(
            abi.VERSION,
            min(minor, abi.MINOR),
            max_readahead,
            flags & 0xFFFFFFFF,
            64,
            48,
            abi.MAX_WRITE,
            1,
            abi.MAX_PAGES,
            0,
            flags >> 32,
            1 if flags & Init.PASSTHROUGH else 0,
            0,
        )
        device.send(messages.header(request.unique, len(answer)), answer)
        return True

    def _try_passthrough(self, device: Device) -> None:
        """Whether the kernel takes descriptors is known when it has taken one."""
        assert self._dispatcher is not None
        if not self._offers_passthrough:
            log.info("no passthrough: this kernel does not offer it (Linux 6.9 does)")
            return
        fd = os.memfd_create("passthrough")
        try:
            device.close_backing(device.open_backing(fd))
        except OSError as exc:
            log.info("no passthrough: %s (CAP_SYS_ADMIN is needed)", exc.strerror)
            return
        finally:
            os.close(fd)
        log.info("passthrough: the kernel itself reads and writes files that a local tier holds whole")
        self._passes = True
        self._dispatcher.pass_by(device)

    # --- the loop ---------------------------------------------------------------------------------------

    async def answer(self) -> None:
        """Until the kernel lets go of the mount, or `terminate`. Handlers under way are waited for."""
        device = self._device
        assert device is not None
        try:
            if self._is_resumed:
                # What the kernel believes of names may be out of date; what is unanswered comes again.
                device.notify(messages.void_names())
                device.notify(messages.resend())
            else:
                await self._start(device)
        except (Ended, OSError) as exc:
            log.debug("the session ends at once: %s", exc)
            return
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._give_lead()

    def _give_lead(self) -> None:
        """Somebody else reads on."""
        self._has_leader = False
        if self._is_over or self._nursery is None:
            return
        if self._lot:
            self._has_leader = True
            self._lot.unpark()
        elif self._task_count < MAX_TASKS:
            self._has_leader = True
            self._task_count += 1
            self._nursery.start_soon(self._work)

    async def _work(self) -> None:
        """One task: leads, loses the lead when it must wait, and waits for its turn to lead again."""
        task = _Task()
        try:
            while not self._is_over:
                task.is_leading = True
                await self._lead(task)
                if self._is_over:
                    break
                if not self._has_leader:
                    self._has_leader = True
                    continue
                if len(self._lot) >= MAX_IDLE_TASKS:
                    return
                await self._lot.park()
        finally:
            self._task_count -= 1
            if self._is_over:
                self._lot.unpark_all()

    async def _lead(self, task: _Task) -> None:
        device, dispatcher = self._device, self._dispatcher
        assert device is not None
        assert dispatcher is not None
        view, buffer = task.view, task.buffer
        yielded_at = time.monotonic()
        misses = 0

        def lose_lead() -> None:
            if task.is_leading:
                task.is_leading = False
                self._give_lead()

        while task.is_leading and not self._is_over:
            try:
                count = device.receive(buffer)
                if not count and misses < MAX_MISSES and self._is_alone:
                    count = device.receive_within(SPIN_S, buffer)
                    misses = 0 if count else misses + 1
            except Ended:
                self._end()
                return
            if not count:
                waits_from = time.monotonic()
                if not await self._wait(device):
                    return
                yielded_at = time.monotonic()
                if yielded_at - waits_from < MAX_MISSES * SPIN_S:
                    misses = 0
                continue
            try:
                request = messages.decode(view[:count])
            except Malformed as exc:
                self._complain(device, exc)
                continue
            if request.opcode == Op.INTERRUPT:
                scope = self._waiting.get(request.fields[0] & ~abi.RESENT)
                if scope is not None:
                    scope.cancel()
                continue
            if self._memory is None:
                await self._handle(device, dispatcher, request, lose_lead)
            else:
                await self._handle_kept(device, dispatcher, request, lose_lead, self._memory)
            if task.is_leading and time.monotonic() - yielded_at > YIELD_S:
                await trio.lowlevel.checkpoint()
                yielded_at = time.monotonic()

    @property
    def _is_alone(self) -> bool:
        """No handler waits for anything that the event loop would have to see."""
        return self._task_count - len(self._lot) == 1

    async def _wait(self, device: Device) -> bool:
        """For a request; False: the session is over."""
        with self._scope:
            try:
                await trio.lowlevel.wait_readable(device.fd)
            except (trio.ClosedResourceError, OSError):
                self._end()
        if self._scope.cancelled_caught:
            self._end()
        self._scope = trio.CancelScope()
        return not self._is_over

    async def _handle_kept(
        self,
        device: Device,
        dispatcher: Dispatcher,
        request: Request,
        lose_lead: Callable[[], None],
        memory: Memory,
    ) -> None:
        """So that the next daemon can tell what was done of it, should this one end before it is answered."""
        unique = request.unique & ~abi.RESENT
        asked_by.set(unique)
        memory.begin(unique)
        if unique != request.unique:
            await Stepped(self._drop_unanswered(dispatcher, unique), lose_lead)
        await self._handle(device, dispatcher, request, lose_lead)
        memory.end(unique)

    @staticmethod
    async def _drop_unanswered(dispatcher: Dispatcher, unique: int) -> None:
        try:
            await dispatcher.drop_unanswered(unique)
        except pyfuse3.FUSEError as exc:
            log.info("what was opened for a request that comes again: %s", exc)

    async def _handle(
        self, device: Device, dispatcher: Dispatcher, request: Request, lose_lead: Callable[[], None]
    ) -> None:
        handler = dispatcher.handler_of(request)
        if handler is None:
            device.send(messages.failure(request.unique, errno.ENOSYS))
            return
        payload: Payload
        code = 0
        try:
            if request.opcode in _INTERRUPTIBLE:
                payload, code = await self._interruptible(handler, request, lose_lead)
            else:
                payload = await Stepped(handler(request), lose_lead)  # type: ignore[arg-type]
        except pyfuse3.FUSEError as exc:
            code = exc.errno
        except OSError as exc:
            code = exc.errno or errno.EIO
        except Exception:
            log.exception("a request (opcode %d) failed unexpectedly", request.opcode)
            code = errno.EIO
        if code:
            device.send(messages.failure(request.unique, code))
        elif isinstance(payload, InSlab):
            self._send_from_slab(device, request.unique, payload)
        elif payload is not None:
            device.send(messages.header(request.unique, len(payload)), payload)

    @staticmethod
    def _send_from_slab(device: Device, unique: int, data: InSlab) -> None:
        """Before any await, as `data` is good until then."""
        try:
            if device.send_from(unique, data.fd, data.offset, data.length):
                return
            buffer = os.pread(data.fd, data.length, data.offset)
        except OSError as exc:
            log.warning("reading a slab failed: %s", exc.strerror)
            device.send(messages.failure(unique, errno.EIO))
            return
        device.send(messages.header(unique, len(buffer)), buffer)

    async def _interruptible(
        self, handler: Handler, request: Request, lose_lead: Callable[[], None]
    ) -> tuple[Payload, int]:
        unique = request.unique & ~abi.RESENT

        def waits() -> None:
            self._waiting[unique] = scope
            lose_lead()

        with trio.CancelScope() as scope:
            try:
                return await Stepped(handler(request), waits), 0  # type: ignore[arg-type]
            finally:
                self._waiting.pop(unique, None)
        return None, errno.EINTR

    def _complain(self, device: Device, exc: Malformed) -> None:
        self._malformed_count += 1
        if self._malformed_count == 1:
            log.error("the kernel sent a request that can't be understood: %s", exc)
        if exc.unique:
            device.send(messages.failure(exc.unique, errno.EIO))

    # --- the end ----------------------------------------------------------------------------------------

    def _end(self) -> None:
        self._is_over = True
        self._lot.unpark_all()

    def terminate(self) -> None:
        """`answer` returns as soon as the requests under way are answered."""
        self._end()
        self._scope.cancel()

    def close(self, *, is_unmount: bool) -> None:
        """Lets go of the device. The mount, if there is one still, is cleared away by the caller."""
        device, self._device = self._device, None
        if device is not None:
            device.close()
