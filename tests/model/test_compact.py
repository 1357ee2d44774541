"""Fewer operators, the same numbers: norms and decodes beside what transformers computes, and what is left alone."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from server.model import compact
from server.model.attention import KVCache
from server.model.base import Base
from server.model.compact import DecodeAttentions, compact_norm
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from server.ops import rotate, store_kv
from tests.models import VOCAB_SIZE

WIDTH = 48


def load(folder: Path) -> Base:
    return Base.load(BaseOptions(str(folder), Quantization.NONE, torch.float32))


def sequences() -> list[torch.Tensor]:
    return list(torch.randint(0, VOCAB_SIZE, (3, 2), generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen2RMSNorm])
def test_an_rms_norm_of_fewer_operators_is_within_the_rounding_of_its_dtype(
    kind: type[nn.Module], dtype: torch.dtype
) -> None:
    norm = kind(WIDTH).to(dtype)
    norm.get_parameter("weight").data.normal_()
    forward = compact_norm(norm, norm.forward)
    assert forward is not None
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(forward(x), norm(x), rtol=rounding, atol=rounding)
    torch.testing.assert_close(forward(x.double()), norm(x.double()), rtol=0, atol=0)  # any other dtype is its own


def test_a_norm_in_float32_stays_as_it_is() -> None:
    norm = LlamaRMSNorm(WIDTH)
    assert compact_norm(norm, norm.forward) is None


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(WIDTH).bfloat16(), GemmaRMSNorm(WIDTH).bfloat16()], ids=lambda norm: type(norm).__name__
)
def test_a_norm_of_another_formula_stays_as_it_is(norm: nn.Module) -> None:
    norm.get_parameter("weight").data.normal_()
    assert compact_norm(norm, norm.forward) is None


def test_heads_are_rotated_as_transformers_rotates_them() -> None:
    x, angles = torch.randn(7, 3, 16), torch.rand(7, 8).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected, _ = apply_rotary_pos_emb(x[None], x[None], cos[None], sin[None], unsqueeze_dim=2)
    rotate(x, cos[:, None], torch.cat((-sin[:, :8], sin[:, 8:]), dim=-1)[:, None])
    torch.testing.assert_close(x, expected[0])


def test_keys_and_values_are_stored_at_once_where_each_belongs() -> None:
    cpu, blocks, offsets = torch.device("cpu"), torch.tensor([4, 0, 4]), torch.tensor([3, 2, 0])
    at_once, expected = (KVCache([(2, 8), (2, 8)], 5, 4, torch.float32, cpu) for _ in range(2))
    heads = torch.randn(3, 4, 8)
    store_kv(heads[:, :2], heads[:, 2:], expected.keys[1], expected.values[1], blocks, offsets)
    at_once.store(1, heads, at_once.rows_of(2, blocks, offsets))
    for layer in (0, 1):
        assert torch.equal(at_once.keys[layer], expected.keys[layer])
        assert torch.equal(at_once.values[layer], expected.values[layer])


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "mixtral"])
def test_decodes_give_what_the_attention_of_transformers_gives(
    architecture: str, model_folder: Callable[[str], Path]
) -> None:
    base = load(model_folder(architecture))
    compacted = [m for m in base.model.modules() if "Attention" in type(m).__name__ and "forward" in vars(m)]
    assert len(compacted) == base.num_layers
    logits = base._decode_probe(sequences())
    for module in compacted:
        del module.forward
    torch.testing.assert_close(logits, base._decode_probe(sequences()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "phi3", "qwen3"])
def test_an_attention_of_other_code_stays_as_it_is(architecture: str, model_folder: Callable[[str], Path]) -> None:
    base = load(model_folder(architecture))
    assert len(DecodeAttentions(base.model, base.attention, base.scope)) == 0


def test_where_decodes_differ_all_the_same_the_stock_attention_stays(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load(model_folder("llama"))._decode_probe(sequences())
    monkeypatch.setattr(compact, "rotate", lambda x, cos, sin: x.mul_(sin))
    with caplog.at_level(logging.WARNING):
        base = load(model_folder("llama"))
    assert "with fewer operators it differs" in caplog.text
    torch.testing.assert_close(base._decode_probe(sequences()), expected, rtol=1e-5, atol=1e-5)
