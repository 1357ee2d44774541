"""What one request asks of the choice of its tokens: allowed ones, biases, penalties, ends that would come too early.

Owns these lists of token ids and the counts of one sequence's tokens. Knows nothing about tensors, text or the batch.
"""

from array import array
from collections.abc import Iterable

from server.engine.sequence import SamplingParams, Sequence


class TokenRules:
    """The rules of one sequence. What depends on the output is read from its output ids, and from nothing else.

    So they are the same after a preemption and with blocks found in the cache: neither changes the output ids.
    """

    def __init__(self, sequence: Sequence, eos_ids: frozenset[int]) -> None:
        params = sequence.params
        self._sequence = sequence
        self.allowed = _ids(params.allowed_token_ids)  # empty: all
        self.biased = _ids(token for token, _ in params.logit_bias)
        self.biases = array("f", (bias for _, bias in params.logit_bias))
        self._ends = _ids(ending_ids(params, eos_ids)) if params.min_tokens else _ids(())
        self._seen = _ids(())
        self._counts = array("f")  # of each of `_seen`: how often it is in the output
        self._place: dict[int, int] = {}  # in `_seen`
        self._num_counted: int | None = None  # output tokens; None: the prompt has not been read either

    @property
    def params(self) -> SamplingParams:
        return self._sequence.params

    @property
    def banned(self) -> "array[int]":
        """The tokens that would end the sequence too early now."""
        return self._ends if self._sequence.num_output_tokens < self.params.min_tokens else _ids(())

    def penalized(self) -> "tuple[array[int], array[float]]":
        """The tokens that a penalty applies to, each once, and how often each is in the output."""
        if not _has_penalties(self.params):
            return _ids(()), array("f")
        if self._num_counted is None:  # now, and not on the loop that takes requests: prompts are long
            for token in dict.fromkeys(self._sequence.prompt_ids) if self.params.repetition_penalty != 1 else ():
                self._place_of(token)
        for token in self._sequence.output_ids[self._num_counted or 0 :]:
            self._counts[self._place_of(token)] += 1
        self._num_counted = self._sequence.num_output_tokens
        return self._seen, self._counts

    def _place_of(self, token: int) -> int:
        place = self._place.setdefault(token, len(self._seen))
        if place == len(self._seen):
            self._seen.append(token)
            self._counts.append(0)
        return place


def token_rules(sequence: Sequence, eos_ids: frozenset[int]) -> TokenRules | None:
    """The rules of a sequence; None if its request has none, as most have."""
    params = sequence.params
    has_rules = (
        params.allowed_token_ids
        or params.logit_bias
        or _has_penalties(params)
        or (params.min_tokens and ending_ids(params, eos_ids))
    )
    return TokenRules(sequence, eos_ids) if has_rules else None


def ending_ids(params: SamplingParams, eos_ids: frozenset[int]) -> frozenset[int]:
    """The tokens that end a sequence."""
    return params.stop_token_ids if params.ignore_eos else params.stop_token_ids | eos_ids


def _has_penalties(params: SamplingParams) -> bool:
    return (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1, 0, 0)


def _ids(tokens: Iterable[int]) -> "array[int]":
    return tokens if isinstance(tokens, array) else array("q", tokens)
