"""One step on the device: a batch becomes flat tensors, the base runs once, and logits come back.

All device work of a step starts here. Owns the KV cache and the packing of a batch. Knows nothing about the queue, text
or how tokens are chosen.
"""

from collections.abc import Sequence as Listing
from dataclasses import dataclass

import torch

from server.adapters.device import DeviceTier
from server.engine.sequence import Batch, ScheduledSequence
from server.model.attention import KVCache
from server.model.base import Base
from server.model.context import AttentionBatch, StepContext
from server.ops import DecodeBatch, Lanes, PrefillSpan, Run, TokenLayout


@dataclass(frozen=True, slots=True)
class StepLogits:
    """What a step computed. `sampled` (k, vocabulary): one row per item of `samplers`, in order. `scored`: the logits
    of all rows of an item that wants its prompt scored, (tokens of the item, vocabulary), by sequence id."""

    samplers: tuple[ScheduledSequence, ...]
    sampled: torch.Tensor
    scored: dict[str, torch.Tensor]


class Runner:
    """Runs batches of one base with the adapters of one device tier, on a KV cache of `num_blocks` blocks."""

    def __init__(self, base: Base, adapters: DeviceTier, num_blocks: int, block_size: int) -> None:
        self._base = base
        self._adapters = adapters
        self._block_size = block_size
        self.cache = KVCache(base.kv_shapes, num_blocks, block_size, base.kv_dtype, base.device)

    def is_device_alive(self) -> bool:
        """Whether the device still computes; a GPU that has met an illegal access never does again."""
        try:
            return torch.ones(2, device=self._base.device).sum().item() == 2
        except RuntimeError:
            return False

    def run(self, batch: Batch) -> StepLogits:
        """One forward pass over the batch (not empty)."""
        items = _pack_order(batch.sequences)
        num_decodes = sum(_is_decode(item) for item in items)
        starts = _starts([item.num_tokens for item in items])
        ids = [token for item in items for token in item.token_ids]
        positions = [p for item in items for p in range(item.start, item.start + item.num_tokens)]
        keep = [row for item, start in zip(items, starts, strict=False) for row in _kept_rows(item, start)]
        context = self._context(items, starts, num_decodes, keep)
        self._base.attention.cache = self.cache
        device = self._base.device
        logits = self._base.forward(
            torch.tensor(ids, device=device), torch.tensor(positions, device=device),
            torch.tensor(keep, device=device, dtype=torch.long), context,
        )  # fmt: skip
        return _split(items, logits)

    def _context(
        self, items: Listing[ScheduledSequence], starts: Listing[int], num_decodes: int, keep: Listing[int]
    ) -> StepContext:
        slots = {item.sequence.slot for item in items} - {0}
        edits = self._adapters.batch(sorted(slots)) if slots else None
        adapters = [0 if edits is None else edits.local(item.sequence.slot) for item in items]
        per_token = [a for a, item in zip(adapters, items, strict=True) for _ in range(item.num_tokens)]
        chunks = list(zip(items, starts, adapters, strict=False))[num_decodes:]
        runs = tuple(Run(start, start + item.num_tokens, adapter) for item, start, adapter in chunks)
        device = self._base.device
        num_adapters = 0 if edits is None else len(edits.numbers)
        lanes = Lanes.of(per_token, num_adapters, 2, device) or Lanes.of(
            per_token[:num_decodes], num_adapters, 4, device
        )
        layout = TokenLayout(torch.tensor(per_token, device=device), num_decodes, runs, lanes)
        kept = [per_token[row] for row in keep]
        lanes = Lanes.of(kept, num_adapters, 4, device)
        logits_layout = TokenLayout(torch.tensor(kept, device=device, dtype=torch.long), len(kept), (), lanes)
        return StepContext(self._attention(items, starts, num_decodes), layout, logits_layout, edits)

    def _attention(self, items: Listing[ScheduledSequence], starts: Listing[int], num_decodes: int) -> AttentionBatch:
        size, device = self._block_size, self._base.device
        blocks, offsets = [], []
        for item in items:
            for position in range(item.start, item.start + item.num_tokens):
                blocks.append(item.sequence.blocks[position // size])
                offsets.append(position % size)
        prefills = tuple(
            PrefillSpan(start, start + item.num_tokens, item.start, self._covering(item))
            for item, start in zip(items[num_decodes:], starts[num_decodes:], strict=False)
        )
        return AttentionBatch(
            blocks=torch.tensor(blocks, device=device),
            offsets=torch.tensor(offsets, device=device),
            decode=_decode_batch(items[:num_decodes], size, device) if num_decodes else None,
            num_decodes=num_decodes,
            prefills=prefills,
        )

    def _covering(self, item: ScheduledSequence) -> torch.Tensor:
        num_blocks = -(-(item.start + item.num_tokens) // self._block_size)
        return torch.tensor(item.sequence.blocks[:num_blocks], device=self._base.device)


def _is_decode(item: ScheduledSequence) -> bool:
    return item.num_tokens == 1


def _pack_order(items: Listing[ScheduledSequence]) -> list[ScheduledSequence]:
    """Single tokens first, in the order of their first block (so that they read the cache in few runs), then chunks."""
    decodes = [item for item in items if _is_decode(item)]
    chunks = [item for item in items if not _is_decode(item)]
    return sorted(decodes, key=lambda item: item.sequence.blocks[0]) + chunks


def _starts(lengths: Listing[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def _kept_rows(item: ScheduledSequence, start: int) -> range:
    """The rows of a packed batch whose logits an item needs."""
    end = start + item.num_tokens
    if item.wants_prompt_logits:
        return range(start, end)
    return range(end - 1, end) if item.samples else range(0)


def _decode_batch(items: Listing[ScheduledSequence], size: int, device: torch.device) -> DecodeBatch:
    pair_sequence: list[int] = []
    pair_block: list[int] = []
    pair_start: list[int] = []
    for number, item in enumerate(items):
        num_blocks = -(-(item.start + 1) // size)
        pair_sequence += [number] * num_blocks
        pair_block += item.sequence.blocks[:num_blocks]
        pair_start += range(0, num_blocks * size, size)
    return DecodeBatch(
        lengths=torch.tensor([item.start + 1 for item in items], device=device),
        pair_sequence=torch.tensor(pair_sequence, device=device),
        pair_block=torch.tensor(pair_block, device=device),
        pair_start=torch.tensor(pair_start, device=device),
        runs=_consecutive(pair_block),
        is_single=len(pair_block) == len(items),
        num_read=min(size, max(item.start + 1 for item in items)),
    )


def _consecutive(blocks: Listing[int]) -> tuple[tuple[int, int, int], ...]:
    """Stretches of blocks that follow one another: (first index, last index + 1, first block)."""
    runs: list[tuple[int, int, int]] = []
    for index, block in enumerate(blocks):
        if runs and block == runs[-1][2] + index - runs[-1][0]:
            runs[-1] = (runs[-1][0], index + 1, runs[-1][2])
        else:
            runs.append((index, index + 1, block))
    return tuple(runs)


def _split(items: Listing[ScheduledSequence], logits: torch.Tensor) -> StepLogits:
    samplers, rows, scored, row = [], [], {}, 0
    for item in items:
        num_rows = len(_kept_rows(item, 0))
        if item.wants_prompt_logits:
            scored[item.sequence.sequence_id] = logits[row : row + num_rows]
        row += num_rows
        if item.samples:
            samplers.append(item)
            rows.append(row - 1)
    sampled = logits if rows == list(range(logits.shape[0])) else logits[rows]
    return StepLogits(tuple(samplers), sampled, scored)
