"""The arithmetic of the normal form and of paged attention: one interface, one choice of implementation.

Owns which implementation runs. Knows nothing about adapters, sequences or models: tensors in, tensors out.
"""

import importlib
import logging
import os
from typing import Any

import torch

from server.ground.errors import StartupRefused
from server.ops import native
from server.ops.edits import GroupEdits, Lanes, Run, SiteEdits, Stack, TokenLayout, runs_of
from server.ops.packed import FourBitProducts
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
from server.ops.sheets import Joint
from server.ops.step_kernels import Kernels, StepKernels

log = logging.getLogger(__name__)

__all__ = [
    "DecodeBatch",
    "GroupEdits",
    "Joint",
    "Kernels",
    "Lanes",
    "PrefillSpan",
    "Run",
    "SiteEdits",
    "Stack",
    "StackHidden",
    "StepKernels",
    "TokenLayout",
    "decode_attention",
    "embed_low_rank",
    "expand",
    "expand_stack",
    "load_four_bit_products",
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
    "takes_native",
]


def takes_native(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `load_kernels` would give native kernels."""
    if name not in ("auto", "native"):
        return False
    try:
        _native(device, dtype)
    except StartupRefused:
        return False
    return True


def load_kernels(name: str, device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """The kernels that --ops names, for a base in this dtype; None for "reference". Logged.

    "auto" takes those for the processor where they can be had. Raises StartupRefused where the named ones cannot run.
    """
    if name == "auto":
        name = "native" if device.type == "cpu" and dtype in native.DTYPES else "reference"
        try:
            return _kernels(name, device, dtype)
        except StartupRefused as refused:
            log.warning("adapters and attention run on PyTorch's operators, which is slower. %s", refused.message)
            return None
    return _kernels(name, device, dtype)


def _kernels(name: str, device: torch.device, dtype: torch.dtype) -> Kernels | None:
    if name == "reference":
        return None
    kernels = _triton(device) if name == "triton" else _native(device, dtype)
    log.info("adapters and decode attention run on %s", "Triton kernels" if name == "triton" else "native kernels")
    return kernels


def load_four_bit_products(name: str, device: torch.device) -> FourBitProducts | None:
    """What --four-bit-products names; None for "auto": native kernels and bitsandbytes have their own. Logged.

    Raises StartupRefused where the named ones cannot run.
    """
    if name == "auto":
        return None
    module = _in_triton("server.ops.four_bit", device, "--four-bit-products triton", "--four-bit-products auto")
    products: FourBitProducts = module.FourBitWeight
    log.info("the base's 4-bit weights are multiplied by Triton kernels")
    return products


def _triton(device: torch.device) -> Kernels:
    kernels: Kernels = _in_triton("server.ops.kernels", device, "--ops triton", "--ops native, or use --ops reference")
    return kernels


def _in_triton(module: str, device: torch.device, wanted: str, instead: str) -> Any:
    """The module, imported; raises StartupRefused where its kernels cannot run."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise StartupRefused(f"{wanted}: its kernels need a GPU, and the base is on the CPU; use {instead}")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise StartupRefused(
            f"{wanted}: Triton cannot be imported ({error}); install graftserve[triton], or use {instead}"
        ) from error


def _native(device: torch.device, dtype: torch.dtype) -> Kernels:
    if device.type != "cpu":
        raise StartupRefused("--ops native: its kernels run on a CPU, and the base is on a GPU; use --ops triton")
    if dtype not in native.DTYPES:
        raise StartupRefused(
            f"--ops native: it computes float32 and bfloat16, and the base is in {str(dtype).removeprefix('torch.')}; "
            "use --dtype bfloat16, or --ops reference"
        )
    try:
        native.library()
    except native.CannotCompile as error:
        raise StartupRefused(
            f"--ops native: its kernels cannot be compiled: {error}; or use --ops reference"
        ) from error
    return native
