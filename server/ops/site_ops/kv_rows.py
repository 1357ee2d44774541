"""Keys and values of an adapter's own for its virtual tokens: what prefix tuning puts before every prompt.

Owns the op at a layer's attention, whose input is keys and values side by side, heads under one another. Knows nothing
about caches: what is computed for a virtual token is replaced before it is stored, and rotated no more.

Semantics, for a virtual token t (its id is -1 - i) of a lane with `rows` (n, width):
    x[t] = rows[i]
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from server.ops.sending import send
from server.ops.site_ops.site_op import OpSite, OpTokens, SiteOp, SiteShape, Tensors, joined


class KvRows(SiteOp):
    name = "kv_rows"

    def check(self, tensors: Tensors, site: SiteShape) -> None:
        shape = tuple(tensors["rows"].shape)
        if len(shape) != 2 or shape[1] != site.d_in:
            raise ValueError(
                f"its rows have the shape {list(shape)}, and this base needs [virtual tokens, {site.d_in}]"
            )

    def stack(self, of_lane: Sequence[Tensors], site: OpSite) -> Tensors:
        """Rows of all lanes under one another, and the first of each lane, lane 0 included."""
        rows = joined(of_lane, "rows")
        starts = torch.tensor([0, *accumulate((len(own["rows"]) for own in of_lane[:-1]), initial=0)])
        return {"rows": rows, "starts": send(starts, rows.device)}

    def before(self, x: torch.Tensor, stacked: Tensors, tokens: OpTokens, site: OpSite) -> torch.Tensor:
        is_own = (tokens.ids < 0) & (tokens.lanes > 0)
        places = stacked["starts"][tokens.lanes] + (-1 - tokens.ids).clamp_min(0)
        rows = stacked["rows"][places.clamp_max(len(stacked["rows"]) - 1)]
        return torch.where(is_own[:, None], rows.to(x.dtype), x)
