"""Power failures: ext4 on a loop device that can be switched off.

`Disk.cut` is the ioctl FS_IOC_SHUTDOWN without flushing the journal: from then on nothing more reaches
the device, as if its power were gone; mounting it again replays the journal as a reboot would. What
was written and neither synced nor written back is lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest

FS_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32), linux/fs.h (ext4: EXT4_IOC_SHUTDOWN)
_NO_LOG_FLUSH = 2
UMOUNT_TIMEOUT_S = 30.0


def require_disks() -> None:
    """Skips the test where filesystems can't be made and mounted. Containers of CI often have no loop
    devices, so that this is no failure there either."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a filesystem")
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("no mkfs.ext4: install e2fsprogs")
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("no loop devices on this machine")


class Disk:
    """An ext4 filesystem in a file, mounted at `top`. `close` undoes everything."""

    def __init__(self, base: Path, name: str, size_bytes: int = 512 << 20) -> None:
        self.image = base / f"{name}.img"
        self.top = base / name
        self.top.mkdir()
        with open(self.image, "wb") as file:
            file.truncate(size_bytes)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(self.image)], check=True, timeout=120)
        self.mount()

    def mount(self) -> None:
        done = subprocess.run(
            ["mount", "-o", "loop", str(self.image), str(self.top)], capture_output=True, check=False
        )
        if done.returncode:
            reason = os.fsdecode(done.stderr).strip()
            if "loop" in reason:  # No device, or not for us: a container.
                pytest.skip(f"loop devices can't be used: {reason}")
            raise AssertionError(reason)

    def cut(self) -> None:
        """The power is gone. Everything but reading what is cached fails with EIO from here on."""
        fd = os.open(self.top, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, FS_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def remount(self) -> None:
        """Power again. All processes that used it have ended (some a moment ago)."""
        self.umount()
        self.mount()

    def umount(self) -> None:
        deadline = time.monotonic() + UMOUNT_TIMEOUT_S
        while os.path.ismount(self.top):
            done = subprocess.run(["umount", str(self.top)], capture_output=True, check=False)
            if done.returncode == 0:
                return
            assert time.monotonic() < deadline, os.fsdecode(done.stderr)
            time.sleep(0.02)

    def close(self) -> None:
        if os.path.ismount(self.top):
            subprocess.run(["umount", "--lazy", str(self.top)], check=False, capture_output=True)
        self.image.unlink(missing_ok=True)


class Writeback:
    """Writes parts of what is in memory to the disks, in an order of its own, as a kernel does when it
    likes: syncs files and directories taken at random, which commits the names of all others too."""

    def __init__(self, disks: list[Disk], seed: int) -> None:
        self._disks = disks
        self._dice = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Writeback:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._dice.random() * 0.03):
            with contextlib.suppress(OSError):
                self._sync_one(self._dice.choice(self._disks))

    def _sync_one(self, disk: Disk) -> None:
        found = [
            os.path.join(folder, name) for folder, _, names in os.walk(disk.top) for name in (*names, ".")
        ]
        # RocksDB's logs are left alone most of the time: that their tail is lost is what hurts.
        slabs = [path for path in found if "/slabs/" in path]
        path = self._dice.choice(slabs if slabs and self._dice.random() < 0.9 else found)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
