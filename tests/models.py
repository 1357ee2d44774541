"""Tiny random models with a byte tokenizer, saved as the folders that the server loads.

The architectures of the fidelity tests: each differs from the others in what an adapter or the attention can meet
(biases and grouped queries, per-head norms, fused projections, transposed weights, windows shorter than the prompts,
caps low enough to bend scores, positions learned or half-rotated, parallel blocks, experts).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 260  # 256 bytes, then begin, end, user, assistant
EOS_ID = 257
MAX_CONTEXT = 256
WINDOW = 12  # of the models with sliding windows: shorter than most prompts of the tests

_CHAT_TEMPLATE = (
    "<|begin|>{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "{{ '<|assistant|>' if m['role'] == 'assistant' else '<|user|>' }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that any text encodes and any token sequence decodes; half characters are common."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


WIDTHS = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_CONTEXT,
    "bos_token_id": 256,
    "eos_token_id": EOS_ID,
    "pad_token_id": EOS_ID,
}


def tiny_llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**WIDTHS, attention_bias=True, mlp_bias=True))


def wide_llama() -> PreTrainedModel:
    """Its linears are wide enough for the products of `server.ops.four_bit`; not one of ARCHITECTURES."""
    widths = {**WIDTHS, "hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**widths, attention_bias=True))


def tiny_qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**WIDTHS, head_dim=16))


def tiny_phi3() -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**WIDTHS))


def tiny_gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE, n_embd=64, n_layer=2, n_head=4, n_positions=MAX_CONTEXT,
            bos_token_id=256, eos_token_id=EOS_ID,
        )
    )  # fmt: skip


def tiny_mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**WIDTHS, sliding_window=WINDOW))


def tiny_qwen2() -> PreTrainedModel:
    """Biases on q, k and v only, tied embeddings, and a window from the second layer on."""
    config = Qwen2Config(
        **WIDTHS, tie_word_embeddings=True, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    )
    return Qwen2ForCausalLM(config)


def tiny_gemma2() -> PreTrainedModel:
    """Caps on scores and logits low enough to bend them; a window in every other layer."""
    config = Gemma2Config(
        **WIDTHS, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW, attn_logit_softcapping=1.5,
        final_logit_softcapping=4.0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def tiny_gemma3() -> PreTrainedModel:
    """Windows and full attention by layer, each with a RoPE of its own."""
    config = Gemma3TextConfig(
        **WIDTHS, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        },
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def tiny_opt() -> PreTrainedModel:
    """Embeddings narrower than the layers, so that there is a projection on both ends, as in OPT-350m."""
    config = OPTConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, ffn_dim=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=MAX_CONTEXT, word_embed_proj_dim=32, bos_token_id=256, eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )  # fmt: skip
    return OPTForCausalLM(config)


def tiny_gpt_neox() -> PreTrainedModel:
    """As Pythia: attention and feedforward side by side, a quarter of each head rotated."""
    config = GPTNeoXConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=MAX_CONTEXT, bos_token_id=256, eos_token_id=EOS_ID, pad_token_id=EOS_ID,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def tiny_mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**WIDTHS, num_local_experts=4, num_experts_per_tok=2))


def tiny_qwen3_moe() -> PreTrainedModel:
    """Experts in the second layer, a plain feedforward in the first."""
    config = Qwen3MoeConfig(
        **WIDTHS, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, mlp_only_layers=[0]
    )
    return Qwen3MoeForCausalLM(config)


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "mistral": tiny_mistral,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "gemma2": tiny_gemma2,
    "gemma3": tiny_gemma3,
    "phi3": tiny_phi3,
    "gpt2": tiny_gpt2,
    "opt": tiny_opt,
    "gpt_neox": tiny_gpt_neox,
    "mixtral": tiny_mixtral,
    "qwen3_moe": tiny_qwen3_moe,
}


def save_model(architecture: str, folder: Path, seed: int = 0) -> Path:
    """The folder of one of ARCHITECTURES, filled by `save_filled`."""
    torch.manual_seed(seed)
    return save_filled(ARCHITECTURES[architecture](), folder)


def save_filled(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """A model folder with weights large enough, biases included, that every part of the model matters.

    `options` go to save_pretrained.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() == 1:
                # Around the init, which is 1, or 0 where a norm multiplies by 1 + weight (Gemma).
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif parameter.dim() >= 2:  # experts have three
                # A sharper head: near ties between tokens, at which greedy answers may part, become rare.
                parameter.normal_(std=0.5 if name.startswith("lm_head") else 0.1)
    model.eval().save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder
