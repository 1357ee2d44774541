"""A site's ops where every token is one adapter's: for those who fold an adapter into weights, or compare with it.

Owns the order in which ops come before and after a product. Knows nothing about steps, slots or batches.
"""

from collections.abc import Callable, Mapping

import torch

from server.ops.edits import Run
from server.ops.site_ops import SITE_OPS, OpSite, OpTokens, Tensors


def run_alone(
    ops: Mapping[str, Tensors], normal: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, site: OpSite
) -> torch.Tensor:
    """What the site gives for x (..., d_in), or for ids (...), with these ops around `normal`: (..., d_out)."""
    is_embedding = site.kind == "embedding"
    flat = x.reshape(-1) if is_embedding else x.reshape(-1, site.d_in)
    num, device = len(flat), x.device
    ids = flat if is_embedding else torch.zeros(num, dtype=torch.int64, device=device)
    lanes = torch.ones(num, dtype=torch.int64, device=device)
    tokens = OpTokens(lanes, 0, (Run(0, num, 1),), ids)
    placed = [(op, op.stack([ops[name]], site)) for name, op in SITE_OPS.items() if name in ops]
    read = flat
    for op, stacked in placed:
        read = op.before(read, stacked, tokens, site)
    y = normal(x if read is flat else read.view(x.shape))
    out = y.reshape(num, -1)
    for op, stacked in placed:
        out = op.after(out, flat, stacked, tokens, site)
    return out.view(*y.shape[:-1], -1)
