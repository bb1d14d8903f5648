"""What pip gets, and what an import costs."""

from __future__ import annotations

import ast
import compileall
import graphlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = {
    "accelerate",
    "datasets",
    "hypothesis",
    "jinja2",
    "matplotlib",
    "rich",
    "safetensors",
    "tokenizers",
    "transformers",
    "typer",
}


def run(*command: object, cwd: Path | None = None) -> str:
    """Run a command outside the checkout's import path and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the files of the checkout without reaching for an index."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is unpacked into and compiled in, which is all that installing it does."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    assert compileall.compile_dir(folder, quiet=1)
    return folder


class Imports(NamedTuple):
    """What `imports` found."""

    took: float  # seconds of a processor that the import of the package takes
    core: set[str]  # packages that it imports
    evaluation: set[str]  # packages that are there after the import of the evaluation
    file: str
    modules: set[str]


@pytest.fixture(scope="module")
def imports(installed: Path) -> Imports:
    """In a process of its own, import the package from the wheel, then the evaluation, then every module."""
    script = """
import importlib, json, pkgutil, sys
import torch, einops
from time import process_time
def packages():
    return {name.split(".")[0] for name in sys.modules}
before, start = packages(), process_time()
import tokendrift
took, core = process_time() - start, packages() - before
import tokendrift.evaluation
assert tokendrift.evaluation.measure
evaluation = packages()
names = [module.name for module in pkgutil.walk_packages(tokendrift.__path__, "tokendrift.")
         if not module.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(json.dumps([took, sorted(core), sorted(evaluation), tokendrift.__file__, names]))
"""
    took, core, evaluation, file, names = json.loads(run(sys.executable, "-c", script, cwd=installed).splitlines()[-1])
    return Imports(took, set(core), set(evaluation), file, set(names))


def test_wheel_holds_the_package_and_only_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = (path for path in (ROOT / "tokendrift").rglob("*") if path.is_file())
    wanted = {path.relative_to(ROOT).as_posix() for path in sources if "__pycache__" not in path.parts}
    assert wanted <= names
    assert {name.split("/")[0] for name in names - wanted} == {f"tokendrift-{version()}.dist-info"}
    assert "tokendrift/py.typed" in names


def test_wheel_declares_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"tokendrift-{version()}.dist-info/METADATA").decode()
        licence = archive.read(f"tokendrift-{version()}.dist-info/licenses/LICENSE").decode()
    needed = [line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert sorted(line for line in needed if "extra" not in line) == ["einops>=0.8", "torch>=2.6"]
    extras = {line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Provides-Extra")}
    assert {"hf", "train", "eval", "plot", "cli", "all"} <= extras
    assert "Apache License" in licence


def test_every_module_of_the_wheel_imports(imports: Imports, installed: Path) -> None:
    assert Path(imports.file).is_relative_to(installed), "the checkout was imported, not the wheel"
    sources = (ROOT / "tokendrift").rglob("*.py")
    paths = (path.relative_to(ROOT).with_suffix("") for path in sources if path.stem not in ("__init__", "__main__"))
    assert {".".join(path.parts) for path in paths} <= imports.modules


def test_import_loads_nothing_optional(imports: Imports) -> None:
    loaded = imports.core
    assert not loaded & OPTIONAL
    assert not {name for name in loaded - {"tokendrift"} if name not in sys.stdlib_module_names and name[0] != "_"}


def test_importing_the_evaluation_loads_no_transformers(imports: Imports) -> None:
    assert not {"transformers", "tokenizers"} & imports.evaluation


def test_import_is_quick(imports: Imports) -> None:
    assert imports.took <= 0.3


def version() -> str:
    """The version as the package states it."""
    from tokendrift import __version__

    return __version__


def test_no_module_imports_itself_through_others():
    """Of the imports that run when a module is imported: those inside of functions are not counted."""
    modules = {}
    for path in sorted((ROOT / "tokendrift").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text("utf-8"))
    imports = {name: set(_imported(tree, modules)) - {name} for name, tree in modules.items()}
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        pytest.fail("modules import each other in a circle: " + " <- ".join(error.args[1]))


def _imported(tree, modules):
    """Yield the modules of the package that one of them imports when it is imported."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                full = f"{node.module}.{name.name}"
                yield from (full if full in modules else node.module,) if node.module in modules else ()
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in modules)


def test_every_guarantee_names_a_test_that_exists():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8"))
    assert len(named) > 25
    missing = [
        each for each in named if f"def {each[1]}(" not in (ROOT / "tests" / each[0]).read_text(encoding="utf-8")
    ]
    assert missing == []
