"""Sampling: the distribution that was asked for, and a row's choice that no neighbour can change."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine.sampler import SamplingRow, sample

VOCABULARY = 12
GREEDY = SamplingRow(temperature=0, top_p=1, top_k=0, uniform=0.5)


def logits_of(num_rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return 2 * torch.randn(num_rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def probabilities(logits: torch.Tensor, temperature: float, top_p: float, top_k: int) -> list[float]:
    """The distribution by its definition: the top_k best, of these the fewest whose mass reaches top_p."""
    full = torch.softmax(logits.double() / temperature, dim=-1).tolist()
    best = sorted(range(len(full)), key=lambda token: -full[token])
    best = best[:top_k] if top_k else best
    mass = sum(full[token] for token in best)
    kept: dict[int, float] = {}
    for token in best:
        if sum(kept.values()) >= top_p:
            break
        kept[token] = full[token] / mass
    return [kept.get(token, 0.0) / sum(kept.values()) for token in range(len(full))]


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = logits_of(6)
    assert sample(logits, [GREEDY] * 6).tolist() == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.999999999999])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.5, 1.0, 1), (1.5, 1e-9, 0), (1e-9, 1.0, 0), (1e-30, 0.9, 5)],
    ids=["top-k-1", "tiny-top-p", "tiny-temperature", "all-tiny"],
)
def test_limits_that_leave_one_token_are_greedy(temperature: float, top_p: float, top_k: int, uniform: float) -> None:
    logits = logits_of(6)
    rows = [SamplingRow(temperature, top_p, top_k, uniform)] * 6
    assert torch.equal(sample(logits, rows), logits.argmax(dim=-1))


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.7, 0.8, 0), (1.0, 1.0, 4), (1.3, 0.7, 6), (1.0, 0.99, VOCABULARY + 5)],
)
def test_draws_follow_the_distribution(temperature: float, top_p: float, top_k: int) -> None:
    """Chi-square over fixed random numbers: 36 is its 0.9998 quantile at 11 degrees of freedom, and fewer need less."""
    num_draws = 4000
    logits = logits_of(1, seed=5)
    dice = random.Random(1)
    rows = [SamplingRow(temperature, top_p, top_k, dice.random()) for _ in range(num_draws)]
    counts = torch.bincount(sample(logits.expand(num_draws, -1), rows), minlength=VOCABULARY).tolist()
    expected = probabilities(logits[0], temperature, top_p, top_k)
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0)
    chi_square = sum((c - num_draws * p) ** 2 / (num_draws * p) for c, p in zip(counts, expected, strict=True) if p)
    assert chi_square < 36


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.8])
@pytest.mark.parametrize(
    ("top_p", "top_k", "min_p"),
    [(1.0, 0, 0.1), (1.0, 0, 1.0), (0.8, 0, 0.05), (1.0, 5, 0.2), (0.9, 7, 0.02), (0.9, 7, 0.0), (0.5, 0, 0.0)],
)
def test_the_cuts_are_those_of_transformers(temperature: float, top_p: float, top_k: int, min_p: float) -> None:
    """Its warpers in its order give each token's probability; evenly spread random numbers must meet it to one draw."""
    num_draws = 1000
    logits = logits_of(1, seed=4)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    expected = torch.softmax(warpers(torch.tensor([[0]]), logits.clone()), dim=-1)[0]
    rows = [SamplingRow(temperature, top_p, top_k, (i + 0.5) / num_draws, min_p) for i in range(num_draws)]
    counts = torch.bincount(sample(logits.expand(num_draws, -1), rows), minlength=VOCABULARY)
    assert ((counts - expected * num_draws).abs() <= 1).all()
    assert counts[expected == 0].sum() == 0


kinds = st.builds(
    SamplingRow,
    temperature=st.sampled_from([0.0, 1e-8, 0.7, 1.0, 3.0]),
    top_p=st.sampled_from([1e-6, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 50, 600, 3000]),
    uniform=st.floats(0, 1, exclude_max=True),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(kinds, min_size=1, max_size=8), st.integers(0, 100))
def test_a_rows_choice_is_the_one_it_makes_alone(rows: list[SamplingRow], seed: int) -> None:
    logits = logits_of(len(rows), seed)
    together = sample(logits, rows).tolist()
    alone = [int(sample(logits[i : i + 1], [row])) for i, row in enumerate(rows)]
    assert together == alone


def test_a_row_without_limits_keeps_its_way_beside_rows_with_limits() -> None:
    """Sorting may send one random number to another token, so whether a row is sorted is its own matter."""
    logits = logits_of(2, vocabulary=50)
    cut = SamplingRow(1, 0.9, 0, 0.5)
    for step in range(50):
        free = SamplingRow(1, 1, 0, step / 50)
        assert sample(logits, [free, cut])[0] == sample(logits[:1], [free])[0]


def test_the_last_random_number_stays_within_what_can_be_drawn() -> None:
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, 3] = logits[0, 4] = 0
    assert sample(logits, [SamplingRow(1, 1, 0, 1 - 2**-53)]).tolist() == [4]


def large(num_rows: int, seed: int) -> torch.Tensor:
    """More tokens than are looked at first, some rows flat and some steep."""
    return logits_of(num_rows, seed, 4000) * torch.linspace(0.2, 4, num_rows)[:, None]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(kinds, min_size=1, max_size=6), st.integers(0, 100))
def test_looking_at_the_first_tokens_only_changes_nothing(rows: list[SamplingRow], seed: int) -> None:
    logits = large(len(rows), seed).to(torch.bfloat16 if seed % 2 else torch.float32)  # of which many are equal
    found = sample(logits, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.engine.sampler._FIRST", 4000)  # as many as there are: all are sorted
        assert torch.equal(found, sample(logits, rows))


def test_of_equals_the_first_is_taken_however_many_there_are() -> None:
    logits = torch.zeros(1, 4000)
    logits[0, [7, 1000, 3999]] = 3
    rows = [SamplingRow(1, 1, 1, i / 50) for i in range(50)]
    assert set(sample(logits.expand(50, -1), rows).tolist()) == {7}
    flat = torch.zeros(50, 4000)
    assert max(sample(flat, [SamplingRow(1, 1, 20, i / 50) for i in range(50)]).tolist()) == 19


def test_a_cut_that_keeps_more_than_the_first_tokens_is_made_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flat row under top_p 0.9 keeps most of its tokens, and any of them may be drawn."""
    monkeypatch.setattr("server.engine.sampler._FIRST", 16)
    logits, draws = torch.zeros(1, 1000), 400
    rows = [SamplingRow(1, 0.9, 0, i / draws) for i in range(draws)]
    assert len(set(sample(logits.expand(draws, -1), rows).tolist())) == draws
    wide = [SamplingRow(1, 1, 100, i / draws) for i in range(draws)]
    assert len(set(sample(logits.expand(draws, -1), wide).tolist())) == 100


def test_sixteen_bit_logits_are_sampled_in_float32() -> None:
    logits = logits_of(4).bfloat16()
    rows = [SamplingRow(1, 0.9, 5, 0.4)] * 4
    assert torch.equal(sample(logits, rows), sample(logits.float(), rows))


def test_the_logits_are_left_as_they_are() -> None:
    logits = logits_of(2)
    before = logits.clone()
    sample(logits, [SamplingRow(0.5, 0.5, 3, 0.5), GREEDY])
    assert torch.equal(logits, before)
