"""Train a bottleneck adapter (Houlsby, or after the MLP alone), and save what `graft serve` reads: docs/bottleneck.md.

PEFT has no bottleneck adapters, and AdapterHub's library wants a transformers of its own. This loop puts two small
layers after the sub-blocks of a transformers model, by forward hooks, and saves them in the library's format.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

_LAYERS = {"gpt2": "transformer.h"}  # by model_type; else model.layers
_LINEARS = {  # what ends the attention, and the MLP
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ("self_attn.o_proj", "mlp.down_proj")),
}


@dataclass(frozen=True, slots=True)
class BottleneckConfig:
    """What is trained. The fields that the library has too have its names."""

    mh_adapter: bool = True  # after the attention
    output_adapter: bool = True  # after the MLP
    reduction_factor: int = 16
    non_linearity: str = "swish"
    learning_rate: float = 1e-3
    seed: int = 0


class Bottleneck(nn.Module):
    """y + up act(down y), which begins as nearly y."""

    def __init__(self, width: int, config: BottleneckConfig) -> None:
        super().__init__()
        self.act = ACT2FN[config.non_linearity]
        self.adapter_down = nn.Linear(width, max(1, width // config.reduction_factor))
        self.adapter_up = nn.Linear(self.adapter_down.out_features, width)
        for layer in (self.adapter_down, self.adapter_up):
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        change: torch.Tensor = self.adapter_up(self.act(self.adapter_down(y)))
        return y + change


def train_bottleneck(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    config: BottleneckConfig,
    on_step: Callable[[int, float], None],
) -> None:
    """One step for each batch: the keyword arguments of the model's forward pass, labels included.

    Leaves the model with the trained modules in place, and nothing else of it changed. `on_step` gets the number of
    steps taken and the loss before the last one. Raises ValueError for a type of model that is not known here, and
    where neither place is trained.
    """
    modules = _insert(model, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = [parameter.requires_grad_(True) for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    model.train(False)
    for step, batch in enumerate(batches, start=1):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_step(step, loss.item())


def save_bottleneck(
    model: PreTrainedModel, config: BottleneckConfig, folder: str | Path, name: str = "adapter"
) -> None:
    """Writes the adapter of a model that `train_bottleneck` has trained, in float32.

    The library itself reads it too, once the weights are called adapter.safetensors.
    """
    tensors = {}
    for path, module in model.named_modules():
        if isinstance(module, Bottleneck):
            for layer, called in ((module.adapter_down, "adapter_down.0"), (module.adapter_up, "adapter_up")):
                for part in ("weight", "bias"):
                    tensors[f"{path}.adapters.{name}.{called}.{part}"] = layer.get_parameter(part).detach()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.float().cpu().contiguous() for key, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps(_described(model, config, name), indent=2) + "\n")


def load_bottleneck(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with what `save_bottleneck` wrote put in place; the tensors may have been halved since."""
    described = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    known = {field.name for field in fields(BottleneckConfig)}
    _insert(model, BottleneckConfig(**{key: value for key, value in described["config"].items() if key in known}))
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        path, _, within = key.partition(f".adapters.{described['name']}.")
        layer, _, part = within.replace("adapter_down.0", "adapter_down").partition(".")
        with torch.no_grad():
            model.get_submodule(path).get_submodule(layer).get_parameter(part).copy_(tensor)
    return model


def _insert(model: PreTrainedModel, config: BottleneckConfig) -> list[Bottleneck]:
    """Puts the modules into the layers under the library's names, and hooks that call them on the linears."""
    kind = model.config.model_type
    if kind not in _LINEARS:
        raise ValueError(f"model_type {kind!r} is not known here; known are {', '.join(_LINEARS)}")
    if not (config.mh_adapter or config.output_adapter):
        raise ValueError("neither mh_adapter nor output_adapter is set: there is nothing to train")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return list(_inserted(model, config, _LINEARS[kind]))


def _inserted(model: PreTrainedModel, config: BottleneckConfig, linears: tuple[str, str]) -> Iterator[Bottleneck]:
    places = (
        ("attention_adapters", linears[0], config.mh_adapter),
        ("output_adapters", linears[1], config.output_adapter),
    )
    for layer in model.get_submodule(_LAYERS.get(model.config.model_type, "model.layers")).children():
        for attribute, linear, is_on in places:
            if is_on:
                module = Bottleneck(model.config.hidden_size, config).to(model.device)
                layer.add_module(attribute, module)
                layer.get_submodule(linear).register_forward_hook(_after(module))
                yield module


def _after(module: Bottleneck) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
    def hook(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = module(output)
        return changed

    return hook


def _described(model: PreTrainedModel, config: BottleneckConfig, name: str) -> dict[str, Any]:
    """The library's config of a sequential adapter; what is not named has its default there."""
    return {
        "config": {
            "mh_adapter": config.mh_adapter,
            "output_adapter": config.output_adapter,
            "reduction_factor": config.reduction_factor,
            "non_linearity": config.non_linearity,
            "original_ln_before": False,
            "original_ln_after": True,
            "residual_before_ln": True,
            "is_parallel": False,
            "scaling": 1.0,
            "leave_out": [],
        },
        "hidden_size": model.config.hidden_size,
        "model_class": type(model).__name__,
        "model_name": model.config.name_or_path,
        "model_type": model.config.model_type,
        "name": name,
        "version": "adapters.1.3.0",  # the format's; files without one are read as older ones
    }
