"""Tiny random models with a byte tokenizer, saved as the folders that the server loads.

The architectures of the fidelity tests: each differs from the others in what an adapter can meet (biases and grouped
queries, per-head norms, fused projections, transposed weights).
"""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 260  # 256 bytes, then begin, end, user, assistant
EOS_ID = 257
MAX_CONTEXT = 256

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


_WIDTHS = {
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
    return LlamaForCausalLM(LlamaConfig(**_WIDTHS, attention_bias=True, mlp_bias=True))


def tiny_qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_WIDTHS, head_dim=16))


def tiny_phi3() -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**_WIDTHS))


def tiny_gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE, n_embd=64, n_layer=2, n_head=4, n_positions=MAX_CONTEXT,
            bos_token_id=256, eos_token_id=EOS_ID,
        )
    )  # fmt: skip


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "qwen3": tiny_qwen3,
    "phi3": tiny_phi3,
    "gpt2": tiny_gpt2,
}


def save_model(architecture: str, folder: Path, seed: int = 0) -> Path:
    """A model folder with weights large enough, biases included, that every part of the model matters."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[architecture]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() == 2:
                # A sharper head: near ties between tokens, at which greedy answers may part, become rare.
                parameter.normal_(std=0.5 if name.startswith("lm_head") else 0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
