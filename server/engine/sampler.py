"""Logits to tokens, for a whole batch in one pass.

Owns the sampling rules. Knows nothing about sequences or text: one row of logits and one `SamplingRow` per token to
choose.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch

from server.engine.token_rules import TokenRules
from server.ops.sending import send

_FIRST = 512  # of the most likely tokens, which are looked at before all are sorted; almost any cut is among them

ArgMax = Callable[[torch.Tensor], torch.Tensor]  # (rows, vocabulary) -> (rows,) int64
_Way = Callable[[torch.Tensor, Sequence["SamplingRow"]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How one row is sampled. `uniform` is the row's own random number in [0, 1); `rules` change its logits before."""

    temperature: float
    top_p: float
    top_k: int
    uniform: float
    min_p: float = 0.0
    rules: TokenRules | None = None


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    return torch.argmax(logits, dim=-1)


class Asked(NamedTuple):
    """What rows are sampled with, on the device: each (rows, 1) float64."""

    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor  # 0: all
    min_p: torch.Tensor
    uniform: torch.Tensor

    @classmethod
    def of(cls, packed: torch.Tensor) -> Self:
        """Views of what `packed` gave."""
        return cls(*packed[:, :, None])

    @property
    def is_cut(self) -> torch.Tensor:
        """(rows, 1) bool: whether top_p, top_k or min_p leaves out any token."""
        return (self.top_p < 1) | (self.top_k > 0) | (self.min_p > 0)


def packed(rows: Sequence[SamplingRow]) -> torch.Tensor:
    """The numbers of `Asked`: (5, rows) float64 on the CPU."""
    listed = [(row.temperature, row.top_p, row.top_k, row.min_p, row.uniform) for row in rows]
    return torch.tensor(listed, dtype=torch.float64).T.contiguous()


def is_cut(row: SamplingRow) -> bool:
    """Whether top_p, top_k or min_p leaves out any token."""
    return row.top_p < 1 or row.top_k > 0 or row.min_p > 0


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow], argmax: ArgMax = most_likely) -> torch.Tensor:
    """One token per row: logits (rows, vocabulary) -> (rows,) int64 on the same device.

    A row's choice depends on its own logits and its own random number only, so a seed gives the same answer in any
    batch. Temperature 0 takes the most likely token.
    """

    def drawn(draw: Callable[[torch.Tensor, Asked], torch.Tensor]) -> _Way:
        return lambda of_way, own: draw(of_way, Asked.of(send(packed(own), logits.device)))

    # Ways that may answer one random number differently, so a row's way must not depend on its neighbours.
    ways: list[tuple[list[int], _Way]] = [
        ([i for i, row in enumerate(rows) if row.temperature == 0], lambda of_way, _: argmax(of_way)),
        ([i for i, row in enumerate(rows) if row.temperature > 0 and not is_cut(row)], drawn(_draw)),
        ([i for i, row in enumerate(rows) if row.temperature > 0 and is_cut(row)], drawn(_draw_cut)),
    ]
    for numbers, choose in ways:
        if len(numbers) == len(rows):
            return choose(logits, rows)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for numbers, choose in ways:
        if numbers:
            at = send(torch.tensor(numbers), logits.device)
            tokens[at] = choose(logits[at], [rows[i] for i in numbers])
    return tokens


def sample_all(logits: torch.Tensor, asked: Asked, *, has_cuts: bool) -> torch.Tensor:
    """`sample` for recordings: every row goes every way, and tensors alone say which one counts.

    `has_cuts`: whether any row is cut; then all of them are sorted.
    """
    tokens = _draw(logits, asked)
    if has_cuts:
        tokens = torch.where(asked.is_cut[:, 0], _draw_cut(logits, asked), tokens)
    return torch.where(asked.temperature[:, 0] > 0, tokens, most_likely(logits))


def _probabilities(logits: torch.Tensor, asked: Asked) -> torch.Tensor:
    """Float32. Very small temperatures would overflow; relative to the maximum they cannot."""
    logits = logits.float()
    temperatures = asked.temperature.clamp_min(1e-5).float()
    return torch.softmax((logits - logits.amax(dim=-1, keepdim=True)).div_(temperatures), dim=-1)


def _draw(logits: torch.Tensor, asked: Asked) -> torch.Tensor:
    return _inverse_cdf(_probabilities(logits, asked), asked.uniform)


def _draw_cut(logits: torch.Tensor, asked: Asked) -> torch.Tensor:
    """Sorts all tokens on a GPU. On a CPU that would take longer than the step, and almost always a few are enough."""
    probs = _probabilities(logits, asked)
    if logits.device.type != "cpu" or probs.shape[-1] <= _FIRST:
        return _draw_sorted(*torch.sort(probs, dim=-1, descending=True, stable=True), asked)
    # As a stable sort would have them: of equals the first.
    order = probs.topk(_FIRST, dim=-1, sorted=False).indices.sort(dim=-1).values
    first, places = probs.gather(1, order).sort(dim=-1, descending=True, stable=True)
    order = order.gather(1, places)
    tokens = _draw_sorted(first, order, asked)
    open_rows = _reaches_further(first, asked).nonzero()[:, 0]
    if len(open_rows):
        rest = torch.sort(probs[open_rows], dim=-1, descending=True, stable=True)
        tokens[open_rows] = _draw_sorted(*rest, Asked(*(column[open_rows] for column in asked)))
    return tokens


def _reaches_further(first: torch.Tensor, asked: Asked) -> torch.Tensor:
    """(rows,) whether a row's cuts may need more than its `first` tokens: (rows, _FIRST) of a sum of 1, sorted.

    Those as likely as the last of them do not count, for there may be more of these.
    """
    most, least = first[:, :1], first[:, -1:]
    counted = first > least
    num, mass = counted.sum(dim=-1, keepdim=True), (first.double() * counted).sum(dim=-1, keepdim=True)
    ends_by_min_p = least < asked.min_p * most
    has_top_k = asked.top_k > 0
    by_top_k = (num >= asked.top_k) | ((asked.top_p == 1) & ends_by_min_p)
    is_enough = torch.where(has_top_k, by_top_k, (mass >= asked.top_p) | ends_by_min_p)
    return (~is_enough & (least > 0))[:, 0]


def _draw_sorted(probs: torch.Tensor, order: torch.Tensor, asked: Asked) -> torch.Tensor:
    """probs (rows, n): the n most likely tokens, sorted, which are `order`; all that the cuts leave are among them."""
    num = probs.shape[-1]
    rank = torch.arange(num, device=probs.device)
    has_top_k = asked.top_k > 0
    probs = probs.masked_fill(rank >= torch.where(has_top_k, asked.top_k, num), 0)
    # top_p is a share of what top_k leaves; without top_k that is all, whose sum is 1.
    probs = probs / torch.where(has_top_k, probs.sum(dim=-1, keepdim=True), 1)
    before = probs.cumsum(dim=-1) - probs  # mass before each token: the first token always stays
    probs = probs.masked_fill(before >= asked.top_p, 0)
    probs = probs.masked_fill(probs < asked.min_p * probs[:, :1], 0)
    return order.gather(1, _inverse_cdf(probs, asked.uniform)[:, None])[:, 0]


def _inverse_cdf(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The index at which the cumulated (unnormalized) probability passes the row's random number times its total."""
    cumulated = probs.double().cumsum(dim=-1)
    total = cumulated[:, -1:]
    # Rounding must not leave the target at the very end, past the last token that has any probability.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, target, right=True)[:, 0].clamp_max(probs.shape[-1] - 1)  # NaN: past the end
