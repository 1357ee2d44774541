"""Delta-LoRA adapters in our own format, and their oracle: the dense model whose weights were moved for good."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

RANK, ALPHA, STEP_SIZE = 3, 7, 0.8


def save_delta_lora_adapter(
    base: PreTrainedModel, targets: Sequence[str], folder: Path, seed: int, strength: float
) -> Path:
    """An adapter on every linear named in `targets`, as if W had moved from step 5 on."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for path, linear in base.named_modules():
        if isinstance(linear, nn.Linear) and path.rpartition(".")[2] in targets:
            for a, b in (("lora_A", "lora_B"), ("lora_start_A", "lora_start_B")):
                down = torch.randn(RANK, linear.in_features, generator=generator)
                up = torch.randn(linear.out_features, RANK, generator=generator)
                tensors[f"base_model.model.{path}.{a}.weight"] = down / linear.in_features**0.5
                tensors[f"base_model.model.{path}.{b}.weight"] = 0.3 * strength * up
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "DELTALORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(targets),
        "delta_lambda": STEP_SIZE, "start_step": 5,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def with_moved_weights(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A copy of `base` in which W is W + s B A + lambda (B A - B_K A_K), module by module."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    moved = copy.deepcopy(base)
    for key in tensors:
        if not key.endswith(".lora_A.weight"):
            continue
        path = key.removesuffix(".lora_A.weight")
        a, b, start_a, start_b = (
            tensors[f"{path}.{name}.weight"].double() for name in ("lora_A", "lora_B", "lora_start_A", "lora_start_B")
        )
        change = config["lora_alpha"] / config["r"] * b @ a + config["delta_lambda"] * (b @ a - start_b @ start_a)
        weight = moved.get_parameter(path.removeprefix("base_model.model.") + ".weight")
        weight.data = (weight.data.double() + change).to(weight.dtype)
    return moved
