"""The closed list of what an adapter may do at a site beside the normal form: one file per op.

Owns the list. An op is known here by its name, in an edit by its name and its tensors; nothing but the op itself knows
what they mean. Each runs on any device, for all tokens of a step at once, and only at sites where some token's adapter
has it. Where a site has several they come in the order of the list.
"""

from collections.abc import Mapping

from server.ops.site_ops.block_rotation import BlockRotation
from server.ops.site_ops.bottleneck import Bottleneck, KeepStream
from server.ops.site_ops.circulant import Circulant
from server.ops.site_ops.kronecker import Kronecker
from server.ops.site_ops.kv_rows import KvRows
from server.ops.site_ops.norm_weight import NormWeight
from server.ops.site_ops.own_weight import OwnWeight
from server.ops.site_ops.pair_rotation import PairRotation
from server.ops.site_ops.site_op import (
    OpSite,
    OpTokens,
    PlacedOp,
    SiteOp,
    SiteShape,
    Tensors,
    around,
    tensors_in,
)
from server.ops.site_ops.token_rows import TokenRows

__all__ = ["SITE_OPS", "OpSite", "OpTokens", "PlacedOp", "SiteOp", "SiteShape", "Tensors", "around", "tensors_in"]

_OPS: tuple[SiteOp, ...] = (
    OwnWeight(), TokenRows(), KvRows(), NormWeight(), BlockRotation(), Kronecker(), Circulant(), PairRotation(),
    KeepStream(), Bottleneck(),
)  # fmt: skip
SITE_OPS: Mapping[str, SiteOp] = {op.name: op for op in _OPS}
