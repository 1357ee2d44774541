"""LoHa: the elementwise product of two low-rank matrices, which is itself a matrix of rank r^2.

Owns Delta W = s (W1a W1b) * (W2a W2b) with s = alpha / r as an exact pair of rank r^2: row (i, j) of `down` is
W1b[i] * W2b[j], column (i, j) of `up` is s W1a[:, i] * W2a[:, j]. Hyeon-Woo et al. 2021, arXiv:2108.06098; as an
adapter: Yeh et al. 2023, arXiv:2309.14859.
"""

from collections.abc import Mapping
from typing import Any

from server.adapters.by_module import ModuleTensors, lower_by_module, modules_of
from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.method import Edit, Lowered
from server.model.site import Site

_W1A, _W1B, _W2A, _W2B = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"
_KNOWN = {
    "r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout", "init_weights",
    "use_effective_conv2d",
}  # fmt: skip


class LoHa:
    name = "loha"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "LOHA"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        config = checkpoint.config
        fields.check_known(config, _KNOWN)
        rank = fields.by_pattern(config, "r", "rank_pattern", fields.count, default=8)
        alpha = fields.by_pattern(config, "alpha", "alpha_pattern", fields.number, default=8)
        modules = modules_of(checkpoint, sites, (_W1A, _W1B, _W2A, _W2B))
        return lower_by_module(
            self.name, checkpoint, modules, lambda module: _edit(module, int(rank(module.path)), alpha(module.path))
        )


def _edit(module: ModuleTensors, rank: int, alpha: float) -> Edit:
    module.check_saved_rank(_W1B, 0, rank, "r or rank_pattern")
    module.check_rank(
        rank * rank,
        f"A LoHa of r = {rank} is a LoRA of r^2. Train with a smaller r, or merge it into the base (PEFT's "
        "merge_and_unload) and serve that.",
    )
    d_in, d_out = module.site.d_in, module.site.d_out
    w1b, w2b = module.take(_W1B, (rank, d_in)), module.take(_W2B, (rank, d_in))
    w1a, w2a = module.take(_W1A, (d_out, rank)).T, module.take(_W2A, (d_out, rank)).T
    down = (w1b[:, None] * w2b).reshape(rank * rank, d_in)
    up = (w1a[:, None] * w2a).reshape(rank * rank, d_out)
    return Edit(down=down, up=alpha / rank * up)


METHOD = LoHa()
