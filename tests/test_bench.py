"""scripts/bench.py: every workload runs anywhere, wrong bytes are noticed, nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import bench as bench_script
from benchmark import daemons, large
from benchmark.place import CHUNK_BYTES, Place, Workload, WrongBytesError

BENCH = Path(__file__).resolve().parent.parent / "scripts/bench.py"
QUICK = ["--size", "2M", "--files", "40", "--tree", "20", "--rounds", "2", "--seconds", "0.01"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def place(root: Path) -> Place:
    return Place("here", root, 2 * CHUNK_BYTES, file_count=3, tree_count=3, seconds=0.01)


def test_all_workloads_in_two_directories(tmp_path: Path) -> None:
    places = [tmp_path / "a", tmp_path / "b=c"]
    for one in places:
        one.mkdir()
    pids = [f"--pid={one}={os.getpid()}" for one in places]
    done = bench(*QUICK, "--settle", "0", "--json", *pids, *map(str, places))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    results = json.loads(done.stdout)
    assert len(results) >= 28
    for name, workload in results.items():
        assert list(workload["directories"]) == [str(one) for one in places]
        for numbers in workload["directories"].values():
            assert len(numbers["rounds"]) == 2
            assert numbers["median"] > 0 or name.startswith("cpu")
    assert [list(one.iterdir()) for one in places] == [[], []]


def test_the_table_shows_the_ratio_to_the_first_directory(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    done = bench(*QUICK, "--only", "small-warm,git", str(tmp_path), f"other={tmp_path / 'b'}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["unit", str(tmp_path), "other"]
    assert lines[2].startswith("small files read, warm")
    assert "x)" in lines[2]
    assert lines[3].startswith("git init, add, commit of it (less is better)")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "nonsense", "."], "no such workload: nonsense"),
        (["--only", "memory", "."], "need --pid"),
        (["--pid", "x=1", "."], "no directory has the label x"),
        (["--rest", "999999999", "."], "there is no process 999999999"),
        (["--rounds", "0", "."], "at least 1"),
        ([".", "."], "given twice"),
        (["/nonexistent"], "is not a directory"),
    ],
)
def test_mistakes_are_said_in_one_place(arguments: list[str], said: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_directory_that_can_not_be_written_is_one_line() -> None:
    done = bench(*QUICK, "--only", "write", "/proc")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("bench.py: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_removes_what_it_made(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, str(BENCH), "--seconds", "60", "--size", "2M", "--only", "random-read-8"]
    running = subprocess.Popen([*command, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while len(daemons.family(running.pid)) < 9:
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    readers = daemons.family(running.pid)[1:]
    running.send_signal(number)
    out, said = running.communicate(timeout=30)
    assert (running.returncode, out, said) == (130, b"", b"")
    assert list(tmp_path.iterdir()) == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in readers)


def test_interrupted_it_shows_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(place: Place) -> float:
        raise KeyboardInterrupt

    monkeypatch.setitem(bench_script.WORKLOADS, "rename", Workload("rename", "ops/s", interrupted))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert bench_script.main([*QUICK, "--only", "create,rename", str(tmp_path)]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    created, renamed = capsys.readouterr().out.splitlines()[2:4]
    assert created.split()[-1].replace(",", "").isdigit()
    assert renamed.split()[-1] == "-"
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_byte_is_noticed(tmp_path: Path) -> None:
    here = place(tmp_path)
    large.sequential_write(here, is_synced=False)
    large.random_write(here, is_direct=False)  # changes nothing
    for workload in (large.read_cold, large.read_warm, large.mmap_read):
        assert workload(here) > 0
    with open(here.big, "r+b") as file:
        file.seek(CHUNK_BYTES + 5)
        byte = file.read(1)[0]
        file.seek(CHUNK_BYTES + 5)
        file.write(bytes([byte ^ 1]))
    for workload in (large.read_cold, large.read_warm, large.mmap_read):
        with pytest.raises(WrongBytesError, match=f"MiB at {CHUNK_BYTES}"):
            workload(here)


def test_bytes_of_another_place_are_noticed(tmp_path: Path) -> None:
    here = place(tmp_path)
    large.sequential_write(here, is_synced=False)
    content = here.big.read_bytes()
    here.big.write_bytes(content[CHUNK_BYTES:] + content[:CHUNK_BYTES])
    with pytest.raises(WrongBytesError):
        large.read_warm(here)
    with pytest.raises(WrongBytesError):
        large.random_read(here)
    with pytest.raises(WrongBytesError, match="wrong bytes in the 4 KiB"):
        large.random_read_at_once(here, 2)


def test_what_fails_in_one_directory_leaves_the_others_alone(tmp_path: Path) -> None:
    """Its directory is removed meanwhile: any error that a filesystem gives."""
    ours, gone = tmp_path / "ours", tmp_path / "gone"
    ours.mkdir()
    gone.mkdir()
    command = [sys.executable, str(BENCH), "--seconds", "1", "--size", "2M", "--rounds", "1"]
    command += ["--only", "random-read,random-write", str(ours), str(gone)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (made := list(gone.glob("bench-*"))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    made[0].rmdir()
    out, said = running.communicate(timeout=60)
    assert running.returncode == 1
    rows = [line.split() for line in out.splitlines()[2:]]
    assert [row[-1] for row in rows] == ["-", "-"]
    assert all(row[-2].replace(",", "").isdigit() for row in rows)
    assert "gone: random 4 KiB read, O_DIRECT: [Errno 2]" in said
    assert "Traceback" not in said


def test_the_cpu_time_and_memory_of_a_daemon_are_those_of_its_children_too() -> None:
    burn = "import os,time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    script = f"import subprocess,sys\nsubprocess.run([sys.executable, '-c', {burn!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        running.stdout.readline()
        assert len(daemons.family(running.pid)) == 2
        assert daemons.cpu_seconds(running.pid) >= 0.29
        assert daemons.peak_memory_bytes(running.pid) > daemons.peak_memory_bytes(
            daemons.family(running.pid)[1]
        )
        assert daemons.wait_for_rest([running.pid], 10)
        running.communicate(b"\n")


def test_it_waits_for_a_busy_daemon_no_longer_than_it_was_told() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as running:
        try:
            assert not daemons.wait_for_rest([running.pid], 1.2)
        finally:
            running.kill()


def test_the_comparison_with_rivals_says_what_it_lacks() -> None:
    script = BENCH.with_name("bench_rivals.py")
    done = subprocess.run(
        [sys.executable, str(script), "--redis", "/nonexistent"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "root" in done.stderr or "there is no /nonexistent" in done.stderr
    assert "Traceback" not in done.stderr
