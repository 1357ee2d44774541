"""LoRA and what is LoRA once trained: rsLoRA, LoRA+, LoRA-FA, QLoRA, EVA, block-diagonal LoRA, trained biases; aLoRA.

Owns y = base(x) + s (B (A x) + beta) + (new bias - base's bias). The reading of the file is `lora_file.py`'s.
Hu et al. 2021, arXiv:2106.09685; s = lora_alpha / sqrt(r): Kalajdzievski 2023, arXiv:2312.03732.
"""

from collections.abc import Mapping
from typing import Any

import torch

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.lora_file import LoraFile, Pair, Part
from server.adapters.method import Edit, Lowered, add_ops
from server.model.site import Site


class Lora:
    name = "lora"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "LORA" and not config.get("use_dora")

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        file = LoraFile(checkpoint, sites)
        edits: dict[str, Edit] = {}
        for part in file.parts:
            pair = file.pair(part)
            shift = _shift(file, part, pair)
            if pair is not None:
                edits[part.site.path] = Edit(down=pair.down, up=pair.up, out_shift=shift)
            elif shift is not None:
                edits[part.site.path] = Edit(out_shift=shift)
            add_ops(edits, file.ops(part))
        method = "alora" if file.positions else "rslora" if checkpoint.config.get("use_rslora") else self.name
        rank = max((edit.rank for edit in edits.values()), default=0)
        return Lowered(method, rank, checkpoint.num_parameters, edits, file.warnings, positions=file.positions)


def _shift(file: LoraFile, part: Part, pair: Pair | None) -> torch.Tensor | None:
    """What is added to the output beside the pair (d_out,): s beta, and the trained bias less the one it replaces."""
    change = file.bias_change(part)
    beta = None if pair is None else file.vector(part, "up_bias")
    if pair is None or beta is None:
        return change
    return pair.scaling * beta if change is None else pair.scaling * beta + change


METHOD = Lora()
