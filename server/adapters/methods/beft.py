"""BEFT: one trained vector per module, added to its output.

Owns y = base(x) + beta, for linears with and without a bias of their own: BitFit (Ben Zaken et al. 2021,
arXiv:2106.10199) as PEFT saves it beside a base that stays as it is.
"""

from collections.abc import Mapping
from typing import Any

from server.adapters.by_module import ModuleTensors, lower_by_module, modules_of
from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.method import Edit, Lowered
from server.model.site import Site

_BIAS = "beft_bias"


class Beft:
    name = "beft"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "BEFT"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        fields.check_known(checkpoint.config, {"init_weights"})
        return lower_by_module(self.name, checkpoint, modules_of(checkpoint, sites, (_BIAS,)), _edit)


def _edit(module: ModuleTensors) -> Edit:
    return Edit(out_shift=module.take(_BIAS, (1, module.site.d_out)).flatten())


METHOD = Beft()
