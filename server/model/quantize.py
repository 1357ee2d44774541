"""What bitsandbytes does to a base: how to ask for it, what its modules mean, and its traps on CPUs.

Owns every touch of bitsandbytes. Knows nothing about sites, adapters or attention.
"""

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, has_avx512bf16
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import nn
from transformers import BitsAndBytesConfig

# It says at every product that int8 inputs pass through float16, which is how its int8 works.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


class Quantization(StrEnum):
    NF4 = "nf4"
    FP4 = "fp4"  # of checkpoints that are stored so; it cannot be asked for
    INT8 = "int8"
    NONE = "none"

    @property
    def is_4_bit(self) -> bool:
        return self in (Quantization.NF4, Quantization.FP4)


def quantization_config(kind: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The request to transformers: NF4 with double quantization, or int8 without outlier columns.

    int8's threshold is 0 because the outlier columns of a threshold above 0 are chosen over the whole batch, so that
    one request would change the answer of another.
    """
    if kind is Quantization.NF4:
        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if kind is Quantization.INT8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)  # type: ignore[no-untyped-call]
    return None


def is_quantized(module: nn.Module) -> bool:
    return isinstance(module, Linear4bit | Linear8bitLt)


def can_read_weight(module: nn.Module) -> bool:
    """Whether `dequantized_weight` holds at any time; of 4-bit weights only before their first use."""
    return not isinstance(module, Linear4bit)


def found_quantization(model: nn.Module) -> Quantization:
    """What the base's linears are in fact (checkpoints come quantized, too)."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            return Quantization(weight.quant_type)
        if isinstance(module, Linear8bitLt):
            return Quantization.INT8
    return Quantization.NONE


def dequantized_weight(module: nn.Module) -> torch.Tensor:
    """The weight as stored (out, in), or (in, out) for Conv1D and embeddings, dequantized to a floating dtype.

    For 4-bit weights this holds only before the module's first forward pass on a CPU with AVX512-BF16, which repacks
    them; `settle` and the row norms come before it.
    """
    weight: Any = module.weight  # of bitsandbytes' own classes, which hang their scales on it
    if isinstance(module, Linear4bit):
        return dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(module, Linear8bitLt):
        # The first forward pass moves both from the weight to the module's state.
        held: Any = module.state if module.state.CB is not None else weight
        return cast(torch.Tensor, held.CB.float() * (held.SCB.float() / 127.0)[:, None])
    return cast(torch.Tensor, weight.data)


@dataclass(frozen=True, slots=True)
class FourBitRows:
    """A 4-bit weight (d_out, d_in) as bitsandbytes stores it: levels[code] * scale, one scale for a block of a row.

    codes (d_out, d_in / 2) uint8, the first of two in the higher bits; levels (16,) float32. The scales are there as
    `server.ops.packed.FourBitProducts` takes them.
    """

    codes: torch.Tensor
    levels: torch.Tensor
    scale_codes: torch.Tensor
    scale_levels: torch.Tensor | None = None
    seconds: torch.Tensor | None = None


def four_bit_format(module: nn.Module) -> tuple[str, int, bool] | None:
    """Which levels, how many weights of a row share a scale, and whether scales are quantized, too; None for no 4-bit
    linear, or a repacked one."""
    if not isinstance(module, Linear4bit):
        return None
    weight: Any = module.weight
    state = weight.quant_state
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    return str(weight.quant_type), int(state.blocksize), bool(state.nested)


def four_bit_rows(module: nn.Linear) -> FourBitRows:
    """What a 4-bit linear holds that has not been repacked, and whose blocks do not cross rows."""
    weight: Any = module.weight
    state = weight.quant_state
    codes = weight.data.view(torch.uint8).view(module.out_features, module.in_features // 2)
    scales = state.absmax.view(module.out_features, -1)
    if not state.nested:
        return FourBitRows(codes, state.code.float(), scales.float())
    first = state.state2.absmax.float()
    seconds = torch.stack([first, state.offset.float().expand_as(first)], dim=1)
    return FourBitRows(codes, state.code.float(), scales, state.state2.code.float(), seconds)


def four_bit_scales(module: nn.Linear) -> torch.Tensor:
    """(d_out, d_in / block) float32 of a 4-bit linear as `four_bit_rows` reads it."""
    weight: Any = module.weight
    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return cast(torch.Tensor, scales.float().view(module.out_features, -1))


def empty(module: nn.Module) -> None:
    """Takes a 4-bit linear's weight and scales away, whose product is made elsewhere; its own would raise."""
    weight: Any = module.weight
    weight.data = torch.empty(0, dtype=torch.uint8, device=weight.device)
    weight.quant_state = None
    module.quant_state = None  # type: ignore[assignment]  # bitsandbytes keeps the scales here as well


def settle(
    model: nn.Module, dtype: torch.dtype, device: torch.device, left_alone: Collection[nn.Module] = ()
) -> str | None:
    """Makes quantized modules answer each request alone and as asked; returns a sentence for the log, if any.

    int8 thresholds of pre-quantized checkpoints are set to 0 (see `quantization_config`). On a CPU, 4-bit layers run on
    bitsandbytes' AVX512-BF16 product where it exists and their shape allows it; float32 is computed in float32; and a
    CPU without that product would dequantize every layer in every step, so it does so once, here. 4-bit layers that
    are `left_alone` stay as they are stored.
    """
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.state.threshold = 0.0
    choose_four_bit_products(model, dtype, device, left_alone)
    if holds_dequantized(dtype, device):
        num = _dequantize_linears(model, dtype, left_alone)
        if num:
            return (
                f"this CPU has no AVX512-BF16, so {num} 4-bit layers are held dequantized as {dtype}: "
                "same values, faster, more memory"
            )
    return None


def choose_four_bit_products(
    model: nn.Module, dtype: torch.dtype, device: torch.device, left_alone: Collection[nn.Module] = ()
) -> None:
    """bitsandbytes' AVX512-BF16 product on a CPU for each 4-bit linear that it fits and that is not `left_alone`: it
    repacks the weights."""
    is_fast = has_avx512bf16()  # type: ignore[no-untyped-call]
    for module in model.modules():
        if isinstance(module, Linear4bit) and device.type == "cpu":
            fits = module.out_features % 32 == 0 and module.in_features % 64 == 0 and module not in left_alone
            module.support_avx512bf16_for_cpu = is_fast and fits and dtype is not torch.float32


def scales(model: nn.Module) -> Iterator[torch.Tensor]:
    """What quantized weights need beside their numbers, and is neither parameter nor buffer."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            yield from () if weight.quant_state is None else _tensors(weight.quant_state)
        if isinstance(module, Linear8bitLt):
            held: Any = module.state if module.state.CB is not None else module.weight
            yield held.SCB


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """Of a quantization state, and of the one by which its scales are quantized."""
    yield from (value for value in vars(state).values() if isinstance(value, torch.Tensor))
    if getattr(state, "state2", None) is not None:
        yield from _tensors(state.state2)


def holds_dequantized(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `settle` holds 4-bit layers as what they stand for."""
    is_fast: bool = has_avx512bf16()  # type: ignore[no-untyped-call]
    return device.type == "cpu" and not is_fast and dtype is not torch.float32


def expert_bytes(model: nn.Module) -> int:
    """Bytes of the stacks of experts; 0 for a model without experts."""
    stacks = [p for m in model.modules() if type(m).__name__.endswith("Experts") for p in m.parameters(recurse=False)]
    return sum(p.numel() * p.element_size() for p in stacks)


def experts_note(model: nn.Module) -> str | None:
    """A sentence on the bytes of experts that a quantized base holds unquantized; None where there are none.

    transformers keeps the experts of a layer as one stack of matrices, which bitsandbytes' linears do not cover.
    """
    num_bytes = expert_bytes(model)
    if not num_bytes or found_quantization(model) is Quantization.NONE:
        return None
    return f"the experts stay unquantized ({num_bytes / 2**20:,.1f} MiB of the base), and no adapter can edit them"


def _dequantize_linears(model: nn.Module, dtype: torch.dtype, left_alone: Collection[nn.Module]) -> int:
    """Replaces 4-bit linears by plain ones with the dequantized weight; returns how many."""
    num = 0
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Linear4bit) and module not in left_alone:
                plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, dtype=dtype)
                plain.weight.data = dequantized_weight(module).to(dtype)
                if module.bias is not None:
                    plain.bias.data = module.bias.data.to(dtype)
                setattr(parent, name, plain.requires_grad_(False).eval())
                num += 1
    return num
