"""Logits to tokens, for a whole batch in one pass.

Owns the sampling rules and the log-probabilities that requests ask for. Knows nothing about sequences or text: one row
of logits and one `SamplingRow` per token to choose.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from server.engine.sequence import TokenLogprobs
from server.engine.token_rules import TokenRules
from server.ops.sending import send


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How one row is sampled. `uniform` is the row's own random number in [0, 1); `rules` change its logits before."""

    temperature: float
    top_p: float
    top_k: int
    uniform: float
    min_p: float = 0.0
    rules: TokenRules | None = None


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """One token per row: logits (rows, vocabulary) -> (rows,) int64 on the same device.

    A row's choice depends on its own logits and its own random number only, so a seed gives the same answer in any
    batch. Temperature 0 takes the most likely token.
    """
    greedy = torch.argmax(logits, dim=-1)
    drawn = [i for i, row in enumerate(rows) if row.temperature > 0]
    if not drawn:
        return greedy
    # Two ways that may answer one random number differently, so a row's way must not depend on its neighbours.
    for of_way in ([i for i in drawn if _is_cut(rows[i])], [i for i in drawn if not _is_cut(rows[i])]):
        if of_way:
            at = send(torch.tensor(of_way), logits.device)
            greedy[at] = _draw(logits[at].float(), [rows[i] for i in of_way])
    return greedy


def _is_cut(row: SamplingRow) -> bool:
    """Whether top_p, top_k or min_p leaves out any token."""
    return row.top_p < 1 or row.top_k > 0 or row.min_p > 0


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Rows that are all cut, or none of them."""
    device = logits.device

    def column(values: Sequence[float]) -> torch.Tensor:
        return send(torch.tensor(values, dtype=torch.float64), device)[:, None]

    # Very small temperatures would overflow; relative to the maximum they cannot.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    probs = torch.softmax(logits / column([max(row.temperature, 1e-5) for row in rows]).float(), dim=-1)
    uniform = column([row.uniform for row in rows])
    if not _is_cut(rows[0]):
        return _inverse_cdf(probs, uniform)
    probs, order = torch.sort(probs, dim=-1, descending=True, stable=True)
    rank = torch.arange(probs.shape[-1], device=device)
    top_k = column([min(row.top_k or probs.shape[-1], probs.shape[-1]) for row in rows])
    probs = probs.masked_fill(rank >= top_k, 0)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    before = probs.cumsum(dim=-1) - probs  # mass before each token: the first token always stays
    probs = probs.masked_fill(before >= column([row.top_p for row in rows]), 0)
    probs = probs.masked_fill(probs < column([row.min_p for row in rows]) * probs[:, :1], 0)
    return order.gather(1, _inverse_cdf(probs, uniform)[:, None])[:, 0]


def _inverse_cdf(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The index at which the cumulated (unnormalized) probability passes `uniform` of its total."""
    cumulated = probs.double().cumsum(dim=-1)
    target = uniform * cumulated[:, -1:]
    index = torch.searchsorted(cumulated, target, right=True)[:, 0]
    # Rounding may leave the target at the very end, past the last token that has any probability.
    last = (probs > 0).long().cumsum(dim=-1).argmax(dim=-1)
    return torch.minimum(index, last)


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], num_top: int) -> tuple[TokenLogprobs, ...]:
    """The log-probability of each row's token under the unmodified distribution, and the `num_top` best of the row.

    logits (rows, vocabulary); the softmax is taken in float32.
    """
    if not token_ids:
        return ()
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    ids = torch.tensor(token_ids, device=logits.device)[:, None]
    own = logprobs.gather(1, ids)[:, 0].tolist()
    if num_top == 0:
        return tuple(TokenLogprobs(t, p) for t, p in zip(token_ids, own, strict=True))
    values, indices = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    tops = zip(indices.tolist(), values.tolist(), strict=True)
    best = (tuple(zip(i, v, strict=True)) for i, v in tops)
    return tuple(TokenLogprobs(t, p, top) for t, p, top in zip(token_ids, own, best, strict=True))
