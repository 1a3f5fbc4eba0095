"""pyfuse3's session: mounting, answering the kernel, and ending without losing anything.

A process can serve one mount (pyfuse3 keeps its session in a global).
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyfuse3
import trio

from alluxiofuse.client.filesystem import FileSystem
from alluxiofuse.errors import UserError
from alluxiofuse.fuse import mountpoint as mountpoints
from alluxiofuse.fuse.invalidation import Invalidator, PyFuse3Kernel
from alluxiofuse.fuse.mountopts import MountOptions
from alluxiofuse.fuse.operations import Operations

log = logging.getLogger("alluxiofuse.fuse")

IDLE_TASKS = 8
"""Tasks that wait for a request; when all are busy another is started (docs/fuse.md: measured)."""
MAX_TASKS = 256
"""Requests under way at once; one that waits for a master that is away must not stop the others."""
READ_AHEAD_BYTES = 4 << 20
MAX_BACKGROUND = 64
"""Read-ahead requests that the kernel sends at once; its own default is 12."""
FLUSH_TIMEOUT_S = 20.0
GOODBYE_TIMEOUT_S = 3.0
"""How long after an unmount the kernel may take to end the connection."""
JOIN_TIMEOUT_S = 5.0
_is_serving = False


async def serve(
    fs: FileSystem,
    mountpoint: str,
    options: MountOptions,
    *,
    on_ready: Callable[[], None] | None = None,
    handle_signals: bool = True,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mount `fs` at `mountpoint` and serve it until it is unmounted (then returns), a SIGTERM or
    SIGINT comes (with `handle_signals`; unmounts, then returns), or the task is cancelled (unmounts).

    Unmounting ourselves: an unmount proper; if the mount is in use, what is open for writing is
    flushed, and the mount is detached: programs that still use it then get errors. `fs` must be
    running before and until this has returned; cancel it afterwards, not together with this task.

    `on_ready` and `task_status` tell that the mount answers. UserError when it can't be mounted.
    """
    global _is_serving
    if _is_serving:
        raise UserError("this process serves a mount already")
    _is_serving = True
    try:
        await _Session(fs, mountpoint, options).run(on_ready, handle_signals, task_status)
    finally:
        _is_serving = False


class _Session:
    def __init__(self, fs: FileSystem, mountpoint: str, options: MountOptions) -> None:
        self._fs = fs
        self._mountpoint = os.path.realpath(mountpoint)  # later it would ask us
        self._options = options
        kernel = PyFuse3Kernel()
        self._operations = Operations(
            fs, root_ino=options.root_ino, cache_limit_s=options.cache_limit_s, kernel=kernel
        )
        self._invalidator = Invalidator(kernel, self._operations.view.reset)
        self._ended = trio.Event()
        """The kernel has let go of the session, or the session was terminated."""
        self._answering = trio.CancelScope(shield=True)
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
        self._mount()
        view = self._operations.view
        view.connect(self._invalidator)
        self._invalidator.start()
        self._fs.set_listener(view)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._answer)
                try:
                    await self._until_ended(nursery, on_ready, handle_signals, task_status)
                finally:
                    with trio.CancelScope(shield=True):
                        await self._unmount()
                nursery.cancel_scope.cancel()
        finally:
            self._fs.set_listener(None)
            self._close()

    def _mount(self) -> None:
        try:
            pyfuse3.init(self._operations, self._mountpoint, kernel_options(self._options))
        except RuntimeError as exc:
            raise UserError(f"cannot mount at {self._mountpoint}: {_why_not(self._options)}") from exc
        mount = mountpoints.mount_at(self._mountpoint)
        self._device = mount.device if mount is not None else ""
        log.info("mounted at %s (session=pyfuse3)", self._mountpoint)

    async def _answer(self) -> None:
        """Shielded: a request that is cancelled is never answered, and its program hangs."""
        try:
            with self._answering:
                await pyfuse3.main(IDLE_TASKS, MAX_TASKS)
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
        await trio.to_thread.run_sync(os.statvfs, self._mountpoint)
        await trio.to_thread.run_sync(tune, self._mountpoint, self._options)
        task_status.started()
        if on_ready is not None:
            on_ready()
        nursery.start_soon(_first, self._ended, stop)
        await stop.wait()

    async def _wait_for_signal(
        self, stop: trio.Event, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                if stop.is_set():  # a second one: hurry
                    pyfuse3.terminate()
                log.info("%s: unmounting %s", signal.Signals(number).name, self._mountpoint)
                stop.set()

    async def _unmount(self) -> None:
        if self._ended.is_set():
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
        pyfuse3.terminate()
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
            log.warning("a cache invalidation is stuck: aborting the connection")
            _abort(self._mountpoint)
            if not self._invalidator.join(JOIN_TIMEOUT_S):
                log.error("it stays stuck: the session is left to the end of the process")
                return
        pyfuse3.close(unmount=not self._is_detached)
        left = mountpoints.mount_at(self._mountpoint)
        if left is not None and left.is_ours and left.device == self._device:
            # The connection was aborted (umount --force, or in /sys): libfuse leaves such a mount.
            with suppress(UserError):
                mountpoints.umount(self._mountpoint, is_lazy=True)


async def _first(ended: trio.Event, stop: trio.Event) -> None:
    await ended.wait()
    stop.set()


def kernel_options(options: MountOptions) -> set[str]:
    """For libfuse: each an option of its own, values escaped."""
    found = {"default_permissions", "subtype=alluxiofuse", f"fsname={_escaped(options.fsname)}"}
    if options.is_readonly:
        found.add("ro")
    if options.is_allowed_for_others:
        found.add("allow_other")
    return found | set(options.kernel)


def _escaped(fsname: str) -> str:
    """A comma would end it, and pyfuse3 takes ASCII only."""
    plain = "".join(
        char if 32 <= ord(char) < 127 else "".join(f"%{byte:02X}" for byte in os.fsencode(char))
        for char in fsname or "alluxiofuse"
    )
    return plain.replace("\\", "\\\\").replace(",", "\\,")


def _why_not(options: MountOptions) -> str:
    """libfuse has printed its own words to stderr; this is the usual reason."""
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse: `modprobe fuse`, or in a container --device /dev/fuse"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "you may not use /dev/fuse (usually it has mode 0666)"
    if os.geteuid() == 0:
        return "the kernel refused it (in a container: --device /dev/fuse --cap-add SYS_ADMIN is needed)"
    if options.is_allowed_for_others:
        return "for -o allow_other, user_allow_other must be set in /etc/fuse.conf"
    return "fusermount3 refused it: the directory must be yours and writable"


def tune(mountpoint: str, options: MountOptions) -> None:
    """Larger read-ahead and more of it at once. Only root can; without it reads are slower, no more."""
    if os.geteuid() != 0:
        return
    mount = mountpoints.mount_at(mountpoint)
    if mount is None:
        return
    read_ahead = READ_AHEAD_BYTES if options.read_ahead_bytes is None else options.read_ahead_bytes
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
