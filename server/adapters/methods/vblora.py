"""VB-LoRA: LoRA whose A and B are put together from one bank of short vectors.

Owns the mixture: each piece of a row is a weighted sum of the `topk` vectors with the largest logits, weighted by their
softmax. Once put together it is LoRA of scaling 1. Li et al. 2024, arXiv:2405.15179.
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

_A, _B = "vblora_logits_A", "vblora_logits_B"
_BANK = "vblora_vector_bank"
_KNOWN = {
    "r", "num_vectors", "vector_length", "topk", "vblora_dropout", "bias", "init_vector_bank_bound", "init_logits_std",
}  # fmt: skip
_REFUSED = fields.REFUSED | {"save_only_topk_weights": "save the logits instead: set it to false and save again"}


class VbLora:
    name = "vblora"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "VBLORA"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        config = checkpoint.config
        fields.check_known(config, _KNOWN, _REFUSED)
        fields.check_no_bias(config, "VB-LoRA")
        rank, topk = fields.count(config.get("r", 4), "r"), fields.count(config.get("topk", 2), "topk")
        modules = modules_of(checkpoint, sites, (_A, _B))
        bank = _bank(checkpoint, topk) if modules else torch.empty(0, 0)
        return lower_by_module(self.name, checkpoint, modules, lambda module: _edit(module, rank, topk, bank))


def _bank(checkpoint: Checkpoint, topk: int) -> torch.Tensor:
    """(vectors, length)"""
    config = checkpoint.config
    shape = tuple(fields.count(config.get(name, 256), name) for name in ("num_vectors", "vector_length"))
    if _BANK not in checkpoint:
        raise AdapterRejected(f"The file has no {_BANK}, which all modules of a VB-LoRA read. Save the whole adapter.")
    if topk > shape[0]:
        raise AdapterRejected(f"topk = {topk} in adapter_config.json is more than num_vectors = {shape[0]}.")
    return checkpoint.take(_BANK, shape)


def _edit(module: ModuleTensors, rank: int, topk: int, bank: torch.Tensor) -> Edit:
    module.check_saved_rank(_A, 0, rank)
    module.check_rank(rank)
    (num_vectors, length), d_in, d_out = bank.shape, module.site.d_in, module.site.d_out
    if d_in % length or d_out % length:
        raise AdapterRejected(
            f"vector_length = {length} in adapter_config.json does not divide the widths of {module.path}."
        )
    logits_a = module.take(_A, (rank, d_in // length, num_vectors))
    logits_b = module.take(_B, (d_out // length, rank, num_vectors)).transpose(0, 1)
    down, up = (_mixed(logits, bank, topk).reshape(rank, -1) for logits in (logits_a, logits_b))
    return Edit(down=down, up=up)


def _mixed(logits: torch.Tensor, bank: torch.Tensor, topk: int) -> torch.Tensor:
    """(r, pieces, length): of each piece the sum of its `topk` vectors."""
    largest, chosen = logits.topk(topk, dim=-1)
    # As one product, which is no larger than its operands: gathered, each piece would hold `topk` vectors.
    return torch.zeros_like(logits).scatter_(-1, chosen, largest.softmax(dim=-1)) @ bank


METHOD = VbLora()
