"""docs/failure.md names every test that breaks something, and none that is not there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(test_\w+)`")
DEFINED = re.compile(r"^def (test_\w+)", re.MULTILINE)
FAULT = re.compile(r"^\| [^|]+\| [^|]+\| [^|]+\| `(test_\w+)` \|$", re.MULTILINE)


def test_the_page_has_every_fault_and_no_other() -> None:
    page = (ROOT / "docs" / "failure.md").read_text(encoding="utf-8")
    defined = {
        name for path in (ROOT / "tests" / "faults").glob("test_*.py") for name in DEFINED.findall(path.read_text())
    }
    assert set(NAMED.findall(page)) == defined
    assert len(FAULT.findall(page)) >= 25
