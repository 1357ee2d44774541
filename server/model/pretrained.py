"""What a checkpoint says of itself before its weights are read: its config, name, dtype and stored quantization.

Owns the sentences that refuse a checkpoint as such. Knows nothing about the model that is made of it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from server.ground.errors import StartupRefused
from server.model.quantize import Quantization


@dataclass(frozen=True, slots=True)
class BaseOptions:
    """What to load and how. `dtype` None means the checkpoint's own (bfloat16 for float16 ones on a CPU)."""

    model: str
    quantize: Quantization = Quantization.NF4
    dtype: torch.dtype | None = None
    device: torch.device = torch.device("cpu")
    ops: str = "reference"  # what computes adapters and attention, as `server.ops.load_kernels` names it
    four_bit_products: str = "auto"  # as `server.ops.load_four_bit_products` names them


def read_config(model: str) -> PreTrainedConfig:
    """The config of a local folder or hub id. Raises StartupRefused with the remedy."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        if Path(model).exists():
            remedy = "the folder needs a config.json of an architecture that transformers knows"
        elif model.startswith((".", "/", "~")):
            remedy = "there is no such folder"
        else:
            remedy = "give a local folder or a hub id like org/name"
        raise StartupRefused(f"cannot read the model {model!r}: {remedy} ({error})") from error
    return config


def refuse_missing(model: str, missing: Collection[str]) -> None:
    """Raises StartupRefused for a checkpoint that lacks weights, which transformers fills with random numbers."""
    if missing:
        named = ", ".join(sorted(missing)[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise StartupRefused(
            f"the checkpoint {model!r} lacks {named}: it is not whole, or not a causal language model; download it "
            "again, or give the checkpoint of one"
        )


def default_dtype(config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """The checkpoint's own; bfloat16 where it names none, and for float16 on a CPU."""
    dtype = getattr(config.get_text_config(), "dtype", None)
    if dtype is None or (dtype is torch.float16 and device.type == "cpu"):
        return torch.bfloat16
    assert isinstance(dtype, torch.dtype)
    return dtype


def stored_quantization(config: PreTrainedConfig) -> Quantization | None:
    """How the checkpoint's linears are stored; None: unquantized. Raises StartupRefused for another quantizer's."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    if fields.get("load_in_4bit") or fields.get("_load_in_4bit"):
        return Quantization(fields.get("bnb_4bit_quant_type", Quantization.FP4))  # bitsandbytes' own default
    if fields.get("load_in_8bit") or fields.get("_load_in_8bit"):
        return Quantization.INT8
    raise StartupRefused(
        f"the checkpoint is quantized with {fields.get('quant_method')!r}; this server runs checkpoints that "
        "bitsandbytes has quantized to 4 or 8 bits, or unquantized ones"
    )


def model_name(model: str) -> str:
    """What the base is called where nobody says otherwise: the folder's name, or the hub id."""
    path = Path(model)
    return path.resolve().name if path.exists() else model
