"""Bases of the shapes of real models with random weights, and adapters for their linears, as files.

Owns the shapes and the files. Numbers are drawn on the device that is given and written a layer at a time, so that a
base of 8 billion parameters takes the time of writing it (16 GB) and the memory of a layer. Knows nothing about what is
measured.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

_DTYPE = torch.bfloat16
_SPREAD = 0.02  # of weights, as transformers draws them
_VERA_RANK = 64
_VERA_TARGETS = ("q_proj", "v_proj")
_IA3_TARGETS = ("k_proj", "v_proj", "down_proj")


def _llama_8b() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=False, rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
        architectures=["LlamaForCausalLM"], bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


def _qwen_half_b() -> PreTrainedConfig:
    return Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        architectures=["Qwen2ForCausalLM"], bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


def _tiny() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"], bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


SHAPES = {"llama-3.1-8b": _llama_8b, "qwen2.5-0.5b": _qwen_half_b, "tiny": _tiny}


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear of the base that adapters edit: its path, d_in and d_out."""

    path: str
    d_in: int
    d_out: int

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


class RandomBase:
    """One shape, and what can be written of it. `device` is where numbers are drawn."""

    def __init__(self, shape: str, device: torch.device) -> None:
        self.config = SHAPES[shape]()
        self.device = device
        with torch.device("meta"):
            model = cast(Any, AutoModelForCausalLM).from_config(self.config, dtype=_DTYPE)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if self.config.tie_word_embeddings:
            self._shapes.pop("lm_head.weight", None)
        self.linears = tuple(
            Linear(path, module.in_features, module.out_features)
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and path != "lm_head"
        )

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self._shapes.values())

    def save(self, folder: Path) -> None:
        """A checkpoint in bfloat16, a file for each layer, with a tokenizer of a word for each id."""
        folder.mkdir(parents=True)
        self.config.dtype = _DTYPE
        self.config.save_pretrained(folder)
        generator = torch.Generator(self.device).manual_seed(0)
        files: dict[str, str] = {}
        for part, names in self._by_layer().items():
            file = f"model-{part}.safetensors"
            save_file({name: self._drawn(name, generator) for name in names}, folder / file, {"format": "pt"})
            files |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.num_parameters * _DTYPE.itemsize}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        _save_tokenizer(folder, self.config.get_text_config().vocab_size)

    def _by_layer(self) -> dict[str, list[str]]:
        parts: dict[str, list[str]] = {}
        for name in self._shapes:
            layer = re.search(r"\.layers\.(\d+)\.", name)
            parts.setdefault(layer[1] if layer else name.replace(".", "-"), []).append(name)
        return parts

    def _drawn(self, name: str, generator: torch.Generator) -> torch.Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=_DTYPE)
        numbers = torch.randn(shape, generator=generator, dtype=_DTYPE, device=self.device)
        return (_SPREAD * numbers).cpu()

    def save_adapter(self, folder: Path, method: str, rank: int, seed: int) -> None:
        """A folder as PEFT writes it: lora and dora on all linears, vera (rank 64) and ia3 on some. Seeded."""
        folder.mkdir(parents=True)
        config, shapes = self._adapter(method, rank)
        generator = torch.Generator(self.device).manual_seed(seed)
        sizes = [math.prod(shape) for shape in shapes.values()]
        numbers = _SPREAD * torch.randn(sum(sizes), generator=generator, dtype=_DTYPE, device=self.device)
        flat = dict(zip(shapes, torch.split(numbers.cpu(), sizes), strict=True))
        tensors = {name: (flat[name] + _centre(name)).view(shape) for name, shape in shapes.items()}
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")

    def _adapter(self, method: str, rank: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        """The config, and the shape of each tensor."""
        if method in ("lora", "dora"):
            config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "use_dora": method == "dora"}
            targets = sorted({linear.name for linear in self.linears})
            return {**config, "target_modules": targets}, dict(self._lora(rank, has_magnitude=method == "dora"))
        if method == "vera":
            config = {"peft_type": "VERA", "r": _VERA_RANK, "projection_prng_key": 0, "save_projection": False}
            return {**config, "target_modules": list(_VERA_TARGETS)}, dict(self._vera())
        if method == "ia3":
            config = {"peft_type": "IA3", "feedforward_modules": ["down_proj"]}
            return {**config, "target_modules": list(_IA3_TARGETS)}, dict(self._ia3())
        raise ValueError(f"no recipe for {method!r}; there are lora, dora, vera and ia3")

    def _lora(self, rank: int, *, has_magnitude: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        for linear in self.linears:
            yield f"{_key(linear)}.lora_A.weight", (rank, linear.d_in)
            yield f"{_key(linear)}.lora_B.weight", (linear.d_out, rank)
            if has_magnitude:
                yield f"{_key(linear)}.lora_magnitude_vector", (linear.d_out,)

    def _vera(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for linear in self.linears:
            if linear.name in _VERA_TARGETS:
                yield f"{_key(linear)}.vera_lambda_b", (linear.d_out,)
                yield f"{_key(linear)}.vera_lambda_d", (_VERA_RANK,)

    def _ia3(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for linear in self.linears:
            if linear.name in _IA3_TARGETS:
                is_before = linear.name == "down_proj"
                yield f"{_key(linear)}.ia3_l", (1, linear.d_in) if is_before else (linear.d_out, 1)


def _key(linear: Linear) -> str:
    return f"base_model.model.{linear.path}"


def _centre(name: str) -> float:
    """About what a tensor's numbers lie: scales about one, all else about zero. (DoRA's lengths too; time is all.)"""
    return 1.0 if name.endswith(("ia3_l", "magnitude_vector")) else 0.0


def _save_tokenizer(folder: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w2"))
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=words, bos_token="w0", eos_token="w1").save_pretrained(folder)
