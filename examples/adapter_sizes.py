"""How large each technique's adapter is on the shape of Llama 3.1 8B, counted from shapes: no weight is made or loaded.

python examples/adapter_sizes.py

PEFT puts each adapter on models of one and of two layers whose tensors have shapes alone; what a second layer adds is
counted 32 times. The numbers are those that the adapter's file holds, at two bytes each. docs/methods.md shows them.
"""

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peft import (
    AdaLoraConfig,
    BeftConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    RoadConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from transformers import LlamaConfig, LlamaForCausalLM

from demo.recipes import LINEARS

NUM_LAYERS, HIDDEN, KV_WIDTH = 32, 4096, 1024
LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": HIDDEN,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
BYTES_PER_NUMBER = 2
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
QKV = ["q_proj", "k_proj", "v_proj"]


@dataclass(frozen=True, slots=True)
class Size:
    """Numbers in one adapter's file, and the rank and places that were chosen for it."""

    chosen: str
    num_numbers: int

    @property
    def megabytes(self) -> float:
        return self.num_numbers * BYTES_PER_NUMBER / 1e6


def count(kind: type[PeftConfig], num_layers: int, **fields: Any) -> int:
    """Numbers in the file of an adapter on a model of so many layers."""
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        model: Any = LlamaForCausalLM(LlamaConfig(num_hidden_layers=num_layers, **LLAMA_8B))
        adapted = get_peft_model(model, kind(task_type="CAUSAL_LM", **fields))
        saved = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return sum(tensor.numel() for tensor in saved.values())


def on_all_layers(chosen: str, kind: type[PeftConfig], targets: list[str] = LINEARS, **fields: Any) -> Size:
    one, two = (count(kind, n, target_modules=list(targets), **fields) for n in (1, 2))
    return Size(chosen, one + (NUM_LAYERS - 1) * (two - one))


def sizes() -> Mapping[str, Size]:
    """By technique. LoRA+, rsLoRA, LoRA-FA, QLoRA and Delta-LoRA save what LoRA saves."""
    r, tokens = 8, 32
    ia3 = {"feedforward_modules": ["down_proj"]}
    return {
        "LoRA": on_all_layers("r = 16, all linears", LoraConfig, r=16),
        "DoRA": on_all_layers("r = 16, all linears", LoraConfig, r=16, use_dora=True),
        "VeRA": on_all_layers(
            "r = 256, all linears, projections from the key", VeraConfig, r=256, save_projection=False
        ),
        "AdaLoRA": on_all_layers("16 ranks on average, all linears", AdaLoraConfig, init_r=16, total_step=2000),
        "LoHa": on_all_layers("r = 8, all linears", LoHaConfig, r=8),
        "LoKr": on_all_layers("r = 16, factor 64, all linears", LoKrConfig, r=16, decompose_factor=64),
        "OFT": on_all_layers("blocks of 32, all linears", OFTConfig, oft_block_size=32),
        "RoAd": on_all_layers("road_1, all linears", RoadConfig, group_size=64),
        "IA3": on_all_layers("k, v, down", IA3Config, ["k_proj", "v_proj", "down_proj"], **ia3),
        "BitFit (BEFT)": on_all_layers("all linears", BeftConfig),
        "norm tuning": on_all_layers("all norms", LNTuningConfig, NORMS),
        "trainable tokens": Size("16 tokens", 16 * HIDDEN),
        "prompt tuning": Size("32 tokens", tokens * HIDDEN),
        "p-tuning": Size("32 tokens", tokens * HIDDEN),
        "prefix tuning": Size("32 tokens", tokens * NUM_LAYERS * 2 * KV_WIDTH),
        "aLoRA": on_all_layers("r = 32, q, k, v", LoraConfig, QKV, r=32, alora_invocation_tokens=[1]),
        "LoReFT": Size("r = 8, every layer, both ends share", NUM_LAYERS * (2 * r * HIDDEN + r)),
    }


def main() -> None:
    for technique, size in sizes().items():
        print(f"{technique:<18} {size.chosen:<46} {size.num_numbers:>12,} numbers {size.megabytes:>8.2f} MB")


if __name__ == "__main__":
    main()
