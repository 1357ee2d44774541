"""Norm tuning: weights, and biases where there are any, of norms that are the adapter's own.

Owns the reading of PEFT's LN_TUNING files, which hold the whole new norm. Zhao et al. 2023, arXiv:2312.11420.
"""

from collections.abc import Mapping
from typing import Any

import torch

from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.module_paths import SiteFinder
from server.adapters.method import Edit, Lowered
from server.ground.errors import AdapterRejected
from server.model.site import Site, SiteKind

_ENDING = ".ln_tuning_layers.weight"


class LnTuning:
    name = "ln_tuning"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "LN_TUNING"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        fields.check_known(checkpoint.config, set())
        finder = SiteFinder(sites)
        edits: dict[str, Edit] = {}
        for key in checkpoint:
            if key.endswith(_ENDING):
                site = finder.find(key.removesuffix(_ENDING), checkpoint.name(key))
                if site.path in edits:
                    raise AdapterRejected(f"{checkpoint.name(key)}: {site.path} is edited twice. Save one per file.")
                edits[site.path] = _edit(checkpoint, key, site)
        return Lowered(self.name, 0, checkpoint.num_parameters, edits)


def _edit(checkpoint: Checkpoint, key: str, site: Site) -> Edit:
    if site.kind is not SiteKind.NORM:
        raise AdapterRejected(f"{checkpoint.name(key)}: {site.path} is no norm, and LN_TUNING trains norms only.")
    bias_key = key.removesuffix("weight") + "bias"
    bias = torch.zeros(site.d_out) if site.bias is None else site.bias
    if bias_key in checkpoint:
        bias = checkpoint.take(bias_key, (site.d_out,))
    return Edit(ops={"norm_weight": {"weight": checkpoint.take(key, (site.d_out,)), "bias": bias}})


METHOD = LnTuning()
