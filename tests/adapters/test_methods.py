"""Every method, lowered and applied by definition, gives the logits that PEFT gives with the adapter alone."""

import copy
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
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
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    RoadConfig,
    VBLoRAConfig,
    VeraConfig,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from server.adapters.format.checkpoint import Checkpoint, CheckpointLimits
from server.adapters.lowering import lower
from server.adapters.method import Lowered
from server.adapters.methods import discover, method_for
from server.ground.errors import AdapterRejected
from server.ops.site_ops.alone import run_alone
from tests.adapters.dense import edited_logits, sites_of
from tests.adapters.peft_adapters import (
    BIASED_KINDS,
    KINDS,
    LINEAR_KINDS,
    LLAMA_KINDS,
    OWN_KINDS,
    make_adapter,
    peft_logits,
    save_trained,
)

SMALL: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": False}
GQA: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 160}
IDS = torch.tensor([[1, 5, 9, 94, 3, 22, 47, 8], [7, 7, 2, 60, 61, 62, 0, 33]])


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **GQA, attention_bias=True, mlp_bias=True))


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SMALL, **GQA))


def phi3() -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**SMALL, **GQA, pad_token_id=0))


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32, tie_word_embeddings=False)
    return GPT2LMHeadModel(config)


@cache
def base(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A model of random weights, biases too (transformers starts those at zero, which would hide them)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
        model.train(False)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(0, 0.3)
            elif parameter.dim() == 2:
                parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def lowered(folder: Path, model: PreTrainedModel, limits: CheckpointLimits | None = None) -> Lowered:
    return lower(Checkpoint.open(folder, limits=limits), sites_of(model))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference relative to the largest logit."""
    return float((one - other).abs().max() / other.abs().max())


# One of each method where only the names and shapes of modules differ.
SOME_KINDS = (
    "lora",
    "lora-embedding-and-head",
    "rslora-patterns",
    "dora",
    "vera",
    "vera-drawn",
    "ia3",
    "ia3-attention",
    "road",
    "oft",
    "lokr",
)
CASES = [
    *[(llama, kind) for kind in (*KINDS, *LINEAR_KINDS, *OWN_KINDS, *BIASED_KINDS, *LLAMA_KINDS)],
    *[(gpt2, kind) for kind in (*KINDS, "lora-bias-only", "dora-bias-only")],
    *[(make, kind) for make in (phi3, qwen3) for kind in SOME_KINDS],
]


@pytest.mark.parametrize(("make", "kind"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_logits_equal_pefts(make: Callable[[], PreTrainedModel], kind: str, tmp_path: Path) -> None:
    model = base(make)
    folder = make_adapter(model, kind, tmp_path, seed=3)
    ours = edited_logits(model, lowered(folder, model).edits, IDS)
    theirs = peft_logits(model, folder, IDS)
    with torch.no_grad():
        without = model(input_ids=IDS).logits
    assert difference(ours, theirs) < 1e-5
    assert difference(without, theirs) > 1e-2, "the adapter does nothing, so the comparison says nothing"


Copies = Callable[[str], Path]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Copies:
    """One adapter of each kind for the Llama, made when it is first asked for."""
    return cache(lambda kind: make_adapter(base(llama), kind, tmp_path_factory.mktemp(kind), seed=1))


@pytest.fixture
def adapter(originals: Copies, tmp_path: Path) -> Copies:
    """A copy of one that the test may alter."""
    return lambda kind: shutil.copytree(originals(kind), tmp_path / kind)


@pytest.mark.parametrize(
    ("kind", "method", "rank", "num_warnings"),
    [
        ("lora", "lora", 4, 0),
        ("lora-patterns", "lora", 6, 0),
        ("lora-embedding-and-head", "lora", 4, 2),
        ("rslora", "rslora", 8, 0),
        ("dora-rslora", "dora", 4, 0),
        ("vera", "vera", 12, 0),
        ("ia3", "ia3", 0, 0),
        ("adalora-pruned", "adalora", 4, 0),
        ("loha", "loha", 9, 0),
        ("delta_lora", "delta_lora", 6, 0),
        ("road", "road", 0, 0),
        ("oft", "oft", 0, 0),
        ("oft-shared", "oft", 0, 2),
        ("lokr-both", "lokr", 0, 0),
        ("miss", "miss", 6, 0),
        ("miss-mini", "miss", 4, 0),
        ("gralora-hybrid", "gralora", 35, 0),
    ],
)
def test_a_lowered_adapter_says_what_it_is(
    kind: str, method: str, rank: int, num_warnings: int, adapter: Copies
) -> None:
    model = base(llama)
    made = lowered(adapter(kind), model)
    assert (made.method, made.rank, len(made.warnings)) == (method, rank, num_warnings)


@pytest.mark.parametrize(
    ("config", "warning"),
    [
        ({"target_modules": ["fc1", "layers.0.fc2"]}, "target_modules names none"),
        ({"exclude_modules": ["self_attn.q_proj"]}, "exclude_modules names model.layers.0.self_attn.q_proj"),
        ({"layers_to_transform": [0, 7]}, r"layers_to_transform leaves out the layer of model.layers.1\."),
        ({"layers_to_transform": 0}, "layers_to_transform"),
        ({"lora_bias": True}, "lora_bias is true"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_warned_of_and_the_tensors_decide(
    config: Mapping[str, Any], warning: str, adapter: Copies
) -> None:
    model, folder = base(llama), adapter("lora")
    before = lowered(folder, model)
    after = lowered(altered(folder, config), model)
    assert [bool(re.search(warning, text)) for text in after.warnings] == [True]
    assert after.edits.keys() == before.edits.keys()


def test_the_bases_own_tables_in_a_file_do_not_count_as_parameters(adapter: Copies) -> None:
    model = base(llama)
    folder = adapter("lora-embedding-and-head")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sum("base_layer" in key for key in tensors) == 2
    own = sum(tensor.numel() for key, tensor in tensors.items() if "base_layer" not in key)
    assert lowered(folder, model).num_parameters == own


@pytest.mark.parametrize("kind", ["vera", "vera-drawn"])
def test_veras_sites_of_equal_width_share_one_tensor(kind: str, adapter: Copies) -> None:
    model = base(llama)
    edits = lowered(adapter(kind), model).edits
    query, other = edits["model.layers.0.self_attn.q_proj"], edits["model.layers.1.mlp.up_proj"]
    assert query.down is other.down
    assert query.up is edits["model.layers.1.self_attn.q_proj"].up
    assert query.mid_scale is not other.mid_scale


def altered(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor | None] | None = None,
    spell: Callable[[str], str] = str,
) -> Path:
    """The adapter with config fields and tensors replaced (None removes a tensor) and its keys spelled otherwise."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(config or {})))
    path = folder / "adapter_model.safetensors"
    changed = {name: tensor for name, tensor in (load_file(path) | dict(tensors or {})).items() if tensor is not None}
    save_file({spell(name): tensor for name, tensor in changed.items()}, path)
    return folder


SPELLINGS: dict[str, Callable[[str], str]] = {
    "without a prefix": lambda key: key.removeprefix("base_model.model."),
    "prefix twice": lambda key: "base_model.model." + key,
    "data parallel": lambda key: "module." + key,
    "compiled": lambda key: "_orig_mod." + key,
    "sharded": lambda key: key.replace("self_attn", "_fsdp_wrapped_module.self_attn"),
    "adapter name": lambda key: key.replace(".weight", ".default.weight"),
    "adapter name on parameters": lambda key: key if key.endswith("weight") else key + ".default",
    "old magnitudes": lambda key: key + ".weight" if key.endswith("magnitude_vector") else key,
    "new magnitudes": lambda key: key + ".default.weight" if key.endswith("magnitude_vector") else key,
    "bare model": lambda key: key.replace("base_model.model.model.", "base_model.model."),
    "transformers 4 multimodal": lambda key: key.replace(".model.model.", ".model.language_model.model."),
    "transformers 5 multimodal": lambda key: key.replace(".model.model.", ".model.model.language_model."),
}


@pytest.mark.parametrize("kind", ["lora", "dora", "vera", "ia3"])
@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_keys_of_every_generation_mean_the_same(kind: str, spell: Callable[[str], str], adapter: Copies) -> None:
    model = base(llama)
    folder = adapter(kind)
    plain = lowered(folder, model)
    other = lowered(altered(folder, spell=spell), model)
    assert plain.edits.keys() == other.edits.keys()
    for path, edit in plain.edits.items():
        for name, tensor in edit.tensors().items():
            assert tensor.equal(other.edits[path].tensors()[name])


# What these write beside r, lora_alpha and target_modules.
EXPORTS: dict[str, dict[str, Any]] = {
    "Unsloth": {
        "alpha_pattern": {}, "arrow_config": None, "auto_mapping": {
            "base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama",
            "unsloth_fixed": True,
        },
        "base_model_name_or_path": "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "bias": "none", "corda_config": None,
        "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
        "layers_to_transform": None, "loftq_config": {}, "lora_bias": False, "lora_dropout": 0, "megatron_config": None,
        "megatron_core": "megatron.core", "modules_to_save": None, "peft_version": "0.18.0", "qalora_group_size": 16,
        "rank_pattern": {}, "revision": None, "target_parameters": None, "task_type": "CAUSAL_LM",
        "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
    },
    "Axolotl, with PEFT of 2023": {
        "auto_mapping": None, "base_model_name_or_path": "NousResearch/Llama-2-7b-hf", "bias": "none",
        "fan_in_fan_out": None, "inference_mode": True, "init_lora_weights": True, "layers_pattern": None,
        "layers_to_transform": None, "lora_dropout": 0.05, "modules_to_save": None, "revision": None,
        "task_type": "CAUSAL_LM",
    },
    "PEFT's first": {
        "base_model_name_or_path": "decapoda-research/llama-7b-hf", "bias": "none", "enable_lora": None,
        "fan_in_fan_out": False, "inference_mode": True, "lora_dropout": 0.05, "merge_weights": False,
        "modules_to_save": None, "task_type": "CAUSAL_LM",
    },
}  # fmt: skip


@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS.keys())
def test_a_config_as_other_tools_export_it_means_the_same(export: dict[str, Any], adapter: Copies) -> None:
    model = base(llama)
    folder = adapter("lora")
    plain = lowered(folder, model)
    path = folder / "adapter_config.json"
    own = json.loads(path.read_text())
    path.write_text(
        json.dumps({name: own[name] for name in ("peft_type", "r", "lora_alpha", "target_modules")} | export)
    )
    other = lowered(folder, model)
    assert plain.edits.keys() == other.edits.keys()
    for site, edit in plain.edits.items():
        assert all(tensor.equal(other.edits[site].tensors()[name]) for name, tensor in edit.tensors().items())


def test_modules_named_by_unsloths_pattern_are_found(adapter: Copies) -> None:
    """As it writes it for models that might see: every linear of language, attention and MLP."""
    model = base(llama)
    folder = adapter("lora")
    names = "|".join(json.loads((folder / "adapter_config.json").read_text())["target_modules"])
    parts = "(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    pattern = (
        rf"(?:.*?(?:language|text).*?{parts}.*?(?:{names}).*?)|"
        rf"(?:\bmodel\.layers\.[\d]{{1,}}\.{parts}\.(?:(?:{names})))"
    )
    plain = lowered(folder, model)
    assert lowered(altered(folder, config={"target_modules": pattern}), model).edits.keys() == plain.edits.keys()


def test_tensors_that_only_training_used_change_nothing(adapter: Copies) -> None:
    model = base(llama)
    folder = adapter("lora")
    plain = lowered(folder, model)
    extra = {f"{Q}.lora_velora_embed": torch.ones(3), f"{Q}.lora_monteclora_sampler.std": torch.ones(2)}
    assert lowered(altered(folder, tensors=extra), model).num_parameters == plain.num_parameters


def test_an_output_scale_and_an_input_scale_are_told_apart_by_shape(adapter: Copies) -> None:
    model = base(llama)
    folder = adapter("ia3-attention")
    key = f"{Q}.ia3_l"  # 64 x 64: only the orientation tells
    out = lowered(folder, model).edits["model.layers.0.self_attn.q_proj"]
    turned = altered(folder, tensors={key: load_file(folder / "adapter_model.safetensors")[key].T.contiguous()})
    into = lowered(turned, model).edits["model.layers.0.self_attn.q_proj"]
    assert out.tensors().keys() == {"out_scale"}
    assert into.tensors().keys() == {"in_scale"}


Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
ELSEWHERE = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
TABLE = "base_model.model.lm_head.base_layer.weight"
BIAS = f"{Q}.base_layer.bias"
R = f"{Q}.oft_R.weight"

# kind, config fields to set, tensors to set, words of the sentence
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor | None], str]] = {
    "method": ("lora", {"peft_type": "NEW"}, {}, "peft_type = 'NEW' .* the methods are "),
    "no method": ("lora", {"peft_type": None}, {}, "peft_type = None"),
    "layer_replication": ("lora", {"layer_replication": [[0, 2]]}, {}, "layer_replication .* number of layers"),
    "pissa": ("lora", {"init_lora_weights": "pissa"}, {}, "'pissa' .* no lora_initial_A .* path_initial_model"),
    "pissa_niter": ("lora", {"init_lora_weights": "pissa_niter_4"}, {}, "'pissa_niter_4' .* base's weights"),
    "olora": ("lora", {"init_lora_weights": "olora"}, {}, "'olora' .* base's weights"),
    "corda": ("lora", {"init_lora_weights": "corda"}, {}, "'corda' .* base's weights"),
    "loftq": ("lora", {"init_lora_weights": "loftq"}, {}, "'loftq' .* base's weights"),
    "lora_ga": ("lora", {"init_lora_weights": "lora_ga"}, {}, "'lora_ga' .* base's weights"),
    "init of nobody": ("lora", {"init_lora_weights": "warp"}, {}, "'warp' .* none of PEFT's inits, .* to true"),
    "kasa": ("lora", {"kasa_config": {"beta": 1e-4}}, {}, "kasa_config .* base's weights"),
    "modules_to_save": ("lora", {"modules_to_save": ["lm_head"]}, {}, "names lm_head, and the file has no weight"),
    "modules_to_save in vera": ("vera", {"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
    "modules_to_save in ia3": ("ia3", {"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
    "trainable tokens": ("lora", {"trainable_token_indices": [1]}, {}, "trainable_token_indices"),
    "target_parameters": ("lora", {"target_parameters": ["experts.up"]}, {}, "target_parameters .* target modules"),
    "alora of no ids": ("lora", {"alora_invocation_tokens": "go"}, {}, "alora_invocation_tokens .* list of token ids"),
    "alora of too many": (
        "lora", {"alora_invocation_tokens": list(range(300))}, {}, "has 300 tokens; the limit is 256"
    ),
    "alora with a bias": (
        "lora", {"alora_invocation_tokens": [5], "bias": "all"}, {Q + ".bias": torch.ones(64)},
        "q_proj.bias in the file: PEFT applies that before the invocation",
    ),
    "a whole weight that is not named": (
        "lora", {"modules_to_save": ["lm_head"]},
        {"base_model.model.lm_head.weight": torch.ones(96, 64), f"{Q}.weight": torch.ones(64, 64)},
        "does not name .*q_proj",
    ),
    "a whole weight beside a pair": (
        "lora", {"modules_to_save": ["q_proj"]}, {f"{Q}.weight": torch.ones(64, 64)}, "for the same module"
    ),
    "token ids beyond all": (
        "lora", {"trainable_token_indices": [10**400]},
        {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 64)},
        "must be a list of token ids",
    ),
    "r beyond all": ("lora", {"r": 10**400}, {}, "r in adapter_config.json must be a whole number"),
    "alora with dora": ("dora", {"alora_invocation_tokens": [5]}, {}, "alora_invocation_tokens and use_dora"),
    "arrow": ("lora", {"arrow_config": {"top_k": 2}}, {}, "arrow_config"),
    "qalora": ("lora", {"use_qalora": True}, {}, "use_qalora"),
    "tied adapters": ("lora", {"ensure_weight_tying": True}, {}, "ensure_weight_tying"),
    "unknown field": ("lora", {"use_warp": {"x": 1}}, {}, "use_warp = .* not known, .* remove it"),
    "unknown field in vera": ("vera", {"use_warp": 1}, {}, "use_warp"),
    "unknown field in ia3": ("ia3", {"use_warp": "yes"}, {}, "use_warp"),
    "bias": ("lora", {"bias": "some"}, {}, "bias = 'some' .* none, all or lora_only"),
    "bias in vera": ("vera", {"bias": "vera_only"}, {}, "bias = 'vera_only'"),
    "r of words": ("lora", {"r": "8"}, {}, "r in adapter_config.json must be a whole number"),
    "r of zero": ("lora", {"r": 0}, {}, "r in adapter_config.json must be a whole number of at least 1, not 0"),
    "r of true": ("lora", {"r": True}, {}, "not True"),
    "alpha of words": ("lora", {"lora_alpha": "8"}, {}, "lora_alpha in adapter_config.json must be a finite number"),
    "alpha beyond floats": ("lora", {"lora_alpha": 10**400}, {}, "lora_alpha"),
    "rslora of words": ("lora", {"use_rslora": "yes"}, {}, "use_rslora in adapter_config.json must be true or false"),
    "dora of words": ("dora", {"use_dora": "yes"}, {}, "use_dora in adapter_config.json must be true or false"),
    "pattern of lists": ("lora", {"rank_pattern": [8]}, {}, "rank_pattern in adapter_config.json must be an object"),
    "pattern value": ("lora", {"alpha_pattern": {"q_proj": None}}, {}, "alpha_pattern .* finite number, not None"),
    "pattern syntax": ("lora", {"rank_pattern": {"(q": 8}}, {}, "rank_pattern .* not supported at character"),
    "rank by config": ("lora", {"r": 8}, {}, "has rank 4, and r or rank_pattern .* says 8"),
    "rank by pattern": ("lora", {"rank_pattern": {"q_proj": 2}}, {}, "q_proj.lora_A.weight has rank 4, .* says 2"),
    "scalar": ("lora", {}, {A: torch.tensor(1.0)}, "q_proj.lora_A.weight has rank 0"),
    "width": ("lora", {}, {A: torch.ones(4, 63)}, r"q_proj.lora_A.weight has the shape \[4, 63\], .* needs \[4, 64\]"),
    "height": ("lora", {}, {B: torch.ones(32, 4)}, r"q_proj.lora_B.weight has the shape \[32, 4\], .* \[64, 4\]"),
    "convolution": ("lora", {}, {A: torch.ones(4, 64, 1)}, r"shape \[4, 64, 1\]"),
    "no partner": ("lora", {}, {B: None}, "q_proj.lora_A.weight has no partner"),
    "NaN": ("lora", {}, {B: torch.full((64, 4), math.nan)}, "q_proj.lora_B.weight contains NaN or infinity"),
    "overflow": ("lora", {"lora_alpha": 1e30}, {B: torch.full((64, 4), 1e30)}, "up at .*q_proj is not finite"),
    "no such layer": ("lora", {}, {ELSEWHERE: torch.ones(4, 64)}, "no module model.layers.7.self_attn.q_proj"),
    "unknown tensor": ("lora", {}, {f"{Q}.lora_C.weight": torch.ones(4)}, "lora has no use for .*q_proj.lora_C.weight"),
    "saved head": ("lora", {}, {"base_model.model.lm_head.weight": torch.ones(96, 64)}, "no use for .*lm_head.weight"),
    "saved weight": ("lora", {}, {f"{Q}.base_layer.weight": torch.ones(64, 64)}, "no use for .*base_layer.weight"),
    "resized vocabulary": (
        "lora-embedding-and-head", {}, {TABLE: torch.ones(97, 64)}, r"lm_head.base_layer.weight .*\[96, 64\].* resized"
    ),
    "bias on a norm": ("lora", {}, {"base_model.model.model.norm.bias": torch.ones(64)}, "no module model.norm"),
    "magnitude in lora": ("lora", {}, {f"{Q}.lora_magnitude_vector": torch.ones(64)}, "no use for .*magnitude"),
    "dora without magnitude": ("dora", {}, {f"{Q}.lora_magnitude_vector": None}, "no lora_magnitude_vector for"),
    "module twice": (
        "lora", {}, {A.replace("model.model.model.", "model.model."): torch.ones(4, 64)}, "are for one module"
    ),
    "vera without projection": ("vera", {}, {"base_model.vera_B": None}, "save_projection is true .* no vera_B"),
    "vera with unused projection": ("vera", {"save_projection": False}, {}, "vera has no use for base_model.vera_A"),
    "vera of other width": ("vera", {}, {"base_model.vera_A": torch.ones(12, 64)}, r"vera_A has the shape \[12, 64\]"),
    "vera of other rank": ("vera", {"r": 13}, {}, "vera_A has the shape"),
    "vera half": ("vera", {}, {f"{Q}.vera_lambda_d": None}, "q_proj.vera_lambda_b has no partner"),
    "vera key": ("vera-drawn", {"projection_prng_key": 1 << 70}, {}, "projection_prng_key .* 64-bit"),
    "vera on an embedding": (
        "vera", {}, {"base_model.model.model.embed_tokens.vera_lambda_d": torch.ones(12)}, "linear modules only"
    ),
    "ia3 shape": ("ia3", {}, {f"{Q}.ia3_l": torch.ones(64)}, r"ia3_l has the shape \[64\], .* \[1, 64\] on its input"),
    "ia3 on an embedding": (
        "ia3", {}, {"base_model.model.model.embed_tokens.ia3_l": torch.ones(64, 1)}, r"embed_tokens \(embedding\)"
    ),
    "adalora of more rank than it began with": ("adalora", {"init_r": 3}, {}, "has rank 4, .* at most init_r = 3"),
    "adalora of no rank": ("adalora", {}, {f"{Q}.lora_E": torch.tensor(1.0)}, r"lora_E has the shape \[\]"),
    "adalora with a module half pruned": ("adalora", {}, {f"{Q}.lora_E": torch.ones(0, 1)}, "lora_E is empty, shape"),
    "adalora without singular values": ("adalora", {}, {f"{Q}.lora_E": None}, r"no partner: .* no .*q_proj.lora_E"),
    "adalora on an embedding": (
        "adalora", {}, {"base_model.model.model.embed_tokens.lora_A": torch.ones(4, 96)}, "is no linear module"
    ),
    "adalora with dora": ("adalora", {"use_dora": True}, {}, "use_dora = True .* AdaLoRA has no such option"),
    "bias in adalora": ("adalora", {"bias": "all"}, {}, "bias = 'all' .* AdaLoRA's biases are not served yet"),
    "loha of other rank": ("loha", {"r": 4}, {}, "has rank 3, and r or rank_pattern .* says 4"),
    "loha of a scalar": ("loha", {}, {f"{Q}.hada_w1_b": torch.tensor(1.0)}, "hada_w1_b has rank 0"),
    "loha of other width": ("loha", {}, {f"{Q}.hada_w2_a": torch.ones(63, 3)}, r"hada_w2_a has the shape \[63, 3\]"),
    "loha of r^2 beyond the limit": (
        "loha", {"rank_pattern": {"0.self_attn.q_proj": 23}}, {f"{Q}.hada_w1_b": torch.ones(23, 64)},
        r"has rank 529; the limit is 512. A LoHa of r = 23 is a LoRA of r\^2. Train with .* or merge it",
    ),
    "loha of a convolution": ("loha", {}, {f"{Q}.hada_t1": torch.ones(3, 3, 1, 1)}, "no use for .*hada_t1"),
    "delta-lora without the pair of its start": (
        "delta_lora", {}, {f"{Q}.lora_start_A.weight": None, f"{Q}.lora_start_B.weight": None},
        "q_proj has no lora_start_A and lora_start_B, .* save it with the adapter",
    ),
    "delta-lora with half a start": (
        "delta_lora", {"start_step": 0}, {f"{Q}.lora_start_A.weight": None}, "has no lora_start_A"
    ),
    "delta-lora without its step size": ("delta_lora", {"delta_lambda": None}, {}, "delta_lambda .* finite number"),
    "delta-lora without alpha": ("delta_lora", {"lora_alpha": None}, {}, "lora_alpha .* finite number"),
    "delta-lora from a step of words": ("delta_lora", {"start_step": "5"}, {}, "start_step .* whole number"),
    "delta-lora of other rank": ("delta_lora", {"r": 4}, {}, "lora_A.weight has rank 3, and r in .* says 4"),
    "delta-lora of a rank beyond the limit": ("delta_lora", {"r": 257}, {}, "has rank 514; .* it counts twice"),
    "delta-lora with biases": ("delta_lora", {"bias": "all"}, {}, "Delta-LoRA's biases"),
    "beft of other width": ("beft", {}, {f"{Q}.beft_bias": torch.ones(1, 63)}, r"beft_bias has the shape \[1, 63\]"),
    "beft with a rank": ("beft", {"r": 4}, {}, "r = 4 .* not known"),
    "hra of other rank": ("hra", {"r": 4}, {}, "hra_u has rank 5, and r in .* says 4"),
    "hra of a scalar": ("hra", {}, {f"{Q}.hra_u": torch.tensor(1.0)}, "hra_u has rank 0"),
    "hra without a direction": ("hra", {}, {f"{Q}.hra_u": torch.zeros(64, 5)}, "hra_u has a column of length zero"),
    "bias in hra": ("hra", {"bias": "hra_only"}, {}, "HRA's biases are not served yet"),
    "miss of other rank": ("miss", {"r": 5}, {}, "miss_block has rank 6, and r in .* says 5"),
    "miss of other width": ("miss", {}, {f"{Q}.miss_block": torch.ones(6, 4)}, r"miss_block has the shape \[6, 4\]"),
    "miss, bat": ("miss", {"init_weights": "bat"}, {}, "'bat' .* of full rank; .* Merge the adapter"),
    "miss, mini, of no divisor": ("miss-mini", {"mini_r": 5}, {}, "mini_r = 5 .* does not divide 64"),
    "delora of other rank": ("delora", {"r": 5}, {}, "delora_A has rank 4, and r or rank_pattern .* says 5"),
    "delora without norms": ("delora", {}, {f"{Q}.delora_w_norm": None}, r"no partner: .*q_proj.delora_w_norm"),
    "delora of two strengths": ("delora", {}, {f"{Q}.delora_lambda": torch.ones(2)}, "delora_lambda has the shape"),
    "gralora of other rank": ("gralora", {"r": 8}, {}, "gralora_A has rank 4, and r in .* says 8"),
    "gralora of no divisor": ("gralora", {"gralora_k": 3}, {}, "gralora_k = 3 .* does not divide r = 4"),
    "gralora of blocks that do not fit": (
        "gralora", {"gralora_k": 60, "r": 60}, {f"{Q}.gralora_A": torch.ones(60, 1, 60)}, "gralora_A has rank 4"
    ),
    "gralora without the hybrid pair": ("gralora", {"hybrid_r": 3}, {}, "hybrid_r is set .* no .*A_general"),
    "gralora of a hybrid that is not set": ("gralora-hybrid", {"hybrid_r": 0}, {}, "no use for .*general"),
    "gralora beyond the limit": (
        "gralora", {"r": 512}, {"base_model.model.model.layers.0.mlp.down_proj.gralora_A": torch.ones(2, 80, 512)},
        "has rank 1024; the limit is 512. GraLoRA's is gralora_k times r",
    ),
    "vblora of other rank": ("vblora", {"r": 4}, {}, "vblora_logits_A has rank 3, and r in .* says 4"),
    "vblora without its bank": ("vblora", {}, {"base_model.vblora_vector_bank": None}, "no vblora_vector_bank"),
    "vblora of other bank": ("vblora", {"num_vectors": 21}, {}, r"vector_bank has the shape \[20, 8\]"),
    "vblora of too many": ("vblora", {"topk": 21}, {}, "topk = 21 .* more than num_vectors = 20"),
    "vblora of weights": ("vblora", {"save_only_topk_weights": True}, {}, "save the logits instead"),
    "road group": ("road", {"group_size": 24}, {}, "group_size = 24 .* the 64 outputs of model.layers.0"),
    "road of odd groups": ("road", {"group_size": 1}, {}, "group_size = 1 .* two halves"),
    "road of another variant": ("road", {"variant": "road_2"}, {}, r"road_theta has the shape \[32\]"),
    "road of no variant": ("road", {"variant": "road_3"}, {}, "variant = 'road_3' .* one of road_1, road_2, road_4"),
    "road half": ("road", {}, {f"{Q}.road_alpha": None}, "q_proj.road_theta has no partner"),
    "road on an embedding": (
        "road", {}, {"base_model.model.model.embed_tokens.road_theta": torch.ones(32)}, "is no linear module"
    ),
    "oft shape": ("oft", {}, {R: torch.ones(4, 119)}, r"oft_R.weight has the shape \[4, 119\]: that is not triangles"),
    "oft of other width": ("oft", {}, {R: torch.ones(5, 120)}, r"\[5, 120\].*blocks of b that make up the 64"),
    "oft of a scalar": ("oft", {}, {R: torch.tensor(1.0)}, r"oft_R.weight has the shape \[\]"),
    "oft not shared": ("oft", {"block_share": True}, {}, r"that is not one triangle \(block_share\)"),
    "oft shared": ("oft-shared", {"block_share": False}, {}, "that is not triangles of"),
    "oft terms": ("oft", {"num_cayley_neumann_terms": 1 << 40}, {}, "num_cayley_neumann_terms = .* the limit is 64"),
    "oft of no bound": ("oft-constrained", {"eps": None}, {}, "eps in adapter_config.json must be a finite number"),
    "oft bias": ("oft", {"bias": "some"}, {}, "bias = 'some' .* none, all or oft_only"),
    "oft out of range": ("oft", {}, {R: torch.full((4, 120), 1e20)}, "blocks of block_rotation at .* is not finite"),
    "oft of an embedding on a linear": (
        "oft", {}, {f"{Q}.oft_embedding_R.weight": torch.ones(4, 120)}, "oft_embedding_R.weight is not for .*q_proj"
    ),
    "oft on a norm": (
        "oft", {}, {"base_model.model.model.norm.oft_R.weight": torch.ones(4, 120)}, "no module model.norm"
    ),
    "boft factors": ("boft", {}, {f"{Q}.boft_R": torch.ones(2, 8, 8, 8)}, "has 2 butterfly factors, and one is served"),
    "boft of other width": ("boft", {}, {f"{Q}.boft_R": torch.ones(1, 9, 8, 8)}, r"\[1, 9, 8, 8\], .* the 64 inputs"),
    "boft half": ("boft", {}, {f"{Q}.boft_s": None}, "boft_R has no partner"),
    "bias in boft": ("boft", {"bias": "boft_only"}, {}, "BOFT's biases are not served yet"),
    "c3a of other width": ("c3a", {}, {f"{Q}.c3a_kernel": torch.ones(4, 4, 15)}, r"circulant at .*\[4, 4, 15\], whose"),
    "bias in c3a": ("c3a", {"bias": "c3a_only"}, {}, "C3A's biases are not served yet"),
    "lokr of other width": (
        "lokr-whole", {}, {f"{Q}.lokr_w2": torch.ones(8, 9)}, r"make \[64, 72\], and this base needs \[64, 64\]"
    ),
    "lokr half": ("lokr-both", {}, {f"{Q}.lokr_w1_a": None}, "must have either lokr_w1, or lokr_w1_a and lokr_w1_b"),
    "lokr too much": (
        "lokr-both", {}, {f"{Q}.lokr_w1": torch.ones(4, 4)}, "must have either lokr_w1, or lokr_w1_a and lokr_w1_b"
    ),
    "lokr rank": ("lokr", {"r": 4}, {}, "lokr_w2_a has rank 3, and r or rank_pattern in .* says 4"),
    "lokr vector": ("lokr-whole", {}, {f"{Q}.lokr_w1": torch.ones(64)}, r"lokr_w1 has the shape \[64\]"),
    "lokr convolution": ("lokr", {}, {f"{Q}.lokr_t2": torch.ones(3, 3, 3, 3)}, "lokr has no use for .*lokr_t2"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "config", "tensors", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_applied_exactly_is_refused_by_name(
    kind: str, config: dict[str, Any], tensors: dict[str, torch.Tensor | None], words: str, adapter: Copies
) -> None:
    folder = altered(adapter(kind), config, tensors)
    with pytest.raises(AdapterRejected, match=words) as refused:
        lowered(folder, base(llama))
    assert len(refused.value.message) < 400


@pytest.mark.parametrize("written_by", ["0.17.1", "0.9", None, "new"])
def test_an_oft_adapter_from_before_the_present_series_is_warned_of(written_by: str | None, adapter: Copies) -> None:
    folder = altered(adapter("oft"), {"peft_version": written_by})
    (warning,) = lowered(folder, base(llama)).warnings
    assert "does not say that it was written by PEFT 0.18 or later" in warning
    assert lowered(altered(folder, {"use_cayley_neumann": False}), base(llama)).warnings == ()


@pytest.mark.parametrize(
    ("kind", "words"),
    [("road", "group_size = 64"), ("lokr", "says 8"), ("oft", "no oft_block_size: .* before PEFT 0.14")],
)
def test_a_config_that_says_nothing_means_what_peft_would_take_it_for(kind: str, words: str, adapter: Copies) -> None:
    """PEFT writes every field; what is missing has PEFT's default, which here is not what was trained with."""
    folder = adapter(kind)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({"peft_type": config["peft_type"]}))
    with pytest.raises(AdapterRejected, match=words):
        lowered(folder, base(llama))


def test_factors_whose_product_is_large_stay_factors(adapter: Copies) -> None:
    """Or a small file would ask for as much memory as the base's own weights take."""
    model = copy.deepcopy(base(llama))
    wide = nn.Linear(256, 256)
    model.model.layers[0].self_attn.q_proj = wide
    factors = {"lokr_w1_a": (256, 3), "lokr_w1_b": (3, 256), "lokr_w2_a": (1, 3), "lokr_w2_b": (3, 1)}
    folder = adapter("lokr")
    none = dict.fromkeys(load_file(folder / "adapter_model.safetensors"))
    own = {f"{Q}.{name}": torch.randn(shape) for name, shape in factors.items()}
    edit = lowered(altered(folder, tensors={**none, **own}), model).edits["model.layers.0.self_attn.q_proj"]
    assert edit.ops["kronecker"].keys() == {"left_up", "left_down", "right"}
    x, exact = torch.randn(5, 256), {name: factor.double() for name, factor in own.items()}
    left = exact[f"{Q}.lokr_w1_a"] @ exact[f"{Q}.lokr_w1_b"]
    right = exact[f"{Q}.lokr_w2_a"] @ exact[f"{Q}.lokr_w2_b"]
    site = sites_of(model)["model.layers.0.self_attn.q_proj"]
    found = run_alone(edit.ops, wide, x, site)
    expected = wide(x) + 7 / 3 * x.double() @ torch.kron(left, right).T
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_a_bias_for_a_linear_without_one_is_refused(tmp_path: Path) -> None:
    folder = altered(make_adapter(base(qwen3), "lora", tmp_path, seed=1), tensors={BIAS: torch.ones(64)})
    with pytest.raises(AdapterRejected, match=r"model.layers.0.self_attn.q_proj has no bias in this base"):
        lowered(folder, base(qwen3))


@pytest.mark.parametrize("kind", ["lora", "dora", "vera"])
def test_the_limit_on_ranks_is_named(kind: str, adapter: Copies) -> None:
    folder = adapter(kind)
    with pytest.raises(AdapterRejected, match="the limit is 3. Use a smaller r"):
        lowered(folder, base(llama), CheckpointLimits(max_rank=3))


def test_a_huge_rank_draws_no_projection(adapter: Copies) -> None:
    folder = altered(adapter("vera-drawn"), {"r": 1 << 40})
    with pytest.raises(AdapterRejected, match="r = 1099511627776 in adapter_config.json; the limit is 512"):
        lowered(folder, base(llama))


def test_an_adapter_of_nothing_is_refused(tmp_path: Path) -> None:
    save_file({f"{Q}.lora_velora_embed": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(AdapterRejected, match="edits no site of the base"):
        lowered(tmp_path, base(llama))


def test_a_row_of_length_zero_has_no_direction(tmp_path: Path) -> None:
    model = copy.deepcopy(base(llama))
    model.get_parameter("model.layers.0.self_attn.q_proj.weight").data[3] = 0
    folder = make_adapter(model, "dora", tmp_path, seed=1)
    with pytest.raises(AdapterRejected, match="q_proj: .* row of length zero"):
        lowered(altered(folder, tensors={B: torch.zeros(64, 4)}), model)


def reason(folder: Path) -> str:
    """Why the adapter is refused; empty if it is not."""
    try:
        lowered(folder, base(llama))
    except AdapterRejected as refused:
        return refused.message
    return ""


# An adapter of each config class of PEFT's that is served.
CONFIGS: list[tuple[str, type[PeftConfig]]] = [
    ("lora", LoraConfig),
    ("vera", VeraConfig),
    ("ia3", IA3Config),
    ("adalora", AdaLoraConfig),
    ("loha", LoHaConfig),
    ("beft", BeftConfig),
    ("hra", HRAConfig),
    ("miss", MissConfig),
    ("delora", DeloraConfig),
    ("gralora", GraloraConfig),
    ("vblora", VBLoRAConfig),
    ("road", RoadConfig),
    ("oft", OFTConfig),
    ("lokr", LoKrConfig),
    ("boft", BOFTConfig),
    ("c3a", C3AConfig),
]


@pytest.mark.parametrize(("kind", "config"), CONFIGS)
def test_every_field_that_peft_has_was_thought_of(kind: str, config: type[PeftConfig], adapter: Copies) -> None:
    folder = adapter(kind)
    plain = (folder / "adapter_config.json").read_text()
    for field in dataclasses.fields(config):
        (folder / "adapter_config.json").write_text(plain)
        assert "not known" not in reason(altered(folder, {field.name: "peculiar"}))


def test_the_method_in_the_recipe_works_as_it_is_printed(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    recipe = (root / "docs" / "adding-a-method.md").read_text().split("```python\n")[1].split("```")[0]
    assert recipe == (root / "server" / "adapters" / "methods" / "beft.py").read_text()
    printed: dict[str, Any] = {}
    exec(recipe, printed)
    model = base(llama)
    folder = save_trained(model, BeftConfig(target_modules=["q_proj", "down_proj"]), tmp_path, seed=1)
    checkpoint = Checkpoint.open(folder)
    edits = printed["METHOD"].lower(checkpoint, sites_of(model)).edits
    assert checkpoint.leftover() == ()
    assert difference(edited_logits(model, edits, IDS), peft_logits(model, folder, IDS)) < 1e-5


def test_every_module_with_a_method_is_discovered_and_claims_its_own_configs() -> None:
    assert {method.name for method in discover()} >= {"lora", "dora", "vera", "ia3"}
    assert method_for({"peft_type": "LORA"}).name == "lora"
    assert method_for({"peft_type": "LORA", "use_dora": True}).name == "dora"
