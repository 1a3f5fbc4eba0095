"""Real trees for end-to-end tests, and what "the same" means for two of them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from pathlib import Path

TIMEOUT_S = 180
PACKAGES = ("json", "email", "asyncio", "encodings", "unittest")


def run(
    *command: str | Path,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> str:
    """Standard output; fails the test with the program's stderr."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C", **(env or {})},
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, (
        f"{command}: exit code {done.returncode}\n{os.fsdecode(done.stdout)}{os.fsdecode(done.stderr)}"
    )
    return os.fsdecode(done.stdout)


def copy_library(target: Path, packages: Iterable[str] = PACKAGES) -> None:
    """A part of Python's own library: some 250 files."""
    library = Path(sysconfig.get_path("stdlib"))
    for package in packages:
        shutil.copytree(
            library / package, target / package, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True
        )


def add_oddities(target: Path) -> None:
    """What libraries do not have: links, modes, times, sizes and names of all sorts."""
    odd = target / "odd"
    odd.mkdir()
    (odd / "link").symlink_to("../json/decoder.py")
    (odd / "directory link").symlink_to("../email")
    (odd / "dangling").symlink_to("/nowhere/at all")
    (odd / "empty").touch()
    (odd / "empty directory").mkdir(mode=0o711)
    (odd / "script.sh").write_text("#!/bin/sh\necho it runs\n")
    (odd / "script.sh").chmod(0o755)
    (odd / "private").write_text("private")
    (odd / "private").chmod(0o600)
    (odd / "sticky").mkdir()
    (odd / "sticky").chmod(0o1777)
    (odd / "page and a byte").write_bytes(os.urandom((1 << 20) + 1))
    (odd / "large").write_bytes(os.urandom(9_000_001))
    (odd / os.fsdecode(b"not \xff utf-8")).write_text("x")
    (odd / "Grüße\n#%?&+ 'quoted'").write_text("a name")
    os.utime(odd / "empty", ns=(10**18, 10**18 + 123_456_789))


def listing(top: Path, *, fields: str = r"%P %y %m %s %l %T@\n") -> list[str]:
    """Sorted; of directories no sizes, no times."""
    of_others = run("find", ".", "!", "-type", "d", "-printf", fields, cwd=top)
    of_directories = run("find", ".", "-type", "d", "-printf", r"%P %y %m\n", cwd=top)
    return sorted([*of_others.splitlines(), *of_directories.splitlines()])


def assert_same(left: Path, right: Path) -> None:
    """Contents, names, kinds, modes, sizes, targets and times to the nanosecond."""
    run("diff", "-r", "--no-dereference", left, right)
    in_left, in_right = set(listing(left)), set(listing(right))
    assert in_left == in_right, f"{left}: {sorted(in_left - in_right)}\n{right}: {sorted(in_right - in_left)}"


def digests(top: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every regular file below."""
    return {
        os.path.relpath(Path(directory) / name, top): hashlib.sha256(
            (Path(directory) / name).read_bytes()
        ).hexdigest()
        for directory, _, names in os.walk(top)
        for name in names
        if not (Path(directory) / name).is_symlink()
    }
