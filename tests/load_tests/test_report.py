"""The statistics by hand and against numpy, and the names under which they are reported."""

import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from load_tests.outcome import Outcome
from load_tests.report import (
    Limits,
    adapter_figures,
    errors,
    group_figures,
    groups,
    percentile,
    popularity_groups,
    report,
    sentences,
    summary_ms,
    table,
    totals,
)
from tests.load_tests.outcomes import cancelled, completed, failed, request

LIMITS = Limits(ttft_s=0.5, tpot_s=0.1)
NAMES = tuple(f"adapter-{rank}" for rank in range(1, 21))
TIMES = st.floats(0, 1e6, allow_subnormal=False)

SUMMARY = {"count": int, "mean": float, "p50": float, "p90": float, "p99": float, "max": float}
GROUP = {
    "num_requests": int,
    "num_completed": int,
    "share_within_slo": float,
    "ttft_ms": SUMMARY,
    "ttft_from_sent_ms": SUMMARY,
    "itl_ms": SUMMARY,
    "tpot_ms": SUMMARY,
    "e2el_ms": SUMMARY,
}
REPORT = {
    "totals": {
        "num_sent": int,
        "num_completed": int,
        "num_failed": int,
        "num_cancelled": int,
        "elapsed_s": float,
        "requests_per_s": float,
        "goodput_per_s": float,
        "output_tokens_per_s": float,
        "num_prompt_tokens": int,
        "num_output_tokens": int,
        "num_chunks": int,
        "num_without_usage": int,
    },
    "errors": {"http_500": {"count": int, "first": str}},
    "schedule_lag_ms": SUMMARY,
    "num_adapters_asked": int,
    "share_of_adapters_within_slo": float,
    "groups": dict.fromkeys(("all", "head", "middle", "tail", "first_use", "later_use"), GROUP),
    "adapters": [
        {
            "rank": int,
            "adapter": str,
            "expected_share": float,
            "num_requests": int,
            "num_within_slo": int,
            "ttft_p50_ms": float,
        }
    ],
    "warnings": [str],
}


def shape(value: Any) -> Any:
    """Keys and types; the entries of a list are all like its first."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        assert all(shape(inner) == shape(value[0]) for inner in value)
        return [shape(value[0])] if value else []
    return type(value)


def mixed_run() -> list[Outcome]:
    """Every rank asked three times, the last of them badly: an error on the last rank, no answer on the one before."""
    run = []
    for number in range(60):
        asked = request(number, rank=number % 20 + 1, at_s=number / 10)
        run.append(completed(asked, ttft_s=0.1 + number / 1000, gaps_s=(0.05, 0.06)))
    return [*run[:58], cancelled(run[58].request), failed(run[59].request)]


@given(st.lists(TIMES, min_size=1, max_size=40), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-9)


def test_a_percentile_lies_on_the_line_between_two_ranks() -> None:
    assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    assert percentile([10.0, 20.0], 90) == 19.0
    assert percentile([10.0], 99) == 10.0


def test_nothing_has_no_percentile() -> None:
    assert percentile([], 50) is None


def test_a_summary_is_in_milliseconds_and_leaves_out_what_is_missing() -> None:
    values = [random.Random(0).expovariate(3) for _ in range(200)]
    found = summary_ms([*values, None, None])
    in_ms = 1000 * np.array(values)
    assert found["count"] == 200
    assert found["mean"] == pytest.approx(in_ms.mean(), abs=1e-3)
    assert found["max"] == pytest.approx(in_ms.max(), abs=1e-3)
    for percent in (50, 90, 99):
        assert found[f"p{percent}"] == pytest.approx(np.percentile(in_ms, percent), abs=1e-3)


def test_a_summary_of_nothing_says_so() -> None:
    assert summary_ms([None]) == {"count": 0, "mean": None, "p50": None, "p90": None, "p99": None, "max": None}


@pytest.mark.parametrize("num_adapters", range(101))
def test_every_rank_is_in_one_group_of_popularity(num_adapters: int) -> None:
    ranks = [rank for group in popularity_groups(num_adapters).values() for rank in group]
    assert ranks == list(range(1, num_adapters + 1))


def test_the_head_is_a_tenth_and_the_tail_the_less_popular_half() -> None:
    assert popularity_groups(50) == {"head": range(1, 6), "middle": range(6, 26), "tail": range(26, 51)}


def test_requests_are_grouped_by_the_rank_of_their_adapter() -> None:
    run = mixed_run()
    parts = groups(run, 20)
    assert parts["all"] == run
    assert {name: {o.request.rank for o in parts[name]} for name in ("head", "middle", "tail")} == {
        "head": set(range(1, 3)),
        "middle": set(range(3, 11)),
        "tail": set(range(11, 21)),
    }


def test_the_first_use_of_an_adapter_is_the_first_that_was_scheduled_not_the_first_that_ended() -> None:
    run = [completed(request(number, rank)) for number, rank in enumerate((2, 1, 2, 2, 1))]
    parts = groups(list(reversed(run)), 20)
    assert [o.request.number for o in parts["first_use"]] == [0, 1]
    assert [o.request.number for o in parts["later_use"]] == [2, 3, 4]


def test_the_bare_base_has_only_one_group() -> None:
    assert list(groups([completed(request(rank=0))], 0)) == ["all"]


def test_the_share_within_the_limits_is_of_all_that_were_sent() -> None:
    slow_start, slow_tokens = completed(ttft_s=0.6), completed(gaps_s=(0.2,))
    run = [
        completed(),
        completed(gaps_s=(0.05,)),
        slow_start,
        slow_tokens,
        failed(),
        cancelled(),
        completed(),
        failed(),
    ]
    assert group_figures(run, LIMITS)["share_within_slo"] == pytest.approx(3 / 8)


def test_times_are_of_the_requests_that_completed() -> None:
    half = replace(cancelled(), token_times_s=(0.9,))
    figures = group_figures([completed(ttft_s=0.25, gaps_s=(0.5, 0.1)), half, failed()], LIMITS)
    assert (figures["num_requests"], figures["num_completed"]) == (3, 1)
    assert (figures["ttft_ms"]["count"], figures["ttft_ms"]["max"]) == (1, 250.0)
    assert (figures["itl_ms"]["count"], figures["itl_ms"]["max"]) == (2, 500.0)
    assert figures["tpot_ms"]["mean"] == 300.0
    assert figures["e2el_ms"]["mean"] == 850.0


def test_rates_are_over_the_whole_time_and_tokens_those_of_completed_requests() -> None:
    run = [completed(gaps_s=(0.01,) * 9), completed(ttft_s=0.6, num_output_tokens=None), failed(), cancelled()]
    sums = totals(run, 4.0, LIMITS)
    assert [sums[f"num_{end}"] for end in ("sent", "completed", "failed", "cancelled")] == [4, 2, 1, 1]
    assert (sums["requests_per_s"], sums["goodput_per_s"], sums["output_tokens_per_s"]) == (0.5, 0.25, 2.75)
    assert (sums["num_prompt_tokens"], sums["num_output_tokens"], sums["num_chunks"]) == (32, 11, 11)
    assert sums["num_without_usage"] == 1


def test_errors_are_counted_by_kind_the_most_frequent_first() -> None:
    kinds = [("cut", "a"), ("http_500", "b"), ("http_500", "c"), ("cut", "d"), ("http_500", "e")]
    run = [completed(), *(failed(error=kind, detail=detail) for kind, detail in kinds), cancelled()]
    assert list(errors(run).items()) == [
        ("http_500", {"count": 3, "first": "b"}),
        ("cut", {"count": 2, "first": "a"}),
    ]


def test_each_adapter_has_its_own_figures_beside_what_the_law_expects() -> None:
    run = [completed(request(0, 1), ttft_s=0.2), completed(request(1, 1), ttft_s=0.6), failed(request(2, 2))]
    first, second, third = adapter_figures(run, ("a", "b", "c"), 1.0, LIMITS)
    assert first == {
        "rank": 1,
        "adapter": "a",
        "expected_share": pytest.approx(6 / 11, abs=1e-5),
        "num_requests": 2,
        "num_within_slo": 1,
        "ttft_p50_ms": 400.0,
    }
    assert (second["num_requests"], second["num_within_slo"], second["ttft_p50_ms"]) == (1, 0, None)
    assert (third["adapter"], third["num_requests"]) == ("c", 0)


def test_an_adapter_counts_as_served_only_if_every_request_of_it_was_within_the_limits() -> None:
    found = report(mixed_run(), NAMES, 1.0, 6.0, LIMITS)
    assert found["num_adapters_asked"] == 20
    assert found["share_of_adapters_within_slo"] == pytest.approx(18 / 20)


def test_adapters_that_nobody_asked_for_are_no_part_of_the_share() -> None:
    found = report([completed(request(0, 1)), failed(request(1, 2))], NAMES, 1.0, 1.0, LIMITS)
    assert (found["num_adapters_asked"], found["share_of_adapters_within_slo"]) == (2, 0.5)


def test_the_report_has_these_keys_and_types() -> None:
    found = report(mixed_run(), NAMES, 1.0, 6.0, LIMITS)
    assert shape(found) == REPORT
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_run_without_an_answer_can_be_reported() -> None:
    found = report([failed(request(0, 1))], NAMES, 1.0, 0.5, LIMITS)
    assert found["totals"]["num_completed"] == 0
    assert found["groups"]["all"]["ttft_ms"]["p50"] is None
    assert found["groups"]["tail"]["share_within_slo"] is None
    json.dumps(found, allow_nan=False)


def test_a_run_of_the_bare_base_has_no_adapters() -> None:
    found = report([completed(request(rank=0))], (), 1.0, 1.0, LIMITS)
    assert (found["adapters"], found["num_adapters_asked"], found["share_of_adapters_within_slo"]) == ([], 0, None)


def test_a_run_in_which_nothing_arrived_can_be_reported() -> None:
    found = report([], NAMES, 1.0, 0.001, LIMITS)
    assert found["totals"]["num_sent"] == 0
    assert len(written(found).splitlines()) == 2


def test_a_good_run_has_no_warnings() -> None:
    assert report([completed()], NAMES, 1.0, 1.0, LIMITS)["warnings"] == []


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (completed(sent_s=0.026), "The client sent late (p99 26 ms)"),
        (completed(num_output_tokens=None), "1 answers came without a usage"),
        (cancelled(), "1 requests were cancelled unanswered"),
    ],
    ids=["lag", "usage", "cancelled"],
)
def test_what_makes_figures_doubtful_is_a_warning(outcome: Outcome, words: str) -> None:
    (warning,) = report([outcome], NAMES, 1.0, 1.0, LIMITS)["warnings"]
    assert warning.startswith(words)


def test_a_lag_that_is_small_beside_the_limit_is_no_warning() -> None:
    assert report([completed(sent_s=0.024)], NAMES, 1.0, 1.0, LIMITS)["warnings"] == []


def written(found: dict[str, Any]) -> str:
    return table({"workload": {"num_adapters": len(NAMES)}} | found)


def test_the_table_has_a_row_for_each_group_and_as_many_cells_in_every_row() -> None:
    lines = written(report(mixed_run(), NAMES, 1.0, 6.0, LIMITS)).splitlines()
    assert {line.count("|") for line in lines} == {13}
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "all",
        "head (ranks 1 to 2)",
        "middle (ranks 3 to 10)",
        "tail (ranks 11 to 20)",
        "first use of its adapter",
        "later use",
    ]


def test_the_table_shows_the_figures_of_the_report() -> None:
    run = [completed(request(0, 1), ttft_s=0.25, gaps_s=(0.005, 0.005)), failed(request(1, 1))]
    line = written(report(run, NAMES, 1.0, 6.0, LIMITS)).splitlines()[2]
    assert line == "| all | 2 | 1 | 50.0 % | 250 | 250 | 250 | 5.0 | 5.0 | 5.0 | 5.0 | 5.0 |"


def test_groups_that_nobody_asked_for_and_times_that_nobody_has_are_not_made_up() -> None:
    lines = written(report([completed(request(0, 1), ttft_s=0.25)], NAMES, 1.0, 6.0, LIMITS)).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "all",
        "head (ranks 1 to 2)",
        "first use of its adapter",
    ]
    assert lines[2] == "| all | 1 | 1 | 100.0 % | 250 | 250 | 250 | - | - | - | - | - |"


def test_the_sentences_tell_what_the_table_does_not_hold() -> None:
    found = report(mixed_run(), NAMES, 1.0, 6.0, LIMITS)
    told = "\n".join(sentences({"workload": {"num_adapters": len(NAMES)}} | found))
    assert "9.67 requests/s completed, 9.67 within the SLO; 29 output tokens/s; 6.0 s in all" in told
    assert "schedule lag of the client: p50 0.0 ms, p99 0.0 ms" in told
    assert "20 of 20 adapters asked for; of 90 % of these every request was within the SLO" in told
    assert "http_500: 1, first: broken" in told
    assert "cancelled: 1" in told
    assert "warning: 1 requests were cancelled" in told
