"""MiSS, also known as Bone: a linear's input is summed over its shards, and a small trained block reads the sum.

Owns Delta y = D^T (sum of x over the places that are equal modulo r), an exact pair of rank r: `down` is a row of
identities, one for all sites of one width, and `up` is D. In the form "mini" D is m wide, and what it makes is repeated
over the output: where m is less than r, the pair of rank m is D^T over the input and a row of identities over the
output. The form "bat" multiplies the base's weight, is of full rank, and is refused. Kang and Yin 2024,
arXiv:2409.15371.
"""

from collections.abc import Callable, Mapping
from functools import cache
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
        identities = cache(_identities)
        return lower_by_module(self.name, checkpoint, modules, lambda module: _edit(module, rank, width, identities))


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


def _edit(module: ModuleTensors, rank: int, width: int | None, identities: Callable[[int, int], torch.Tensor]) -> Edit:
    """`width` is that of the block in the form "mini"."""
    module.check_saved_rank(_BLOCK, 0, rank)
    d_in, d_out = module.site.d_in, module.site.d_out
    if width is not None and d_out % width:
        raise AdapterRejected(
            f"mini_r = {width} in adapter_config.json does not divide {d_out}, the width of {module.path}."
        )
    block = module.take(_BLOCK, (rank, width or d_out))
    module.check_rank(min(block.shape))
    if width is not None and width < rank:
        return Edit(down=block.T[:, torch.arange(d_in) % rank], up=identities(width, d_out))
    return Edit(down=identities(rank, d_in), up=block.repeat(1, d_out // block.shape[1]))


def _identities(rank: int, width: int) -> torch.Tensor:
    """(rank, width): identities side by side, the last one cut off where the width ends."""
    return (torch.arange(rank)[:, None] == torch.arange(width) % rank).float()


METHOD = Miss()
