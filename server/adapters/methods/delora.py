"""DeLoRA: LoRA whose rows are brought to length 1, with one trained strength per module.

Owns y = base(x) + B diag(lambda / (r |A_i| |B_i|)) A (w * x), w being the lengths of the base weight's columns, which
PEFT saves. Bini et al. 2025, arXiv:2503.18225.
"""

from collections.abc import Mapping
from typing import Any

from server.adapters.by_module import ModuleTensors, lower_by_module, modules_of
from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.method import Edit, Lowered
from server.model.site import Site

_A, _B, _LAMBDA, _NORMS = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"
_KNOWN = {"r", "rank_pattern", "delora_lambda", "lambda_pattern", "module_dropout", "bias", "init_weights"}
_SHORTEST = 1e-4  # as in PEFT: shorter rows count as this long


class DeLora:
    name = "delora"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "DELORA"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        config = checkpoint.config
        fields.check_known(config, _KNOWN)
        fields.check_no_bias(config, "DeLoRA")
        rank = fields.by_pattern(config, "r", "rank_pattern", fields.count, default=8)
        modules = modules_of(checkpoint, sites, (_A, _B, _LAMBDA, _NORMS))
        return lower_by_module(self.name, checkpoint, modules, lambda module: _edit(module, int(rank(module.path))))


def _edit(module: ModuleTensors, rank: int) -> Edit:
    module.check_saved_rank(_A, 0, rank, "r or rank_pattern")
    module.check_rank(rank)
    down = module.take(_A, (rank, module.site.d_in))
    up = module.take(_B, (module.site.d_out, rank)).T.contiguous()
    lengths = down.norm(dim=1).clamp(min=_SHORTEST) * up.norm(dim=1).clamp(min=_SHORTEST)
    strength = module.take(_LAMBDA, (1,)) / rank / lengths  # (r,)
    return Edit(down=down * module.take(_NORMS, (module.site.d_in,)), up=strength[:, None] * up)


METHOD = DeLora()
