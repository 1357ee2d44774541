"""LoRA adapters for the tiny Llama, as the files that PEFT writes."""

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save

HIDDEN, KV_WIDTH, RANK = 64, 32, 4


@dataclass(frozen=True)
class AdapterFiles:
    config: bytes
    weights: bytes

    def parts(self) -> dict[str, tuple[str, bytes]]:
        """As httpx and requests send files."""
        return {
            "config": ("adapter_config.json", self.config),
            "weights": ("adapter_model.safetensors", self.weights),
        }

    def with_config(self, **fields: Any) -> "AdapterFiles":
        return replace(self, config=json.dumps(json.loads(self.config) | fields).encode())

    @property
    def num_bytes(self) -> int:
        return len(self.config) + len(self.weights)


def lora_files(seed: int, scale: float = 0.5, hidden: int = HIDDEN, parent: str = "self_attn") -> AdapterFiles:
    """An adapter on q and v of both layers, strong enough that the greedy tokens differ from the base's.

    `hidden` and `parent` make one that fits another model.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for module, width in (("q_proj", HIDDEN), ("v_proj", KV_WIDTH)):
            key = f"base_model.model.model.layers.{layer}.{parent}.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) * scale
            tensors[f"{key}.lora_B.weight"] = torch.randn(width, RANK, generator=generator) * scale
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    return AdapterFiles(json.dumps(config).encode(), save(tensors))
