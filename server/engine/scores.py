"""The log-probabilities that requests ask for: found behind a step's choice, and read when the step ends.

Owns what is computed of a step's logits beside its tokens. Only `read` waits for the device, and what it reads has been
on its way since the choice. Knows nothing about how tokens are chosen, nor about who is still in flight.
"""

from collections.abc import Iterable, Sequence

import torch

from server.engine.chosen import Chosen, Reading
from server.engine.runner import StepLogits
from server.engine.sequence import ScheduledSequence, TokenLogprobs
from server.model.exhaustion import is_out_of_memory
from server.ops.sending import send

_SCORED_AT_ONCE = 128  # rows: each takes two of float32 as long as the vocabulary


class RowScores:
    """The log-probability of each row's token under the unmodified distribution, and the `num_top` best of the row.

    logits (rows, vocabulary), one row or more; tokens (rows,) int64 beside them. The softmax is taken in float32.
    """

    def __init__(self, logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> None:
        rows, own = (torch.split(each, _SCORED_AT_ONCE) for each in (logits, tokens))
        found = [_scores(*piece, num_top) for piece in zip(rows, own, strict=True)]
        self._reading = Reading(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def read(self, token_ids: Sequence[int]) -> tuple[TokenLogprobs, ...]:
        """Those of the rows, whose tokens are known by now. Waits for the device."""
        own, *top = (part.tolist() for part in self._reading.wait())
        if not top:
            return tuple(TokenLogprobs(t, p) for t, p in zip(token_ids, own, strict=True))
        best = (tuple(zip(v, p, strict=True)) for v, p in zip(*top, strict=True))
        return tuple(TokenLogprobs(t, p, top) for t, p, top in zip(token_ids, own, best, strict=True))


def _scores(logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> tuple[torch.Tensor, ...]:
    """(rows,) of the tokens; with `num_top` also the best tokens and what they have, each (rows, num_top)."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, tokens[:, None])[:, 0]
    if num_top == 0:
        return (own,)
    values, indices = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    return own, indices, values


class PromptScores:
    """The scores of the prompt's tokens that follow those of one item of a step.

    `logits` (tokens of the item, vocabulary): the row of a position scores the token after it, as far as that is still
    the prompt's.
    """

    def __init__(self, item: ScheduledSequence, logits: torch.Tensor) -> None:
        sequence = item.sequence
        end = item.end + 1 - sequence.num_virtual_tokens
        # Nothing is said of the prompt's first token, whatever stands before it.
        self._start = max(end - item.num_tokens, 1)
        self._following = sequence.prompt_ids[self._start : max(end, self._start)]
        self._is_finite = Reading(logits.amax(dim=-1).isfinite().all())
        self._rows: RowScores | None = None
        if self._following:
            rows = logits[self._start - end + item.num_tokens :][: len(self._following)]
            tokens = send(torch.tensor(self._following), logits.device)
            self._rows = RowScores(rows, tokens, sequence.params.prompt_logprobs or 0)

    def is_finite(self) -> bool:
        """Whether the logits are numbers, those of no use here too. Waits for the device."""
        return all(map(bool, self._is_finite.wait()))

    def read(self) -> tuple[int, tuple[TokenLogprobs, ...]]:
        """The position of the first of them, and the scores. Waits for the device."""
        return self._start, () if self._rows is None else self._rows.read(self._following)


class StepScores:
    """What is asked for beside the tokens that a step chose. Made before the next step is launched, as its logits may
    be written over then."""

    def __init__(self, logits: StepLogits, chosen: Chosen) -> None:
        # By sequence id; None where there was no memory, which is no reason to fail the others of the step.
        self.prompts = {
            item.sequence.sequence_id: _prompt_scores(item, logits.scored[item.sequence.sequence_id])
            for item in logits.scorers
        }
        # One pass for all rows with as many alternatives: a batch mostly asks for one number of them.
        self._rows: list[tuple[list[str], RowScores]] = []
        for num_top, rows in _by_num_top(logits.samplers).items():
            names = [logits.samplers[row].sequence.sequence_id for row in rows]
            own, tokens = (_taken(each, rows) for each in (logits.sampled, chosen.tokens))
            # A row without a choice has failed: nobody reads its scores.
            self._rows.append((names, RowScores(own, tokens.clamp_min(0), num_top)))

    def read(self, tokens: dict[str, int]) -> dict[str, TokenLogprobs]:
        """Those of the `tokens` that were chosen, both by sequence id. Waits for the device."""
        scores: dict[str, TokenLogprobs] = {}
        for names, rows in self._rows:
            scores.update(zip(names, rows.read([tokens[name] for name in names]), strict=True))
        return scores


def _prompt_scores(item: ScheduledSequence, logits: torch.Tensor) -> PromptScores | None:
    try:
        return PromptScores(item, logits)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def _by_num_top(samplers: Iterable[ScheduledSequence]) -> dict[int, list[int]]:
    """The rows that are to be scored, by the number of alternatives."""
    found: dict[int, list[int]] = {}
    for row, item in enumerate(samplers):
        num_top = item.sequence.params.logprobs
        if num_top is not None:
            found.setdefault(num_top, []).append(row)
    return found


def _taken(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """These rows, which ascend; a view where they follow one another."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return tensor[rows[0] : rows[-1] + 1]
    return tensor.index_select(0, send(torch.tensor(rows), tensor.device))
