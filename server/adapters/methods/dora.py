"""DoRA, QDoRA and DoRA with rsLoRA: LoRA whose output rows are brought to trained lengths.

Owns y = c (W x + s B (A x)) + bias with c = m / ||W + s B A|| row by row, without the dense weight. A request's weight
multiplies s, and c is computed anew: the rows keep their trained lengths. The reading of the file is `lora_file.py`'s.
Liu et al. 2024, arXiv:2402.09353.
"""

from collections.abc import Mapping
from typing import Any

import torch

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.lora_file import LoraFile, Pair, Part
from server.adapters.method import Edit, Lowered, add_ops
from server.ground.errors import AdapterRejected
from server.model.site import Site


class Dora:
    name = "dora"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "LORA" and bool(config.get("use_dora"))

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        return self.lower_weighed(checkpoint, sites, 1.0)

    def lower_weighed(self, checkpoint: Checkpoint, sites: Mapping[str, Site], weight: float) -> Lowered:
        file = LoraFile(checkpoint, sites)
        if file.positions is not None:
            raise AdapterRejected(
                "alora_invocation_tokens and use_dora in adapter_config.json: PEFT has no such method."
            )
        edits: dict[str, Edit] = {}
        for part in file.parts:
            pair, change = file.pair(part), file.bias_change(part)
            if pair is not None:
                edits[part.site.path] = _edit(file, part, pair, change, weight)
            elif change is not None:
                edits[part.site.path] = Edit(out_shift=weight * change)
            add_ops(edits, file.ops(part))
        rank = max((edit.rank for edit in edits.values()), default=0)
        return Lowered(self.name, rank, checkpoint.num_parameters, edits, file.warnings)


def _edit(file: LoraFile, part: Part, pair: Pair, change: torch.Tensor | None, weight: float) -> Edit:
    magnitude = file.vector(part, "magnitude")
    if magnitude is None:
        raise AdapterRejected(f"use_dora is true, but the file has no lora_magnitude_vector for {part.module}.")
    scale = (magnitude.double() / _row_norms(part.site, pair, weight)).float()  # (d_out,)
    # `out_scale` multiplies the base's bias too, and DoRA leaves the bias alone.
    shift = None if part.site.bias is None else (1 - scale) * part.site.bias
    if shift is not None and change is not None:
        shift = shift + weight * change
    # Beside the rows, which stay those of the weight 1, and so can be shared with it.
    weights = None if weight == 1 else torch.full((len(pair.down),), weight)
    return Edit(down=pair.down, up=pair.up, mid_scale=weights, out_scale=scale, out_shift=shift)


def _row_norms(site: Site, pair: Pair, weight: float) -> torch.Tensor:
    """||W + w s B A|| of each output row, float64 (d_out,).

    Squared: ||W||^2 + 2 <s B, W A^T> + s B (A A^T) s B^T, s times the weight w. W enters by its row norms and its
    product with r rows only.
    """
    down, up = pair.down.double(), weight * pair.up.double()
    cross = (up * site.project(pair.down).double()).sum(0)  # (d_out,)
    own = (up * (down @ down.T @ up)).sum(0)  # (d_out,)
    squared = site.row_norms_squared.double() + 2 * cross + own
    if not bool((squared > 0).all()):
        raise AdapterRejected(f"{site.path}: W + s B A has a row of length zero, which no magnitude can scale.")
    return squared.sqrt()


METHOD = Dora()
