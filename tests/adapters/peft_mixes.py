"""What a mix has to answer, by PEFT: each adapter merged with its weight into a copy of the base, and summed up."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from tests.adapters.peft_adapters import _peft_warnings_off as peft_warnings_off

__all__ = ["merged", "merged_logits", "peft_warnings_off"]
_DEFAULT = "default"


def merged_logits(base: PreTrainedModel, parts: Mapping[Path, float], input_ids: torch.Tensor) -> torch.Tensor:
    """Logits (batch, length, vocabulary) of the base with the sum of these saved adapters' changes in its weights."""
    with torch.no_grad():
        logits: torch.Tensor = merged(base, parts)(input_ids=input_ids).logits
    return logits


def merged(base: PreTrainedModel, parts: Mapping[Path, float]) -> PreTrainedModel:
    total = copy.deepcopy(base)
    own = dict(base.named_parameters())
    with torch.no_grad():
        for folder, weight in parts.items():
            alone = dict(_merged_alone(base, folder, weight).named_parameters())
            for name, parameter in total.named_parameters():
                parameter += alone[name] - own[name]
    return total.eval()


def _merged_alone(base: PreTrainedModel, folder: Path, weight: float) -> nn.Module:
    with peft_warnings_off():
        adapted = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        for module in adapted.modules():
            if isinstance(module, BaseTunerLayer):
                _weigh(module, weight)
        alone: nn.Module = adapted.merge_and_unload()
    return alone


def _weigh(layer: BaseTunerLayer, weight: float) -> None:
    if hasattr(layer, "ia3_l"):
        layer.ia3_l[_DEFAULT].data = 1 + weight * (layer.ia3_l[_DEFAULT].data - 1)
    elif hasattr(layer, "vera_lambda_b"):
        layer.vera_lambda_b[_DEFAULT].data *= weight
    else:
        layer.scaling[_DEFAULT] *= weight
