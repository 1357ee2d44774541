"""The base with every weight at hand: for those who compute with weights instead of serving them.

Owns how a checkpoint is loaded for that, what a quantized weight stands for, and making a quantized model plain. Knows
nothing about adapters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from server.ground.errors import StartupRefused
from server.model.outline import outline
from server.model.pretrained import BaseOptions, read_config, refuse_missing, stored_quantization
from server.model.quantize import dequantized_weight, is_quantized, quantization_config
from server.model.site import SiteKind


@dataclass(frozen=True, slots=True)
class DenseSite:
    """A site whose weight can be read (satisfies the `Site` protocol). Numbers are read when they are asked for."""

    index: int
    path: str
    kind: SiteKind
    d_in: int
    d_out: int
    module: nn.Module
    table_of: str | None

    @property
    def is_transposed(self) -> bool:
        """Whether the module keeps its weight as (d_in, d_out)."""
        return isinstance(self.module, nn.Embedding | Conv1D)

    @property
    def bias(self) -> torch.Tensor | None:
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach().float().cpu()

    def weight(self) -> torch.Tensor:
        """Dequantized, (d_out, d_in) as in y = W x, float32 on the CPU."""
        weight = dequantized_weight(self.module).detach().float().cpu()
        return weight.T if self.is_transposed else weight

    @property
    def row_norms_squared(self) -> torch.Tensor:
        pieces = torch.split(self.weight(), 1024)  # in float64, a large head would take gigabytes
        return torch.cat([piece.double().square().sum(1) for piece in pieces]).float()

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.weight().T


@dataclass(frozen=True, slots=True)
class DenseBase:
    """A loaded model that has not run yet, and its sites by path: those that the served base has, too."""

    name: str
    fingerprint: str | None
    dtype: torch.dtype  # of what is not quantized
    model: PreTrainedModel
    sites: Mapping[str, DenseSite]

    @classmethod
    def load(cls, options: BaseOptions) -> "DenseBase":
        """Loads a local folder or hub id as `options` say, with transformers' own attention.

        With a quantization, weights are what the quantized ones stand for; a checkpoint that is quantized already
        stays as it is. Raises StartupRefused as loading a base to serve does.
        """
        known = outline(options)
        model = _load(options, known.dtype)
        sites = {
            path: DenseSite(
                site.index, path, site.kind, site.d_in, site.d_out, model.get_submodule(path), site.table_of
            )
            for path, site in known.sites.items()
        }
        return cls(known.name, known.fingerprint, known.dtype, model, sites)


def stored_dtype(model: str) -> torch.dtype:
    """What a checkpoint says that its weights are in; bfloat16 where it does not say."""
    dtype = getattr(read_config(model).get_text_config(), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def make_plain(base: DenseBase) -> DenseBase:
    """The base with plain modules in place of quantized ones, holding in `base.dtype` what those stand for."""
    quantized = [(path, module) for path, module in base.model.named_modules() if is_quantized(module)]
    if not quantized:
        return base
    for path, module in quantized:
        parent, _, name = path.rpartition(".")
        setattr(base.model.get_submodule(parent), name, _plain(module, base.dtype))
    _forget_quantization(base.model)
    sites = {path: replace(site, module=base.model.get_submodule(path)) for path, site in base.sites.items()}
    return replace(base, sites=sites)


def _forget_quantization(model: Any) -> None:
    """Takes off what transformers keeps of a quantization, so that it saves a plain model."""
    del model.config.quantization_config
    model.hf_quantizer = None
    # How keys were turned around while loading, the packed weights' keys among them; None: as the architecture says.
    model._weight_conversions = None
    for flag in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        if flag in vars(model):
            delattr(model, flag)


def _plain(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A linear with the dequantized weight; a Conv1D where transformers made the quantized module out of one."""
    weight = dequantized_weight(module).to(dtype)
    num_out, num_in = weight.shape
    bias = getattr(module, "bias", None)
    plain: nn.Module
    if getattr(module, "source_cls", None) is Conv1D:
        plain, weight = Conv1D(num_out, num_in), weight.T  # type: ignore[no-untyped-call]
    else:
        plain = nn.Linear(num_in, num_out, bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return plain.eval()


def _load(options: BaseOptions, dtype: torch.dtype) -> PreTrainedModel:
    is_stored = stored_quantization(read_config(options.model)) is not None
    quantization = None if is_stored else quantization_config(options.quantize, dtype)
    extra: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            options.model,
            dtype=dtype,
            # Others leave out what some models do to their scores (Gemma 2's cap).
            attn_implementation="eager",
            device_map={"": str(options.device)},
            output_loading_info=True,
            **extra,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise StartupRefused(f"cannot load {options.model!r}: {error}") from error
    model, info = loaded
    refuse_missing(options.model, info["missing_keys"])
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    return frozen
