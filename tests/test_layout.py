"""The shape of the source tree: who may import whom, and what setup.cfg says about it."""

from __future__ import annotations

import ast
import configparser
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS: dict[str, int] = {
    "alluxiofuse": 0,  # the package itself: the version
    "alluxiofuse.errors": 0,
    "alluxiofuse.ids": 0,
    "alluxiofuse.units": 0,
    "alluxiofuse.config": 0,
    "alluxiofuse.config_load": 0,
    "alluxiofuse.descriptors": 0,
    "alluxiofuse.findings": 0,
    "alluxiofuse.state_disk": 0,
    "alluxiofuse.wire": 1,
    "alluxiofuse.rpc": 2,
    "alluxiofuse.metrics": 2,
    "alluxiofuse.ufs": 2,
    "alluxiofuse.client": 3,
    "alluxiofuse.master": 3,
    "alluxiofuse.worker": 3,
    "alluxiofuse.fuse": 4,
    "alluxiofuse.cli": 4,
}
SAME_LAYER_STRANGERS = {
    "alluxiofuse.master": {"alluxiofuse.worker", "alluxiofuse.client"},
    "alluxiofuse.worker": {"alluxiofuse.master", "alluxiofuse.client"},
    "alluxiofuse.client": {"alluxiofuse.master", "alluxiofuse.worker"},
    "alluxiofuse.fuse": {"alluxiofuse.cli", "alluxiofuse.master", "alluxiofuse.worker"},
}
"""Same or lower layers that a part must not know. The CLI starts everything and may import all."""


def module_files() -> Iterator[tuple[str, Path]]:
    """(module name, file) of everything that is installed; the daemons through their real folders."""
    for top, package in (
        ("alluxiofuse", "alluxiofuse"),
        ("master", "alluxiofuse.master"),
        ("worker", "alluxiofuse.worker"),
    ):
        base = ROOT / top
        for file in sorted(base.rglob("*.py")):
            inside = file.relative_to(base)
            if top == "alluxiofuse" and inside.parts[0] in ("master", "worker"):
                continue
            parts = [package, *inside.with_suffix("").parts]
            yield ".".join(parts).removesuffix(".__init__"), file


MODULES = dict(module_files())


def part_of(module: str) -> str:
    """The entry of LAYERS that a module belongs to: alluxiofuse.rpc.server -> alluxiofuse.rpc."""
    part = ".".join(module.split(".")[:2])
    return part if part in LAYERS else module


@cache
def imports(module: str, file: Path) -> set[str]:
    """Full names of the modules that a file imports, also inside functions and TYPE_CHECKING."""
    found: set[str] = set()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_bytes(), str(file))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in MODULES else base)
    return found


def importers_of(name: str) -> set[str]:
    return {
        module
        for module, file in MODULES.items()
        if any(one == name or one.startswith(f"{name}.") for one in imports(module, file))
    }


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_its_own_and_lower_layers(module: str) -> None:
    part = part_of(module)
    assert part in LAYERS, f"{module} is in no layer: add its part to LAYERS"
    for name in imports(module, MODULES[module]):
        if not name.startswith("alluxiofuse"):
            continue
        other = part_of(name)
        assert other in LAYERS, f"{module} imports {name}, which is in no layer"
        if other == part:
            continue
        assert LAYERS[other] <= LAYERS[part], (
            f"{module} (layer {LAYERS[part]}) imports {name} (layer {LAYERS[other]})"
        )
        assert other not in SAME_LAYER_STRANGERS.get(part, set()), f"{module} must not know {name}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_daemons_are_never_imported_under_their_bare_names(module: str) -> None:
    bare = {name for name in imports(module, MODULES[module]) if name.split(".")[0] in ("master", "worker")}
    assert not bare, f"{module} imports {bare}: write alluxiofuse.master, alluxiofuse.worker"


def test_only_the_fuse_folder_imports_pyfuse3() -> None:
    outside = {m for m in importers_of("pyfuse3") if part_of(m) != "alluxiofuse.fuse"}
    assert not outside


@pytest.mark.parametrize("library", ["boto3", "botocore", "rocksdict", "obstore", "pyarrow"])
def test_each_heavy_library_has_one_place(library: str) -> None:
    places = importers_of(library)
    limit = 2 if library == "rocksdict" else 1  # the master's store and the worker's index
    assert len(places) <= limit, f"{library} is imported by {sorted(places)}"


def test_only_the_codec_speaks_msgpack() -> None:
    def speaks(file: Path) -> bool:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
        names = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names += [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
        return any("msgpack" in name.split(".") for name in names)

    assert {module for module, file in MODULES.items() if speaks(file)} == {"alluxiofuse.wire.codec"}


def test_setup_cfg_lists_exactly_the_packages_of_the_tree() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    assert listed == sorted(listed)
    assert set(listed) == {module for module, file in MODULES.items() if file.name == "__init__.py"}


def test_the_daemons_are_reached_through_the_links() -> None:
    for name in ("master", "worker"):
        link = ROOT / "alluxiofuse" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


def test_a_daemon_refuses_its_bare_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    for name in ("master", "worker"):
        with pytest.raises(ImportError, match=f"import alluxiofuse.{name}"):
            __import__(name)


def test_report_module_sizes() -> None:
    """No assertion: the longest modules, for whoever reads the report."""
    sizes = {module: len(file.read_bytes().splitlines()) for module, file in MODULES.items()}
    for module, lines in sorted(sizes.items(), key=lambda item: -item[1])[:5]:
        print(f"{lines:5} {module}")
