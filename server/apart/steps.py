"""What a step gave to its sequences, as messages on `deltas`: the only ones that are lists.

Owns how deltas are packed, and that none of these messages grows with a prompt. Knows nothing about who sends them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import chain
from operator import attrgetter
from typing import Any

from server.engine.sequence import Delta

# Of prompts' log-probabilities in one message, tokens and alternatives counted: some 25 kB. Those of a long prompt are
# megabytes, which would hold up every stream while they are pickled, read, and made an answer of.
MAX_SCORES = 1000

# A dataclass pickles itself in Python, a field at a time; a step's deltas are the one message of which there are many.
PackedDeltas = list[tuple[Any, ...]]
_packed = attrgetter(*(field.name for field in fields(Delta)))


def messages_of(deltas: Sequence[Delta]) -> Iterator[PackedDeltas]:
    """One, where no long prompt was scored. A delta with too many scores crosses as several deltas, in order."""
    held: list[Delta] = []
    num_held = 0
    for delta in chain.from_iterable(map(_parts, deltas)):
        num_scores = _num_scores(delta)
        if num_held and num_held + num_scores > MAX_SCORES:
            yield [_packed(one) for one in held]
            held, num_held = [], 0
        held.append(delta)
        num_held += num_scores
    yield [_packed(one) for one in held]


def unpacked(deltas: PackedDeltas) -> list[Delta]:
    return [Delta(*values) for values in deltas]


def _parts(delta: Delta) -> Iterator[Delta]:
    """The last of them says all but the first scores."""
    scores = delta.prompt_logprobs or ()
    if _num_scores(delta) > MAX_SCORES:
        alone = replace(delta, token_ids=(), text="", logprobs=(), finish_reason=None, error=None, num_output_tokens=0)
        at_once = max(MAX_SCORES // (1 + len(scores[-1].top)), 1)
        while len(scores) > at_once:
            yield replace(alone, prompt_logprobs=scores[:at_once])
            scores = scores[at_once:]
        delta = replace(delta, prompt_logprobs=scores)
    yield delta


def _num_scores(delta: Delta) -> int:
    """Tokens of a prompt have as many alternatives each, but for the first."""
    scores = delta.prompt_logprobs
    return len(scores) * (1 + len(scores[-1].top)) if scores else 0
