"""The kernels' benchmark, small and in the interpreter: every way computes the same, and wrong results are said."""

import json
from pathlib import Path

import pytest
import torch

from load_tests.kernels import BATCHES, MODELS, Case, main

pytest.importorskip("triton")


def test_quick_checks_every_way_and_claims_no_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.json"
    assert main(["--quick", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["way"] for row in rows} == {"kernels", "gathered bmm", "loop"}
    assert all(row["relative_error"] < 1e-5 and row["group_s"] is None for row in rows)
    assert "us a group" not in capsys.readouterr().out


def by_nothing(case: Case):  # type: ignore[no-untyped-def]
    return lambda x, y: None


def test_another_way_is_checked_before_it_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--way", f"nothing={__name__}:by_nothing"]) == 1
    assert "wrong results: nothing (mixed), nothing (shared)" in capsys.readouterr().err


def test_shared_projections_must_move_once() -> None:
    group = MODELS["quick"][1][0]
    shared = next(batch for batch in BATCHES if batch.is_shared)
    case = Case(group, shared, torch.float32, torch.device("cpu"), 0)
    rows = 256 * (3 * group.d_in + sum(group.widths))
    assert case.moved_bytes == 4 * (rows + 64 * group.d_in + 2 * 64 * sum(group.widths))
