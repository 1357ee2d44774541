"""The arithmetic of the normal form and of paged attention: one interface, one choice of implementation.

Owns which implementation runs. Knows nothing about adapters, sequences or models: tensors in, tensors out.
"""

from server.ops.edits import GroupEdits, Lanes, Run, SiteEdits, Stack, TokenLayout
from server.ops.reference import (
    DecodeBatch,
    PrefillSpan,
    decode_attention,
    embed_low_rank,
    expand,
    expand_lanes,
    prefill_attention,
    scale,
    scale_shift,
    shift,
    shrink,
    shrink_lanes,
    store_kv,
)

__all__ = [
    "DecodeBatch",
    "GroupEdits",
    "Lanes",
    "PrefillSpan",
    "Run",
    "SiteEdits",
    "Stack",
    "TokenLayout",
    "decode_attention",
    "embed_low_rank",
    "expand",
    "expand_lanes",
    "prefill_attention",
    "scale",
    "scale_shift",
    "shift",
    "shrink",
    "shrink_lanes",
    "store_kv",
]
