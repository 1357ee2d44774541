"""Where in a sequence an adapter is applied: everywhere, from some tokens on, at the ends of the prompt, or after it.

Owns these rules, which give each token the part of the adapter that edits it. Knows nothing about tensors, devices or
what an edit is. A rule refers to the original prompt, also after a preemption.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

_ENDS = re.compile(r"(?:f([0-9]{1,6}))?\+?(?:l([0-9]{1,6}))?")


def prompt_ends(text: str) -> tuple[int, int] | None:
    """The numbers of first and of last tokens that "f7+l7", "f7" or "l7" is about; None for other texts, and for 0."""
    match = _ENDS.fullmatch(text)
    first, last = (int(match[1] or 0), int(match[2] or 0)) if match else (0, 0)
    return (first, last) if first or last else None


@dataclass(frozen=True, slots=True)
class Span:
    """The positions start <= p < stop (None: to the end), counted from the prompt's first token, and who edits them."""

    start: int
    stop: int | None
    part: int = 1  # of the adapter, numbered from 1


class Positions(Protocol):
    """A rule; as text, the positions that it is about."""

    def over(self, prompt_ids: Sequence[int]) -> tuple[Span, ...]:
        """Where the adapter's parts are applied in a sequence of this prompt; what is in no span is the bare base's."""


@dataclass(frozen=True, slots=True)
class FromInvocation:
    """Part 1 from the last occurrence of these tokens in the prompt on; nothing where there is none (aLoRA)."""

    tokens: tuple[int, ...]

    def __str__(self) -> str:
        return f"from the last {list(self.tokens)} in the prompt on"

    def over(self, prompt_ids: Sequence[int]) -> tuple[Span, ...]:
        length = len(self.tokens)
        starts = range(len(prompt_ids) - length, -1, -1)
        found = (i for i in starts if prompt_ids[i] == self.tokens[0])
        first = next((i for i in found if tuple(prompt_ids[i : i + length]) == self.tokens), None)
        return () if first is None else (Span(first, None),)


@dataclass(frozen=True, slots=True)
class PromptEnds:
    """Part 1 at the first tokens of the prompt, `last_part` at its last ones (ReFT's f{first}+l{last}).

    `num_left_out` tokens at the prompt's end are not counted. Each end is cut off at half of what is counted, as
    pyreft's get_intervention_locations does.
    """

    first: int
    last: int
    last_part: int = 1
    num_left_out: int = 0

    def __str__(self) -> str:
        ends = [f"{name} {num}" for name, num in (("first", self.first), ("last", self.last)) if num]
        but = f", {self.num_left_out} at its end left out" if self.num_left_out else ""
        return f"{' and '.join(ends)} tokens of the prompt{but}"

    def over(self, prompt_ids: Sequence[int]) -> tuple[Span, ...]:
        length = max(len(prompt_ids) - self.num_left_out, 0)
        first, last = min(self.first, length // 2), min(self.last, length // 2)
        return Span(0, first), Span(length - last, length, self.last_part)


@dataclass(frozen=True, slots=True)
class Generated:
    """Part 1 at the tokens that were generated, and nothing at the prompt."""

    def __str__(self) -> str:
        return "tokens that were generated"

    def over(self, prompt_ids: Sequence[int]) -> tuple[Span, ...]:
        return (Span(len(prompt_ids), None),)


def parts_of(spans: Sequence[Span], start: int, stop: int) -> list[int]:
    """The part that edits each token at positions start..stop-1; 0: the bare base."""
    parts = [0] * (stop - start)
    for span in spans:
        first = max(span.start, start)
        last = stop if span.stop is None else min(span.stop, stop)
        if first < last:
            parts[first - start : last - start] = [span.part] * (last - first)
    return parts


@dataclass(frozen=True, slots=True)
class Reach:
    """What a resident adapter does to the positions of a sequence."""

    slots: tuple[int, ...]  # of its parts, the first one's first
    positions: Positions | None = None  # None: part 1 everywhere
    num_virtual_tokens: int = 0  # that stand before the prompt
