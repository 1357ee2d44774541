"""The oracle of bottleneck adapters: the `adapters` library's own forward, on tiny models that anybody can make.

Owns the models, the adapters and the prompts that the tests of bottleneck adapters share with it. As a program it
writes tests/data/bottleneck; it needs the library, which wants another transformers than the server (see the README
there). Imported by tests it needs torch and transformers alone.
"""

import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

DATA = Path(__file__).parents[1] / "data" / "bottleneck"
ANSWERS = "answers.safetensors"
SAVED_AS = "adapter.safetensors"  # by the library, with use_safetensors=True
VOCAB_SIZE = 260  # of the tests' byte tokenizer
EVERY = 11  # of the vocabulary, what is kept of a distribution
PROMPT = (256, 72, 101, 108, 108, 111, 44, 32, 119)
NUM_NEW_TOKENS = 8
CLEAR = 1e-3  # by how much the best token of a position leads, so that the choice is no matter of rounding

_EAGER = {"attn_implementation": "eager"}  # the others leave out Gemma 2's cap on scores
_WIDTHS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257, **_EAGER,
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": 256, "eos_token_id": 257, **_EAGER,
}  # fmt: skip

MODELS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_WIDTHS)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_WIDTHS)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in _WIDTHS.items() if k != "head_dim"})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_WIDTHS)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_WIDTHS)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_WIDTHS)),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One adapter: its model, the library's config class and what is set in it."""

    model: str
    config_class: str
    fields: Mapping[str, Any] = field(default_factory=dict)


_BOTH = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 8}
CASES: Mapping[str, Case] = {
    "llama-houlsby": Case("llama", "DoubleSeqBnConfig", {"reduction_factor": 8}),
    "llama-pfeiffer": Case("llama", "SeqBnConfig", {"reduction_factor": 16, "dropout": 0.1}),
    "llama-parallel": Case("llama", "ParBnConfig", {"mh_adapter": True, "reduction_factor": 8}),
    "llama-plus": Case("llama", "AdapterPlusConfig", {"reduction_factor": 8, "stochastic_depth": 0.0}),
    "llama-stream": Case(
        "llama", "SeqBnConfig", {**_BOTH, "scaling": "learned", "non_linearity": "tanh", "leave_out": [0]}
    ),
    "llama-norms": Case("llama", "DoubleSeqBnConfig", {**_BOTH, "ln_before": True, "ln_after": True, "leave_out": [1]}),
    "llama-norm-last": Case(
        "llama",
        "DoubleSeqBnConfig",
        {**_BOTH, "ln_after": True, "adapter_residual_before_ln": True, "leave_out": [0], "non_linearity": "gelu"},
    ),
    "llama-widths": Case(
        "llama",
        "DoubleSeqBnConfig",
        {"reduction_factor": {"1": 4, "default": 32}, "non_linearity": "LeakyReLU", "scaling": 0.5},
    ),
    "mistral-pfeiffer": Case("mistral", "SeqBnConfig", {**_BOTH, "non_linearity": "sigmoid", "leave_out": [1]}),
    "gpt2-houlsby": Case("gpt2", "DoubleSeqBnConfig", {**_BOTH, "non_linearity": "gelu_new", "leave_out": [0]}),
    "gpt2-pfeiffer": Case("gpt2", "SeqBnConfig", {**_BOTH, "leave_out": [1]}),
    "gpt2-parallel": Case("gpt2", "ParBnConfig", {"mh_adapter": True, "reduction_factor": 8, "leave_out": [1]}),
    "qwen2-pfeiffer": Case("qwen2", "SeqBnConfig", {**_BOTH, "leave_out": [0]}),
    "qwen3-parallel": Case("qwen3", "ParBnConfig", {**_BOTH, "leave_out": [1]}),
    "gemma2-houlsby": Case("gemma2", "DoubleSeqBnConfig", {**_BOTH, "leave_out": [1]}),
    "gemma3-parallel": Case("gemma3", "ParBnConfig", {**_BOTH, "leave_out": [0]}),
}


def made(model: str) -> PreTrainedModel:
    """One of the models, in eval mode."""
    built = MODELS[model]()
    built.train(False)
    for name, parameter in built.named_parameters():
        _fill(parameter.data, name, "norm" in name or ".ln_" in name)
    return built


def _fill(tensor: torch.Tensor, name: str, is_norm: bool) -> None:
    """Numbers that depend on the name alone, the same everywhere: hashed integers, scaled by powers of two."""
    numbers = torch.arange(tensor.numel(), dtype=torch.int64) + (zlib.crc32(name.encode()) << 20)
    for _ in range(2):
        numbers = numbers * 0x5851F42D4C957F2D + 0x14057B7EF767814F  # of Knuth's MMIX, modulo 2^64
        numbers = numbers ^ ((numbers >> 29) & 0x7FFFFFFFF)
    uniform = ((numbers >> 20) & 0xFFFF).float() / 0x8000 - 1
    values = uniform.view(tensor.shape) * (0.25 if tensor.dim() < 2 or is_norm else 0.5)
    tensor.copy_(values + 1 if is_norm and name.endswith("weight") else values)


def _write(name: str, case: Case) -> dict[str, torch.Tensor]:
    """Saves the adapter as the library does, and returns what the library's own forward says with it."""
    import adapters

    model = made(case.model)
    adapters.init(model)
    model.add_adapter(name, config=getattr(adapters, case.config_class)(**case.fields))
    model.set_active_adapters(name)
    model.train(False)
    for parameter_name, parameter in model.named_parameters():
        if f"adapters.{name}." in parameter_name:
            _fill(parameter.data, parameter_name, "norm" in parameter_name)
            if parameter_name.endswith("adapter_down.0.weight") and parameter.dim() == 1:
                parameter.data += 1  # a norm by another name
    _save(model, name)
    return _answers(model, name)


def _save(model: Any, name: str) -> None:
    """With the norm before the bottleneck, which the library saves twice, safetensors wants it once."""
    folder = DATA / name
    model.save_adapter(str(folder), name, with_head=False)
    pickled = folder / "pytorch_adapter.bin"
    tensors = torch.load(pickled, weights_only=True)
    pickled.unlink()
    if any("adapter_norm_before" in key for key in tensors):
        save_file({key: t for key, t in tensors.items() if "adapter_norm_before" not in key}, folder / SAVED_AS)
    else:
        model.save_adapter(str(folder), name, with_head=False, use_safetensors=True)


@torch.no_grad()
def _answers(model: Any, name: str) -> dict[str, torch.Tensor]:
    """The greedy answer, and a part of the distribution at every position but the last."""
    ids = list(PROMPT)
    for _ in range(NUM_NEW_TOKENS):
        best, second = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2).values
        assert best - second > CLEAR, f"{name}: two tokens are nearly tied"
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    kept = torch.log_softmax(logits.double(), dim=-1)[:, ::EVERY].float().contiguous()
    return {f"{name}.token_ids": torch.tensor(ids), f"{name}.log_probabilities": kept}


def main() -> None:
    for name in CASES:
        shutil.rmtree(DATA / name, ignore_errors=True)
    answers: dict[str, torch.Tensor] = {}
    for name, case in CASES.items():
        answers |= _write(name, case)
    save_file(answers, DATA / ANSWERS)


if __name__ == "__main__":
    main()
