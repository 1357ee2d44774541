"""Lanes whose tensors have one shape, and a product for all tokens of a step that are theirs.

Owns which tokens are computed together: those of a run at once with their lane's tensors, and mixed tokens with a
copy of the tensors for each of them, or lane by lane where a lane has many tokens or large tensors. Knows nothing about
what is computed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from server.ops.site_ops.site_op import MixedTokens, OpTokens, Tensors

# Mixed tokens of a lane, on average, from which on a product for each lane moves fewer bytes than a copy of its tensors
# for each token, at the price of a launch for each lane.
_MANY_TOKENS = 4
_MAX_STACKED_BYTES = 1 << 18  # of a lane: a stack of small tensors is gathered faster than they are one by one
_MAX_GATHERED_BYTES = 64 << 20  # copied for tokens at once
_MIN_GATHERED = 8  # tokens at once, for which copies are worth their while

# (x (tokens, width), tensors, by_token) -> (tokens, any width). By token, the tensors have the tokens as their first
# dimension; else all tokens share them.
Product = Callable[[torch.Tensor, Tensors, bool], torch.Tensor]
Rows = torch.Tensor | slice


@dataclass(frozen=True, slots=True)
class ShapedLanes:
    """Some of an op's lanes. Without a place for lane 0: its tokens are never computed."""

    lanes: tuple[int, ...]
    own: tuple[Tensors, ...]  # of each
    stacked: Tensors | None  # the same once more, each (lanes, ...); None where they are large, or there is one lane

    def of(self, lane: int) -> Tensors:
        return self.own[self.lanes.index(lane)]

    def of_tokens(self, found: MixedTokens) -> Tensors:
        """Copies with the tokens in front."""
        if self.stacked is not None:
            return {field: tensor.index_select(0, found.places) for field, tensor in self.stacked.items()}
        of_token = [self.own[place] for place in found.place_numbers]
        return {field: torch.stack([own[field] for own in of_token]) for field in self.own[0]}

    @property
    def lane_bytes(self) -> int:
        return _num_bytes(self.own[0])


def by_shape(of_lane: Sequence[Tensors]) -> tuple[ShapedLanes, ...]:
    """The tensors of lanes 1, 2, ..., those of one shape together."""
    alike: dict[object, list[int]] = {}
    for lane, own in enumerate(of_lane, start=1):
        shapes = tuple((field, tuple(own[field].shape)) for field in sorted(own))
        alike.setdefault(shapes, []).append(lane)
    return tuple(_shaped(tuple(lanes), tuple(of_lane[lane - 1] for lane in lanes)) for lanes in alike.values())


def _shaped(lanes: tuple[int, ...], own: tuple[Tensors, ...]) -> ShapedLanes:
    if len(lanes) == 1 or _num_bytes(own[0]) > _MAX_STACKED_BYTES:
        return ShapedLanes(lanes, own, None)
    stacked = {field: torch.stack([one[field] for one in own]) for field in own[0]}
    rows = tuple({field: tensor[place] for field, tensor in stacked.items()} for place in range(len(lanes)))
    return ShapedLanes(lanes, rows, stacked)  # and nothing else is kept of them


def _num_bytes(own: Tensors) -> int:
    return sum(tensor.nbytes for tensor in own.values())


def products(
    x: torch.Tensor, groups: Sequence[ShapedLanes], tokens: OpTokens, product: Product
) -> Iterator[tuple[Rows, torch.Tensor]]:
    """Tokens that have a lane, and their product, float32; each token once, those of lane 0 never."""
    for group in groups:
        for run in tokens.runs:
            if run.adapter in group.lanes:
                rows = slice(run.start, run.end)
                yield rows, product(x[rows].float(), group.of(run.adapter), False)
        yield from _of_mixed(x, group, tokens, product)


def add_products(
    y: torch.Tensor, x: torch.Tensor, groups: Sequence[ShapedLanes], tokens: OpTokens, product: Product
) -> torch.Tensor:
    """y (tokens, d_out), in place, with the product of x added for each token that has a lane; rounded once."""
    for rows, added in products(x, groups, tokens, product):
        y[rows] = (y[rows].float() + added).to(y.dtype)
    return y


def _of_mixed(
    x: torch.Tensor, group: ShapedLanes, tokens: OpTokens, product: Product
) -> Iterator[tuple[Rows, torch.Tensor]]:
    found = tokens.mixed_of(group.lanes)
    num_at_once = _MAX_GATHERED_BYTES // max(1, group.lane_bytes)
    are_few = 0 < len(found.place_numbers) < _MANY_TOKENS * len(group.lanes)
    if len(group.lanes) > 1 and are_few and num_at_once >= _MIN_GATHERED:
        for part in found.parts(num_at_once):
            yield part.tokens, product(x.index_select(0, part.tokens).float(), group.of_tokens(part), True)
        return
    for lane in group.lanes:
        rows = tokens.mixed_of((lane,)).tokens
        if len(rows):
            yield rows, product(x.index_select(0, rows).float(), group.of(lane), False)
