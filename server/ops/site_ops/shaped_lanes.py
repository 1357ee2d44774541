"""Lanes whose tensors have one shape, under one another, and a product for all tokens of a step that are theirs.

Owns which tokens are computed together: those of a run at once with their lane's tensors, and mixed tokens with a
copy of the tensors for each of them, or lane by lane where a lane has many. Knows nothing about what is computed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from server.ops.site_ops.site_op import OpTokens, Tensors

# Mixed tokens of a lane, on average, from which on a product for each lane moves fewer bytes than a copy of its tensors
# for each token, at the price of a launch for each lane.
_MANY_TOKENS = 4

# (x (tokens, width), tensors, by_token) -> (tokens, any width). By token, the tensors have the tokens as their first
# dimension; else all tokens share them.
Product = Callable[[torch.Tensor, Tensors, bool], torch.Tensor]
Rows = torch.Tensor | slice


@dataclass(frozen=True, slots=True)
class ShapedLanes:
    """Some of an op's lanes. Without a place for lane 0: its tokens are never computed."""

    lanes: tuple[int, ...]
    tensors: Tensors  # each (lanes, ...)

    def of(self, lane: int) -> Tensors:
        place = self.lanes.index(lane)
        return {field: tensor[place] for field, tensor in self.tensors.items()}


def by_shape(of_lane: Sequence[Tensors]) -> tuple[ShapedLanes, ...]:
    """The tensors of lanes 1, 2, ..., those of one shape stacked."""
    alike: dict[object, list[int]] = {}
    for lane, own in enumerate(of_lane, start=1):
        shapes = tuple((field, tuple(own[field].shape)) for field in sorted(own))
        alike.setdefault(shapes, []).append(lane)
    return tuple(ShapedLanes(tuple(lanes), _stacked([of_lane[lane - 1] for lane in lanes])) for lanes in alike.values())


def _stacked(of_lane: Sequence[Tensors]) -> Mapping[str, torch.Tensor]:
    if len(of_lane) == 1:  # no second copy
        return {field: tensor[None] for field, tensor in of_lane[0].items()}
    return {field: torch.stack([own[field] for own in of_lane]) for field in of_lane[0]}


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
    found, places = tokens.mixed_of(group.lanes)
    if len(found) == 0:
        return
    if len(group.lanes) > 1 and len(found) < _MANY_TOKENS * len(group.lanes):
        own = {field: tensor.index_select(0, places) for field, tensor in group.tensors.items()}
        yield found, product(x.index_select(0, found).float(), own, True)
        return
    for lane in group.lanes:
        rows, _ = tokens.mixed_of((lane,))
        if len(rows):
            yield rows, product(x.index_select(0, rows).float(), group.of(lane), False)
