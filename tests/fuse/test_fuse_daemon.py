"""The command ends when the daemon has said how it went."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path


def run(body: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    script = "import os, sys\nfrom pathlib import Path\nfrom alluxiofuse.fuse.daemon import daemonize\n"
    return subprocess.run(
        [sys.executable, "-c", script + textwrap.dedent(body), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def wait_for_end(pid: int) -> None:
    """Of a process that is not our child."""
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ready_ends_the_command_and_detaches_its_output(tmp_path: Path) -> None:
    done = run(
        """
        pipe = daemonize(Path(sys.argv[1]) / "log")
        print(os.getpid(), flush=True)
        pipe.ready()
        print("after", flush=True)
        assert os.getcwd() == "/" and os.getsid(0) == os.getpid()
        pipe.failed("too late")
        """,
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    wait_for_end(int(done.stdout))
    assert (tmp_path / "log").read_text() == "after\n"
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_a_failure_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    done = run('daemonize().failed("cannot mount at /x: no", 7)', tmp_path)
    assert (done.returncode, done.stderr) == (7, "alluxiofuse: cannot mount at /x: no\n")


def test_a_daemon_that_dies_is_reported(tmp_path: Path) -> None:
    done = run("daemonize(); os.kill(os.getpid(), 9)", tmp_path)
    assert done.returncode == 32
    assert "ended by signal 9 before the mount was ready" in done.stderr
