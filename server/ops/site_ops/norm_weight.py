"""An adapter's own weight and bias of a norm: norm tuning, and norms that were trained beside something else.

Owns the op at a norm. Knows nothing about what the norm computes before its weight.

Semantics, for a token t of a lane with `weight` (width,) and `bias` (width,):
    y[t] = (weight + what the model adds to a weight) * normalized(x)[t] + bias
"""

from collections.abc import Sequence

import torch

from server.ops.site_ops.site_op import OpSite, OpTokens, SiteOp, SiteShape, Tensors


class NormWeight(SiteOp):
    name = "norm_weight"

    def check(self, tensors: Tensors, site: SiteShape) -> None:
        for field, tensor in tensors.items():
            if tuple(tensor.shape) != (site.d_out,):
                raise ValueError(f"its {field} has the shape {list(tensor.shape)}, and this base needs {[site.d_out]}")

    def stack(self, of_lane: Sequence[Tensors], site: OpSite) -> Tensors:
        blank = torch.zeros_like(of_lane[0]["weight"])
        weight, bias = (torch.stack([blank, *(own[field] for own in of_lane)]) for field in ("weight", "bias"))
        return {"weight": weight + site.weight_offset, "bias": bias}

    def after(self, y: torch.Tensor, x: torch.Tensor, stacked: Tensors, tokens: OpTokens, site: OpSite) -> torch.Tensor:
        weight, bias = (stacked[field].index_select(0, tokens.lanes) for field in ("weight", "bias"))
        own = torch.addcmul(bias, weight, site.normalized(x).float()).to(y.dtype)
        return torch.where((tokens.lanes > 0)[:, None], own, y)
