"""A Kronecker product added to a linear's weight, and never written out: LoKr.

Owns the op beside the product of a linear. Knows nothing about scalings (they are in the factors).

Semantics, for a token t of a lane with `left` (a, c) and `right` (b, d), d_in = c d and d_out = a b:
    y'[t, i b + j] = y[t, i b + j] + sum over k, l of left[i, k] * right[j, l] * x[t, k d + l]
which is left X right^T for x[t] as a matrix X (c, d). In place of `right` there may be `right_up` (b, r) and
`right_down` (r, d), of which it is the product.
"""

from collections.abc import Sequence

import torch

from server.ops.site_ops.shaped_lanes import ShapedLanes, by_shape, products
from server.ops.site_ops.site_op import OpSite, OpTokens, SiteShape, Tensors


class Kronecker:
    name = "kronecker"

    def check(self, tensors: Tensors, site: SiteShape) -> None:
        if _made(tensors) != (site.d_out, site.d_in):
            shapes = " and ".join(f"{field} {list(tensor.shape)}" for field, tensor in tensors.items())
            raise ValueError(f"its factors {shapes} do not make {[site.d_out, site.d_in]}, which this base needs")

    def stack(self, of_lane: Sequence[Tensors], site: OpSite) -> tuple[ShapedLanes, ...]:
        return by_shape(of_lane)

    def before(self, x: torch.Tensor, stacked: tuple[ShapedLanes, ...], tokens: OpTokens, site: OpSite) -> torch.Tensor:
        return x

    def after(
        self, y: torch.Tensor, x: torch.Tensor, stacked: tuple[ShapedLanes, ...], tokens: OpTokens, site: OpSite
    ) -> torch.Tensor:
        for rows, added in products(x, stacked, tokens, _product):
            y[rows] = (y[rows].float() + added).to(y.dtype)
        return y


def _made(tensors: Tensors) -> tuple[int, int] | None:
    """The shape of the product; None where the factors make none."""
    if any(tensor.dim() != 2 for tensor in tensors.values()):
        return None
    left = tensors["left"].shape
    if "right" in tensors:
        up, down = tensors["right"].shape
    else:
        (up, rank), (also_rank, down) = tensors["right_up"].shape, tensors["right_down"].shape
        if rank != also_rank:
            return None
    return left[0] * up, left[1] * down


def _product(x: torch.Tensor, tensors: Tensors, by_token: bool) -> torch.Tensor:
    t = "t" if by_token else ""
    h = x.view(len(x), tensors["left"].shape[-1], -1)  # (tokens, c, d)
    if "right" in tensors:
        h = torch.einsum(f"tcd,{t}bd->tcb", h, tensors["right"])
    else:
        h = torch.einsum(f"tcd,{t}rd->tcr", h, tensors["right_down"])
        h = torch.einsum(f"tcr,{t}br->tcb", h, tensors["right_up"])
    return torch.einsum(f"{t}ac,tcb->tab", tensors["left"], h).reshape(len(x), -1)
