"""A site's ops where every token is one adapter's: for those who fold an adapter into weights, or compare with it.

Owns the order in which ops come before and after a product. Knows nothing about steps, slots or batches.
"""

from collections.abc import Callable, Mapping

import torch

from server.ops.edits import Run
from server.ops.site_ops import SITE_OPS, OpSite, OpTokens, PlacedOp, Tensors, around


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
    placed = [PlacedOp(op, op.stack([ops[name]], site), tokens) for name, op in SITE_OPS.items() if name in ops]

    def flat_normal(read: torch.Tensor) -> torch.Tensor:
        return normal(x if read is flat else read.view(x.shape)).reshape(num, -1)

    return around(placed, flat, flat_normal, site).view(*(x.shape if is_embedding else x.shape[:-1]), -1)
