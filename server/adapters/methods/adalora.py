"""AdaLoRA: LoRA in the form of a singular value decomposition, pruned to another rank at each module.

Owns y = base(x) + s B (E * (A x)) with s = lora_alpha / (init_r + 1e-5), whatever rank is left of init_r: the form of
PEFT's forward pass. Zhang et al. 2023, arXiv:2303.10512.
"""

from collections.abc import Mapping
from typing import Any

from server.adapters.by_module import ModuleTensors, lower_by_module, modules_of
from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.method import Edit, Lowered
from server.ground.errors import AdapterRejected
from server.model.site import Site

_A, _B, _E = "lora_A", "lora_B", "lora_E"
# The last lines are LoRA's fields that PEFT's AdaLoRA has and passes over, and that leave no tensors.
_KNOWN = {
    "r", "lora_alpha", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
    "total_step", "rank_pattern", "lora_dropout", "bias", "init_lora_weights", "runtime_config",
    "alpha_pattern", "use_rslora", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "monteclora_config", "megatron_config", "megatron_core", "qalora_group_size",
}  # fmt: skip
_NOT_ADALORAS = (
    "use_dora", "lora_bias", "use_bdlora", "use_qalora", "kasa_config", "arrow_config", "alora_invocation_tokens",
    "ensure_weight_tying",
)  # fmt: skip
_REFUSED = fields.REFUSED | dict.fromkeys(_NOT_ADALORAS, "AdaLoRA has no such option; set it to false or remove it")


class AdaLora:
    name = "adalora"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "ADALORA"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        config = checkpoint.config
        fields.check_known(config, _KNOWN, _REFUSED)
        fields.check_no_bias(config, "AdaLoRA")
        init_r = fields.count(config.get("init_r", 12), "init_r")
        alpha = fields.number(config.get("lora_alpha", 8), "lora_alpha")
        scaling = (alpha if alpha > 0 else init_r) / (init_r + 1e-5)
        modules = modules_of(checkpoint, sites, (_A, _B, _E))
        return lower_by_module(self.name, checkpoint, modules, lambda module: _edit(module, init_r, scaling))


def _edit(module: ModuleTensors, init_r: int, scaling: float) -> Edit | None:
    keys = module.keys.values()
    if all(module.checkpoint.is_empty(key) for key in keys):  # pruned to nothing
        for key in keys:
            module.checkpoint.ignore(key)
        return None
    rank = next(iter(module.shape(_E)), 0)
    module.check_rank(rank, "Use a smaller init_r.")
    if rank > init_r:
        raise AdapterRejected(
            f"{module.name(_E)} has rank {rank}, and pruning leaves at most init_r = {init_r}. "
            "Save the config that belongs to the weights."
        )
    singular = module.take(_E, (rank, 1))
    down = module.take(_A, (rank, module.site.d_in)) * singular
    up = module.take(_B, (module.site.d_out, rank))
    return Edit(down=down, up=(scaling * up).T.contiguous())


METHOD = AdaLora()
