"""The draws against their laws, with bounds that are computed; every seed is fixed, so nothing here is left to luck."""

import math
import statistics
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from load_tests.plan import WORDS, Load, Request, TokenScale, draw, poisson_arrivals, prompt, ranked, zipf_law

LOAD = Load(rate_per_s=500.0, duration_s=40.0, zipf=1.0, min_prompt_tokens=32, max_prompt_tokens=128, seed=7)
NAMES = tuple(f"adapter-{number:03d}" for number in range(50))
SIGMAS = 4
# Seconds of the arrival, rank and prompt tokens of the first five requests at two per second.
PLAN_OF_SEED_0 = [(0.920057, 20, 72), (1.39048, 1, 36), (2.062579, 8, 115), (2.279613, 3, 113), (2.79239, 1, 125)]
RANKED_BY_SEED_0 = ("adapter-000", "adapter-019", "adapter-034")


def chi_square(counts: list[int], law: list[float]) -> float:
    """Pearson's statistic."""
    num_draws = sum(counts)
    return sum((count - num_draws * p) ** 2 / (num_draws * p) for count, p in zip(counts, law, strict=True))


def chi_square_bound(num_ranks: int) -> float:
    """Where the statistic lies `SIGMAS` above its mean (Wilson and Hilferty's cube root)."""
    freedom = num_ranks - 1
    spread = 2 / (9 * freedom)
    return float(freedom * (1 - spread + SIGMAS * math.sqrt(spread)) ** 3)


def rank_counts(requests: tuple[Request, ...]) -> list[int]:
    counts = Counter(request.rank for request in requests)
    return [counts[rank] for rank in range(1, len(NAMES) + 1)]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.5])
def test_the_law_is_zipfs(exponent: float) -> None:
    law = zipf_law(50, exponent)
    assert math.fsum(law) == pytest.approx(1.0)
    assert [p / law[0] for p in law] == pytest.approx([1 / rank**exponent for rank in range(1, 51)])


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.5])
def test_adapters_are_drawn_by_the_law_and_by_no_other(exponent: float) -> None:
    counts = rank_counts(draw(replace(LOAD, zipf=exponent), NAMES))
    bound = chi_square_bound(len(NAMES))
    assert chi_square(counts, zipf_law(len(NAMES), exponent)) < bound
    assert chi_square(counts, zipf_law(len(NAMES), exponent + 0.25)) > bound


def test_arrivals_ascend_and_end_with_the_duration() -> None:
    arrivals = poisson_arrivals(500.0, 40.0, 7)
    assert arrivals[0] > 0
    assert arrivals[-1] < 40.0
    assert all(earlier < later for earlier, later in pairwise(arrivals))


def test_the_number_of_arrivals_is_rate_times_duration() -> None:
    """A Poisson count has its mean as its variance."""
    assert abs(len(poisson_arrivals(500.0, 40.0, 7)) - 20_000) < SIGMAS * math.sqrt(20_000)


def test_gaps_have_the_mean_and_the_variance_of_the_exponential_law() -> None:
    gaps = [later - earlier for earlier, later in pairwise(poisson_arrivals(500.0, 40.0, 7))]
    # Of n draws the mean has a relative spread of 1 / sqrt(n), and the variance of sqrt(8 / n): its fourth moment is 9.
    assert abs(statistics.fmean(gaps) * 500 - 1) < SIGMAS / math.sqrt(len(gaps))
    assert abs(statistics.variance(gaps) * 500**2 - 1) < SIGMAS * math.sqrt(8 / len(gaps))


def test_gaps_follow_the_exponential_law_everywhere() -> None:
    """Kolmogorov's distance; 1.95 / sqrt(n) is exceeded once in a thousand seeds, and this seed is fixed."""
    gaps = sorted(later - earlier for earlier, later in pairwise(poisson_arrivals(500.0, 40.0, 7)))
    law = [1 - math.exp(-500 * gap) for gap in gaps]
    distance = max(max(p - place / len(gaps), (place + 1) / len(gaps) - p) for place, p in enumerate(law))
    assert distance < 1.95 / math.sqrt(len(gaps))


def test_gaps_do_not_depend_on_one_another() -> None:
    """The correlation of neighbours has a spread of 1 / sqrt(n)."""
    gaps = [later - earlier for earlier, later in pairwise(poisson_arrivals(500.0, 40.0, 7))]
    assert abs(statistics.correlation(gaps[:-1], gaps[1:])) < SIGMAS / math.sqrt(len(gaps))


def test_the_same_seed_gives_the_same_plan_and_another_seed_another() -> None:
    assert draw(LOAD, NAMES) == draw(LOAD, NAMES)
    other = draw(replace(LOAD, seed=8), NAMES)
    assert [request.scheduled_s for request in other[:9]] != [request.scheduled_s for request in draw(LOAD, NAMES)[:9]]


def test_a_plan_is_the_same_on_every_machine() -> None:
    """Results of different days are compared: a change here makes all the older ones another workload."""
    load = Load(rate_per_s=2.0, duration_s=3.0, zipf=1.0, min_prompt_tokens=32, max_prompt_tokens=128, seed=0)
    shown = [(round(r.scheduled_s, 6), r.rank, r.num_prompt_tokens) for r in draw(load, NAMES)]
    assert shown == PLAN_OF_SEED_0
    assert ranked(NAMES, 3, seed=0) == RANKED_BY_SEED_0


def test_a_longer_run_begins_with_the_shorter_one() -> None:
    short = draw(replace(LOAD, duration_s=5.0), NAMES)
    assert draw(LOAD, NAMES)[: len(short)] == short


def test_more_arrivals_do_not_change_who_is_asked_for() -> None:
    slow, fast = draw(replace(LOAD, rate_per_s=50.0), NAMES), draw(LOAD, NAMES)
    assert len(fast) > len(slow)
    assert [r.adapter for r in fast[: len(slow)]] == [r.adapter for r in slow]
    assert [r.num_prompt_tokens for r in fast[: len(slow)]] == [r.num_prompt_tokens for r in slow]


def test_a_request_names_the_adapter_of_its_rank_and_its_place_in_the_run() -> None:
    requests = draw(LOAD, NAMES)
    assert all(request.adapter == NAMES[request.rank - 1] for request in requests)
    assert [request.number for request in requests] == list(range(len(requests)))


def test_without_adapters_every_request_is_the_bases() -> None:
    bare = draw(LOAD, ())
    assert {(request.adapter, request.rank) for request in bare} == {(None, 0)}
    assert [r.scheduled_s for r in bare] == [r.scheduled_s for r in draw(LOAD, NAMES)]


def test_prompt_lengths_are_uniform_over_the_range_and_both_its_ends() -> None:
    counts = Counter(request.num_prompt_tokens for request in draw(LOAD, NAMES))
    lengths = range(32, 129)
    assert set(counts) == set(lengths)
    law = [1 / len(lengths)] * len(lengths)
    assert chi_square([counts[length] for length in lengths], law) < chi_square_bound(len(lengths))


def test_who_is_popular_is_the_seeds_choice_in_whatever_order_the_server_lists() -> None:
    assert ranked(NAMES, 50, 7) == ranked(tuple(reversed(NAMES)), 50, 7)
    assert ranked(NAMES, 50, 7) not in (NAMES, ranked(NAMES, 50, 8))
    assert set(ranked(NAMES, 50, 7)) == set(NAMES)


def test_a_name_that_is_listed_twice_is_one_adapter() -> None:
    assert sorted(ranked(("a", "b", "a"), 2, 0)) == ["a", "b"]


def test_more_adapters_than_there_are_is_an_error_that_says_how_many_there_are() -> None:
    with pytest.raises(ValueError, match="asks for 3, but only 2 are known"):
        ranked(("a", "b", "a"), 3, 0)


def test_the_scale_is_the_line_through_two_measurements() -> None:
    scale = TokenScale.through((4, 11), (24, 51))
    assert scale == TokenScale(tokens_per_word=2.0, overhead=3.0)
    assert scale.num_words(103) == 50


def test_the_words_come_as_close_to_the_wanted_tokens_as_whole_words_can() -> None:
    scale = TokenScale(tokens_per_word=1.3, overhead=2.0)
    for num_tokens in range(32, 129):
        counted = scale.overhead + scale.tokens_per_word * scale.num_words(num_tokens)
        assert abs(counted - num_tokens) <= scale.tokens_per_word / 2 + 1e-9


def test_there_is_always_a_word() -> None:
    assert TokenScale(tokens_per_word=2.0, overhead=30.0).num_words(1) == 1


@pytest.mark.parametrize("many", [4, 3])
def test_a_server_whose_counts_do_not_grow_is_not_believed(many: int) -> None:
    assert TokenScale.through((4, 4), (24, many)) == TokenScale()


def test_prompts_differ_from_their_first_words_on_and_stay_the_same_for_a_seed() -> None:
    requests = draw(replace(LOAD, duration_s=1.0), NAMES)
    prompts = [prompt(request, TokenScale(), 7) for request in requests]
    assert len({text[:40] for text in prompts}) == len(prompts)
    assert prompts == [prompt(request, TokenScale(), 7) for request in requests]
    assert prompts[0] != prompt(requests[0], TokenScale(), 8)


def test_a_prompt_has_the_wanted_number_of_known_words() -> None:
    words = prompt(draw(LOAD, NAMES)[0], TokenScale(), 7).split(" ")
    assert len(words) == draw(LOAD, NAMES)[0].num_prompt_tokens
    assert set(words) <= set(WORDS)
