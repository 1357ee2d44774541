"""The cliff and the cold load: what is asked for, what is computed, and a short run of each on a real server."""

import json
from pathlib import Path

import pytest

from load_tests import cliff, cold_load
from load_tests.closed_loop import Round
from load_tests.own_server import NoServer, Shape, make_loras, own_server
from tests.load_tests.outcomes import completed, failed


def test_every_working_set_beyond_what_fits_has_at_least_one_adapter_more() -> None:
    cases = cliff.cases_of(8, cliff.FACTORS)
    assert [case.num_adapters for case in cases if case.pattern == "cyclic"] == [4, 8, 9, 16, 32]
    assert [case.num_adapters for case in cliff.cases_of(1, [0.5, 1.0, 1.1, 2.0])][:4] == [1, 1, 2, 2]


def test_a_cycle_asks_for_each_in_turn_and_a_draw_is_the_same_each_time() -> None:
    cyclic, uniform = cliff.Case("cyclic", 1.1, 3), cliff.Case("uniform", 1.1, 3)
    assert cliff._order(cyclic, 5, 0) == [f"cliff-000{index}" for index in (0, 1, 2, 0, 1)]
    assert cliff._order(uniform, 50, 1) == cliff._order(uniform, 50, 1) != cliff._order(uniform, 50, 2)
    assert set(cliff._order(uniform, 50, 1)) == {f"cliff-000{index}" for index in range(3)}


def rounds(*ttfts_s: float) -> list[Round]:
    """Each of two requests, with 11 tokens in a second."""
    return [Round((completed(ttft_s=ttft_s, gaps_s=(0.1,) * 10),) * 2, 2.0) for ttft_s in ttfts_s]


def test_ratios_are_medians_of_the_rounds_own() -> None:
    one, two = cliff.Case("cyclic", 1.0, 8), cliff.Case("cyclic", 2.0, 16)
    measured = {one: cliff.Measured(rounds(0.1, 0.2, 1.0)), two: cliff.Measured(rounds(0.2, 0.4, 1.0), 7, 3)}
    measured[two].rounds[0] = Round((*measured[two].rounds[0].outcomes, failed()), 4.0)
    rows = cliff.rows_of(measured)
    assert [row["ttft_p99_ratio"] for row in rows] == pytest.approx([1.0, 2.0])
    assert [row["num_failed"] for row in rows] == [0, 1]
    assert [row["tokens_per_s"] for row in rows] == pytest.approx([11.0, 11.0])
    assert rows[1]["rounds"][0]["tokens_per_s"] == pytest.approx(5.5)
    assert (rows[1]["num_promotions"], rows[1]["num_rotations"]) == (7, 3)
    assert rows[0]["itl_p99_ms"] == pytest.approx(100)
    assert "| cyclic 2x | 16 | 7 | 1 | 7 | 3 |" in cliff.table(rows)


def test_the_cold_loads_are_compared_with_the_same_round_alone() -> None:
    measured = {variant: cold_load.Measured(rounds(0.1, 0.1)) for variant in cold_load.VARIANTS}
    measured["load"] = cold_load.Measured([Round((completed(gaps_s=(0.3,) * 10),), 2.0)] * 2, [0.5, 0.7])
    alone, load, _ = cold_load.rows_of(measured)
    assert (alone["itl_p99_ratio"], alone["load_s"]) == (1.0, None)
    assert (load["itl_p99_ratio"], load["num_loads"], load["load_s"]) == pytest.approx((3.0, 2, 0.6))
    assert "| load | 2 | 0 | 2 | 0.60 |" in cold_load.table([alone, load])


def test_an_adapter_is_as_large_as_it_is_wanted(tiny_llama: Path) -> None:
    shape = Shape.of(tiny_llama)
    rank = shape.rank_of(400_000)
    (made,) = make_loras(shape, "big", 1, rank)
    assert (made.name, json.loads(made.config)["r"]) == ("big-0000", rank)
    assert len(made.weights) == pytest.approx(400_000, rel=0.05)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(NoServer, match=r"(?s)did not start: .*--no-such-flag"),
        own_server(tmp_path, tmp_path, {"no-such-flag": 1}),
    ):
        pass


def test_a_short_run_writes_every_figure_and_a_picture(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "cliff.json", tmp_path / "cliff.png"
    assert cliff.main(["--model", str(tiny_llama), "--quick", "--out", str(out), "--plot", str(plot)]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(row["pattern"], row["num_adapters"]) for row in rows] == [
        ("uniform", 2), ("uniform", 4), ("cyclic", 2), ("cyclic", 4),
    ]  # fmt: skip
    assert all(row["num_failed"] == 0 and row["num_requests"] == 8 for row in rows)
    assert rows[2]["num_promotions"] == 0, "what fits stays"
    assert rows[3]["num_promotions"] > 0, "what does not fit is brought when it is its turn"
    assert "| cyclic 2x | 4 | 8 | 0 |" in capsys.readouterr().out
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_short_run_of_the_cold_load(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "cold.json"
    assert cold_load.main(["--model", str(tiny_llama), "--quick", "--out", str(out)]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["variant"] for row in rows] == ["alone", "load", "request"]
    assert all(row["num_failed"] == 0 for row in rows)
