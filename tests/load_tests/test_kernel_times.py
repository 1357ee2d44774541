"""The kernels' benchmark, small and in the interpreter: every way computes the same, and wrong results are said."""

import json
from pathlib import Path

import pytest
import torch

from load_tests import kernels
from load_tests.gpu_times import Call
from load_tests.kernel_cases import BATCHES, MODELS, QUICK_BATCHES, QUICK_MODEL, Batch, BatchAdapter, Case
from load_tests.kernel_targets import Row, Speeds
from load_tests.kernel_ways import WAYS, Run, Way
from load_tests.kernels import Bench, main, measure

pytest.importorskip("triton")


def test_quick_checks_every_way_and_claims_no_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.json"
    assert main(["--quick", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    served = [row for row in result["rows"] if row["not_served"] is None]
    assert {row["way"] for row in served} == {"kernels", "gathered bmm", "loop"}
    assert all(row["relative_error"] < 1e-5 and row["is_right"] and row["group_s"] is None for row in served)
    assert result["peers"] == {"vllm": None, "sglang": None}
    assert [target["met"] for target in result["targets"].values()] == [None, None, None]
    assert "us a group" not in capsys.readouterr().out


def test_who_cannot_serve_a_batch_is_in_the_rows_with_the_reason(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    main(["--quick", "--out", str(out)])
    [row, *_] = [row for row in json.loads(out.read_text())["rows"] if row["not_served"]]
    assert (row["way"], row["batch"]) == ("gathered bmm", "methods")
    assert (row["not_served"], row["relative_error"]) == ("two products are LoRA's alone", None)


def by_nothing(case: Case):  # type: ignore[no-untyped-def]
    return lambda x, y: None


def test_another_way_is_checked_before_it_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--way", f"nothing={__name__}:by_nothing"]) == 1
    assert "wrong results: nothing (q k v, mixed), nothing (o, mixed)" in capsys.readouterr().err


SPEEDS = Speeds(copy_bytes_per_s=1e12, flops_per_s=1e15, launch_s=1e-9)


def _rows(monkeypatch: pytest.MonkeyPatch, *ways: Way) -> list[Row]:
    """As on a GPU, with a clock that says only how many rounds there were."""

    def seconds(calls: list[Call], num_rounds: int) -> float:
        for call in calls:
            call()
        return 1e-6 * (num_rounds + 1)

    monkeypatch.setattr(kernels, "seconds_of", seconds)
    group, batch = QUICK_MODEL.groups[0], QUICK_BATCHES[0]
    bench = Bench({"quick": QUICK_MODEL}, QUICK_BATCHES, ways, torch.device("cpu"))
    return measure(bench, "quick", batch, group, SPEEDS)


def test_launches_are_timed_one_by_one_where_there_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _, loop = _rows(monkeypatch, *WAYS)
    assert (ours.group_s, ours.shrink_s, ours.expand_s) == pytest.approx((5e-6, 5e-6, 5e-6))
    assert (loop.group_s, loop.shrink_s, loop.expand_s) == (pytest.approx(2e-6), None, None)
    assert ours.copy_share == pytest.approx(ours.moved_bytes / 5e-6 / SPEEDS.copy_bytes_per_s)
    assert "5.0 us a group (    5.0 +     5.0)" in kernels.line(ours)


def test_what_one_way_has_changed_is_not_what_the_next_is_held_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(row.is_right for row in _rows(monkeypatch, *WAYS, *WAYS))


def _broken(case: Case) -> Run:
    raise RuntimeError("out of shared memory")


@pytest.mark.parametrize("is_peer", [True, False])
def test_a_way_that_fails_is_a_row_and_ends_nothing(is_peer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    [row, after] = _rows(monkeypatch, Way("broken", _broken, is_peer=is_peer), WAYS[0])
    assert (row.not_served, row.group_s) == ("failed: RuntimeError: out of shared memory", None)
    assert after.is_right


def test_a_way_of_ours_that_fails_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--way", f"broken={__name__}:_broken"]) == 1
    assert "failed: broken (q k v, mixed)" in capsys.readouterr().err


def test_without_time_nothing_is_begun_and_all_is_listed(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    assert main(["--quick", "--seconds", "-1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert (result["rows"], len(result["skipped"])) == ([], 9)


def _case(*adapters: BatchAdapter) -> Case:
    return Case(QUICK_MODEL.groups[0], Batch("", adapters), torch.float32, torch.device("cpu"), 0)


def test_shared_projections_must_move_once() -> None:
    case = _case(*(BatchAdapter(256, 1, "vera"),) * 64)
    group = case.group
    vectors = 64 * (3 * 256 + sum(group.widths))
    rows = 256 * (3 * group.d_in + sum(group.widths))
    assert case.moved_bytes == 4 * (rows + vectors + 64 * group.d_in + 2 * 64 * sum(group.widths))


def test_products_are_counted_without_padding() -> None:
    case = _case(BatchAdapter(8, 2), BatchAdapter(64, 1))
    assert case.num_flops == 2 * (8 * 2 + 64) * (3 * case.group.d_in + sum(case.group.widths))


def test_shuffled_tokens_are_the_same_tokens() -> None:
    batch = next(batch for batch in BATCHES if batch.is_shuffled)
    ordered = Batch("", batch.adapters)
    assert batch.slots != ordered.slots
    assert sorted(batch.slots) == ordered.slots


def test_the_batches_are_those_that_were_promised() -> None:
    decodes = [batch for batch in BATCHES if batch.name.startswith("decode")]
    distinct = {
        len(b.slots) for b in decodes if len(b.adapters) == len(b.slots) and {a.rank for a in b.adapters} == {16}
    }
    assert distinct == {1, 8, 16, 32, 64}
    assert {len(batch.slots) for batch in BATCHES if batch.name.startswith("prefill")} == {512, 2048, 8192}
    assert {b.max_rank for b in decodes if b.is_plain and not b.has_mixed_ranks} == {8, 16, 64}
    assert any(b.has_mixed_ranks for b in decodes)
    assert any({a.method for a in b.adapters} == {"lora", "dora", "vera"} for b in decodes)
    assert len({batch.name for batch in BATCHES}) == len(BATCHES)
    assert set(MODELS) == {"llama-3.1-8b", "qwen2.5-0.5b"}
