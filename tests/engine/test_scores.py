"""Log-probabilities are of the logits as the step left them, for the rows and positions that ask, and for no others."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from server.adapters.positions import Reach
from server.engine.chosen import NOT_FINITE, Chosen
from server.engine.runner import StepLogits
from server.engine.scores import PromptScores, RowScores, StepScores
from server.engine.sequence import SamplingParams, ScheduledSequence, TokenLogprobs
from server.engine.sequence import Sequence as Running

VOCABULARY = 40
GREEDY = SamplingParams(9, temperature=0.0)


def logits_of(num_rows: int, seed: int = 0) -> torch.Tensor:
    return 4 * torch.randn(num_rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def scored(logits: torch.Tensor, tokens: list[int], num_top: int) -> tuple[TokenLogprobs, ...]:
    return RowScores(logits, torch.tensor(tokens), num_top).read(tokens)


def step(
    params: Sequence[SamplingParams], logits: torch.Tensor, tokens: list[int]
) -> tuple[StepScores, dict[str, int]]:
    """Of sequences s0, s1, ... that each sampled a token."""
    items = [ScheduledSequence(Running(f"s{i}", [1], own), 0, 1, True, False) for i, own in enumerate(params)]
    chosen = Chosen(torch.tensor(tokens), [item.sequence.sequence_id for item in items])
    return StepScores(StepLogits(tuple(items), logits, (), {}), chosen), chosen.read()


@pytest.mark.parametrize("num_top", [0, 1, 5, VOCABULARY, VOCABULARY + 9])
def test_logprobs_are_those_of_the_unmodified_distribution_best_first(num_top: int) -> None:
    logits = logits_of(3, seed=9)
    before, expected = logits.clone(), torch.log_softmax(logits.double(), dim=-1)
    scores = scored(logits, [4, 0, 11], num_top)
    assert [score.token_id for score in scores] == [4, 0, 11]
    for row, score in zip(expected, scores, strict=True):
        assert score.logprob == pytest.approx(float(row[score.token_id]), abs=1e-5)
        best = sorted(range(VOCABULARY), key=lambda token: -float(row[token]))[:num_top]
        assert [token for token, _ in score.top] == best
        assert [p for _, p in score.top] == pytest.approx([float(row[token]) for token in best], abs=1e-5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("num_at_once", [1, 2, 3, 100])
def test_a_row_has_the_same_bits_whatever_rows_are_scored_with_it(
    num_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, tokens = logits_of(7), [3, 1, 4, 1, 5, 9, 2]
    alone = [scored(logits[row : row + 1], tokens[row : row + 1], 3)[0] for row in range(7)]
    monkeypatch.setattr("server.engine.scores._SCORED_AT_ONCE", num_at_once)
    assert list(scored(logits, tokens, 3)) == alone


def test_each_sequence_gets_the_number_of_alternatives_that_it_asked_for() -> None:
    """Also those that ask for as many and do not lie side by side; who did not ask gets nothing."""
    numbers, logits = [3, None, 0, 3, 1, 3], logits_of(6)
    tokens = [2, 7, 1, 8, 2, 8]
    scores, chosen = step([replace(GREEDY, logprobs=number) for number in numbers], logits, tokens)
    found = scores.read(chosen)
    assert found == {
        f"s{row}": scored(logits[row : row + 1], [tokens[row]], number)[0]
        for row, number in enumerate(numbers)
        if number is not None
    }


def test_a_row_without_a_choice_spoils_no_other() -> None:
    logits = logits_of(2)
    logits[0] = torch.nan
    scores, chosen = step([replace(GREEDY, logprobs=1)] * 2, logits, [NOT_FINITE, 5])
    assert scores.read(chosen)["s1"] == scored(logits[1:], [5], 1)[0]


# Of prompts


def item(start: int, num_tokens: int, num_virtual: int = 0) -> ScheduledSequence:
    """Some tokens of a prompt of 10, 11, ... 17."""
    sequence = Running("s", list(range(10, 18)), replace(GREEDY, prompt_logprobs=2))
    sequence.take(1, Reach((1,), None, num_virtual) if num_virtual else None)
    return ScheduledSequence(sequence, start, num_tokens, False, True)


@pytest.mark.parametrize(
    ("own", "position", "rows"),
    [
        pytest.param(item(0, 8), 1, slice(0, 7), id="the whole prompt: nothing follows its last token"),
        pytest.param(item(0, 3), 1, slice(0, 3), id="its beginning"),
        pytest.param(item(3, 2), 4, slice(0, 2), id="its middle"),
        pytest.param(item(3, 5), 4, slice(0, 4), id="its end"),
        pytest.param(item(7, 1), 8, slice(0, 0), id="its last token"),
        pytest.param(item(0, 10, 2), 1, slice(2, 9), id="after two virtual tokens, the first is not scored"),
        pytest.param(item(0, 2, 2), 1, slice(0, 0), id="virtual tokens alone"),
    ],
)
def test_a_row_scores_the_token_after_it(own: ScheduledSequence, position: int, rows: slice) -> None:
    logits = logits_of(own.num_tokens)
    start, scores = PromptScores(own, logits).read()
    num = rows.stop - rows.start
    following = own.sequence.prompt_ids[position : position + num]
    assert len(following) == num
    assert start == position
    assert scores == (scored(logits[rows], following, 2) if num else ())


def test_logits_that_are_no_numbers_are_told() -> None:
    own, logits = item(0, 3), logits_of(3)
    assert PromptScores(own, logits).is_finite()
    logits[1, 5] = torch.inf
    assert not PromptScores(own, logits).is_finite()


def test_a_prompt_for_which_memory_is_short_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def scarce(own: ScheduledSequence, logits: torch.Tensor) -> PromptScores:
        if len(logits) > 4:
            raise MemoryError
        return PromptScores(own, logits)

    monkeypatch.setattr("server.engine.scores.PromptScores", scarce)
    items = (item(0, 5), item(0, 3))
    items[1].sequence.sequence_id = "other"
    rows = {own.sequence.sequence_id: logits_of(own.num_tokens) for own in items}
    scores = StepScores(StepLogits((), torch.empty(0, VOCABULARY), items, rows), Chosen(torch.empty(0).long(), []))
    assert [name for name, own in scores.prompts.items() if own is None] == ["s"]
