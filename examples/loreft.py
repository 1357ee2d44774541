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
    """`positions` "f4+l4": the first four and the last four tokens of the prompt, or "f4", or "l4".

    None: every token that is generated and none of the prompt, a stronger adapter that costs its edit at each step.
    """

    r: int
    layers: tuple[int, ...]
    positions: str | None = "f4+l4"
    share_weights: bool = True  # one intervention for both ends of the prompt; else one for each

    def __post_init__(self) -> None:
        if self.positions is not None and not self.numbers:
            raise ValueError(f"positions = {self.positions!r} must be like f4+l4, f4 or l4, or None")

    @property
    def numbers(self) -> dict[str, int]:
        """How many tokens of the prompt are edited at its start (f) and at its end (l)."""
        found = re.fullmatch(r"(?:f(\d+))?\+?(?:l(\d+))?", self.positions or "")
        return {end: int(n) for end, n in zip("fl", found.groups(), strict=True) if n} if found else {}

    @property
    def parts(self) -> dict[str, str]:
        """The name under which the weights for each end are saved: `all` if one serves wherever there is an edit."""
        if self.positions is None:
            return {"generated": "all"}
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
    """A causal language model with interventions on the outputs of its decoder layers, where the config says.

    Its decoder layers must be called with `position_ids`, as those of transformers are.
    """

    def __init__(self, model: Any, config: LoreftConfig) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.config = config
        hidden = model.config.hidden_size
        names = sorted(set(config.parts.values()))
        self.interventions = nn.ModuleDict(
            {f"{layer}_{part}": Intervention(hidden, config.r) for layer in config.layers for part in names}
        )
        self._num_prompt = torch.zeros(1, dtype=torch.long)  # (rows,) tokens of each prompt, set before a forward pass
        for layer in config.layers:
            model.model.layers[layer].register_forward_hook(self._hook(layer), with_kwargs=True)

    def forward(self, *, input_ids: torch.Tensor, labels: torch.Tensor, **arguments: Any) -> Any:
        """The model's output. A row's prompt is what comes before its first label."""
        self._num_prompt = (labels != IGNORED).int().argmax(dim=1)
        return self.model(input_ids=input_ids, labels=labels, **arguments)

    def generate(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Prompts that are padded on the left, each with its answer."""
        self._num_prompt = attention_mask.sum(dim=1)
        answer: torch.Tensor = self.model.generate(input_ids=input_ids, attention_mask=attention_mask, **arguments)
        return answer

    def _hook(self, layer: int) -> Any:
        def edit(_: nn.Module, __: Any, given: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
            # Positions count from a prompt's first token, also behind padding and in a step of decoding.
            for part, mask in masks(self.config, self._num_prompt, given["position_ids"]).items():
                edited = self.interventions[f"{layer}_{part}"](output)
                output = torch.where(mask[..., None], edited.to(output.dtype), output)
            return output

        return edit


def masks(config: LoreftConfig, lengths: torch.Tensor, at: torch.Tensor) -> dict[str, torch.Tensor]:
    """Which of the positions `at`, (rows, n) or (1, n) int64, each part edits, (rows, n) bool; prompts of `lengths`
    (rows,) tokens.

    Where a prompt is short, each end takes half of it at most, so that no token is edited twice.
    """
    half, length = (lengths // 2)[:, None], lengths[:, None]
    if config.positions is None:
        return {config.parts["generated"]: at >= length}
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
    applies_to = "generated" if loreft.config.positions is None else "prompt"
    config |= {"activation": None, "last_position": "prompt", "applies_to": applies_to}
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
    """What `save_loreft` wrote, on the model that it was trained for; the tensors may have been halved since."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    fields = {"r": config["r"], "positions": config["positions"], "share_weights": config["share_weights"]}
    loreft = Loreft(model, LoreftConfig(layers=tuple(config["layers"]), **fields))
    tensors = {key: t.float() for key, t in load_file(folder / "adapter_model.safetensors").items()}
    with torch.no_grad():
        for name, intervention in loreft.interventions.items():
            key = "layers." + name.replace("_", ".")
            intervention.source.weight.copy_(tensors[f"{key}.weight"])
            intervention.source.bias.copy_(tensors[f"{key}.bias"])
            intervention.rotation.weight = tensors[f"{key}.rotate_layer"]
    return loreft
