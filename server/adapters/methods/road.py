"""RoAd: pairs of outputs, each turned by a trained angle and stretched by a trained scale.

Owns y' = c1 * y + c2 * rot(y) on the whole output y of a linear, with the bias: within each group of `group_size`
outputs the first half (y1) and the second half (y2) are paired, and rot(y1, y2) = (-y2, y1). What c1 = alpha cos theta
and c2 = alpha sin theta have in common is the variant's: one angle and scale for a pair (road_1), for an output
(road_2), or for each of the four numbers of a pair's matrix (road_4). Liao and Monz 2024, arXiv:2409.00119.
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

_THETA, _ALPHA = "road_theta", "road_alpha"
_KNOWN = {"variant", "group_size", "init_weights"}
_NUMBERS_PER_PAIR = {"road_1": 1, "road_2": 2, "road_4": 4}


class Road:
    name = "road"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "ROAD"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        config = checkpoint.config
        fields.check_known(config, _KNOWN)
        variant = config.get("variant", "road_1")
        if not isinstance(variant, str) or variant not in _NUMBERS_PER_PAIR:
            names = ", ".join(_NUMBERS_PER_PAIR)
            raise AdapterRejected(f"variant = {variant!r:.40} in adapter_config.json must be one of {names}.")
        group = fields.count(config.get("group_size", 64), "group_size")
        modules = modules_of(checkpoint, sites, (_THETA, _ALPHA))
        return lower_by_module(self.name, checkpoint, modules, lambda module: _edit(module, variant, group))


def _edit(module: ModuleTensors, variant: str, group: int) -> Edit:
    d_out = module.site.d_out
    if group % 2 or d_out % group:
        raise AdapterRejected(
            f"group_size = {group} in adapter_config.json: the {d_out} outputs of {module.path} cannot be cut into "
            "such groups of two halves each. Save the config that belongs to the weights."
        )
    num = d_out // 2 * _NUMBERS_PER_PAIR[variant]
    theta, alpha = module.take(_THETA, (num,)), module.take(_ALPHA, (num,))
    own, other = (_spread(vector, variant, group // 2) for vector in (alpha, theta))
    own, other = own[0] * other[0].cos(), own[1] * other[1].sin()
    halves = (d_out // group, 2, group // 2)
    partners = torch.arange(d_out, dtype=torch.float32).view(halves).flip(1).flatten()
    sign = torch.tensor([-1.0, 1.0])[:, None].expand(halves).flatten()
    return Edit(ops={"pair_rotation": {"own": own, "other": sign * other, "partners": partners}})


def _spread(numbers: torch.Tensor, variant: str, half: int) -> torch.Tensor:
    """(2, d_out): for each output its number in c1 and in c2."""
    if variant == "road_4":
        return numbers.view(-1, 2, 2 * half).transpose(0, 1).flatten(1)
    if variant == "road_1":
        numbers = numbers.view(-1, 1, half).expand(-1, 2, -1).flatten()
    return numbers.expand(2, -1)


METHOD = Road()
