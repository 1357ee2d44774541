"""LoReFT, trained with forward hooks: PEFT has no such method, and the library of its authors saves pickles.

Owns the intervention h + R (W h + b - R^T h) on the residual stream (Wu et al. 2024, arXiv:2404.03592, equation 3),
where it acts, and the folder in which it is saved. Knows nothing about batches, losses or learning rates: `Loreft` is a
module that answers as the model inside it does, and only its interventions have gradients.

    loreft = Loreft(model, LoreftConfig(r=4, layers=(0, 1, 2, 3)))
    loss = loreft(input_ids=ids, labels=labels).loss        # labels are -100 on the prompt: so it is known
    save_loreft(loreft, folder, base_model_name_or_path="demo/base")
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

IGNORED = -100  # label of a position without loss


@dataclass(frozen=True, slots=True)
class LoreftConfig:
    """`positions` "f4+l4": the first four and the last four tokens of the prompt, or "f4", or "l4"."""

    r: int
    layers: tuple[int, ...]
    positions: str = "f4+l4"
    share_weights: bool = True  # one intervention for both ends of the prompt; else one for each

    def __post_init__(self) -> None:
        if not self.numbers:
            raise ValueError(f"positions = {self.positions!r} must be like f4+l4, f4 or l4")

    @property
    def numbers(self) -> dict[str, int]:
        """How many tokens of the prompt are edited at its start (f) and at its end (l)."""
        found = re.fullmatch(r"(?:f(\d+))?\+?(?:l(\d+))?", self.positions)
        return {end: int(n) for end, n in zip("fl", found.groups(), strict=True) if n} if found else {}

    @property
    def parts(self) -> dict[str, str]:
        """The name under which the weights for each end are saved: `all` if one serves wherever there is an edit."""
        if self.share_weights or len(self.numbers) == 1:
            return dict.fromkeys(self.numbers, "all")
        return {"f": "prefix", "l": "suffix"}


class Intervention(nn.Module):
    """h + R (W h + b - R^T h), with R (h, r) of orthonormal columns. Untrained it changes nothing: W = R^T, b = 0."""

    def __init__(self, hidden: int, rank: int) -> None:
        super().__init__()
        self.source = nn.Linear(hidden, rank)  # W and b
        rotation = nn.Linear(rank, hidden, bias=False)
        nn.init.orthogonal_(rotation.weight)
        self.rotation = orthogonal(rotation)
        with torch.no_grad():
            self.source.weight.copy_(self.rotation.weight.T)
            self.source.bias.zero_()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., hidden) to the same."""
        rotate = self.rotation.weight
        return states + (self.source(states) - states @ rotate) @ rotate.T


class Loreft(nn.Module):
    """A causal language model with interventions on the outputs of its decoder layers, at positions of the prompt."""

    def __init__(self, model: Any, config: LoreftConfig) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.config = config
        hidden = model.config.hidden_size
        names = sorted(set(config.parts.values()))
        self.interventions = nn.ModuleDict(
            {f"{layer}_{part}": Intervention(hidden, config.r) for layer in config.layers for part in names}
        )
        self._edited: dict[str, torch.Tensor] = {}  # part -> (rows, length) bool, during one forward pass
        for layer in config.layers:
            model.model.layers[layer].register_forward_hook(self._hook(layer))

    def forward(self, *, input_ids: torch.Tensor, labels: torch.Tensor, **arguments: Any) -> Any:
        """The model's output. A row's prompt is what comes before its first label."""
        self._edited = masks(self.config, (labels != IGNORED).int().argmax(dim=1), labels.shape[1])
        return self.model(input_ids=input_ids, labels=labels, **arguments)

    def generate(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Answers to prompts that are padded on the left; only the prompts are edited."""
        length = input_ids.shape[1]
        from_right = masks(self.config, attention_mask.sum(dim=1), length)
        # The masks begin at each prompt's first token; padding shifts them.
        shifts = (length - attention_mask.sum(dim=1)).tolist()
        self._edited = {
            part: torch.stack([row.roll(shift) for row, shift in zip(mask, shifts, strict=True)])
            for part, mask in from_right.items()
        }
        answer: torch.Tensor = self.model.generate(input_ids=input_ids, attention_mask=attention_mask, **arguments)
        return answer

    def _hook(self, layer: int) -> Any:
        def edit(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
            for part, mask in self._edited.items():
                if output.shape[1] == mask.shape[1]:  # else a step of decoding, behind the prompt
                    edited = self.interventions[f"{layer}_{part}"](output)
                    output = torch.where(mask[..., None], edited.to(output.dtype), output)
            return output

        return edit


def masks(config: LoreftConfig, lengths: torch.Tensor, longest: int) -> dict[str, torch.Tensor]:
    """Which positions each part edits, (rows, longest) bool, of prompts of `lengths` (rows,) tokens.

    Where a prompt is short, each end takes half of it at most, so that no token is edited twice.
    """
    at = torch.arange(longest)[None, :]
    half, length = (lengths // 2)[:, None], lengths[:, None]
    edited: dict[str, torch.Tensor] = {}
    for end, number in config.numbers.items():
        count = half.clamp(max=number)
        mask = at < count if end == "f" else (at >= length - count) & (at < length)
        part = config.parts[end]
        edited[part] = edited[part] | mask if part in edited else mask
    return edited


def save_loreft(loreft: Loreft, folder: Path, base_model_name_or_path: str) -> None:
    """adapter_config.json and adapter_model.safetensors, float32: `layers.<l>.<part>.weight` (r, h), `.bias` (r,)
    and `.rotate_layer` (h, r)."""
    config = {"peft_type": "LOREFT", "intervention": "loreft"} | asdict(loreft.config)
    config |= {"activation": None, "last_position": "prompt", "applies_to": "prompt"}
    tensors = {}
    for name, intervention in loreft.interventions.items():
        key = "layers." + name.replace("_", ".")
        tensors[f"{key}.weight"] = intervention.source.weight
        tensors[f"{key}.bias"] = intervention.source.bias
        tensors[f"{key}.rotate_layer"] = intervention.rotation.weight
    folder.mkdir(parents=True, exist_ok=True)
    written = json.dumps(config | {"base_model_name_or_path": base_model_name_or_path}, indent=2)
    (folder / "adapter_config.json").write_text(written + "\n", encoding="utf-8")
    save_file({k: t.detach().float().contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors")


def load_loreft(model: Any, folder: Path) -> Loreft:
    """What `save_loreft` wrote, on the model that it was trained for."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    fields = {"r": config["r"], "positions": config["positions"], "share_weights": config["share_weights"]}
    loreft = Loreft(model, LoreftConfig(layers=tuple(config["layers"]), **fields))
    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name, intervention in loreft.interventions.items():
            key = "layers." + name.replace("_", ".")
            intervention.source.weight.copy_(tensors[f"{key}.weight"])
            intervention.source.bias.copy_(tensors[f"{key}.bias"])
            intervention.rotation.weight = tensors[f"{key}.rotate_layer"]
    return loreft
