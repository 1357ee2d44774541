"""What the two bases need in memory, told before either is loaded.

Owns the checkpoint's dimensions, and the refusal of a comparison that cannot fit. Knows nothing about prompts.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from server.ground.errors import StartupRefused
from server.sizing import free_bytes

_BYTES_PER_WEIGHT = {"nf4": 0.52, "int8": 1.0}  # of a quantized linear; NF4 with its nested scales
_SPARE_BYTES = 1 << 28  # logits of a pass and the arithmetic on them


@dataclass(frozen=True, slots=True)
class Shape:
    """What can be told of a base from its configuration alone."""

    vocab_size: int
    max_context: int
    dtype: torch.dtype  # of the checkpoint
    is_quantized: bool
    num_linear_weights: int  # what bitsandbytes quantizes: linears, the head excepted
    num_other_weights: int

    @classmethod
    def of(cls, model: str) -> "Shape":
        """Builds the model without its weights. Raises StartupRefused where there is none that can be built."""
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(model)
            with torch.device("meta"):
                empty: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            raise StartupRefused(f"cannot read the model {model!r}: give a folder or a hub id ({error})") from error
        text = config.get_text_config()
        num_linear, num_all = _num_weights(empty)
        dtype = getattr(text, "dtype", None)
        return cls(
            vocab_size=int(text.vocab_size),
            max_context=int(getattr(text, "max_position_embeddings", 4096)),
            dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
            is_quantized=getattr(config, "quantization_config", None) is not None,
            num_linear_weights=num_linear,
            num_other_weights=num_all - num_linear,
        )

    def weight_bytes(self, quantize: str, dtype: torch.dtype) -> int:
        """About what the weights take once loaded."""
        per_linear = _BYTES_PER_WEIGHT.get(quantize, float(dtype.itemsize))
        return int(self.num_linear_weights * per_linear) + self.num_other_weights * dtype.itemsize


def _num_weights(model: nn.Module) -> tuple[int, int]:
    """(in linears other than the head, in all); shared ones once."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    return sum(m.weight.numel() for m in linears), sum(p.numel() for p in model.parameters())


def check_room(needed: dict[torch.device, int]) -> None:
    """Refuses what does not fit into the free memory of a device; `needed` is bytes by device."""
    for device, num_bytes in needed.items():
        free = free_bytes(device)
        if num_bytes + _SPARE_BYTES > free:
            raise StartupRefused(
                f"the reference and the served base need about {_gib(num_bytes + _SPARE_BYTES)} side by side, and "
                f"{_gib(free)} are free on {device}; use --reference-dtype bfloat16, put one of them elsewhere with "
                "--reference-device, or free memory"
            )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
