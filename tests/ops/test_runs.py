"""Runs: every token with an adapter in exactly one, beside tokens of its own class, whatever the order they came in."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.ops.runs import LONG_RUN, SHORT_RUN, Runs, TokenRuns

CPU = torch.device("cpu")
examples = settings(max_examples=100, deadline=None, derandomize=True)
DOWN = torch.tensor([0, 1, 2, 1, 3])
UP = torch.tensor([0, 1, 2, 2, 3])
slots_of_tokens = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([1, 1, 2, 15, 17, 70])), max_size=8).map(
    lambda stretches: [slot for slot, length in stretches for _ in range(length)]
)


def members(runs: Runs) -> list[list[int]]:
    ends = runs.starts.tolist()
    return [runs.order[a:b].tolist() for a, b in zip(ends, ends[1:], strict=False)]


@examples
@given(slots_of_tokens, st.booleans())
def test_every_token_with_edits_is_in_one_run_of_its_class(slots: list[int], is_static: bool) -> None:
    tokens = TokenRuns.of(torch.tensor(slots, dtype=torch.long), DOWN, UP, CPU, is_static=is_static)
    assert tokens.slots.tolist() == slots
    for runs, classes in ((tokens.by_down, DOWN.tolist()), (tokens.by_up, UP.tolist())):
        in_runs = members(runs)
        assert sorted(t for run in in_runs for t in run) == [t for t, slot in enumerate(slots) if slot]
        assert all(len({classes[slots[t]] for t in run}) <= 1 for run in in_runs)
        assert all(len(run) <= runs.max_length for run in in_runs)
        assert all(run == sorted(run) for run in in_runs)


@examples
@given(slots_of_tokens)
def test_there_are_no_more_runs_than_needed(slots: list[int]) -> None:
    runs = TokenRuns.of(torch.tensor(slots, dtype=torch.long), DOWN, UP, CPU).by_down
    counts = [sum(1 for slot in slots if int(DOWN[slot]) == c) for c in (1, 2, 3)]
    assert runs.num == sum(-(-count // runs.max_length) for count in counts)
    assert runs.max_length == (LONG_RUN if max(counts) > SHORT_RUN else SHORT_RUN)


@examples
@given(slots_of_tokens)
def test_static_shapes_follow_from_the_number_of_tokens_alone(slots: list[int]) -> None:
    tokens = TokenRuns.of(torch.tensor(slots, dtype=torch.long), DOWN, UP, CPU, is_static=True)
    assert tokens.by_down.order.data_ptr() != tokens.by_up.order.data_ptr() or not slots
    for runs in (tokens.by_down, tokens.by_up):
        assert (runs.max_length, runs.num, len(runs.order)) == (SHORT_RUN, len(slots), len(slots))


def test_adapters_that_share_a_projection_are_one_run_there() -> None:
    tokens = TokenRuns.of(torch.tensor([3, 0, 1, 2, 3]), DOWN, UP, CPU)
    assert members(tokens.by_down) == [[0, 2, 4], [3]]
    assert members(tokens.by_up) == [[2], [0, 3, 4]]
