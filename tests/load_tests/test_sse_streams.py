"""Streams over HTTP beside streams read in the process: how the rounds are summed, and a small run from end to end."""

import json
from pathlib import Path

import pytest

from load_tests.sse_streams import main, summed, table


def row(step_ms: float, engine_cpu_ms: float, loop_cpu_ms: float) -> dict[str, float]:
    return {"step_ms": step_ms, "engine_cpu_ms": engine_cpu_ms, "loop_cpu_ms": loop_cpu_ms, "num_steps": 10}


def test_a_ratio_is_the_median_of_the_rounds_own() -> None:
    slow, fast, odd = 8.0, 1.0, 3.0
    rounds = [
        {"in_process": row(slow, 1, 1), "sse": row(1.1 * slow, 1, 4), "apart": row(slow, 1, 2)},
        {"in_process": row(fast, 1, 1), "sse": row(1.2 * fast, 1, 4), "apart": row(1.1 * fast, 1, 2)},
        {"in_process": row(odd, 1, 1), "sse": row(9 * odd, 1, 4), "apart": row(3 * odd, 1, 2)},
    ]
    summary = summed(rounds)
    assert summary["ratio"]["step_ms"] == pytest.approx(1.2)
    assert summary["apart_ratio"]["step_ms"] == pytest.approx(1.1)
    assert summary["in_process"]["step_ms"] == odd
    assert table(summary).splitlines()[-2:] == [
        "| ratio | 1.20 | 1.00 | 4.00 |",
        "| apart ratio | 1.10 | 1.00 | 2.00 |",
    ]


@pytest.mark.slow
def test_all_ways_are_measured_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "sse.json"
    assert main(["--streams", "4", "--tokens", "64", "--rounds", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["schema"] == "graftserve-sse-streams/1"
    assert len(report["rounds"]) == 1
    assert all(report[way]["engine_cpu_ms"] > 0 for way in ("in_process", "sse", "apart"))
