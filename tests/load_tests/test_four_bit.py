"""The benchmark of 4-bit products, small and in the interpreter: all ways compute the same, and wrong ones are said."""

import json
from pathlib import Path

import pytest
import torch

from load_tests import four_bit
from load_tests.four_bit import QUICK, Product, Row, Weights, layers, main, measure, ways

pytest.importorskip("triton")


def test_quick_checks_every_way_and_claims_no_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "four-bit.json"
    assert main(["--quick", "--tilings", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {row["way"] for row in result["rows"]} == {"bitsandbytes", "triton", "triton 128x8x3x2"}
    assert all(row["relative_error"] < 1e-5 and row["is_right"] and row["group_s"] is None for row in result["rows"])
    assert result["speeds"] is None
    assert result["layers"] == []
    assert " us " not in capsys.readouterr().out


def half(weights: Weights) -> Product:
    product = weights.by_triton()
    return lambda x: product(x) * 0.5  # type: ignore[operator]


def test_a_wrong_product_of_ours_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(four_bit, "ways", lambda tilings, *, is_timed: {"triton": half})
    assert main(["--quick"]) == 1
    assert "wrong results: triton (down, 1 tokens)" in capsys.readouterr().err


def test_each_time_is_that_of_all_copies_beside_the_bytes_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts the calls."""

    def seconds(calls: list[four_bit.Product]) -> float:
        for call in calls:
            call()  # type: ignore[call-arg]
        return 1e-6 * len(calls)

    monkeypatch.setattr(four_bit, "seconds_of", seconds)
    monkeypatch.setattr(four_bit, "CACHE_BYTES", 30_000)
    monkeypatch.setitem(four_bit.LIMITS, torch.bfloat16, 1.0)  # which the interpreter gets wrong
    group = QUICK["quick"].groups[1]
    named = {name: way for name, way in ways([], is_timed=False).items() if name == "bitsandbytes"}
    [row] = measure("quick", group, (5,), named, torch.device("cpu"), copy_bytes_per_s=1e12)
    weight_bytes = Weights(group, torch.device("cpu"), torch.float32, 0).num_bytes
    assert row.moved_bytes == weight_bytes + 2 * 5 * (384 + 128)
    assert row.group_s == pytest.approx(2e-6)  # two copies are more than the cache
    assert row.copy_share == pytest.approx(row.moved_bytes / 2e-6 / 1e12)


def test_a_layer_is_the_sum_of_its_groups_and_their_share_that_of_all_bytes() -> None:
    rows = [
        Row("quick", "q k v", 1, "triton", 100, 0.0, True, 1e-6, 0.5),
        Row("quick", "down", 1, "triton", 300, 0.0, True, 3e-6, 0.1),
        Row("quick", "q k v", 2, "triton", 100, 0.0, True, 1e-6, 0.5),
    ]
    [layer] = layers(rows, QUICK)
    assert (layer["num_tokens"], layer["way"]) == (1, "triton")
    assert layer["layer_s"] == pytest.approx(4e-6)
    assert layer["copy_share"] == pytest.approx(0.2)
