"""SECURITY.md and docs/limits.md say what is so: tests that exist, floors that hold, numbers of the code."""

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
# Public scars of servers like this one, and of what they stand on. Each must have its row.
SCARS = (
    "CVE-2023-30798", "CVE-2023-31036", "CVE-2024-34359", "CVE-2024-53981", "CVE-2025-23316", "CVE-2025-24357",
    "CVE-2025-32434", "CVE-2025-46570", "CVE-2025-48942", "CVE-2025-48943", "CVE-2025-48944", "CVE-2025-48956",
    "CVE-2025-59425", "CVE-2025-61620", "CVE-2025-62164", "CVE-2025-62426", "CVE-2025-66448", "CVE-2026-1839",
    "CVE-2026-24747", "CVE-2026-34756", "CVE-2026-40347", "CVE-2026-42561", "CVE-2026-4372", "CVE-2026-47487",
    "CVE-2026-48746", "CVE-2026-5760", "CVE-2026-9540", "LoRAX #479", "LoRAX #81", "SGLang #26789", "vLLM #42125",
    "vLLM #47724", "vLLM #55193", "vLLM #58144", "TensorRT-LLM #13391", "ainode #186",
)  # fmt: skip
# The first release without a hole that is known.
MENDED = {
    "torch": "2.10", "transformers": "5.3", "starlette": "0.49.1", "h11": "0.16", "jinja2": "3.1.6",
    "python-multipart": "0.0.27",
}  # fmt: skip

HEADINGS = {"threat", "what"}


def rows(page: Path, num_cells: int) -> list[list[str]]:
    """The tables' rows of a page, without their headings."""
    lines = page.read_text(encoding="utf-8").splitlines()
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in split if len(row) == num_cells and not set(row[0]) <= set("-") and row[0] not in HEADINGS]


def functions_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield node.name


THREATS = rows(ROOT / "SECURITY.md", 4)
LIMITS = [row for row in rows(ROOT / "docs" / "limits.md", 3) if row[2]]


@pytest.mark.parametrize("row", THREATS, ids=lambda row: row[0][:60])
def test_every_threat_has_a_control_and_a_test_that_exists(row: list[str]) -> None:
    threat, _, control, named = row
    assert threat
    assert control
    path, _, name = named.partition("::")
    assert name in functions_of(ROOT / path), f"{named} is no test"


def test_there_is_a_row_for_every_scar() -> None:
    assert len(THREATS) > 40
    met = " ".join(re.sub(r", (#\d+)", r", vLLM \1", row[1]) for row in THREATS)
    assert [scar for scar in SCARS if scar not in met] == []


def test_floors_are_above_known_holes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    floors = {need.name: need.specifier for need in map(Requirement, project["dependencies"])}
    for package, mended in MENDED.items():
        at_least = [part.version for part in floors[package] if part.operator == ">="]
        assert Version(at_least[0]) >= Version(mended), package


@pytest.mark.parametrize("row", LIMITS, ids=lambda row: row[2].strip("`"))
def test_a_limit_is_what_the_page_says(row: list[str]) -> None:
    _, told, constant = row
    assert int(re.match(r"\d+", told)[0]) == value_of(constant.strip("`"))  # type: ignore[index]


def value_of(path: str) -> Any:
    """A constant of a module, or the default of a dataclass's field."""
    owner, _, name = path.rpartition(".")
    module, _, kind = owner.rpartition(".")
    if not kind[0].isupper():
        return getattr(importlib.import_module(owner), name)
    found = getattr(importlib.import_module(module), kind)
    assert is_dataclass(found)
    default = next(field.default for field in fields(found) if field.name == name)
    assert default is not MISSING
    return default
