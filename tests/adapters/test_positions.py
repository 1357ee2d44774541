"""Where in a sequence an adapter is applied, by rule, against the rule told token by token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.adapters.positions import FromInvocation, Generated, Positions, PromptEnds, Span, parts_of


def parts(rule: Positions, prompt: list[int], num_generated: int) -> list[int]:
    return parts_of(rule.over(prompt), 0, len(prompt) + num_generated)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([1, 2, 3], [0, 0, 0, 0]),
        ([7, 8, 3], [1, 1, 1, 1]),
        ([1, 7, 8], [0, 1, 1, 1]),
        ([7, 8, 7, 8, 9], [0, 0, 1, 1, 1, 1]),  # the last invocation counts
        ([8, 7], [0, 0, 0]),
        ([7], [0, 0]),  # shorter than the invocation
    ],
)
def test_an_activated_lora_begins_with_the_last_invocation_of_the_prompt(
    prompt: list[int], expected: list[int]
) -> None:
    assert parts(FromInvocation((7, 8)), prompt, 1) == expected


@pytest.mark.parametrize(
    ("rule", "length", "expected"),
    [
        (PromptEnds(2, 1), 6, [1, 1, 0, 0, 0, 1, 0]),
        (PromptEnds(2, 1, last_part=2), 6, [1, 1, 0, 0, 0, 2, 0]),
        (PromptEnds(7, 7, last_part=2), 5, [1, 1, 0, 2, 2, 0]),  # each end is cut off at half of the prompt
        (PromptEnds(7, 7, last_part=2), 4, [1, 1, 2, 2, 0]),
        (PromptEnds(0, 1), 3, [0, 0, 1, 0]),
        (PromptEnds(1, 1, num_left_out=1), 4, [1, 0, 1, 0, 0]),
        (PromptEnds(1, 1), 1, [0, 0]),
        (PromptEnds(1, 1, num_left_out=1), 1, [0, 0]),
    ],
)
def test_reft_edits_the_ends_of_the_prompt(rule: PromptEnds, length: int, expected: list[int]) -> None:
    assert parts(rule, list(range(length)), 1) == expected


def test_what_is_for_generated_tokens_leaves_the_prompt_alone() -> None:
    assert parts(Generated(), [1, 2, 3], 2) == [0, 0, 0, 1, 1]


spans = st.builds(
    Span, st.integers(0, 12), st.none() | st.integers(0, 14), st.integers(1, 3)
)  # some end before they start, and are empty


@given(st.lists(spans, max_size=3), st.integers(-3, 10), st.integers(0, 9))
def test_the_parts_of_a_stretch_are_those_of_each_token(spans: list[Span], start: int, length: int) -> None:
    def part(position: int) -> int:
        found = [s.part for s in spans if s.start <= position and (s.stop is None or position < s.stop)]
        return found[-1] if found else 0

    assert parts_of(spans, start, start + length) == [part(p) for p in range(start, start + length)]


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (FromInvocation((7, 8)), "from the last [7, 8] in the prompt on"),
        (PromptEnds(3, 2), "first 3 and last 2 tokens of the prompt"),
        (PromptEnds(0, 1, num_left_out=1), "last 1 tokens of the prompt, 1 at its end left out"),
        (Generated(), "tokens that were generated"),
    ],
)
def test_a_rule_can_be_told(rule: Positions, text: str) -> None:
    assert str(rule) == text
