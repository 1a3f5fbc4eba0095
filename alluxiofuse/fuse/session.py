"""A session: mounting, answering the kernel, and ending without losing anything.

A *driver* talks to the kernel: `pyfuse3_driver`, or `native`. A process serves one mount.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import pyfuse3
import trio

from alluxiofuse.client.filesystem import FileSystem
from alluxiofuse.errors import UserError
from alluxiofuse.fuse import mountpoint as mountpoints
from alluxiofuse.fuse.invalidation import Invalidator, Kernel
from alluxiofuse.fuse.keeping import Kept
from alluxiofuse.fuse.mountopts import MountOptions
from alluxiofuse.fuse.native.device import why_no_passthrough
from alluxiofuse.fuse.native.driver import NativeDriver
from alluxiofuse.fuse.operations import Operations, ReplyEntry
from alluxiofuse.fuse.passthrough import NewInfo
from alluxiofuse.fuse.pyfuse3_driver import PyFuse3Driver
from alluxiofuse.fuse.takeover import take_over

log = logging.getLogger("alluxiofuse.fuse")

READ_AHEAD_BYTES = 4 << 20
MAX_BACKGROUND = 64
"""Read-ahead requests that the kernel sends at once; its own default is 12."""
FLUSH_TIMEOUT_S = 20.0
GOODBYE_TIMEOUT_S = 3.0
"""How long after an unmount the kernel may take to end the connection."""
JOIN_TIMEOUT_S = 5.0
HAND_OVER_S = 5.0
"""How long what is under way may take before it is left to the next daemon."""
COMES_AGAIN_S = 60.0
"""By then a request that comes again has come."""
_is_serving = False


async def serve(
    fs: FileSystem,
    mountpoint: str,
    options: MountOptions,
    *,
    on_ready: Callable[[], None] | None = None,
    handle_signals: bool = True,
    kept: Kept | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mount `fs` at `mountpoint` and serve it until it is unmounted (then returns), a SIGTERM or
    SIGINT comes (with `handle_signals`; unmounts, then returns), or the task is cancelled (unmounts).

    Unmounting ourselves: an unmount proper; if the mount is in use, what is open for writing is
    flushed, and the mount is detached: programs that still use it then get errors. `fs` must be
    running before and until this has returned; cancel it afterwards, not together with this task.

    `kept`: the mount outlives this process. Then, unless its end was ordered (`kept.is_stopping`), it is left
    as it is; and when another daemon takes over, this does not return.

    `on_ready` and `task_status` tell that the mount answers. UserError when it can't be mounted.
    """
    global _is_serving
    if _is_serving:
        raise UserError("this process serves a mount already")
    _is_serving = True
    try:
        await _Session(fs, mountpoint, options, kept).run(on_ready, handle_signals, task_status)
    finally:
        _is_serving = False


class Driver(Protocol):
    """Talks to the kernel for a session."""

    @property
    def name(self) -> str: ...

    @property
    def kernel(self) -> Kernel:
        """Takes notifications, from any thread."""

    @property
    def reply_entry(self) -> ReplyEntry: ...

    @property
    def new_attributes(self) -> Callable[[], pyfuse3.EntryAttributes]: ...

    @property
    def new_info(self) -> NewInfo: ...

    @property
    def max_read_bytes(self) -> int:
        """The kernel asks for no more at once."""

    def mount(self, operations: Operations, mountpoint: str, options: MountOptions, fsname: str) -> None:
        """UserError in one line when it can't be done."""

    async def answer(self) -> None:
        """Answers requests until the kernel lets go of the mount, or `terminate`."""

    def terminate(self) -> None:
        """Let `answer` return once what is under way is answered."""

    def close(self, *, is_unmount: bool) -> None:
        """After `answer` has returned. `is_unmount`: something of ours may be at the mountpoint still."""


def choose_driver(options: MountOptions) -> tuple[Driver, str]:
    """And why."""
    if options.session == "native":
        return NativeDriver(), "asked for"
    if options.session == "pyfuse3":
        return PyFuse3Driver(), "asked for"
    reason = why_no_passthrough()
    return (PyFuse3Driver(), reason) if reason else (NativeDriver(), "passthrough is possible")


class _Session:
    def __init__(
        self, fs: FileSystem, mountpoint: str, options: MountOptions, kept: Kept | None = None
    ) -> None:
        self._kept = kept
        self._driver, self._reason = choose_driver(options)
        self._fs = fs
        # Once it is mounted it would ask us.
        is_takeover = kept is not None and kept.is_takeover
        self._mountpoint = mountpoint if is_takeover else os.path.realpath(mountpoint)
        self._options = options
        kernel = self._driver.kernel
        self._operations = Operations(
            fs,
            root_ino=options.root_ino,
            cache_limit_s=options.cache_limit_s,
            kernel=kernel,
            reply_entry=self._driver.reply_entry,
            new_attributes=self._driver.new_attributes,
            memory=None if kept is None else kept.memory,
            new_info=self._driver.new_info,
        )
        self._invalidator = Invalidator(kernel, self._operations.view.reset)
        self._ended = trio.Event()
        """The kernel has let go of the session, or the session was terminated."""
        self._answering = trio.CancelScope(shield=True)
        self._is_left = False
        """The mount stays, for another daemon."""
        self._is_detached = False
        """Unmounted lazily: nothing of ours is at the mountpoint any more."""
        self._device = ""

    async def run(
        self,
        on_ready: Callable[[], None] | None,
        handle_signals: bool,
        task_status: trio.TaskStatus[None],
    ) -> None:
        await self._fs.getattr(self._options.root_ino)  # a mount that can't answer is none
        view, kept = self._operations.view, self._kept
        if kept is None or not kept.is_takeover:
            self._mount()
        view.connect(self._invalidator)
        self._invalidator.start()
        self._fs.set_listener(view)
        if kept is not None and kept.is_takeover:
            await self._take_over(kept)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._answer)
                try:
                    await self._until_ended(nursery, on_ready, handle_signals, task_status)
                finally:
                    if kept is not None and not (kept.is_stopping or self._ended.is_set()):
                        self._leave()
                    with trio.CancelScope(shield=True):
                        await self._unmount()
                    if kept is not None and not self._is_left:
                        kept.ended()
                nursery.cancel_scope.cancel()
        finally:
            self._fs.set_listener(None)
            self._close()

    def _mount(self) -> None:
        fsname = plain(self._options.fsname)
        self._driver.mount(self._operations, self._mountpoint, self._options, fsname)
        mount = mountpoints.mount_at(self._mountpoint)
        self._device = mount.device if mount is not None else ""
        if self._kept is not None and isinstance(self._driver, NativeDriver):
            self._driver.keep(self._kept, self._mountpoint)
        log.info("mounted at %s (session=%s: %s)", self._mountpoint, self._driver.name, self._reason)

    async def _take_over(self, kept: Kept) -> None:
        """What a former daemon has mounted."""
        assert isinstance(self._driver, NativeDriver)
        mount = mountpoints.mount_at(self._mountpoint)
        self._device = mount.device if mount is not None else ""
        started_at = trio.current_time()
        # First: how files are opened again depends on whether the kernel takes slabs.
        self._driver.resume(self._operations, kept.fuse, kept.negotiated)
        await take_over(self._operations, kept.memory, self._invalidator)
        log.info(
            "took the mount at %s over with %d open files and directories in %.2f s",
            self._mountpoint,
            len(kept.memory.former_handles),
            trio.current_time() - started_at,
        )

    async def _follow_keeper(self, kept: Kept, stop: trio.Event) -> None:
        if not await kept.wait():
            log.warning("the keeper of %s is gone: unmounting", self._mountpoint)
            kept.is_stopping = True
            stop.set()
            return
        log.info("handing %s over to another daemon", self._mountpoint)
        self._is_left = True
        self._fs.leave()
        self._driver.terminate()
        with trio.move_on_after(HAND_OVER_S):
            await self._ended.wait()
        kept.leave()

    async def _answer(self) -> None:
        """Shielded: a request that is cancelled is never answered, and its program hangs."""
        try:
            with self._answering:
                await self._driver.answer()
        finally:
            self._ended.set()

    async def _until_ended(
        self,
        nursery: trio.Nursery,
        on_ready: Callable[[], None] | None,
        handle_signals: bool,
        task_status: trio.TaskStatus[None],
    ) -> None:
        stop = trio.Event()
        if handle_signals:
            await nursery.start(self._wait_for_signal, stop)
        if self._kept is not None:
            nursery.start_soon(self._follow_keeper, self._kept, stop)
            nursery.start_soon(self._drop_former_notes, self._kept)
        await self._try_out()
        await trio.to_thread.run_sync(tune, self._mountpoint, self._options, self._driver.max_read_bytes)
        task_status.started()
        if on_ready is not None:
            on_ready()
        nursery.start_soon(_first, self._ended, stop)
        await stop.wait()

    async def _try_out(self) -> None:
        """The mount answers when this returns. Asked by another process: one that waits for an answer of its
        own can't be killed, and keeps its end of the session open while it does not die."""
        try:
            await trio.run_process(
                ["stat", "-f", "--", self._mountpoint], capture_stdout=True, capture_stderr=True, check=False
            )
        except OSError as exc:
            log.debug("stat(1): %s", exc.strerror)  # Who asks first finds out, then.

    @staticmethod
    async def _drop_former_notes(kept: Kept) -> None:
        await trio.sleep(COMES_AGAIN_S)
        kept.memory.drop_former()

    async def _wait_for_signal(
        self, stop: trio.Event, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                if stop.is_set():  # a second one: hurry
                    self._driver.terminate()
                log.info("%s: unmounting %s", signal.Signals(number).name, self._mountpoint)
                stop.set()

    def _leave(self) -> None:
        """Something has failed: another daemon shall go on with the mount."""
        log.error("leaving %s to another daemon", self._mountpoint)
        self._is_left = True
        self._fs.leave()
        self._answering.cancel()

    async def _unmount(self) -> None:
        if self._ended.is_set() or self._is_left:
            return
        if await self._try_umount(is_lazy=False):
            # The kernel has said goodbye; whatever is left are requests already received. Unless a
            # copy of the mount lives on in another mount namespace (a container's): then never.
            with trio.move_on_after(GOODBYE_TIMEOUT_S):
                await self._ended.wait()
        if self._ended.is_set():
            return
        with trio.move_on_after(FLUSH_TIMEOUT_S) as scope:
            await self._operations.flush_all()
        if scope.cancelled_caught:
            log.error("files open for writing were not flushed in %.0f s", FLUSH_TIMEOUT_S)
        if mountpoints.mount_at(self._mountpoint) is None:
            self._is_detached = True
        else:
            self._is_detached = await self._try_umount(is_lazy=True)
        self._driver.terminate()
        with trio.move_on_after(FLUSH_TIMEOUT_S):
            await self._ended.wait()
        self._answering.cancel()

    async def _try_umount(self, *, is_lazy: bool) -> bool:
        try:
            await trio.to_thread.run_sync(
                lambda: mountpoints.umount(self._mountpoint, is_lazy=is_lazy), abandon_on_cancel=False
            )
        except UserError as exc:
            log.info("%s", exc.message)
            return False
        return True

    def _close(self) -> None:
        """The session is over: a notification must not find its memory freed."""
        self._invalidator.close()
        if not self._invalidator.join(JOIN_TIMEOUT_S):
            # It waits in the kernel for a request that nobody answers any more: aborting ends both.
            if not self._is_left:
                log.warning("a cache invalidation is stuck: aborting the connection")
                _abort(self._mountpoint)
            if self._is_left or not self._invalidator.join(JOIN_TIMEOUT_S):
                log.error("it stays stuck: the session is left to the end of the process")
                return
        self._driver.close(is_unmount=not self._is_detached and not self._is_left)
        if self._is_left:
            return
        left = mountpoints.mount_at(self._mountpoint)
        if left is not None and left.is_ours and left.device == self._device:
            # The connection was aborted (umount --force, or in /sys): libfuse leaves such a mount.
            with suppress(UserError):
                mountpoints.umount(self._mountpoint, is_lazy=True)


async def _first(ended: trio.Event, stop: trio.Event) -> None:
    await ended.wait()
    stop.set()


def plain(fsname: str) -> str:
    """For /proc/mounts: pyfuse3 takes ASCII only."""
    return "".join(
        char if 32 <= ord(char) < 127 else "".join(f"%{byte:02X}" for byte in os.fsencode(char))
        for char in fsname or "alluxiofuse"
    )


def tune(mountpoint: str, options: MountOptions, max_read_bytes: int) -> None:
    """Larger read-ahead, in whole requests, and more of it at once. Only root can; without it reads are
    slower, no more."""
    if os.geteuid() != 0:
        return
    mount = mountpoints.mount_at(mountpoint)
    if mount is None:
        return
    read_ahead = READ_AHEAD_BYTES if options.read_ahead_bytes is None else options.read_ahead_bytes
    if read_ahead > max_read_bytes:
        read_ahead -= read_ahead % max_read_bytes
    _write_setting(Path("/sys/class/bdi") / mount.device / "read_ahead_kb", read_ahead >> 10)
    connection = Path("/sys/fs/fuse/connections") / mount.device.partition(":")[2]
    _write_setting(connection / "max_background", MAX_BACKGROUND)


def _abort(mountpoint: str) -> None:
    """Whatever waits in the kernel gets an error (MNT_FORCE); root only."""
    with suppress(UserError):
        mountpoints.umount(mountpoint, is_forced=True)


def _write_setting(path: Path, value: int) -> None:
    try:
        path.write_text(f"{value}\n")
    except OSError as exc:
        log.debug("%s was not set: %s", path, exc)
