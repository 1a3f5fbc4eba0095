"""A mount that outlives its daemon, whose files the kernel reads and writes itself: -o keeper=on with
passthrough (docs/adr/0001-passthrough.md, 0002-keeper.md)."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import Cluster, LocalDaemon

sys.path.insert(0, str(Path(__file__).parents[1] / "passthrough"))
from keeper_loads import Appends, Database, ManyAppends, Reads, Writes
from kernel_io import frozen, opened, require_passthrough
from servers import wait_until
from test_keeper import OPTIONS, KeptMount, child_of, under_kills

MIB = 1 << 20


def local() -> KeptMount:
    site = LocalDaemon(session="native", mount_options="keeper=on", tiers=["SSD:{base}/ssd:8GB"]).start()
    return KeptMount(site, site.daemon)


def cluster() -> KeptMount:
    site = Cluster(workers=0, mount_options=OPTIONS, tier="SSD:{base}/ssd{number}:8GB")
    site.master.start()
    place = site.master.arguments.index("--port") + 1
    site.master.arguments[place] = site.address.rpartition(":")[2]
    site.add_worker(socket.gethostname())
    return KeptMount(site, site.add_mount())


PLACES: dict[str, Callable[[], KeptMount]] = {"local": local, "mount": cluster}


@pytest.fixture(params=list(PLACES))
def kept(request: pytest.FixtureRequest) -> Iterator[KeptMount]:
    require_passthrough()
    mount = PLACES[request.param]()
    yield mount
    wrong = mount.site.close()
    assert not wrong, "\n\n".join(wrong)


def uploaded(kept: KeptMount, path: Path) -> None:
    """What the under storage has of it is what is read."""
    data = path.read_bytes()
    stored = kept.site.base / "ufs" / path.relative_to(kept.mount)
    wait_until(lambda: stored.exists() and stored.read_bytes() == data, f"the upload of {path.name}")


def stop_daemon(kept: KeptMount) -> None:
    os.kill(child_of(kept.keeper), signal.SIGSTOP)


def test_programs_see_no_difference(kept: KeptMount) -> None:
    loads = [Reads(kept.mount / "r"), Writes(kept.mount / "w"), Database(kept.mount / "d")]
    loads += [Appends(kept.mount / "a"), ManyAppends(kept.mount / "m")]
    under_kills(kept, loads)
    for name in ("r/data", "w/data", "d/base", "a/log", "m/log"):
        uploaded(kept, kept.mount / name)


def test_the_kernel_goes_on_without_a_daemon(kept: KeptMount) -> None:
    """It writes, reads and appends between the kill and the next daemon's start, and after that."""
    path = kept.mount / "file"
    data = random.Random(1).randbytes(3 * MIB)
    with opened(path, os.O_RDWR | os.O_CREAT) as fd, opened(path, os.O_WRONLY | os.O_APPEND) as appender:
        for turn in range(3):
            # The first write after attributes were asked for asks whether there are file capabilities.
            os.pwrite(fd, b"x", 0)
            os.write(appender, b"y")
            stop_daemon(kept)
            assert os.pwrite(fd, data, 0) == len(data)
            os.write(appender, b"appended %d" % turn)
            data = os.pread(fd, 2 * len(data), 0)
            kept.kill()
            with frozen(kept.daemon):
                os.write(appender, b"and then %d" % turn)
                data = os.pread(fd, 2 * len(data), 0)
            assert data.endswith(b"appended %dand then %d" % (turn, turn))
            assert os.fstat(fd).st_size == path.stat().st_size == len(data)
            os.fsync(fd)
    assert path.read_bytes() == data
    uploaded(kept, path)


def test_others_open_it_after_the_kill(kept: KeptMount) -> None:
    path = kept.mount / "file"
    path.write_bytes(b"before" * 1000)
    with opened(path, os.O_RDONLY) as reader, opened(path, os.O_RDWR) as writer:
        os.pwrite(writer, b"AFTER!", 0)
        kept.kill()
        assert path.read_bytes() == b"AFTER!" + b"before" * 999
        with opened(path, os.O_RDWR) as other:
            os.pwrite(other, b"any", 0)
            with frozen(kept.daemon):
                os.pwrite(other, b"another", 0)
                assert os.pread(reader, 7, 0) == os.pread(writer, 7, 0) == b"another"
        path.write_bytes(b"emptied")
        assert os.pread(reader, 100, 0) == os.pread(writer, 100, 0) == b"emptied"
        os.pwrite(writer, b"E", 0)
        kept.kill()
        os.ftruncate(writer, 5)
        assert os.pread(reader, 100, 0) == path.read_bytes() == b"Empti"
    assert path.read_bytes() == b"Empti"
    uploaded(kept, path)


def test_readers_alone_see_what_comes_after(kept: KeptMount) -> None:
    path = kept.mount / "file"
    path.write_bytes(b"before")
    uploaded(kept, path)
    with opened(path, os.O_RDONLY) as reader:
        kept.kill()
        with frozen(kept.daemon):
            assert os.pread(reader, 100, 0) == b"before"
        path.write_bytes(b"emptied, then this")
        assert os.pread(reader, 100, 0) == b"emptied, then this"
        with opened(path, os.O_WRONLY | os.O_APPEND) as appender:
            os.write(appender, b", and more")
        assert os.pread(reader, 100, 0) == b"emptied, then this, and more"
    uploaded(kept, path)


def test_closed_while_there_is_no_daemon(kept: KeptMount) -> None:
    """The release, which comes to the next daemon, seals it."""
    paths = [kept.mount / f"file{number}" for number in range(20)]
    fds = [os.open(path, os.O_RDWR | os.O_CREAT) for path in paths]
    for fd in fds:
        os.write(fd, b"written")
    stop_daemon(kept)
    for fd in fds:
        os.write(fd, b", and more")
    pid = os.fork()
    if not pid:
        for fd in fds:
            os.close(fd)
        os._exit(0)
    for fd in fds[::2]:
        # close(2) waits for the answer to FLUSH, so in processes of their own.
        if not os.fork():
            os.close(fd)
            os._exit(0)
    time.sleep(0.2)
    kept.kill()
    for fd in fds:
        os.close(fd)
    for path in paths:
        uploaded(kept, path)
        assert path.read_bytes() == b"written, and more"
