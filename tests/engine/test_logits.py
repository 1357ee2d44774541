"""The rules on a request's tokens: each row as transformers' own processors edit it, whoever sits beside it."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from server.engine.logits import edit_logits
from server.engine.sampler import SamplingRow, sample
from server.engine.sequence import SamplingParams, Sequence
from server.engine.token_rules import token_rules

VOCABULARY = 24
EOS = frozenset({7, 11})
PLAIN = SamplingParams(max_tokens=50)


def logits_of(num_rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(num_rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def sequence_of(params: SamplingParams, prompt: list[int], output: list[int]) -> Sequence:
    return Sequence("s", prompt, params, output_ids=output)


def row_of(sequence: Sequence) -> SamplingRow:
    params = sequence.params
    return SamplingRow(params.temperature, params.top_p, params.top_k, 0.5, params.min_p, token_rules(sequence, EOS))


def edited(logits: torch.Tensor, *sequences: Sequence) -> torch.Tensor:
    return edit_logits(logits, [row_of(sequence) for sequence in sequences])


class OpenAIPenalties(LogitsProcessor):
    """The formula of OpenAI's guide: logit - count * frequency - (count > 0) * presence, over the output."""

    def __init__(self, params: SamplingParams, num_prompt: int) -> None:
        self.params, self.num_prompt = params, num_prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for token in range(VOCABULARY):
            count = input_ids[0, self.num_prompt :].tolist().count(token)
            scores[0, token] -= count * self.params.frequency_penalty + (count > 0) * self.params.presence_penalty
        return scores


class Allowed(LogitsProcessor):
    def __init__(self, allowed: tuple[int, ...]) -> None:
        self.allowed = allowed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        left_out = [token for token in range(VOCABULARY) if token not in self.allowed]
        scores[0, left_out] = -torch.inf
        return scores


def by_transformers(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """One row by transformers' processors, in the documented order."""
    params, num_prompt = sequence.params, sequence.num_prompt_tokens
    processors = LogitsProcessorList()
    if params.allowed_token_ids:
        processors.append(Allowed(params.allowed_token_ids))
    if params.logit_bias:
        processors.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in params.logit_bias]))
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(OpenAIPenalties(params, num_prompt))
    ends = sorted(params.stop_token_ids | (frozenset() if params.ignore_eos else EOS))
    if params.min_tokens and ends:
        processors.append(MinNewTokensLengthLogitsProcessor(num_prompt, params.min_tokens, ends))
    ids = torch.tensor([sequence.all_ids])
    found: torch.Tensor = processors(ids, logits[None].clone())[0]
    return found


tokens = st.integers(0, VOCABULARY - 1)
all_params = st.builds(
    SamplingParams,
    max_tokens=st.just(50),
    stop_token_ids=st.frozensets(tokens, max_size=3),
    ignore_eos=st.booleans(),
    min_tokens=st.sampled_from([0, 1, 4]),
    allowed_token_ids=st.one_of(
        st.just(()), st.lists(tokens, min_size=12, max_size=20, unique=True).map(lambda ids: tuple(ids))
    ),
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100, width=32).filter(bool), max_size=4).map(
        lambda biases: tuple(biases.items())
    ),
    presence_penalty=st.sampled_from([0.0, -2.0, 0.5, 2.0]),
    frequency_penalty=st.sampled_from([0.0, -0.7, 0.4, 2.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 100.0]),
)
sequences = st.builds(sequence_of, all_params, st.lists(tokens, min_size=1, max_size=12), st.lists(tokens, max_size=6))


@settings(max_examples=40, derandomize=True)
@given(st.lists(sequences, min_size=1, max_size=5), st.integers(0, 99))
def test_every_row_is_edited_as_transformers_edits_it_alone(batch: list[Sequence], seed: int) -> None:
    logits = logits_of(len(batch), seed)
    together = edited(logits, *batch)
    for row, sequence in enumerate(batch):
        torch.testing.assert_close(together[row], by_transformers(logits[row], sequence), rtol=1e-5, atol=1e-4)
        assert torch.equal(edited(logits[row : row + 1], sequence)[0], together[row])


@settings(max_examples=40, derandomize=True)
@given(all_params, st.lists(tokens, min_size=1, max_size=8), st.lists(tokens, min_size=1, max_size=9))
def test_rules_that_follow_an_output_token_by_token_are_those_made_at_its_end(
    params: SamplingParams, prompt: list[int], output: list[int]
) -> None:
    """A preempted sequence keeps its rules; what they count must not depend on when they were asked."""
    sequence = sequence_of(params, prompt, [])
    row, logits = row_of(sequence), logits_of(1)
    for token in output:
        edit_logits(logits, [row])
        sequence.output_ids.append(token)
    assert torch.equal(edit_logits(logits, [row]), edited(logits, sequence_of(params, prompt, output)))


def test_a_batch_without_rules_is_not_even_copied() -> None:
    logits = logits_of(2)
    assert edited(logits, *[sequence_of(PLAIN, [1, 2], [3])] * 2) is logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_logits_stay_as_they_are(dtype: torch.dtype) -> None:
    """Log-probabilities are read from them."""
    logits = logits_of(2).to(dtype)
    before = logits.clone()
    plain, ruled = sequence_of(PLAIN, [1], []), sequence_of(replace(PLAIN, logit_bias=((3, 5.0),)), [1], [])
    changed = edited(logits, plain, ruled)
    assert torch.equal(logits, before)
    assert changed.dtype == torch.float32
    assert torch.equal(changed[0], logits[0].float())


def test_a_bias_brings_nothing_back_that_is_not_allowed() -> None:
    params = replace(PLAIN, allowed_token_ids=(4, 5), logit_bias=((6, 100.0), (4, -100.0)))
    assert sample(edited(logits_of(1), sequence_of(params, [1], [])), [SamplingRow(0, 1, 0, 0)]).tolist() == [5]


def test_a_bias_brings_no_end_back_before_min_tokens() -> None:
    params = replace(PLAIN, min_tokens=2, stop_token_ids=frozenset({3}), logit_bias=((3, 100.0), (7, 100.0)))
    for num_output, has_ends in ((0, False), (1, False), (2, True)):
        found = edited(logits_of(1), sequence_of(params, [1], [9] * num_output))
        assert (found.argmax().item() in {3, 7}) is has_ends


def test_where_only_ends_are_left_min_tokens_gives_way() -> None:
    """A grammar that is complete allows nothing but the end; its neighbour's ends stay banned."""
    logits = logits_of(2)
    logits[0] = -torch.inf
    logits[0, 7] = 1.0
    ruled = sequence_of(replace(PLAIN, min_tokens=5), [1], [])
    both = edited(logits, ruled, ruled)
    assert both[0].argmax().item() == 7
    assert both[1, [7, 11]].tolist() == [-torch.inf] * 2


def test_an_end_that_the_model_has_no_logits_for_is_passed_over() -> None:
    """Tokens may be added to a tokenizer and not to its model."""
    params = replace(PLAIN, min_tokens=5)
    rules = token_rules(sequence_of(params, [1], []), EOS | {VOCABULARY, 10**6})
    assert edit_logits(logits_of(1), [SamplingRow(0, 1, 0, 0.5, rules=rules)])[0, [7, 11]].tolist() == [-torch.inf] * 2


def test_draws_with_rules_do_not_depend_on_neighbours() -> None:
    """The law of seeds, with all that a row can ask for: the same random number, the same token."""
    dice = random.Random(3)
    params = [
        SamplingParams(
            max_tokens=9,
            temperature=dice.choice([0.0, 0.8, 1.4]),
            top_p=dice.choice([0.7, 1.0]),
            top_k=dice.choice([0, 5]),
            min_p=dice.choice([0.0, 0.1]),
            frequency_penalty=dice.choice([0.0, 1.5]),
            repetition_penalty=dice.choice([1.0, 1.7]),
        )
        for _ in range(60)
    ]
    logits = logits_of(len(params), 8)
    rows = [
        replace(row_of(sequence_of(one, [1, 2], [dice.randrange(VOCABULARY) for _ in range(5)])), uniform=dice.random())
        for one in params
    ]
    together = sample(edit_logits(logits, rows), rows).tolist()
    alone = []
    for i, row in enumerate(rows):
        alone += sample(edit_logits(logits[i : i + 1], [row]), [row]).tolist()
    assert together == alone
