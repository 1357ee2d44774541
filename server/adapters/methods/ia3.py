"""(IA)^3: one trained vector per site, on the input of feedforward modules and on the output of the others.

Owns the reading of PEFT's IA3 files. Liu et al. 2022, arXiv:2205.05638.
"""

from collections.abc import Mapping
from typing import Any

from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.contradictions import contradictions, feedforward_contradictions
from server.adapters.format.module_paths import SiteFinder
from server.adapters.method import Edit, Lowered
from server.ground.errors import AdapterRejected
from server.model.site import Site, SiteKind

_KNOWN = {"feedforward_modules", "init_ia3_weights"}
_PARAMETER = "ia3_l"


class Ia3:
    name = "ia3"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "IA3"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        fields.check_known(checkpoint.config, _KNOWN)
        finder = SiteFinder(sites)
        edits: dict[str, Edit] = {}
        scales_input: dict[str, bool] = {}  # by module path, as in the file
        for key in checkpoint:
            module, _, parameter = key.rpartition(".")
            if parameter != _PARAMETER:
                continue
            site = finder.find(module, checkpoint.name(key))
            if site.path in edits:
                raise AdapterRejected(
                    f"{checkpoint.name(key)}: {site.path} is edited twice. Save one adapter per file."
                )
            edits[site.path] = _edit(checkpoint, key, site)
            scales_input[module] = edits[site.path].in_scale is not None
        warnings = contradictions(checkpoint.config, list(scales_input))
        warnings += feedforward_contradictions(checkpoint.config, scales_input)
        return Lowered(self.name, 0, checkpoint.num_parameters, edits, warnings)


def _edit(checkpoint: Checkpoint, key: str, site: Site) -> Edit:
    """(1, d_in) scales the input, (d_out, 1) the output with its bias.

    The shape decides, not `feedforward_modules`: that list matches ends of names without a dot, so that "proj" there
    also means q_proj.
    """
    shape = checkpoint.shape(key)
    if site.kind is SiteKind.LINEAR and shape == (1, site.d_in):
        return Edit(in_scale=checkpoint.take(key).flatten())
    if site.kind is SiteKind.LINEAR and shape == (site.d_out, 1):
        return Edit(out_scale=checkpoint.take(key).flatten())
    raise AdapterRejected(
        f"{checkpoint.name(key)} has the shape {list(shape)}, and {site.path} ({site.kind}) needs [1, {site.d_in}] on "
        f"its input or [{site.d_out}, 1] on its output."
    )


METHOD = Ia3()
