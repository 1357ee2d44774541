"""Pairs of outputs turned and stretched, each by an angle of its own: RoAd.

Owns the op at a linear, on its whole output with the bias. Knows nothing about how pairs are chosen: each output names
its partner.

Semantics, for a token t of a lane with `own`, `other` and `partners` (d_out,):
    y'[t, i] = own[i] * y[t, i] + other[i] * y[t, partners[i]]
"""

from collections.abc import Sequence

import torch

from server.ops.site_ops.shaped_lanes import ShapedLanes, by_shape, products
from server.ops.site_ops.site_op import OpSite, OpTokens, SiteOp, SiteShape, Tensors


class PairRotation(SiteOp):
    name = "pair_rotation"

    def check(self, tensors: Tensors, site: SiteShape) -> None:
        for field, tensor in tensors.items():
            if tuple(tensor.shape) != (site.d_out,):
                raise ValueError(f"its {field} has the shape {list(tensor.shape)}, and this base needs {[site.d_out]}")
        partners = tensors["partners"]
        if bool(((partners < 0) | (partners >= site.d_out) | (partners != partners.floor())).any()):
            raise ValueError(f"its partners are not all outputs, which are numbered 0 to {site.d_out - 1}")

    def stack(self, of_lane: Sequence[Tensors], site: OpSite) -> tuple[ShapedLanes, ...]:
        return by_shape([{**own, "partners": own["partners"].long()} for own in of_lane])

    def after(
        self, y: torch.Tensor, x: torch.Tensor, stacked: tuple[ShapedLanes, ...], tokens: OpTokens, site: OpSite
    ) -> torch.Tensor:
        for rows, turned in products(y, stacked, tokens, _turned):
            y[rows] = turned.to(y.dtype)
        return y


def _turned(y: torch.Tensor, tensors: Tensors, by_token: bool) -> torch.Tensor:
    partners = tensors["partners"]
    partner = y.gather(1, partners) if by_token else y.index_select(1, partners)
    return torch.addcmul(tensors["own"] * y, tensors["other"], partner)
