"""scripts/bench.py: every workload runs anywhere, results are parsed, nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent / "scripts/bench.py"
QUICK = ["--size", "2M", "--files", "40", "--rounds", "2", "--seconds", "0.01"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_all_workloads_in_two_directories(tmp_path: Path) -> None:
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    done = bench(*QUICK, "--json", *map(str, places))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    results = json.loads(done.stdout)
    assert len(results) >= 16
    for workload in results.values():
        assert list(workload["directories"]) == [str(place) for place in places]
        for numbers in workload["directories"].values():
            assert len(numbers["rounds"]) == 2
            assert numbers["median"] > 0
    assert [list(place.iterdir()) for place in places] == [[], []]


def test_the_table_shows_the_ratio_to_the_first_directory(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    done = bench(*QUICK, "--only", "small-warm,delete", str(tmp_path), str(tmp_path / "b"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert str(tmp_path / "b") in lines[0]
    assert lines[2].startswith("small files read, warm")
    assert "x)" in lines[2]
    assert lines[3].startswith("delete")


def test_mistakes_are_said_in_one_place(tmp_path: Path) -> None:
    assert "no such workload: nonsense" in bench("--only", "nonsense", str(tmp_path)).stderr
    missing = bench(str(tmp_path / "none"))
    assert missing.returncode == 2
    assert "is not a directory" in missing.stderr
