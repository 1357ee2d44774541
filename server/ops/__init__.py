"""The arithmetic of the normal form and of paged attention: one interface, one choice of implementation.

Owns which implementation runs. Knows nothing about adapters, sequences or models: tensors in, tensors out.
"""

from server.ops.edits import GroupEdits, Lanes, Run, SiteEdits, Stack, TokenLayout
from server.ops.reference import (
    DecodeBatch,
    PrefillSpan,
    add_lanes,
    decode_attention,
    embed_low_rank,
    expand,
    prefill_attention,
    scale,
    scale_shift,
    shift,
    shrink,
    store_kv,
    to_lanes,
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
    "add_lanes",
    "decode_attention",
    "embed_low_rank",
    "expand",
    "prefill_attention",
    "scale",
    "scale_shift",
    "shift",
    "shrink",
    "store_kv",
    "to_lanes",
]
