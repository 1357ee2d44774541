"""What each fault came to, and the report of them all: `python -m tests.faults.record --out FILE`.

Owns the counts and their report. A test notes its counts as a line of the file that FAULTS_NOTED_IN names, if any; the
command runs all tests of the folder with such a file and adds up what they have noted. Knows nothing about what breaks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from server.bench import machine

SCHEMA = "graftserve-faults/1"
MIN_FAULTS = 25
MAX_RESTART_S = 60.0  # for a machine that is busy; what it took is in the record
_VARIABLE = "FAULTS_NOTED_IN"
_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one fault. A request is lost if it was sent and had no end; `lost_with_process` are those of killed ones."""

    fault: str
    num_right: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)  # by code
    num_lost: int = 0
    num_wrong: int = 0
    left_over: Mapping[str, int] = field(default_factory=dict)  # by what it is
    num_lost_with_process: int = 0
    num_killed: int = 0  # processes
    num_unreached: int = 0  # tries to connect while there was no process: no requests
    restarts_s: Sequence[float] = ()

    @property
    def num_sent(self) -> int:
        return self.num_right + sum(self.refused.values()) + self.num_lost + self.num_lost_with_process + self.num_wrong

    @property
    def num_left_over(self) -> int:
        return sum(self.left_over.values())


def current_fault() -> str:
    """The test that runs, with its parameters: each breaks one thing."""
    return os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0].rpartition("::")[2]


def note(counts: Counts) -> None:
    """Keeps them for the report, if one is being made."""
    if (path := os.environ.get(_VARIABLE)) is not None:
        with Path(path).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(counts)) + "\n")


def totals(counts: Sequence[Counts]) -> dict[str, Any]:
    """One fault has a row for each way to bring it about; one without requests is what was found when all was over."""
    refused: Counter[str] = Counter()
    for each in counts:
        refused.update(each.refused)
    return {
        "num_faults": len({each.fault.partition("[")[0] for each in counts if each.num_sent}),
        "num_sent": sum(each.num_sent for each in counts),
        "num_right": sum(each.num_right for each in counts),
        "num_refused": refused.total(),
        "num_lost": sum(each.num_lost for each in counts),
        "num_wrong": sum(each.num_wrong for each in counts),
        "num_left_over": sum(each.num_left_over for each in counts),
        "num_killed": sum(each.num_killed for each in counts),
        "num_lost_with_process": sum(each.num_lost_with_process for each in counts),
        "max_restart_s": max((took for each in counts for took in each.restarts_s), default=None),
    }


def is_good(sums: Mapping[str, Any]) -> bool:
    is_clean = sums["num_lost"] == sums["num_wrong"] == sums["num_left_over"] == 0
    return is_clean and int(sums["num_faults"]) >= MIN_FAULTS


def run_tests(lines: Path) -> bool:
    """Whether all tests of the folder have passed; `lines` has their counts."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(_FOLDER)]
    return subprocess.run(command, env=os.environ | {_VARIABLE: str(lines)}, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as scratch:
        lines = Path(scratch) / "lines"
        lines.touch()
        have_passed = run_tests(lines)
        counts = [Counts(**json.loads(line)) for line in lines.read_text(encoding="utf-8").splitlines()]
    sums = totals(counts) | {"have_passed": have_passed}
    rows = [{"num_sent": each.num_sent} | asdict(each) for each in counts]
    report = {"schema": SCHEMA, "machine": machine("cpu"), "totals": sums, "rows": rows}
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(sums, indent=2) + "\n")
    return 0 if have_passed and is_good(sums) else 1


if __name__ == "__main__":
    sys.exit(main())
