"""Train with Delta-LoRA, and save what `graft serve` reads: the format is docs/delta-lora.md.

PEFT has no Delta-LoRA. This loop moves the weights of a transformers model in place, so use a copy of the base that
nothing else needs. `examples/train.py delta-lora` calls it.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class DeltaLoraConfig:
    """What is trained, and how far W follows it."""

    target_modules: tuple[str, ...]  # last names of linear modules, as in PEFT
    r: int = 8
    lora_alpha: float = 16.0
    delta_lambda: float = 0.5  # the share of each change of B A by which W moves
    start_step: int = 0  # K: so many steps are taken before W begins to move
    learning_rate: float = 1e-3
    seed: int = 0

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.r


class DeltaLoraLinear(nn.Module):
    """A linear whose weight is no parameter of the optimizer, and follows the product of its trained pair."""

    def __init__(self, linear: nn.Linear, config: DeltaLoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = linear
        self.scaling = config.scaling
        bound = linear.in_features**-0.5
        drawn = torch.empty(config.r, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(drawn.to(linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, config.r, device=linear.weight.device))
        self.start: tuple[torch.Tensor, torch.Tensor] | None = None  # A_K and B_K, once W moves

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base: torch.Tensor = self.linear(x)
        return base + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)

    def product(self) -> torch.Tensor:
        """B A, unscaled, (d_out, d_in)."""
        return (self.lora_B @ self.lora_A).detach()

    def keep_start(self) -> None:
        self.start = (self.lora_A.detach().clone(), self.lora_B.detach().clone())


def train_delta_lora(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    config: DeltaLoraConfig,
    on_step: Callable[[int, float], None],
) -> None:
    """One step for each batch: the keyword arguments of the model's forward pass, labels included.

    Puts a `DeltaLoraLinear` in the place of each target, and leaves the model as trained: its weights moved, its pairs
    in place. `on_step` gets the number of steps taken and the loss before the last one. Raises ValueError where nothing
    is named by `target_modules`, and where a weight that would move is not float32.
    """
    layers = _insert(model, config)
    trained = [parameter for layer in layers for parameter in (layer.lora_A, layer.lora_B)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    model.train(False)  # no dropout: W moves by the whole product
    for step, batch in enumerate(batches):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        _step(optimizer, layers, config, step)
        on_step(step + 1, loss.item())


def save_delta_lora(model: PreTrainedModel, config: DeltaLoraConfig, folder: str | Path) -> None:
    """Writes the adapter of a model that `train_delta_lora` has trained, in float32."""
    tensors: dict[str, torch.Tensor] = {}
    for path, layer in _layers(model):
        tensors[f"{path}.lora_A.weight"] = layer.lora_A.detach()
        tensors[f"{path}.lora_B.weight"] = layer.lora_B.detach()
        # Where W never moved, there is a pair to be told all the same: lambda times nothing.
        start_a, start_b = layer.start or (layer.lora_A.detach(), layer.lora_B.detach())
        if config.start_step > 0:
            tensors[f"{path}.lora_start_A.weight"] = start_a.clone()
            tensors[f"{path}.lora_start_B.weight"] = start_b.clone()
    described = {
        "peft_type": "DELTALORA",
        "base_model_name_or_path": model.config.name_or_path,
        "target_modules": list(config.target_modules),
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "delta_lambda": config.delta_lambda,
        "start_step": config.start_step,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.float().cpu().contiguous() for key, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n")


def _step(optimizer: torch.optim.Optimizer, layers: list[DeltaLoraLinear], config: DeltaLoraConfig, step: int) -> None:
    """W_{t+1} = W_t + lambda (B_{t+1} A_{t+1} - B_t A_t), from step K on."""
    if step == config.start_step:
        for layer in layers:
            layer.keep_start()
    if step < config.start_step:
        optimizer.step()
        return
    before = [layer.product() for layer in layers]
    optimizer.step()
    for layer, product in zip(layers, before, strict=True):
        layer.linear.weight.data += config.delta_lambda * (layer.product() - product)


def _insert(model: PreTrainedModel, config: DeltaLoraConfig) -> list[DeltaLoraLinear]:
    targets = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in config.target_modules
    ]
    if not targets:
        raise ValueError(f"No linear module of this model is named {' or '.join(config.target_modules)}.")
    if other := next((path for path, linear in targets if linear.weight.dtype != torch.float32), None):
        raise ValueError(
            f"The weight of {other} is not float32. Load the base with dtype=torch.float32: in 16 bits most of W's "
            "steps are rounded away, and the adapter could not be served exactly."
        )
    generator = torch.Generator().manual_seed(config.seed)
    layers = []
    for path, linear in targets:
        parent, _, name = path.rpartition(".")
        layers.append(DeltaLoraLinear(linear, config, generator))
        setattr(model.get_submodule(parent), name, layers[-1])
    return layers


def _layers(model: PreTrainedModel) -> Iterator[tuple[str, DeltaLoraLinear]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, DeltaLoraLinear))
