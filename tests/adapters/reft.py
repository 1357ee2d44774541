"""LoReFT and its relatives: adapters of random weights in the documented format, and what they mean, in plain torch.

The formulas are those of pyreft's interventions, applied by hooks on a model's decoder layers.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN


@dataclass(frozen=True, slots=True)
class Reft:
    """A config, without what is bookkeeping."""

    intervention: str = "loreft"
    r: int = 3
    positions: str | None = "f3+l2"
    share_weights: bool = False
    last_position: str = "prompt"
    applies_to: str = "prompt"
    activation: str | None = None


KINDS: Mapping[str, Reft] = {
    "loreft": Reft(),
    "loreft-shared": Reft(share_weights=True, r=4, last_position="prompt-1"),
    "loreft-last": Reft(positions="l1", share_weights=True),
    "loreft-generated": Reft(positions=None, share_weights=True, applies_to="generated"),
    "noreft": Reft("noreft", positions="f2", share_weights=True),
    "direft": Reft("direft", share_weights=True),
    "nodireft": Reft("nodireft", positions="l4", share_weights=True),
    "consreft": Reft("consreft", share_weights=True),
    "lobireft": Reft("lobireft", positions="f2+l2", share_weights=True),
    "loreft-relu": Reft(activation="relu"),
    "noreft-gelu": Reft("noreft", share_weights=True, activation="gelu"),
    "direft-tanh": Reft("direft", positions="l2", share_weights=True, activation="tanh"),
}


def make_reft(base: PreTrainedModel, kind: str, folder: Path, seed: int) -> Path:
    """Saves an adapter of random weights for every layer of `base` and returns `folder`."""
    reft = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    width, num_layers = base.config.hidden_size, base.config.num_hidden_layers

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {}
    for layer in range(num_layers):
        for part in ("all",) if reft.share_weights else ("prefix", "suffix"):
            own = {
                "weight": normal(reft.r, width) / width**0.5,
                "bias": normal(reft.r),
                "rotate_layer": torch.linalg.qr(normal(width, reft.r))[0].contiguous(),
                "proj_layer.weight": normal(reft.r, width) / width**0.5,
                "proj_layer.bias": normal(reft.r),
            }
            tensors |= {f"layers.{layer}.{part}.{name}": own[name] for name in _TENSORS[reft.intervention]}
    folder.mkdir(parents=True)
    config = {"peft_type": "LOREFT", "layers": list(range(num_layers))} | asdict(reft)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def reft_logits(base: PreTrainedModel, folder: Path, ids: torch.Tensor, num_prompt_tokens: int) -> torch.Tensor:
    """Logits (batch, length, vocabulary) of the saved adapter on a copy of `base`; the prompt is of this length."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    model = copy.deepcopy(base)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == len(config["layers"]))
    for layer, module in enumerate(layers):
        module.register_forward_hook(_hook(config, layer, tensors, ids.shape[1], num_prompt_tokens))
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


_TENSORS = {
    "loreft": ("weight", "bias", "rotate_layer"),
    "direft": ("weight", "bias", "rotate_layer"),
    "consreft": ("bias", "rotate_layer"),
    "lobireft": ("bias", "rotate_layer"),
    "noreft": ("weight", "bias", "proj_layer.weight", "proj_layer.bias"),
    "nodireft": ("weight", "bias", "proj_layer.weight"),
}
_Formula = Callable[[torch.Tensor, Mapping[str, torch.Tensor], Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]
_FORMULAS: Mapping[str, _Formula] = {
    "loreft": lambda h, t, act: h + (act(_read(h, t)) - h @ t["rotate_layer"]) @ t["rotate_layer"].T,
    "direft": lambda h, t, act: h + act(_read(h, t)) @ t["rotate_layer"].T,
    "consreft": lambda h, t, _: h + (t["bias"] - h @ t["rotate_layer"]) @ t["rotate_layer"].T,
    "lobireft": lambda h, t, _: h + t["bias"] @ t["rotate_layer"].T,
    "noreft": lambda h, t, act: h + (act(_read(h, t)) - _projected(h, t)) @ t["proj_layer.weight"],
    "nodireft": lambda h, t, act: h + act(_read(h, t)) @ t["proj_layer.weight"],
}


def _read(h: torch.Tensor, t: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return h @ t["weight"].T + t["bias"]


def _projected(h: torch.Tensor, t: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return h @ t["proj_layer.weight"].T + t["proj_layer.bias"]


def _hook(
    config: Mapping[str, Any], layer: int, tensors: Mapping[str, torch.Tensor], length: int, num_prompt: int
) -> Callable[..., Any]:
    formula = _FORMULAS[config["intervention"]]
    act = ACT2FN[config["activation"] or "linear"]

    def own(part: str) -> dict[str, torch.Tensor]:
        start = f"layers.{layer}.{part}."
        return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}

    def edit(module: nn.Module, inputs: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        changed = h.clone()
        for part, positions in _positions(config, length, num_prompt):
            changed[:, positions] = formula(h[:, positions], own(part), act)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return edit


def _positions(config: Mapping[str, Any], length: int, num_prompt: int) -> list[tuple[str, list[int]]]:
    """As pyreft's `get_intervention_locations`: each end cut off at half of the prompt that counts."""
    if config["applies_to"] == "generated":
        return [("all", list(range(num_prompt, length)))]
    ends = dict(part[:1] and (part[0], int(part[1:])) for part in config["positions"].split("+"))
    counted = num_prompt - (config["last_position"] == "prompt-1")
    first, last = (min(ends.get(end, 0), counted // 2) for end in "fl")
    names = ("all", "all") if config["share_weights"] else ("prefix", "suffix")
    return [(names[0], list(range(first))), (names[1], list(range(counted - last, counted)))]
