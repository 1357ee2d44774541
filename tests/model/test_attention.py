"""Paged attention inside stock models: the cache's accounts, and windows and caps past the first block."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig

from server.ground.errors import StartupRefused
from server.model.attention import IMPLEMENTATION, KVCache, PagedAttention, attach
from server.model.base import Base
from server.model.context import AttentionBatch, Scope, StepContext
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from server.ops import DecodeBatch, PrefillSpan, TokenLayout

BLOCK_SIZE = 4
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "window": lambda: transformers.MistralConfig(**SMALL, sliding_window=6),
    "window-and-softcap": lambda: transformers.Gemma2Config(
        **SMALL, head_dim=8, sliding_window=6, attn_logit_softcapping=2.0
    ),
    "windows-in-some-layers": lambda: transformers.Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "one-kv-head": lambda: transformers.LlamaConfig(**{**SMALL, "num_key_value_heads": 1}),
}


def decode_step(base: Base, token: int, position: int, blocks: list[int]) -> torch.Tensor:
    """Logits (vocabulary,) of one decoding token at a position."""
    num_blocks = position // BLOCK_SIZE + 1
    own = torch.tensor(blocks[:num_blocks])
    starts = torch.arange(num_blocks) * BLOCK_SIZE
    runs = tuple((i, i + 1, block) for i, block in enumerate(own.tolist()))
    batch = DecodeBatch(
        torch.tensor([position + 1]), torch.zeros(num_blocks, dtype=torch.long), own, starts, runs,
        num_blocks == 1, None, min(BLOCK_SIZE, position + 1),
    )  # fmt: skip
    attention = AttentionBatch(own[-1:], torch.tensor([position % BLOCK_SIZE]), batch, 1, ())
    return run(base, [token], [position], attention)


def prefill_step(base: Base, tokens: list[int], start: int, blocks: list[int]) -> torch.Tensor:
    """Logits (vocabulary,) of the last token of a chunk."""
    positions = list(range(start, start + len(tokens)))
    own = torch.tensor(blocks[: positions[-1] // BLOCK_SIZE + 1])
    attention = AttentionBatch(
        torch.tensor([blocks[p // BLOCK_SIZE] for p in positions]), torch.tensor([p % BLOCK_SIZE for p in positions]),
        None, 0, (PrefillSpan(0, len(tokens), start, own),),
    )  # fmt: skip
    return run(base, tokens, positions, attention)


def run(base: Base, tokens: list[int], positions: list[int], attention: AttentionBatch) -> torch.Tensor:
    layout = TokenLayout(torch.zeros(len(tokens), dtype=torch.long), len(tokens), ())
    context = StepContext(attention, layout, layout, None)
    keep = torch.tensor([len(tokens) - 1])
    return base.forward(torch.tensor(tokens), torch.tensor(positions), keep, context)[0]


@pytest.mark.parametrize("kind", sorted(CONFIGS))
@pytest.mark.parametrize("chunks", [[1], [3, 2], [9], [7, 8]], ids=str)
def test_chunks_and_decodes_far_past_a_window_give_transformers_logits(
    kind: str, chunks: list[int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 64, (23,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0]
    base = Base.load(BaseOptions(str(tmp_path), Quantization.NONE, torch.float32))
    base.attention.cache = KVCache(base.kv_shapes, 8, BLOCK_SIZE, base.dtype, base.device)
    blocks = [5, 2, 3, 7, 0, 6]
    start = 0
    for size in chunks:
        got = prefill_step(base, ids[start : start + size], start, blocks)
        start += size
        torch.testing.assert_close(got, expected[start - 1], rtol=1e-4, atol=1e-4)
    for position in range(start, len(ids)):
        got = decode_step(base, ids[position], position, blocks)
        torch.testing.assert_close(got, expected[position], rtol=1e-4, atol=1e-4)


def test_a_block_takes_the_bytes_that_were_foretold() -> None:
    shapes = [(2, 16), (4, 8), (1, 64)]
    cache = KVCache(shapes, 5, 16, torch.bfloat16, torch.device("cpu"))
    assert cache.total_bytes == 5 * KVCache.block_bytes(shapes, 16, torch.bfloat16) == 5 * 16 * 2 * 2 * (32 + 32 + 64)
    assert [tuple(keys.shape) for keys in cache.keys] == [(5, 2, 16, 16), (5, 4, 16, 8), (5, 1, 16, 64)]
    assert [tuple(values.shape) for values in cache.values] == [(5, 2, 16, 16), (5, 4, 16, 8), (5, 1, 16, 64)]


class TinyAttention(nn.Module):
    layer_idx = 0


def call(value_width: int = 8, **options: object) -> object:
    module = TinyAttention()
    attention = PagedAttention(Scope())
    attention.observer = lambda *_: None
    assert attach(module, attention) == 1
    nothing = torch.zeros(3, dtype=torch.long)
    layout = TokenLayout(nothing, 3, ())
    query = torch.zeros(1, 4, 3, 8)
    interface = AttentionInterface()[IMPLEMENTATION]  # type: ignore[no-untyped-call]
    context = StepContext(AttentionBatch(nothing, nothing, None, 0, ()), layout, layout, None)
    with attention._scope.enter(context):
        return interface(module, query, query, torch.zeros(1, 4, 3, value_width), None, **options)


def test_what_the_attention_cannot_compute_is_refused() -> None:
    with pytest.raises(StartupRefused, match="TinyAttention has attention sinks"):
        call(s_aux=torch.zeros(4))
    with pytest.raises(StartupRefused, match="keys of width 8 and values of width 6"):
        call(value_width=6)


def test_the_attention_is_no_part_of_the_model() -> None:
    """It holds the cache, which is neither a weight nor to be saved or moved with the model."""
    model = nn.Sequential(TinyAttention())
    attach(model, PagedAttention(Scope()))
    assert [type(module) for module in model.modules()] == [nn.Sequential, TinyAttention]
    assert model.state_dict() == {}
