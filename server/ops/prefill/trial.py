"""A library on trial: what it gives for chunks of random numbers, beside PyTorch on the CPU.

Owns the chunks, which have what goes wrong in paged attention, and how much may differ. Knows nothing about libraries.
"""

import math
from dataclasses import dataclass, replace

import torch

from server.ops.prefill.chunks import AttentionLayer, Chunks, PrefillLibrary
from server.ops.reference import PrefillSpan, prefill_attention, store_kv

# Of a token's output, the worst of all. Weights and results are rounded to 8 or 11 bits; what is wrong differs more.
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
# So small that the chunks go past them, and that a token or a cap more or less shows. Kernels take them as numbers.
_MAX_WINDOW, _MAX_SOFTCAP = 100, 5.0
_SPREAD = 3.0  # of the scores


@torch.inference_mode()
def difference(
    library: PrefillLibrary, layer: AttentionLayer, dtype: torch.dtype, block_size: int, device: torch.device
) -> float:
    """The largest relative difference of a token's output from what it should be; NaN is possible.

    Whatever the library raises, it raises.
    """
    window = None if layer.window is None else min(layer.window, _MAX_WINDOW)
    softcap = None if layer.softcap is None else min(layer.softcap, _MAX_SOFTCAP)
    layer = replace(layer, window=window, softcap=softcap)
    size = block_size
    # (cached tokens, new ones): few, many, far into a sequence, over an edge of a block, from one on.
    together = [(0, 5), (0, 300), (3 * size + 132, 60), (size - 1, 64), (size, 2)]
    cases = [_Case.drawn(sizes, layer, dtype, size) for sizes in (together, [(2 * size + 1, 7)])]
    errors = [case.error(library, layer, device) for case in cases]
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


@dataclass(frozen=True, slots=True)
class _Case:
    """Some chunks, and a cache in which all else is what a former user may have left."""

    chunks: Chunks
    sizes: list[tuple[int, int]]
    query: torch.Tensor  # (tokens, heads, width), strided as layers give it
    keys: list[torch.Tensor]  # of each sequence, (its length, kv_heads, width)
    values: list[torch.Tensor]
    key_cache: torch.Tensor
    value_cache: torch.Tensor

    @classmethod
    def drawn(cls, sizes: list[tuple[int, int]], layer: AttentionLayer, dtype: torch.dtype, block_size: int) -> "_Case":
        chance = torch.Generator().manual_seed(len(sizes))

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=chance).to(dtype)

        chunks = _chunks(sizes, block_size, chance)
        spread = _SPREAD / (layer.scaling * math.sqrt(layer.width))
        query = (normal(layer.num_heads, chunks.starts[-1], layer.width) * spread).transpose(0, 1)
        own = [(length, layer.kv_heads, layer.width) for length in chunks.lengths]
        keys, values = [normal(*shape) for shape in own], [normal(*shape) for shape in own]
        num_blocks = sum(map(len, chunks.blocks)) + 1
        shape = (num_blocks, layer.kv_heads, block_size, layer.width)
        # Keys may be no numbers; values always are (`store_kv`), but may be as large as they go.
        key_cache = torch.full(shape, math.nan, dtype=dtype)
        value_cache = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
        for k, v, blocks in zip(keys, values, chunks.blocks, strict=True):
            places = torch.arange(k.shape[0])
            store_kv(k, v, key_cache, value_cache, torch.tensor(blocks)[places // block_size], places % block_size)
        return cls(chunks, sizes, query, keys, values, key_cache, value_cache)

    def error(self, library: PrefillLibrary, layer: AttentionLayer, device: torch.device) -> float:
        key_cache, value_cache = self.key_cache.to(device), self.value_cache.to(device)
        plan = library.plan(self.chunks, self.key_cache.shape[2], device)
        found = plan.attend(self.query.to(device), key_cache, value_cache, **layer.options)
        expected = self._expected(layer)
        away = (found.float().cpu() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        return float(away.max())

    def _expected(self, layer: AttentionLayer) -> torch.Tensor:
        """What each chunk gets by itself, on the CPU and in float32."""
        key_cache, value_cache, parts = self.key_cache.float(), self.value_cache.float(), []
        for number, (num_cached, num_new) in enumerate(self.sizes):
            start, blocks = self.chunks.starts[number], torch.tensor(self.chunks.blocks[number])
            span = PrefillSpan(start, start + num_new, num_cached, blocks)
            own = self.query[start : start + num_new].float()
            new = (own, self.keys[number][num_cached:].float(), self.values[number][num_cached:].float())
            parts.append(prefill_attention(*new, key_cache, value_cache, span, **layer.options))
        return torch.cat(parts)


def _chunks(sizes: list[tuple[int, int]], block_size: int, chance: torch.Generator) -> Chunks:
    """Chunks of these sizes, on blocks in no order; block 0, which pads block tables, is nobody's."""
    starts, lengths = [0], []
    for num_cached, num_new in sizes:
        starts.append(starts[-1] + num_new)
        lengths.append(num_cached + num_new)
    counts = [-(-length // block_size) for length in lengths]
    free = torch.split(torch.randperm(sum(counts), generator=chance) + 1, counts)
    return Chunks(tuple(starts), tuple(lengths), tuple(tuple(own.tolist()) for own in free))
