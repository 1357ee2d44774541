"""What one request's times amount to, computed by hand."""

from dataclasses import replace

import pytest

from load_tests.outcome import End
from tests.load_tests.outcomes import cancelled, completed, failed, request


def test_the_first_token_is_timed_from_the_scheduled_arrival_and_the_lag_is_told_apart() -> None:
    late = completed(request(at_s=10.0), ttft_s=0.75, sent_s=10.5)
    assert late.ttft_s == pytest.approx(0.75)
    assert late.lag_s == pytest.approx(0.5)
    assert late.ttft_from_sent_s == pytest.approx(0.25)


def test_the_latency_is_from_the_scheduled_arrival_to_the_end() -> None:
    assert completed(request(at_s=10.0), ended_s=12.5).latency_s == pytest.approx(2.5)
    assert failed(request(at_s=10.0)).latency_s == pytest.approx(0.2)


def test_gaps_lie_between_chunks() -> None:
    assert completed(ttft_s=1.0, gaps_s=(0.25, 0.5)).gaps_s == pytest.approx((0.25, 0.5))
    assert completed().gaps_s == ()


def test_the_time_per_token_leaves_the_first_one_out() -> None:
    assert completed(ttft_s=5.0, gaps_s=(0.25, 0.75)).tpot_s == pytest.approx(0.5)


def test_a_chunk_of_several_tokens_makes_the_time_per_token_shorter() -> None:
    assert completed(gaps_s=(0.5, 0.5), num_output_tokens=11).tpot_s == pytest.approx(0.1)


def test_chunks_stand_in_for_tokens_that_nobody_counted() -> None:
    uncounted = completed(gaps_s=(0.5, 0.5), num_output_tokens=None)
    assert uncounted.num_tokens == 3
    assert uncounted.tpot_s == pytest.approx(0.5)


def test_one_token_has_no_time_per_token() -> None:
    assert completed().tpot_s is None


def test_without_a_token_there_are_no_times() -> None:
    lost = failed()
    assert (lost.ttft_s, lost.ttft_from_sent_s, lost.tpot_s, lost.gaps_s, lost.num_tokens) == (None, None, None, (), 0)


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "is_within"), [(0.5, 0.25, True), (0.49, 0.25, False), (0.5, 0.24, False), (9.0, 9.0, True)]
)
def test_both_limits_include_their_own_value(ttft_s: float, tpot_s: float, is_within: bool) -> None:
    assert completed(ttft_s=0.5, gaps_s=(0.25, 0.25)).is_within(ttft_s, tpot_s) is is_within


def test_an_answer_of_one_token_needs_only_its_first_token_in_time() -> None:
    assert completed(ttft_s=0.5).is_within(0.5, 0.001)


def test_nothing_but_a_completed_request_is_within_any_limit() -> None:
    half = replace(completed(), end=End.CANCELLED)
    assert not any(outcome.is_within(9.0, 9.0) for outcome in (half, cancelled(), failed()))
