"""The house's own rules, held by tests: floors, what never reaches torch, how modules open, how long functions grow."""

import ast
import itertools
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "server").rglob("*.py"))
TORCH_FREE = [
    "server.adapters.device.rows",
    "server.adapters.store.folder_store",
    "server.engine.blocks",
    "server.engine.scheduler",
    "server.engine.sequence",
    "server.ground.config",
    "server.ground.errors",
    "server.ground.metrics",
    "server.cli",
]
NAMELESS = {"utils", "util", "helper", "helpers", "common", "misc", "manager", "handler", "wrapper", "impl"}
# Codebases that read well differ from the rest not in the middle but in the tail: nine of ten functions are short.
MAX_P90_LINES = 25
MAX_LINES = 60


def path_of(module: Path) -> str:
    return str(module.relative_to(ROOT))


def functions(module: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def test_imports_keep_the_contracts_of_pyproject() -> None:
    """In a process of its own: the linter sets up logging, which silences the loggers of everything tested later."""
    lint = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", lint], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", TORCH_FREE)
def test_what_needs_no_tensors_imports_without_torch(module: str) -> None:
    """The contract reads import statements; this runs them, packages on the way included."""
    blocked = "import sys; sys.modules.update(torch=None, transformers=None, bitsandbytes=None)"
    done = subprocess.run(
        [sys.executable, "-c", f"{blocked}; import {module}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", MODULES, ids=path_of)
def test_every_module_opens_with_what_it_owns(module: Path) -> None:
    source = module.read_text(encoding="utf-8")
    if module.name != "__init__.py" or source.strip():
        assert ast.get_docstring(ast.parse(source)), f"{path_of(module)} has no docstring"


@pytest.mark.parametrize("module", MODULES, ids=path_of)
def test_names_say_what_is_inside(module: Path) -> None:
    parts = set(re.split(r"[_/.]", path_of(module)))
    assert not parts & NAMELESS, f"{path_of(module)}: find the noun"


@pytest.mark.parametrize("module", MODULES, ids=path_of)
def test_no_function_outgrows_the_screen_by_far(module: Path) -> None:
    long = [
        f"{function.name} ({num_lines(function)})" for function in functions(module) if num_lines(function) > MAX_LINES
    ]
    assert long == []


def test_nine_of_ten_functions_fit_on_a_screen() -> None:
    lengths = [num_lines(function) for function in itertools.chain.from_iterable(map(functions, MODULES))]
    assert statistics.quantiles(lengths, n=10)[-1] <= MAX_P90_LINES


def test_every_test_lies_where_its_subject_lies() -> None:
    floors = {path.name for path in (ROOT / "server").iterdir() if path.is_dir() and path.name != "__pycache__"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert folders <= floors | {"demo", "deploy", "examples", "faults", "load_tests"}
