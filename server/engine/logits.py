"""The one place where the logits of rows that are to be sampled are changed, for a whole batch in one pass.

Owns the order of the changes, and their arithmetic. Knows nothing about sequences or text. The order, and why:

1. masks - a grammar's, then `allowed_token_ids`: what they leave out is out whatever is added to it later;
2. `logit_bias`, before the penalties, so that a biased token is penalized as any other of its size;
3. penalties - repetition, then frequency, then presence;
4. the ends that would come before `min_tokens`: last, so that nothing brings them back.

Then the sampler divides by the temperature and cuts: top_k, top_p, min_p. Log-probabilities are of the logits as the
model gave them, which stay as they are. The order is vLLM's; the arithmetic of the penalties is that of transformers'
`RepetitionPenaltyLogitsProcessor` and of OpenAI's guide to frequency and presence penalties.
"""

from array import array
from collections.abc import Iterable, Sequence

import torch

from server.engine.sampler import SamplingRow
from server.engine.token_rules import TokenRules
from server.ops.sending import send

_Ruled = Sequence[tuple[int, TokenRules]]  # (row, its rules)


def edit_logits(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """logits (rows, vocabulary) as the rows' rules have them, in float32; `logits` itself where no row has any."""
    ruled = [(number, row.rules) for number, row in enumerate(rows) if row.rules is not None]
    if not ruled:
        return logits
    edited = logits.to(torch.float32, copy=True)
    _keep_allowed(edited, ruled)
    _add_biases(edited, ruled)
    _penalize(edited, ruled)
    _ban_ends(edited, ruled)
    return edited


class _Cells:
    """Places in the logits: the listed tokens of each row, row by row."""

    def __init__(self, tokens: Iterable[tuple[int, "array[int]"]], device: torch.device) -> None:
        listed = [(row, ids) for row, ids in tokens if ids]
        self._num = sum(len(ids) for _, ids in listed)
        self._lengths = send(torch.tensor([len(ids) for _, ids in listed]), device)
        self._device = device
        self.is_empty = not listed
        self.rows = send(torch.tensor([row for row, _ in listed], dtype=torch.int64), device)
        if listed:
            self.at = (
                self.rows.repeat_interleave(self._lengths, output_size=self._num),
                _joined((ids for _, ids in listed), device),
            )

    def spread(self, values: Sequence[float]) -> torch.Tensor:
        """One value per row, repeated for each token of the row."""
        return send(torch.tensor(values), self._device).repeat_interleave(self._lengths, output_size=self._num)


def _joined(arrays: Iterable["array[int] | array[float]"], device: torch.device) -> torch.Tensor:
    """A copy of all of them, one after another (not empty)."""
    listed = list(arrays)
    dtype = torch.int64 if listed[0].typecode == "q" else torch.float32
    return send(torch.frombuffer(bytearray().join(listed), dtype=dtype), device)


def _keep_allowed(logits: torch.Tensor, ruled: _Ruled) -> None:
    cells = _Cells(((row, rules.allowed) for row, rules in ruled), logits.device)
    if cells.is_empty:
        return
    kept = logits[cells.at]
    logits[cells.rows] = -torch.inf
    logits[cells.at] = kept


def _add_biases(logits: torch.Tensor, ruled: _Ruled) -> None:
    cells = _Cells(((row, rules.biased) for row, rules in ruled), logits.device)
    if not cells.is_empty:
        logits[cells.at] += _joined((rules.biases for _, rules in ruled if rules.biases), logits.device)


def _penalize(logits: torch.Tensor, ruled: _Ruled) -> None:
    penalized = [(row, rules.params, *rules.penalized()) for row, rules in ruled]
    penalized = [entry for entry in penalized if entry[2]]
    cells = _Cells(((row, ids) for row, _, ids, _ in penalized), logits.device)
    if cells.is_empty:
        return
    counts = _joined((counts for *_, counts in penalized), logits.device)
    repetition = cells.spread([params.repetition_penalty for _, params, _, _ in penalized])
    frequency = cells.spread([params.frequency_penalty for _, params, _, _ in penalized])
    presence = cells.spread([params.presence_penalty for _, params, _, _ in penalized])
    values = logits[cells.at]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[cells.at] = values - frequency * counts - presence * (counts > 0)


def _ban_ends(logits: torch.Tensor, ruled: _Ruled) -> None:
    """Where nothing else is left, as at the end of a grammar, the ends stay: with more it would not be valid."""
    num_tokens = logits.shape[-1]  # a tokenizer may have ends that its model has no logits for
    banned = ((row, array("q", (token for token in rules.banned if token < num_tokens))) for row, rules in ruled)
    cells = _Cells(banned, logits.device)
    if cells.is_empty:
        return
    before = logits[cells.rows]
    logits[cells.at] = -torch.inf
    has_none = logits[cells.rows].amax(dim=-1, keepdim=True) == -torch.inf
    logits[cells.rows] = torch.where(has_none, before, logits[cells.rows])
