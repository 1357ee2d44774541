"""A Kronecker product added to a linear's weight, and never written out: LoKr.

Owns the op beside the product of a linear. Knows nothing about scalings (they are in the factors).

Semantics, for a token t of a lane with `left` (a, c) and `right` (b, d), d_in = c d and d_out = a b:
    y'[t, i b + j] = y[t, i b + j] + sum over k, l of left[i, k] * right[j, l] * x[t, k d + l]
which is left X right^T for x[t] as a matrix X (c, d). In place of either there may be the two matrices that it is the
product of: `left_up` (a, r) and `left_down` (r, c), `right_up` (b, r) and `right_down` (r, d).
"""

from collections.abc import Sequence

import torch

from server.ops.site_ops.shaped_lanes import ShapedLanes, add_products, by_shape
from server.ops.site_ops.site_op import OpSite, OpTokens, SiteOp, SiteShape, Tensors


class Kronecker(SiteOp):
    name = "kronecker"

    def check(self, tensors: Tensors, site: SiteShape) -> None:
        if _made(tensors) != (site.d_out, site.d_in):
            shapes = " and ".join(f"{field} {list(tensor.shape)}" for field, tensor in tensors.items())
            raise ValueError(f"its factors {shapes} do not make {[site.d_out, site.d_in]}, which this base needs")

    def stack(self, of_lane: Sequence[Tensors], site: OpSite) -> tuple[ShapedLanes, ...]:
        return by_shape(of_lane)

    def after(
        self, y: torch.Tensor, x: torch.Tensor, stacked: tuple[ShapedLanes, ...], tokens: OpTokens, site: OpSite
    ) -> torch.Tensor:
        return add_products(y, x, stacked, tokens, _product)


def _factors(tensors: Tensors, name: str) -> tuple[torch.Tensor, ...]:
    """In the order in which they are applied."""
    return (tensors[name],) if name in tensors else (tensors[f"{name}_down"], tensors[f"{name}_up"])


def _made(tensors: Tensors) -> tuple[int, int] | None:
    """The shape of the product; None where the factors make none."""
    if any(tensor.dim() != 2 for tensor in tensors.values()):
        return None
    left, right = _factors(tensors, "left"), _factors(tensors, "right")
    if any(len(pair) == 2 and pair[0].shape[0] != pair[1].shape[1] for pair in (left, right)):
        return None
    return left[-1].shape[0] * right[-1].shape[0], left[0].shape[1] * right[0].shape[1]


def _product(x: torch.Tensor, tensors: Tensors, by_token: bool) -> torch.Tensor:
    """Factors of each token's own have the tokens in front, as X has, so that both ways it is a product of matrices."""
    left, right = _factors(tensors, "left"), _factors(tensors, "right")
    num_rows, num_columns = left[0].shape[-1], right[0].shape[-1]
    h = x.view(len(x), num_rows, num_columns)  # X (tokens, c, d)
    # The side first that leaves less between the two: factors may be as long as the widths on one side alone.
    is_left_first = left[-1].shape[-2] * num_columns < num_rows * right[-1].shape[-2]
    for side in (left, right) if is_left_first else (right, left):
        for factor in side:
            h = factor @ h if side is left else h @ factor.mT
    return h.reshape(len(x), -1)
