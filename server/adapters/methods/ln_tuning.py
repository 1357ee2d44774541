"""Norm tuning: weights, and biases where there are any, of norms that are the adapter's own.

Owns the reading of PEFT's LN_TUNING files, which hold the whole new norm. Zhao et al. 2023, arXiv:2312.11420.
"""

from collections.abc import Mapping
from typing import Any

import torch

from server.adapters.by_module import ModuleTensors, lower_by_module, modules_of
from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.method import Edit, Lowered
from server.model.site import Site, SiteKind

_WEIGHT, _BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"


class LnTuning:
    name = "ln_tuning"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "LN_TUNING"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        fields.check_known(checkpoint.config, set())
        modules = modules_of(checkpoint, sites, (_WEIGHT,), (_BIAS,), (SiteKind.NORM,))
        return lower_by_module(self.name, checkpoint, modules, _edit)


def _edit(module: ModuleTensors) -> Edit:
    site = module.site
    bias = torch.zeros(site.d_out) if site.bias is None else site.bias
    if _BIAS in module:
        bias = module.take(_BIAS, (site.d_out,))
    return Edit(ops={"norm_weight": {"weight": module.take(_WEIGHT, (site.d_out,)), "bias": bias}})


METHOD = LnTuning()
