"""MiSS, also known as Bone: a linear's input is summed over its shards, and a small trained block reads the sum.

Owns Delta y = D^T (sum of x over the places that are equal modulo r), an exact pair of rank r whose `down` is a row of
identities, equal for all adapters and sites of one width. In the form "mini" the block is repeated over the output. The
form "bat" multiplies the base's weight, is of full rank, and is refused. Kang and Yin 2024, arXiv:2409.15371.
"""

from collections.abc import Mapping
from typing import Any

import torch

from server.adapters.by_module import ModuleTensors, lower_by_module, modules_of
from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.method import Edit, Lowered
from server.ground.errors import AdapterRejected
from server.model.site import Site

_BLOCK = "miss_block"


class Miss:
    name = "miss"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "MISS"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        config = checkpoint.config
        fields.check_known(config, {"r", "mini_r", "miss_dropout", "init_weights", "bias"})
        fields.check_no_bias(config, "MiSS")
        rank = fields.count(config.get("r", 64), "r")
        width = fields.count(config.get("mini_r", 1), "mini_r") if _is_mini(config) else None
        modules = modules_of(checkpoint, sites, (_BLOCK,))
        return lower_by_module(self.name, checkpoint, modules, lambda module: _edit(module, rank, width))


def _is_mini(config: Mapping[str, Any]) -> bool:
    form = config.get("init_weights")
    if form not in (None, True, False, "mini"):
        reason = (
            "multiplies the base's weight, so its change is of full rank"
            if form == "bat"
            else "is none of PEFT's forms"
        )
        raise AdapterRejected(
            f"init_weights = {form!r:.40} in adapter_config.json {reason}; true and 'mini' are served. "
            "Merge the adapter into the base (PEFT's merge_and_unload) and serve that."
        )
    return form == "mini"


def _edit(module: ModuleTensors, rank: int, width: int | None) -> Edit:
    """`width` is that of the block in the form "mini", which is repeated over the output."""
    module.check_saved_rank(_BLOCK, 0, rank)
    module.check_rank(rank)
    d_in, d_out = module.site.d_in, module.site.d_out
    if width is not None and d_out % width:
        raise AdapterRejected(
            f"mini_r = {width} in adapter_config.json does not divide {d_out}, the width of {module.path}."
        )
    block = module.take(_BLOCK, (rank, width or d_out))
    places = torch.arange(d_in) % rank
    down = (torch.arange(rank)[:, None] == places).float()
    return Edit(down=down, up=block.repeat(1, d_out // block.shape[1]))


METHOD = Miss()
