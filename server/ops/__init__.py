"""The arithmetic of the normal form and of paged attention: one interface, one choice of implementation.

Owns which implementation runs. Knows nothing about adapters, sequences or models: tensors in, tensors out.
"""

import importlib
import logging
import os
from types import ModuleType

import torch

from server.ground.errors import StartupRefused
from server.ops.edits import GroupEdits, Lanes, Run, SiteEdits, Stack, TokenLayout, runs_of
from server.ops.reference import (
    DecodeBatch,
    PrefillSpan,
    StackHidden,
    decode_attention,
    embed_low_rank,
    expand,
    expand_stack,
    prefill_attention,
    rotate,
    scale,
    scale_shift,
    shift,
    shrink,
    shrink_stack,
    store_kv,
)

log = logging.getLogger(__name__)

__all__ = [
    "DecodeBatch",
    "GroupEdits",
    "Lanes",
    "PrefillSpan",
    "Run",
    "SiteEdits",
    "Stack",
    "StackHidden",
    "TokenLayout",
    "decode_attention",
    "embed_low_rank",
    "expand",
    "expand_stack",
    "load_kernels",
    "prefill_attention",
    "rotate",
    "runs_of",
    "scale",
    "scale_shift",
    "shift",
    "shrink",
    "shrink_stack",
    "store_kv",
]


def load_kernels(name: str, device: torch.device) -> ModuleType | None:
    """`kernels.py` for "triton", None for "reference"; logged. Raises StartupRefused where the kernels cannot run."""
    if name == "reference":
        return None
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise StartupRefused("--ops triton: its kernels need a GPU, and the base is on the CPU; use --ops reference")
    try:
        kernels = importlib.import_module("server.ops.kernels")
    except ImportError as error:
        raise StartupRefused(
            f"--ops triton: Triton cannot be imported ({error}); install graftserve[triton], or use --ops reference"
        ) from error
    log.info("adapters and decode attention run on Triton kernels")
    return kernels
