"""Prefix tuning: trained keys and values of virtual tokens, in every layer, that stand before every prompt.

Owns the layout of PEFT's file: a row for each virtual token, in it keys and values layer by layer. Keys are used as
they are saved, without a rotation. Li and Liang 2021, arXiv:2101.00190.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.virtual_tokens import KEY, embeddings
from server.adapters.method import Edit, Lowered
from server.ground.errors import AdapterRejected
from server.model.site import Site, SiteKind

# The encoder that the rows came out of, and how they were begun.
_KNOWN = {"encoder_hidden_size", "prefix_projection", "init_weights"}


class PrefixTuning:
    name = "prefix_tuning"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "PREFIX_TUNING"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        rows = embeddings(checkpoint, _KNOWN)
        layers = sorted((s for s in sites.values() if s.kind is SiteKind.ATTENTION), key=lambda site: site.index)
        width = sum(site.d_in for site in layers)
        if rows.shape[1] != width:
            raise AdapterRejected(
                f"{KEY} has rows of {rows.shape[1]} numbers, and the keys and values of this base's {len(layers)} "
                f"layers have {width}. Was the adapter trained on another model?"
            )
        _check_layers(checkpoint.config, layers)
        of_layer = torch.split(rows, [site.d_in for site in layers], dim=1)
        edits = {
            site.path: Edit(ops={"kv_rows": {"rows": own.contiguous()}})
            for site, own in zip(layers, of_layer, strict=True)
        }
        return Lowered(self.name, 0, rows.numel(), edits, num_virtual_tokens=len(rows))


def _check_layers(config: Mapping[str, Any], layers: Sequence[Site]) -> None:
    """What is said of the layout must be that of the base: the total width alone would also fit other cuts."""
    wanted = {"num_layers": len(layers), "token_dim": layers[0].d_in // 2 if layers else 0}
    for name, value in wanted.items():
        if config.get(name) not in (None, value):
            raise AdapterRejected(
                f"{name} = {config[name]!r:.40} in adapter_config.json, and this base has {value}. Was the adapter "
                "trained on another model?"
            )


METHOD = PrefixTuning()
