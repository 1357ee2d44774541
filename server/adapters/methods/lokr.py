"""LoKr: a Kronecker product of two matrices, either of which may be of low rank, added to the weight.

Owns Delta W = s (w1 kron w2) with s = alpha / r, w1 (a, c) whole or as w1_a w1_b, w2 (b, d) whole or as w2_a w2_b.
Yeh et al. 2023, arXiv:2309.14859.
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

_LEFT, _RIGHT = "lokr_w1", "lokr_w2"
_PARAMETERS = (_LEFT, f"{_LEFT}_a", f"{_LEFT}_b", _RIGHT, f"{_RIGHT}_a", f"{_RIGHT}_b")
_KNOWN = {
    "r", "alpha", "rank_pattern", "alpha_pattern", "decompose_both", "decompose_factor", "rank_dropout",
    "rank_dropout_scale", "module_dropout", "init_weights", "use_effective_conv2d",
}  # fmt: skip
# Numbers of a matrix up to which one product with it is quicker than two with its factors, and the memory is no matter.
_MAX_MULTIPLIED = 1 << 14


class Lokr:
    name = "lokr"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "LOKR"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        config = checkpoint.config
        fields.check_known(config, _KNOWN)
        rank = fields.by_pattern(config, "r", "rank_pattern", fields.count, default=8)
        alpha = fields.by_pattern(config, "alpha", "alpha_pattern", fields.number, default=8)
        modules = modules_of(checkpoint, sites, (), _PARAMETERS)
        return lower_by_module(
            self.name, checkpoint, modules, lambda module: _edit(module, int(rank(module.path)), alpha(module.path))
        )


def _edit(module: ModuleTensors, rank: int, alpha: float) -> Edit:
    left, right = _factors(module, _LEFT, rank), _factors(module, _RIGHT, rank)
    (a, b), (c, d) = ((one[0].shape[0], one[-1].shape[1]) for one in (left, right))
    if (a * c, b * d) != (module.site.d_out, module.site.d_in):
        raise AdapterRejected(
            f"{module.path}: lokr_w1 of {[a, b]} and lokr_w2 of {[c, d]} make {[a * c, b * d]}, and this base needs "
            f"{[module.site.d_out, module.site.d_in]}. Was the adapter trained on another model?"
        )
    left = (alpha / rank * left[0], *left[1:])
    return Edit(ops={"kronecker": _named("left", left) | _named("right", right)})


def _named(name: str, factors: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """As the op knows them, multiplied out where the product is small."""
    if len(factors) == 1:
        return {name: factors[0]}
    up, down = factors
    if len(up) * down.shape[1] <= _MAX_MULTIPLIED:
        return {name: up @ down}
    return {f"{name}_up": up, f"{name}_down": down}


def _factors(module: ModuleTensors, name: str, rank: int) -> tuple[torch.Tensor, ...]:
    """The matrix itself, or the two that it is the product of."""
    whole, up, down = name in module, f"{name}_a", f"{name}_b"
    if whole == (up in module and down in module) or (whole and (up in module or down in module)):
        key = module.name(next(iter(module.keys)))
        raise AdapterRejected(f"{key}: {module.path} must have either {name}, or {up} and {down}.")
    if whole:
        return (_matrix(module, name),)
    module.check_rank(rank)
    module.check_saved_rank(up, 1, rank, "r or rank_pattern")
    module.check_saved_rank(down, 0, rank, "r or rank_pattern")
    return _matrix(module, up), _matrix(module, down)


def _matrix(module: ModuleTensors, parameter: str) -> torch.Tensor:
    shape = module.shape(parameter)
    if len(shape) != 2:
        raise AdapterRejected(f"{module.name(parameter)} has the shape {list(shape)}, and a linear needs a matrix.")
    return module.take(parameter, shape)


METHOD = Lokr()
