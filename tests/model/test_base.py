"""The base: transformers' own logits, and every model that would answer wrongly in a batch refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from server.ground.errors import StartupRefused
from server.model.architectures import SERVED
from server.model.attention import IMPLEMENTATION
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from tests.models import ARCHITECTURES, EOS_ID, MAX_CONTEXT, VOCAB_SIZE, save_model

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def load(folder: Path, dtype: torch.dtype | None = torch.float32) -> Base:
    return Base.load(BaseOptions(str(folder), Quantization.NONE, dtype))


def causal_lm(config: PreTrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Saves a model with weights that tell positions and tokens apart."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


# The same answers


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_pass_without_edits_gives_transformers_logits(architecture: str, model_folder: Callable[[str], Path]) -> None:
    base = load(model_folder(architecture))
    ids = torch.randint(0, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        own = AutoModelForCausalLM.from_pretrained(model_folder(architecture), attn_implementation="eager")(ids).logits
    packed = base._probe(list(ids))  # on the fused products, in one pass
    torch.testing.assert_close(packed, own.flatten(0, 1), rtol=1e-5, atol=1e-5 * float(own.abs().max()))


# Law 8: no silent architecture


REFUSED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "bloom": (
        lambda: transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        "BloomForCausalLM does not call transformers' attention interface in every layer",
    ),
    "gpt-j": (
        lambda: transformers.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=8),
        "models of type 'gptj' do not use transformers' attention interface",
    ),
    "mpt": (
        lambda: transformers.MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
        "MptForCausalLM cannot run packed batches with paged attention",
    ),
    "lfm2": (
        lambda: transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
        r"Lfm2ForCausalLM does not call .* in every layer \(it does in \[1\]\)",
    ),
    "deepseek-v3": (
        lambda: transformers.DeepseekV3Config(
            **{**SMALL, "num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
            n_group=1, topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        "DeepseekV3Attention has keys of width 16 and values of width 8",
    ),
    "gpt-oss": (
        lambda: transformers.GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
        "GptOssAttention has attention sinks",
    ),
    "llama4": (
        lambda: transformers.Llama4TextConfig(**SMALL, head_dim=8, intermediate_size_mlp=48, moe_layers=[]),
        "Llama4ForCausalLM attends within chunks of 8192 tokens",
    ),
    "bert": (
        lambda: transformers.BertConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        ),
        r"BertSelfAttention looks ahead \(it is not causal\)",
    ),
    "falcon": (
        lambda: transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        "models of type 'falcon' do not use transformers' attention interface",
    ),
    "qwen3-next": (
        lambda: transformers.Qwen3NextConfig(
            **SMALL, head_dim=8, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
            linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        ),
        r"Qwen3NextForCausalLM does not call .* in every layer \(it does in \[1\]\)",
    ),
    "mamba": (
        lambda: transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
        r"MambaForCausalLM does not call .* in every layer \(it does in none\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(REFUSED))
@pytest.mark.filterwarnings("ignore")  # transformers' own remarks about configs as odd as these
def test_an_architecture_that_cannot_share_a_batch_is_refused_by_name(family: str, tmp_path: Path) -> None:
    config, sentence = REFUSED[family]
    folder = save(causal_lm(config()), tmp_path)
    with pytest.raises(StartupRefused, match=sentence) as refusal:
        load(folder)
    assert str(refusal.value).endswith(SERVED)


class Leaking(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Adds to every token what the whole batch has in common: each sequence alone is right, a packed one is not."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + out.logits.mean(dim=1, keepdim=True)
        return out


class Biased(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Has an attention of its own under transformers' name for the plain one, as models with position biases do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation != IMPLEMENTATION:
            kwargs["position_ids"] = torch.zeros(1, kwargs["input_ids"].shape[1], dtype=torch.long)
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Leaking, "Leaking leaks between packed sequences"),
        (Biased, "Biased computes something in its attention that paged attention does not"),
    ],
)
def test_a_model_that_fails_the_check_at_load_is_refused(
    kind: type[LlamaForCausalLM], sentence: str, tmp_path: Path
) -> None:
    folder = save(LlamaForCausalLM(LlamaConfig(**SMALL)), tmp_path)
    model = kind.from_pretrained(folder, attn_implementation=IMPLEMENTATION)
    with pytest.raises(StartupRefused, match=sentence):
        Base(model, "tiny", torch.float32, CPU)


# What cannot be loaded


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_a_wrong_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut_short(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def with_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (without_a_weight, r"lacks model\.layers\.1\.mlp\.up_proj\.weight: it is not whole"),
        (with_a_wrong_shape, "cannot load"),
        (cut_short, "cannot load"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot load"),
        (lambda folder: (folder / "config.json").unlink(), "the folder needs a config.json"),
        (with_config(model_type="nonesuch"), "an architecture that transformers knows"),
        (with_config(model_type="clip"), "cannot load"),
        (
            with_config(quantization_config={"quant_method": "gptq", "bits": 4}),
            "quantized with 'gptq'; this server runs checkpoints that bitsandbytes has quantized to 4 or 8 bits",
        ),
    ],
    ids=["missing-weight", "wrong-shape", "cut-short", "no-weights", "no-config", "unknown-type", "not-causal", "gptq"],
)
def test_a_folder_that_is_no_whole_model_is_refused(
    damage: Callable[[Path], None], sentence: str, tmp_path: Path
) -> None:
    damage(save_model("llama", tmp_path))
    with pytest.raises(StartupRefused, match=sentence):
        load(tmp_path)


@pytest.mark.parametrize("folder", ["/nonesuch", "./nonesuch"])
def test_a_folder_that_does_not_exist_is_refused(folder: str) -> None:
    with pytest.raises(StartupRefused, match="there is no such folder"):
        Base.load(BaseOptions(folder))


# What it says of itself


def test_a_base_describes_itself(tiny_llama: Path) -> None:
    base = load(tiny_llama)
    assert base.name == tiny_llama.name
    assert base.quantization is Quantization.NONE
    assert base.note is None
    assert base.max_context == MAX_CONTEXT
    assert base.vocab_size == VOCAB_SIZE
    assert base.eos_ids == {EOS_ID}
    assert base.kv_shapes == [(2, 16), (2, 16)]
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training


def test_positions_of_a_gpt2_are_its_context(model_folder: Callable[[str], Path]) -> None:
    assert load(model_folder("gpt2")).max_context == MAX_CONTEXT


@pytest.mark.parametrize(
    ("stored", "served"), [(torch.float16, torch.bfloat16), (torch.bfloat16,) * 2, (torch.float32,) * 2]
)
def test_the_dtype_is_the_checkpoints_but_for_float16_on_a_cpu(
    stored: torch.dtype, served: torch.dtype, tmp_path: Path
) -> None:
    model: Any = LlamaForCausalLM(LlamaConfig(**SMALL))
    assert load(save(model.to(stored), tmp_path), dtype=None).dtype is served


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_state_that_leaks_a_little_is_refused_in_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    config = transformers.Lfm2Config(**SMALL, layer_types=["full_attention", "conv"])
    model = causal_lm(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.02)  # so weak that the leak is within the rounding of bfloat16
    model.to(dtype).save_pretrained(tmp_path)
    with pytest.raises(StartupRefused, match=r"Lfm2ForCausalLM (carries something from|leaks between)"):
        load(tmp_path, dtype)


def test_fusing_copies_no_weight_for_good(tiny_llama: Path) -> None:
    base = load(tiny_llama)
    own = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert base.weight_bytes == sum(t.numel() * 4 for t in (*own.parameters(), *own.buffers()))
    fused = {site.path: site.fused for site in base.sites.sites if site.fused is not None}
    assert len(fused) == 2 * (3 + 2)  # q, k, v and gate, up of two layers
    for path, product in fused.items():
        site = base.sites.by_path[path]
        weight = site.module.get_parameter("weight")
        assert weight.data_ptr() == product.weight_of(site.member).data_ptr()
        torch.testing.assert_close(weight, own.get_submodule(path).get_parameter("weight"), rtol=0, atol=0)
