"""Ops folded into a site's weight and bias, where what they do to it is a change of both.

Owns which ops those are, and the way to it: the op itself is run on the identity. Knows nothing about what an op means.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from server.model.site import SiteKind
from server.ops.site_ops import Tensors
from server.ops.site_ops.alone import run_alone

# Each is linear in what the site reads and in what it gives, whatever else is in the batch.
FOLDED = frozenset({"block_rotation", "circulant", "kronecker", "pair_rotation"})
_NUM_ROWS = 1024  # of the identity at once, so that it never is as large as the weight


@dataclass(frozen=True, slots=True)
class PlainSite:
    """A linear or an embedding, as an op sees it (satisfies `OpSite`)."""

    kind: SiteKind
    d_in: int
    d_out: int
    index: int = 0
    gain: float = 1.0
    weight_offset: float = 0.0

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        raise TypeError(f"a site of the kind {self.kind} is no norm")


def folded_weight(ops: Mapping[str, Tensors], weight: torch.Tensor, site: PlainSite) -> torch.Tensor:
    """W' (d_out, d_in) float32 with W' x = what the site gives for x with these ops around W x."""
    columns = weight.T
    folded = torch.empty_like(columns)
    for start in range(0, site.d_in, _NUM_ROWS):
        rows = slice(start, min(start + _NUM_ROWS, site.d_in))
        unit = torch.arange(rows.start, rows.stop)
        if site.kind is not SiteKind.EMBEDDING:
            unit = torch.nn.functional.one_hot(unit, site.d_in).float()

        def product(x: torch.Tensor, unit: torch.Tensor = unit, rows: slice = rows) -> torch.Tensor:
            return columns[rows].clone() if x is unit or site.kind is SiteKind.EMBEDDING else x @ columns

        folded[rows] = run_alone(ops, product, unit, site)
    return folded.T


def folded_bias(ops: Mapping[str, Tensors], bias: torch.Tensor, site: PlainSite) -> torch.Tensor:
    """b' (d_out,) float32, of a linear: what the site gives for an input of zeros."""
    return run_alone(ops, lambda x: bias[None].clone(), torch.zeros(1, site.d_in), site)[0]
