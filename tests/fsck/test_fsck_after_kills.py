"""What a kill leaves behind is no damage: the check finds nothing that the next start does not mend."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
from daemons import LocalDaemon
from fsck_world import check_clean

Start = Callable[..., LocalDaemon]
KILLS = int(os.environ.get("AF_FSCK_KILLS", "2"))

WRITER = textwrap.dedent("""
    import os, random, sys
    top, seed = sys.argv[1], int(sys.argv[2])
    dice = random.Random(seed)
    kept = []
    os.makedirs(top, exist_ok=True)
    while True:
        directory = f"{top}/d{dice.randrange(4)}"
        name = f"{directory}/f{dice.randrange(40)}"
        what = dice.randrange(14)
        try:
            os.makedirs(directory, exist_ok=True)
            if what < 4:
                with open(name, "wb") as file:
                    file.write(dice.randbytes(dice.choice((0, 10, 4096, 70_000, 2_500_000))))
            elif what < 6:
                with open(name, "ab") as file:
                    file.write(b"appended")
            elif what == 6:
                os.rename(name, f"{directory}/f{dice.randrange(40)}")
            elif what == 7:
                os.unlink(name)
            elif what == 8:
                os.link(name, name + ".link")
            elif what == 9:
                os.symlink("target", name + ".symlink")
            elif what == 10:
                os.rename(directory, f"{top}/d{dice.randrange(6)}")
            elif what == 11:
                kept.append(open(name, "r+b"))
                kept[-1].truncate(dice.randrange(100_000))
                if dice.random() < 0.5:
                    os.unlink(name)
                if len(kept) > 5:
                    kept.pop(0).close()
            elif what == 12:
                os.setxattr(name, "user.x", b"value")
            else:
                with open(name, "rb") as file:
                    file.read()
            print(".", flush=True)
        except FileNotFoundError:
            continue
        except OSError as exc:
            if exc.errno in (17, 39):
                continue
            break
    """)


@pytest.mark.parametrize("seed", range(KILLS))
def test_nothing_is_found_after_a_kill(local_daemon: Start, seed: int) -> None:
    site = local_daemon()
    site.expects_clean_end = False
    dice = random.Random(seed)
    for life in range(2):
        command = [sys.executable, "-c", WRITER, str(site.mount / "top"), str(seed * 100 + life)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(dice.randrange(30, 300)):
                assert writer.stdout.readline() == ".\n", site.daemon.log_text()[-3000:]
            site.kill()
            writer.stdout.read()
            writer.wait(60)
        found = check_clean(site.state, arguments=("--verify-data",))
        print(found["notes"])
        site.daemon.start()
    assert site.stop() == 0
    check_clean(site.state, arguments=("--verify-data",))
