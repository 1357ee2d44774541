"""OFT: blocks of the input turned by trained rotations, before the frozen layer.

Owns R from its parameters, y = W (x R) + b, and at an embedding y = e(x) R. A block's parameters are the upper triangle
of a skew matrix Q. R = (I - Q) (I + Q)^-1 (Cayley), or PEFT's truncated series for it, which is not exactly orthogonal.
Qiu et al. 2023, arXiv:2306.07280; the series: Qiu et al. 2025, arXiv:2506.19847.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from server.adapters.by_module import ModuleTensors, lower_by_module, modules_of
from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.method import Edit, Lowered
from server.adapters.rotations import cayley
from server.ground.errors import AdapterRejected
from server.model.site import Site, SiteKind

_LINEAR, _EMBEDDING = "oft_R.weight", "oft_embedding_R.weight"
_BIASES = ("base_layer.bias", "bias")
_KNOWN = {
    "r", "oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms", "block_share", "coft", "eps", "bias",
    "module_dropout", "init_weights",
}  # fmt: skip
_MAX_TERMS = 64  # beyond which no term of a series that converges matters
_NEW_SERIES = (0, 18)  # PEFT's version from which the series is the present one

Turn = Callable[[torch.Tensor], torch.Tensor]  # skew matrices (n, b, b) -> blocks (n, b, b)


class Oft:
    name = "oft"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "OFT"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        config = checkpoint.config
        fields.check_known(config, _KNOWN)
        if "oft_block_size" not in config:
            raise AdapterRejected(
                "adapter_config.json has no oft_block_size: it was written before PEFT 0.14, whose OFT was another "
                "method. Train it again with a newer PEFT."
            )
        if config.get("bias") not in (None, "none", "all", "oft_only"):
            raise AdapterRejected(
                f"bias = {config['bias']!r:.40} in adapter_config.json must be none, all or oft_only."
            )
        turn, is_shared = _turn(config), fields.flag(config, "block_share")
        bound = _bound(config)
        modules = modules_of(checkpoint, sites, (), (_LINEAR, _EMBEDDING, *_BIASES), tuple(SiteKind))
        turned = [module for module in modules if _LINEAR in module or _EMBEDDING in module]
        made = lower_by_module(self.name, checkpoint, turned, lambda module: _edit(module, turn, bound, is_shared))
        changes = {module.site.path: _bias_change(module) for module in modules if module not in turned}
        biases = {path: Edit(out_shift=change) for path, change in changes.items() if change is not None}
        return replace(made, edits={**made.edits, **biases}, warnings=made.warnings + _warnings(config))


def _turn(config: Mapping[str, Any]) -> Turn:
    terms = fields.count(config.get("num_cayley_neumann_terms", 5), "num_cayley_neumann_terms")
    if terms > _MAX_TERMS:
        raise AdapterRejected(
            f"num_cayley_neumann_terms = {terms} in adapter_config.json; the limit is {_MAX_TERMS}. Use fewer terms, "
            "or use_cayley_neumann = false."
        )
    return partial(_series, num_terms=terms) if fields.flag(config, "use_cayley_neumann", default=True) else cayley


def _warnings(config: Mapping[str, Any]) -> tuple[str, ...]:
    """PEFT changed the last term of the series in 0.18, and gives old adapters the new one, too."""
    if not fields.flag(config, "use_cayley_neumann", default=True):
        return ()
    version = re.match(r"(\d{1,6})\.(\d{1,6})", str(config.get("peft_version")))
    if version is not None and (int(version[1]), int(version[2])) >= _NEW_SERIES:
        return ()
    return (
        "adapter_config.json does not say that it was written by PEFT 0.18 or later, which ends the Cayley-Neumann "
        "series in another term than those before. It is applied as PEFT applies it now; check the answers, or train "
        "again.",
    )


def _bound(config: Mapping[str, Any]) -> float | None:
    """How far COFT lets a module's blocks turn; None without it."""
    bound = fields.number(config.get("eps", 6e-5), "eps")
    return bound if fields.flag(config, "coft") else None


def _edit(module: ModuleTensors, turn: Turn, bound: float | None, is_shared: bool) -> Edit:
    parameter = {SiteKind.LINEAR: _LINEAR, SiteKind.EMBEDDING: _EMBEDDING}.get(module.site.kind)
    foreign = next((one for one in (_LINEAR, _EMBEDDING) if one in module and one != parameter), None)
    if parameter is None or foreign is not None:
        raise AdapterRejected(f"{module.name(foreign or _LINEAR)} is not for {module.site.path} ({module.site.kind}).")
    skew = _skew(module, parameter, is_shared)
    blocks = turn(skew if bound is None else _bounded(skew, bound))
    return Edit(out_shift=_bias_change(module), ops={"block_rotation": {"blocks": blocks}})


def _bias_change(module: ModuleTensors) -> torch.Tensor | None:
    """The file's bias, which is the whole new one, less the base's (d_out,); None if the file has none."""
    parameter = next((one for one in _BIASES if one in module), None)
    if parameter is None:
        return None
    if module.site.bias is None:
        raise AdapterRejected(
            f"{module.name(parameter)}: {module.site.path} has no bias in this base. Train with bias = 'none'."
        )
    return module.take(parameter, (module.site.d_out,)) - module.site.bias


def _skew(module: ModuleTensors, parameter: str, is_shared: bool) -> torch.Tensor:
    """Q of each block, (n, b, b). The shape tells b: where the config's does not fit, PEFT has taken another."""
    width = module.site.d_out if parameter == _EMBEDDING else module.site.d_in
    shape = module.shape(parameter)
    size = (1 + math.isqrt(1 + 8 * shape[-1])) // 2 if len(shape) == 2 else 0
    is_triangle = len(shape) == 2 and shape[-1] == size * (size - 1) // 2
    if not is_triangle or width % size or shape[0] != (1 if is_shared else width // size):
        how = "one triangle (block_share)" if is_shared else "triangles"
        raise AdapterRejected(
            f"{module.name(parameter)} has the shape {list(shape)}: that is not {how} of b (b - 1) / 2 numbers for "
            f"blocks of b that make up the {width} of {module.site.path}. Save the config that belongs to the weights."
        )
    rows, columns = torch.triu_indices(size, size, 1)
    upper = torch.zeros(shape[0], size, size)
    upper[:, rows, columns] = module.take(parameter, shape)
    return upper - upper.transpose(1, 2)


def _bounded(skew: torch.Tensor, bound: float) -> torch.Tensor:
    """COFT: each Q scaled down to the length bound / sqrt(n), where it is longer."""
    limit = bound / math.sqrt(len(skew))
    length = skew.norm(dim=(1, 2), keepdim=True)
    return torch.where(length <= limit, skew, limit * (skew / length))


def _series(skew: torch.Tensor, num_terms: int) -> torch.Tensor:
    """I + 2 Q + 2 Q^2 + ... + Q^k, whose last power has the factor 1: k = num_terms - 1, but 3 for three terms."""
    blocks = torch.eye(skew.shape[-1]).repeat(len(skew), 1, 1)
    if num_terms > 1:
        blocks += 2 * skew
    if num_terms > 2:
        power = skew @ skew
        blocks += 2 * power
        for _ in range(3, num_terms - 1):
            power = power @ skew
            blocks += 2 * power
        blocks += power @ skew
    return blocks


METHOD = Oft()
