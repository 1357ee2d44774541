"""A product's whole weight of an adapter's own: heads, embeddings and other modules that were trained in full.

Owns the op at a linear and at an embedding. It is a product for each adapter that has it: what takes as much memory as
a part of the base is no small edit. Knows nothing about how large that may be.

Semantics, for a token t of a lane with `weight` (d_out, d_in) and `bias` (d_out,):
    at a linear:      y[t] = weight @ x[t] + bias
    at an embedding:  y[t] = gain * weight[:, id of t]
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from server.ops.site_ops.site_op import OpSite, OpTokens, SiteOp, SiteShape, Tensors


class OwnWeight(SiteOp):
    name = "own_weight"

    def check(self, tensors: Tensors, site: SiteShape) -> None:
        wanted = {"weight": (site.d_out, site.d_in), "bias": (site.d_out,)}
        for field, tensor in tensors.items():
            if tuple(tensor.shape) != wanted[field]:
                raise ValueError(
                    f"its {field} has the shape {list(tensor.shape)}, and this base needs {list(wanted[field])}"
                )

    def stack(self, of_lane: Sequence[Tensors], site: OpSite) -> Tensors:
        return {f"{lane}.{field}": t for lane, own in enumerate(of_lane, start=1) for field, t in own.items()}

    def after(self, y: torch.Tensor, x: torch.Tensor, stacked: Tensors, tokens: OpTokens, site: OpSite) -> torch.Tensor:
        for field, weight in stacked.items():
            lane, _, name = field.partition(".")
            if name != "weight":
                continue
            rows = tokens.of_lane(int(lane))
            if not len(rows):
                continue
            if site.kind == "embedding":
                own = weight.T[x[rows]] * site.gain
            else:
                own = F.linear(x[rows].float(), weight, stacked.get(f"{lane}.bias"))
            y[rows] = own.to(y.dtype)
        return y
