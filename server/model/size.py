"""How large a base will be, told by its files and its config, before it is loaded.

Owns these estimates. Knows nothing about what memory there is. The loaded base knows its own size.
"""

import struct
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from server.model.pretrained import BaseOptions, default_dtype, read_config, stored_quantization
from server.model.quantize import Quantization, holds_dequantized
from server.model.safetensors_files import StoredTensor, stored_tensors, weight_files
from server.ops import takes_native
from server.ops.prefill import AttentionLayer

_UNQUANTIZED = ("embed", "wte", "wpe", "lm_head")  # in the names of what bitsandbytes' linears do not cover
_HEAD = "lm_head.weight"
# Bytes for each weight: the numbers, their scales (one byte for 64), and the scales of 256 of those.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True, slots=True)
class BaseSize:
    """What a base takes and asks for."""

    base_bytes: int
    kv_shapes: list[tuple[int, int]]  # (kv_heads, head_dim) of each layer
    kv_dtype: torch.dtype
    max_context: int  # tokens
    config: PreTrainedConfig


def expected_size(options: BaseOptions) -> BaseSize | None:
    """Of a base that is not loaded: its bytes are at least these, the rest is as the configs of most models tell it.

    None where the files do not tell: they are not on this machine, no safetensors, or not what they should be. Raises
    StartupRefused when there is no such model.
    """
    config = read_config(options.model)
    dtype = options.dtype or default_dtype(config, options.device)
    try:
        base_bytes = _least_bytes(options, config, dtype)
        shapes = _kv_shapes(config)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error):  # loading says what is wrong
        return None
    if base_bytes is None:
        return None
    max_context = int(getattr(config.get_text_config(), "max_position_embeddings", 4096))
    has_native = takes_native(options.ops, options.device, dtype)
    return BaseSize(base_bytes, shapes, kv_dtype(dtype, options.device, has_kernels=has_native), max_context, config)


def kv_dtype(dtype: torch.dtype, device: torch.device, *, has_kernels: bool) -> torch.dtype:
    """What keys and values are cached in: float32 for PyTorch on a CPU: its small 16-bit products are slower."""
    return torch.float32 if device.type == "cpu" and not has_kernels else dtype


def _least_bytes(options: BaseOptions, config: PreTrainedConfig, dtype: torch.dtype) -> int | None:
    """Less than the truth where a matrix stays unquantized that looks like a linear's: those of experts."""
    files = weight_files(options.model)
    if not files:
        return None
    is_tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    is_stored = stored_quantization(config) is not None
    kind = options.quantize
    if (
        kind is Quantization.NF4
        and holds_dequantized(dtype, options.device)
        and not takes_native(options.ops, options.device, dtype)
    ):
        kind = Quantization.NONE
    tensors = (tensor for path in files for tensor in stored_tensors(path))
    return sum(
        tensor.num_elements * tensor.item_bytes if is_stored else _loaded_bytes(tensor, kind, dtype)
        for tensor in tensors
        if not (is_tied and tensor.name == _HEAD)
    )


def _kv_shapes(config: PreTrainedConfig) -> list[tuple[int, int]]:
    text: Any = config.get_text_config()
    num_heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or num_heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // num_heads)
    return [(kv_heads, head_dim)] * int(text.num_hidden_layers)


def expected_layers(config: PreTrainedConfig) -> frozenset[AttentionLayer]:
    """The kinds of layers as far as a library must know them beforehand: heads and caps, no windows.

    Empty where the config does not tell; the loaded base knows.
    """
    text: Any = config.get_text_config()
    try:
        kv_heads, width = _kv_shapes(config)[0]
        num_heads = int(text.num_attention_heads)
    except (ValueError, LookupError, TypeError, AttributeError):
        return frozenset()
    softcap = getattr(text, "attn_logit_softcapping", None)
    return frozenset({AttentionLayer(num_heads, kv_heads, width, width**-0.5, None, softcap)})


def workspace_bytes(config: PreTrainedConfig, max_tokens: int, max_rows: int) -> int:
    """About what a step of `max_tokens` that computes `max_rows` rows of logits needs beside what stays, in float32.

    Per token the residual stream and what attention and one MLP hold at once; per row the logits, a copy, and both
    halves of a sort.
    """
    text: Any = config.get_text_config()
    hidden = int(text.hidden_size)
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    inner = int(max(inner) if isinstance(inner, list | tuple) else inner)  # some models have one for each layer
    return 4 * (max_tokens * (4 * hidden + 3 * inner) + max_rows * 5 * int(text.vocab_size))


def _loaded_bytes(tensor: StoredTensor, kind: Quantization, dtype: torch.dtype) -> int:
    is_linear = len(tensor.shape) == 2 and not any(word in tensor.name for word in _UNQUANTIZED)
    if is_linear and kind is Quantization.NF4:
        return int(tensor.num_elements * _NF4_BYTES)
    if is_linear and kind is Quantization.INT8:
        return tensor.num_elements + 4 * tensor.shape[0]
    is_floating = tensor.dtype in ("F64", "F32", "F16", "BF16")
    return tensor.num_elements * (dtype.itemsize if is_floating else tensor.item_bytes)
