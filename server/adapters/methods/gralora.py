"""GraLoRA: k x k blocks of a weight, each with a low-rank pair of its own, and LoRA's pair beside them if it is hybrid.

Owns the blocks as one exact pair of rank k r + hybrid_r, with s = alpha / (r + hybrid_r). Block (o, i) of the change
reads input block i through columns o r / k to (o + 1) r / k of A_i, and writes output block o through rows i r / k to
(i + 1) r / k of B_o. Jung et al. 2025, arXiv:2505.20355.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from server.adapters.by_module import ModuleTensors, lower_by_module, modules_of
from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.method import Edit, Lowered
from server.ground.errors import AdapterRejected
from server.model.site import Site

_A, _B = "gralora_A", "gralora_B"
_GENERAL_A, _GENERAL_B = "gralora_A_general.weight", "gralora_B_general.weight"
_KNOWN = {"r", "hybrid_r", "alpha", "gralora_k", "gralora_dropout", "bias", "init_weights"}


@dataclass(frozen=True, slots=True)
class _Ranks:
    blocks: int  # k: blocks in each direction
    rank: int  # r, of each row of blocks
    hybrid: int  # of the pair beside them; 0 for none

    @property
    def total(self) -> int:
        return self.blocks * self.rank + self.hybrid


class GraLora:
    name = "gralora"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "GRALORA"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        config = checkpoint.config
        fields.check_known(config, _KNOWN)
        fields.check_no_bias(config, "GraLoRA")
        ranks = _ranks(config)
        scaling = fields.number(config.get("alpha", 64), "alpha") / (ranks.rank + ranks.hybrid)
        modules = modules_of(checkpoint, sites, (_A, _B), (_GENERAL_A, _GENERAL_B))
        return lower_by_module(self.name, checkpoint, modules, lambda module: _edit(module, ranks, scaling))


def _ranks(config: Mapping[str, Any]) -> _Ranks:
    blocks, rank = fields.count(config.get("gralora_k", 2), "gralora_k"), fields.count(config.get("r", 32), "r")
    hybrid = fields.count(config["hybrid_r"], "hybrid_r") if config.get("hybrid_r") else 0
    if rank % blocks:
        raise AdapterRejected(f"gralora_k = {blocks} in adapter_config.json does not divide r = {rank}.")
    return _Ranks(blocks, rank, hybrid)


def _edit(module: ModuleTensors, ranks: _Ranks, scaling: float) -> Edit:
    module.check_saved_rank(_A, 2, ranks.rank)
    module.check_rank(ranks.total, "GraLoRA's is gralora_k times r, and hybrid_r. Use smaller ones.")
    k, d_in, d_out = ranks.blocks, module.site.d_in, module.site.d_out
    if d_in % k or d_out % k:
        raise AdapterRejected(f"gralora_k = {k} in adapter_config.json does not divide the widths of {module.path}.")
    a = module.take(_A, (k, d_in // k, ranks.rank))
    b = module.take(_B, (k, ranks.rank, d_out // k))
    part = ranks.rank // k  # rank of one block
    down, up = torch.zeros(k, k, part, k, d_in // k), torch.zeros(k, k, part, k, d_out // k)  # by (o, i): rows, blocks
    for o in range(k):
        for i in range(k):
            down[o, i, :, i] = a[i, :, o * part : (o + 1) * part].T
            up[o, i, :, o] = b[o, i * part : (i + 1) * part]
    down, up = down.reshape(-1, d_in), up.reshape(-1, d_out)
    if ranks.hybrid:
        down, up = _with_general(module, ranks.hybrid, down, up)
    return Edit(down=down, up=scaling * up)


def _with_general(
    module: ModuleTensors, rank: int, down: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    for parameter in (_GENERAL_A, _GENERAL_B):
        if parameter not in module:
            raise AdapterRejected(
                f"hybrid_r is set in adapter_config.json, but the file has no {module.path}.{parameter}."
            )
    general_down = module.take(_GENERAL_A, (rank, module.site.d_in))
    general_up = module.take(_GENERAL_B, (module.site.d_out, rank)).T
    return torch.cat([down, general_down]), torch.cat([up, general_up])


METHOD = GraLora()
