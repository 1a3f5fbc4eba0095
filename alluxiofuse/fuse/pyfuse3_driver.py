"""pyfuse3's session: any kernel, also for ordinary users. A process can have one (pyfuse3 keeps it in
a global)."""

from __future__ import annotations

import os

import pyfuse3

from alluxiofuse.errors import UserError
from alluxiofuse.fuse.invalidation import PyFuse3Kernel
from alluxiofuse.fuse.mountopts import MountOptions
from alluxiofuse.fuse.operations import Operations
from alluxiofuse.fuse.passthrough import plain_info

IDLE_TASKS = 8
"""Tasks that wait for a request; when all are busy another is started (docs/fuse.md: measured)."""
MAX_TASKS = 256
"""Requests under way at once; one that waits for a master that is away must not stop the others."""


class PyFuse3Driver:
    """See `session.Driver`."""

    name = "pyfuse3"
    reply_entry = staticmethod(pyfuse3.readdir_reply)
    new_attributes = pyfuse3.EntryAttributes
    new_info = staticmethod(plain_info)
    max_read_bytes = 1 << 20

    def __init__(self) -> None:
        self.kernel = PyFuse3Kernel()

    def mount(self, operations: Operations, mountpoint: str, options: MountOptions, fsname: str) -> None:
        try:
            pyfuse3.init(operations, mountpoint, kernel_options(options, fsname))
        except RuntimeError as exc:
            raise UserError(f"cannot mount at {mountpoint}: {_why_not(options)}") from exc

    async def answer(self) -> None:
        await pyfuse3.main(IDLE_TASKS, MAX_TASKS)

    def terminate(self) -> None:
        pyfuse3.terminate()

    def close(self, *, is_unmount: bool) -> None:
        pyfuse3.close(unmount=is_unmount)


def kernel_options(options: MountOptions, fsname: str) -> set[str]:
    """For libfuse: each an option of its own, values escaped."""
    escaped = fsname.replace("\\", "\\\\").replace(",", "\\,")
    found = {"default_permissions", "subtype=alluxiofuse", f"fsname={escaped}"}
    if options.is_readonly:
        found.add("ro")
    if options.is_allowed_for_others:
        found.add("allow_other")
    return found | set(options.kernel)


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
