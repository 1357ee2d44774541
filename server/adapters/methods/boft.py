"""BOFT with one butterfly factor: blocks of the input turned by trained rotations, and outputs stretched.

Owns y = s * (W (x R)) + b, whose blocks of R are the Cayley rotations of (P - P^T) / 2 with the file's P. More factors
than one are refused: PEFT itself computes them with an extension of its own, on a GPU alone.
Liu et al. 2024, arXiv:2311.06243.
"""

from collections.abc import Mapping
from typing import Any

from server.adapters.by_module import ModuleTensors, lower_by_module, modules_of
from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.method import Edit, Lowered
from server.adapters.rotations import cayley
from server.ground.errors import AdapterRejected
from server.model.site import Site

_ROTATION, _SCALE = "boft_R", "boft_s"
_KNOWN = {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "bias", "init_weights"}


class Boft:
    name = "boft"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "BOFT"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        fields.check_known(checkpoint.config, _KNOWN)
        fields.check_no_bias(checkpoint.config, "BOFT")
        return lower_by_module(self.name, checkpoint, modules_of(checkpoint, sites, (_ROTATION, _SCALE)), _edit)


def _edit(module: ModuleTensors) -> Edit:
    site, shape = module.site, module.shape(_ROTATION)
    if len(shape) == 4 and shape[0] > 1:
        raise AdapterRejected(
            f"{module.name(_ROTATION)} has {shape[0]} butterfly factors, and one is served. "
            "Train with boft_n_butterfly_factor = 1."
        )
    if len(shape) != 4 or shape[2] != shape[3] or shape[1] * shape[2] != site.d_in:
        raise AdapterRejected(
            f"{module.name(_ROTATION)} has the shape {list(shape)}, and blocks of it cannot be laid side by side to "
            f"the {site.d_in} inputs of {site.path}. Was the adapter trained on another model?"
        )
    parameters = module.take(_ROTATION, shape)[0]
    scale = module.take(_SCALE, (site.d_out, 1)).flatten()
    return Edit(
        out_scale=scale,
        out_shift=None if site.bias is None else (1 - scale) * site.bias,  # the bias is not stretched
        ops={"block_rotation": {"blocks": cayley((parameters - parameters.mT) / 2)}},
    )


METHOD = Boft()
