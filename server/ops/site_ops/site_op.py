"""What every op at a site is: how its tensors are checked and stacked, and what it does to an input and an output.

Owns that contract and the tokens of a step as an op sees them. Knows nothing about adapters, slots or where tensors are
stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from server.ops.edits import Run

Tensors = Mapping[str, torch.Tensor]


class SiteShape(Protocol):
    """What the tensors of an op must fit."""

    @property
    def kind(self) -> str: ...
    @property
    def d_in(self) -> int: ...
    @property
    def d_out(self) -> int: ...


class OpSite(SiteShape, Protocol):
    """A site at which an op is applied."""

    @property
    def index(self) -> int: ...
    @property
    def gain(self) -> float:
        """By which an embedding multiplies its rows (Gemma: the root of the width); else 1."""

    @property
    def weight_offset(self) -> float:
        """What a norm adds to its weight (Gemma: 1); else 0."""

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        """At a norm: what it multiplies by its weight, (tokens, width) -> the same."""


@dataclass(frozen=True, slots=True)
class OpTokens:
    """Which lane of an op's stack each token of a step belongs to: 1 ... for those that have it, 0 for all others.

    The first `num_mixed` tokens may change lane from one to the next; those after them lie in `runs` of one lane each,
    and what is in no run has none. So an op with little to read gathers it by token, and one with much reads it once
    for a run.
    """

    lanes: torch.Tensor  # (tokens,) int64
    num_mixed: int
    runs: tuple[Run, ...]  # after the mixed tokens; `adapter` is the lane
    ids: torch.Tensor  # (tokens,) int64; virtual tokens have -1, -2, ...

    @property
    def mixed(self) -> torch.Tensor:
        """(num_mixed,) the lanes of the mixed tokens."""
        return self.lanes[: self.num_mixed]


class SiteOp(Protocol):
    """One op. `stacked` is what `stack` made: its tensors by name, with a lane's number as the first index."""

    name: str

    def check(self, tensors: Tensors, site: SiteShape) -> None:
        """Raises ValueError, with a sentence, for tensors (float32) that cannot be applied at the site."""

    def stack(self, of_lane: Sequence[Tensors], site: OpSite) -> Tensors:
        """The tensors of lanes 1, 2, ... side by side, with lane 0 before them, which changes nothing."""

    def before(self, x: torch.Tensor, stacked: Tensors, tokens: OpTokens, site: OpSite) -> torch.Tensor:
        """What the site reads in place of x (tokens, d_in); for an embedding ids (tokens,). Never written in place."""

    def after(self, y: torch.Tensor, x: torch.Tensor, stacked: Tensors, tokens: OpTokens, site: OpSite) -> torch.Tensor:
        """What the site gives in place of y (tokens, d_out), which may be written to; x as the site was given it."""
