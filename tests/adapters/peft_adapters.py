"""Tiny adapters made by PEFT, and PEFT's own answer for them: the oracle of the fidelity tests.

`KINDS` names what can be made, `make_adapter` saves one with every trained tensor moved away from its init, and
`peft_logits` runs a saved one the way PEFT runs it. Configs name modules by role, so that one kind fits every
architecture in `TARGETS`.
"""

import copy
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    BeftConfig,
    BOFTConfig,
    C3AConfig,
    DeloraConfig,
    GraloraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RoadConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from tests.adapters.delta_lora_adapters import save_delta_lora_adapter, with_moved_weights


@dataclass(frozen=True, slots=True)
class Targets:
    """Module names of one architecture by their role."""

    query: str  # reads the residual stream, first in attention; may be the fused q, k, v
    value: str
    attention_out: str
    feedforward_in: str
    feedforward_out: str
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    extra: tuple[str, ...] = ()
    norms: tuple[str, ...] = ("input_layernorm", "norm")

    @property
    def attention(self) -> list[str]:
        return sorted({self.query, self.value, self.attention_out})

    @property
    def feedforward(self) -> list[str]:
        return sorted({self.feedforward_in, self.feedforward_out})

    @property
    def all(self) -> list[str]:
        return sorted({*self.attention, *self.feedforward, *self.extra})


_LLAMA_LIKE = Targets("q_proj", "v_proj", "o_proj", "up_proj", "down_proj", extra=("k_proj", "gate_proj"))
TARGETS: Mapping[str, Targets] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "phi3": Targets("qkv_proj", "qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gpt2": Targets("c_attn", "c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", embedding="wte", norms=("ln_1", "ln_f")),
    "gemma2": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE,
    "opt": Targets("q_proj", "v_proj", "out_proj", "fc1", "fc2", extra=("k_proj", "project_in", "project_out")),
    "gpt_neox": Targets(
        "query_key_value", "query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h", embedding="embed_in"
    ),
    # Experts are no modules, so the attention stands for the feedforward too.
    "mixtral": Targets("q_proj", "v_proj", "o_proj", "k_proj", "o_proj"),
    "qwen3_moe": Targets("q_proj", "v_proj", "o_proj", "k_proj", "o_proj"),
}

Recipe = Callable[[Targets], PeftConfig]


def _configured(kind: type[PeftConfig], fields: dict[str, Any]) -> Recipe:
    """A config whose callable fields are filled in with the names of the architecture."""

    def config(targets: Targets) -> PeftConfig:
        values = {name: value(targets) if callable(value) else value for name, value in fields.items()}
        return kind(task_type="CAUSAL_LM", **values)

    return config


def _lora(**fields: Any) -> Recipe:
    return _configured(LoraConfig, {"target_modules": lambda t: t.all, "r": 4, "lora_alpha": 7} | fields)


def _adalora(**fields: Any) -> Recipe:
    schedule = {"target_r": 2, "init_r": 4, "lora_alpha": 7, "total_step": 10}
    return _configured(AdaLoraConfig, {"target_modules": lambda t: t.all} | schedule | fields)


def _attention(targets: Targets) -> list[str]:
    return targets.attention


def _by_layer(targets: Targets) -> dict[str, int]:
    """The general key for the last module comes first, and wins. PEFT saves patterns sorted, so these are."""
    last = targets.feedforward_out
    return {f".*{last}": 2, f"1.mlp.{last}": 3, rf"[a-z.]*\.1\..*{targets.query}": 6}


def _ends(targets: Targets) -> list[str]:
    return [targets.query, targets.embedding, targets.head]


_BLOCKS = BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2, match_strict=False)

KINDS: Mapping[str, Recipe] = {
    "lora": _lora(),
    "lora-r1": _lora(r=1, lora_alpha=3),
    "lora-wide": _lora(r=16, lora_alpha=8, init_lora_weights="gaussian"),
    "lora-query-only": _lora(target_modules=lambda t: [t.query], r=8, lora_alpha=32),
    "lora-patterns": _lora(rank_pattern=_by_layer, alpha_pattern=lambda t: {rf"(.*\.)?0\..*{t.value}": 29}),
    "lora-layer-1": _lora(layers_to_transform=[1]),
    "lora-regex-targets": _lora(target_modules=lambda t: rf".*\.1\..*({t.query}|{t.feedforward_in})"),
    "lora-excluded": _lora(exclude_modules=lambda t: [t.value]),
    "lora-bias-of-b": _lora(lora_bias=True),
    "lora-embedding-and-head": _lora(target_modules=_ends),
    "lora-orthogonal": _lora(init_lora_weights="orthogonal"),
    "rslora": _lora(use_rslora=True, r=8, lora_alpha=4),
    "rslora-patterns": _lora(use_rslora=True, rank_pattern=_by_layer, alpha_pattern=_by_layer),
    "dora": _lora(use_dora=True),
    "dora-attention": _lora(use_dora=True, target_modules=_attention, r=2, lora_alpha=16),
    "dora-rslora": _lora(use_dora=True, use_rslora=True),
    "dora-patterns": _lora(use_dora=True, rank_pattern=_by_layer, alpha_pattern=_by_layer),
    "dora-embedding-and-head": _lora(use_dora=True, target_modules=_ends),
    "vera": _configured(VeraConfig, {"target_modules": lambda t: t.all, "r": 12}),
    "vera-drawn": _configured(
        VeraConfig,
        {"target_modules": lambda t: t.all, "r": 24, "save_projection": False, "projection_prng_key": 1234},
    ),
    "vera-drawn-query": _configured(
        VeraConfig, {"target_modules": lambda t: [t.query], "r": 8, "save_projection": False, "d_initial": 0.9}
    ),
    "vera-key": _configured(
        VeraConfig, {"target_modules": _attention, "r": 16, "projection_prng_key": 99, "d_initial": 0.5}
    ),
    "ia3": _configured(
        IA3Config,
        {"target_modules": lambda t: t.all, "feedforward_modules": lambda t: t.feedforward},
    ),
    "ia3-attention": _configured(IA3Config, {"target_modules": _attention, "feedforward_modules": lambda t: []}),
    "ia3-feedforward": _configured(
        IA3Config, {"target_modules": lambda t: t.feedforward, "feedforward_modules": lambda t: t.feedforward}
    ),
    "adalora": _adalora(),
}

# Kinds that PEFT makes for nn.Linear, and not for GPT-2's Conv1D.
LINEAR_KINDS: Mapping[str, Recipe] = {
    "lora-pissa": _lora(init_lora_weights="pissa"),
    "dora-olora": _lora(init_lora_weights="olora", use_dora=True, use_rslora=True),
    "loha": _configured(LoHaConfig, {"target_modules": lambda t: t.all, "r": 3, "alpha": 7}),
    "loha-patterns": _configured(
        LoHaConfig,
        {"target_modules": lambda t: t.attention, "rank_pattern": _by_layer, "alpha_pattern": lambda t: {t.value: 29}},
    ),
    "beft": _configured(BeftConfig, {"target_modules": lambda t: t.all}),
    "hra": _configured(HRAConfig, {"target_modules": lambda t: t.all, "r": 5}),
    "hra-orthogonal": _configured(HRAConfig, {"target_modules": _attention, "r": 4, "apply_GS": True}),
    "miss": _configured(MissConfig, {"target_modules": lambda t: t.all, "r": 6}),
    "miss-mini-wide": _configured(
        MissConfig, {"target_modules": lambda t: [t.query], "r": 6, "mini_r": 8, "init_weights": "mini"}
    ),
    "miss-mini": _configured(MissConfig, {"target_modules": _attention, "r": 8, "mini_r": 4, "init_weights": "mini"}),
    "delora": _configured(DeloraConfig, {"target_modules": lambda t: t.all, "r": 4, "rank_pattern": _by_layer}),
    "gralora": _configured(GraloraConfig, {"target_modules": lambda t: t.all, "r": 4, "alpha": 7}),
    "gralora-hybrid": _configured(
        GraloraConfig, {"target_modules": _attention, "r": 8, "gralora_k": 4, "hybrid_r": 3, "alpha": 7}
    ),
    "vblora": _configured(
        VBLoRAConfig, {"target_modules": lambda t: t.all, "r": 3, "num_vectors": 20, "vector_length": 8, "topk": 3}
    ),
    "road": _configured(RoadConfig, {"target_modules": lambda t: t.all, "group_size": 8}),
    "road-2": _configured(RoadConfig, {"target_modules": lambda t: t.all, "group_size": 2, "variant": "road_2"}),
    "road-4": _configured(RoadConfig, {"target_modules": _attention, "group_size": 32, "variant": "road_4"}),
    "oft": _configured(OFTConfig, {"target_modules": lambda t: t.all, "oft_block_size": 16}),
    "oft-blocks": _configured(
        OFTConfig,  # 7 is not among the divisors, so PEFT takes another; an exact rotation
        {"target_modules": lambda t: t.all, "r": 7, "oft_block_size": 0, "use_cayley_neumann": False},
    ),
    "oft-shared": _configured(
        OFTConfig,
        {"target_modules": _ends, "oft_block_size": 4, "block_share": True, "num_cayley_neumann_terms": 3},
    ),
    "oft-constrained": _configured(
        OFTConfig,
        {
            "target_modules": lambda t: t.all,
            "oft_block_size": 8,
            "coft": True,
            "eps": 0.9,
            "num_cayley_neumann_terms": 9,
        },
    ),
    "boft": _configured(BOFTConfig, {"target_modules": lambda t: t.all, "boft_block_size": 8}),
    "c3a": _configured(C3AConfig, {"target_modules": lambda t: t.all, "block_size": 16}),
    "lokr": _configured(LoKrConfig, {"target_modules": lambda t: t.all, "r": 3, "alpha": 7}),
    "lokr-whole": _configured(LoKrConfig, {"target_modules": lambda t: t.all, "r": 64, "alpha": 64}),
    "lokr-both": _configured(
        LoKrConfig,
        {
            "target_modules": _attention,
            "r": 2,
            "alpha": 5,
            "decompose_both": True,
            "decompose_factor": 16,
            "rank_pattern": _by_layer,
            "alpha_pattern": lambda t: {t.value: 29},
        },
    ),
}

# Formats that PEFT does not have: how one is saved for (base, target modules, folder, seed, strength), and by peft_type
# the dense model that answers as base and adapter do.
OWN_KINDS: Mapping[str, Callable[[PreTrainedModel, Sequence[str], Path, int, float], Path]] = {
    "delta_lora": save_delta_lora_adapter,
}
_ORACLES: Mapping[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {"DELTALORA": with_moved_weights}

# Kinds that need more of the base than modules by role: biases on the linears, or the Llama names.
BIASED_KINDS: Mapping[str, Recipe] = {
    "lora-bias-only": _lora(bias="lora_only", target_modules=_attention),
    "lora-bias-all": _lora(bias="all", lora_bias=True, target_modules=_attention),
    "dora-bias-only": _lora(bias="lora_only", use_dora=True),
    "oft-bias-only": _configured(OFTConfig, {"target_modules": _attention, "oft_block_size": 8, "bias": "oft_only"}),
    "oft-bias-all": _configured(OFTConfig, {"target_modules": _attention, "oft_block_size": 8, "bias": "all"}),
}
LLAMA_KINDS: Mapping[str, Recipe] = {
    # Pruned: what is left of the rank of 4 at each module that is named.
    "adalora-pruned": _adalora(
        rank_pattern={
            "model.layers.0.self_attn.q_proj.lora_E": [True, False, False, True],
            "model.layers.1.mlp.down_proj.lora_E": [False, True, False, False],
            "model.layers.1.mlp.up_proj.lora_E": [False, False, False, False],
        }
    ),
    "lora-blocks": _lora(target_modules=lambda t: [t.query, t.attention_out], use_bdlora=_BLOCKS),
}

# Kinds that are more than edits of a forward pass: their effect depends on where a token stands in its sequence. The
# reference for LoReFT is `reft.py`, since PEFT does not know it.
INVOCATION = (11, 13)
SEQUENCE_KINDS: Mapping[str, Recipe] = {
    "prompt_tuning": _configured(PromptTuningConfig, {"num_virtual_tokens": 5}),
    "p_tuning": _configured(PromptEncoderConfig, {"num_virtual_tokens": 3, "encoder_hidden_size": 24}),
    "prefix_tuning": _configured(PrefixTuningConfig, {"num_virtual_tokens": 21}),
    "prefix_tuning-encoded": _configured(
        PrefixTuningConfig, {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 24}
    ),
    "alora": _lora(alora_invocation_tokens=list(INVOCATION)),
    "alora-query-only": _lora(alora_invocation_tokens=list(INVOCATION), target_modules=lambda t: [t.query], r=8),
}
# Kinds with modules or rows of tables of their own.
SAVED_KINDS: Mapping[str, Recipe] = {
    "trainable_tokens": _configured(
        TrainableTokensConfig, {"token_indices": [3, 7, 101], "target_modules": lambda t: [t.embedding]}
    ),
    "ln_tuning": _configured(LNTuningConfig, {"target_modules": lambda t: t.norms}),
    "lora-token-rows": _lora(trainable_token_indices=lambda t: {t.embedding: [2, 3, 60, 200]}),
    "lora-saved-head": _lora(modules_to_save=lambda t: [t.head]),
    "dora-saved-norms": _lora(use_dora=True, modules_to_save=["norm"]),
}


def make_adapter(
    base: PreTrainedModel | Callable[[], PreTrainedModel], kind: str, folder: Path, seed: int, strength: float = 1.0
) -> Path:
    """Saves an adapter of a kind for `base` (a model, which is left as it is, or a factory) and returns `folder`.

    Everything that training would change is drawn anew from `seed`, far enough from its init to be seen in the logits;
    at strength 1 an adapter outweighs its base, which no training does.
    """
    model = base if isinstance(base, PreTrainedModel) else base()
    if kind in OWN_KINDS:
        return OWN_KINDS[kind](model, TARGETS[model.config.model_type].all, folder, seed, strength)
    recipe = {**KINDS, **LINEAR_KINDS, **BIASED_KINDS, **LLAMA_KINDS, **SEQUENCE_KINDS, **SAVED_KINDS}[kind]
    with _peft_warnings_off():
        config = recipe(TARGETS[model.config.model_type])
    return save_trained(model, config, folder, seed, strength)


def save_trained(base: PreTrainedModel, config: PeftConfig, folder: Path, seed: int, strength: float = 1.0) -> Path:
    """Saves an adapter of any config for a copy of `base`, as if trained, and returns `folder`."""
    with torch.random.fork_rng(), _peft_warnings_off():
        torch.manual_seed(seed)
        adapted = get_peft_model(copy.deepcopy(base), config)
        changed_base = getattr(config, "init_lora_weights", None) in ("pissa", "olora")
        initial = initial_pair(adapted) if changed_base else {}
        move_away(adapted, strength)
        adapted.create_or_update_model_card = lambda _: None  # half the time of saving, and nobody reads it
        adapted.save_pretrained(str(folder))
    if initial:
        add_initial_pair(folder, initial)
    return folder


def initial_pair(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """A and B of a model before it is trained, by the keys that they have in a file of ours."""
    state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(adapted).items()}
    return {key.replace("lora_A", "lora_initial_A").replace("lora_B", "lora_initial_B"): t for key, t in state.items()}


def add_initial_pair(folder: Path, initial: Mapping[str, torch.Tensor]) -> None:
    """To what PEFT has saved: docs/initial-pair.md."""
    weights = folder / "adapter_model.safetensors"
    own = {
        key: tensor
        for key, tensor in initial.items()
        if key.endswith(("lora_initial_A.weight", "lora_initial_B.weight"))
    }
    save_file(load_file(weights) | own, weights)


def peft_logits(base: PreTrainedModel, folder: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """PEFT's logits (batch, length, vocabulary) with the saved adapter alone on a copy of `base`.

    Those of virtual tokens before the input are left out.
    """
    oracle = _ORACLES.get(json.loads((folder / "adapter_config.json").read_text())["peft_type"])
    with _peft_warnings_off():
        adapted = oracle(base, folder) if oracle else PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    with torch.no_grad():
        logits: torch.Tensor = adapted(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
    return logits[:, -input_ids.shape[1] :]


def move_away(adapted: nn.Module, strength: float) -> None:
    """A random stand-in for training: moves each trainable tensor by an amount that suits what it is."""
    for name, parameter in adapted.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn_like(parameter)
        if "lora_magnitude_vector" in name or "ia3_l" in name:
            parameter.data.mul_(1 + 0.3 * strength * noise.clamp(-2, 2))
        elif "lora_A" in name or "lora_embedding_A" in name:
            parameter.data.copy_(noise / parameter.shape[-1] ** 0.5)
        elif "oft_" in name:  # the rows of a triangle are as many as its numbers' root, and long ones turn too far
            parameter.data.add_(0.5 * strength * noise / parameter.shape[-1] ** 0.5)
        elif "c3a_kernel" in name:  # divided by the input's width
            parameter.data.add_(4 * strength * noise)
        else:
            parameter.data.add_(0.3 * strength * noise)


def _peft_warnings_off() -> AbstractContextManager[None]:
    return warnings.catch_warnings(action="ignore")
