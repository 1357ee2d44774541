"""docs/failure.md names every test that breaks something, and what the record says that came of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.faults.record import MAX_RESTART_S, MIN_FAULTS, SCHEMA, is_good

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
    assert len(FAULT.findall(page)) >= MIN_FAULTS


@pytest.fixture
def recorded() -> dict[str, Any]:
    """The newest record."""
    *_, newest = sorted((ROOT / "load_tests" / "results").glob("faults-*.json"))
    record: dict[str, Any] = json.loads(newest.read_text(encoding="utf-8")) | {"name": newest.name}
    return record


def test_the_record_has_every_fault_of_the_page_and_is_good(recorded: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "failure.md").read_text(encoding="utf-8")
    assert recorded["schema"] == SCHEMA
    assert {row["fault"].partition("[")[0] for row in recorded["rows"] if row["num_sent"]} == set(FAULT.findall(page))
    assert recorded["totals"]["have_passed"]
    assert is_good(recorded["totals"])
    assert recorded["totals"]["max_restart_s"] < MAX_RESTART_S


def test_the_page_tells_what_was_recorded(recorded: dict[str, Any]) -> None:
    page = " ".join((ROOT / "docs" / "failure.md").read_text(encoding="utf-8").split())
    sums = recorded["totals"]
    restarts_s = [took_s for row in recorded["rows"] for took_s in row["restarts_s"]]
    assert recorded["name"] in page
    for said in (
        f"{sums['num_faults']} faults",
        f"{sums['num_sent']:,} requests, of which {sums['num_right']:,} were answered right",
        f"{sums['num_refused']} were refused",
        f"{sums['num_lost']} were lost, and {sums['num_wrong']} were answered wrong",
        f"{sums['num_left_over']} things were left over",
        f"{sums['num_killed']} processes were killed, and {sums['num_lost_with_process']} requests were in flight",
        f"{len(restarts_s)} restarts took {min(restarts_s):.0f} to {max(restarts_s):.0f} s",
    ):
        assert said in page, said
