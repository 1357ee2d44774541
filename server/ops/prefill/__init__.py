"""Attention of prompts by a library that reads the paged cache itself, all chunks of a step in one call.

Owns which library computes it, and whether it may: what it asks for, and a trial on this device. Without one, each
chunk is computed by itself (`reference.prefill_attention`), which is also what a library is held to. Decodes are not
here.
"""

from server.ops.prefill.choice import PrefillNeeds, choose_prefill, library_bytes, prefill_refusal, refuse_prefill
from server.ops.prefill.chunks import AttentionLayer, Chunks, PrefillLibrary, PrefillPlan

__all__ = [
    "AttentionLayer",
    "Chunks",
    "PrefillLibrary",
    "PrefillNeeds",
    "PrefillPlan",
    "choose_prefill",
    "library_bytes",
    "prefill_refusal",
    "refuse_prefill",
]
