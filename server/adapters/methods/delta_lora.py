"""Delta-LoRA: the base's weight moves along with the product of A and B, and is served unmoved all the same.

Owns our format for it (docs/delta-lora.md) and the telescoping. From step K on training moves
W_{t+1} = W_t + lambda (B_{t+1} A_{t+1} - B_t A_t). The differences cancel but for the last and the first product, so
W_T + s B_T A_T = W_0 + (s + lambda) B_T A_T - lambda B_K A_K: two pairs on the weight that was never touched, exactly.
Zi et al. 2023, arXiv:2309.02411.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from server.adapters.by_module import ModuleTensors, lower_by_module, modules_of
from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.method import Edit, Lowered
from server.ground.errors import AdapterRejected
from server.model.site import Site

_A, _B = "lora_A.weight", "lora_B.weight"
_START_A, _START_B = "lora_start_A.weight", "lora_start_B.weight"
_KNOWN = {"r", "lora_alpha", "use_rslora", "delta_lambda", "start_step", "bias", "lora_dropout"}


class DeltaLora:
    name = "delta_lora"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "DELTALORA"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        config = checkpoint.config
        fields.check_known(config, _KNOWN)
        fields.check_no_bias(config, "Delta-LoRA")
        rank = fields.count(config.get("r"), "r")
        alpha = fields.number(config.get("lora_alpha"), "lora_alpha")
        scaling = alpha / (math.sqrt(rank) if fields.flag(config, "use_rslora") else rank)
        step_size = fields.number(config.get("delta_lambda"), "delta_lambda")
        starts_later = _start_step(config) > 0
        modules = modules_of(checkpoint, sites, (_A, _B), (_START_A, _START_B))
        return lower_by_module(
            self.name, checkpoint, modules, lambda module: _edit(module, rank, scaling, step_size, starts_later)
        )


def _start_step(config: Mapping[str, Any]) -> int:
    step = config.get("start_step", 0)
    if type(step) is not int or step < 0:
        raise AdapterRejected(
            f"start_step in adapter_config.json must be a whole number of at least 0, not {step!r:.40}."
        )
    return step


def _edit(module: ModuleTensors, rank: int, scaling: float, step_size: float, starts_later: bool) -> Edit:
    has_start = _START_A in module and _START_B in module
    if not has_start and (starts_later or _START_A in module or _START_B in module):
        raise AdapterRejected(
            f"{module.path} has no lora_start_A and lora_start_B, the pair of step start_step. Without it the weight "
            "that training moved is not known: save it with the adapter. Only where start_step is 0 and B began at "
            "zero may it be left out."
        )
    module.check_rank(2 * rank if has_start else rank, "Use a smaller r: with the pair of its start it counts twice.")
    module.check_saved_rank(_A, 0, rank)
    down, up = _pair(module, _A, _B, rank)
    up = (scaling + step_size) * up
    if has_start:
        start_down, start_up = _pair(module, _START_A, _START_B, rank)
        down, up = torch.cat([down, start_down]), torch.cat([up, -step_size * start_up])
    return Edit(down=down, up=up)


def _pair(module: ModuleTensors, a: str, b: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, d_in), and B by rows (r, d_out)."""
    return module.take(a, (rank, module.site.d_in)), module.take(b, (module.site.d_out, rank)).T.contiguous()


METHOD = DeltaLora()
