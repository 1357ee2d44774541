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

_RECOMPUTED_AT_ONCE = 512  # tokens: bounds what a long sequence takes for itself, once in its life


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
        for item in batch.sequences:
            self._recompute_if_stale(item)
        items = _pack_order(batch.sequences)
        return _split(items, self._forward(items))

    def _recompute_if_stale(self, item: ScheduledSequence) -> None:
        """Computes a sequence's cached tokens again where the token after them changes all their positions' angles."""
        rule, sequence = self._base.rope, item.sequence
        if rule is None or not rule.is_stale(sequence.num_prompt_tokens, item.start):
            return
        for start in range(0, item.start, _RECOMPUTED_AT_ONCE):
            num_tokens = min(_RECOMPUTED_AT_ONCE, item.start - start)
            self._forward([ScheduledSequence(sequence, start, num_tokens, False, False)])

    def _forward(self, items: Listing[ScheduledSequence]) -> torch.Tensor:
        """Logits of the kept rows, (k, vocabulary), of items in packing order."""
        num_decodes = sum(_is_decode(item) for item in items)
        starts = _starts([item.num_tokens for item in items])
        ids = [token for item in items for token in item.token_ids]
        positions = [p for item in items for p in range(item.start, item.start + item.num_tokens)]
        keep = [row for item, start in zip(items, starts, strict=False) for row in _kept_rows(item, start)]
        context = self._context(items, starts, num_decodes, keep)
        self._base.attention.cache = self.cache
        device = self._base.device
        return self._base.forward(
            torch.tensor(ids, device=device), torch.tensor(positions, device=device),
            torch.tensor(keep, device=device, dtype=torch.long), context,
        )  # fmt: skip

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
        layout = _layout(per_token, num_decodes, runs, lanes, device)
        kept = [per_token[row] for row in keep]
        logits_layout = _layout(kept, len(kept), (), Lanes.of(kept, num_adapters, 4, device), device)
        attention = self._attention(items, starts, num_decodes)
        return StepContext(attention, layout, logits_layout, edits, self._rope_lengths(items))

    def _rope_lengths(self, items: Listing[ScheduledSequence]) -> torch.Tensor | None:
        rule = self._base.rope
        if rule is None:
            return None
        lengths: list[int] = []
        for item in items:
            sequence, end = item.sequence, item.start + item.num_tokens
            lengths += rule.lengths(sequence.num_prompt_tokens, sequence.num_tokens, item.start, end)
        return torch.tensor(lengths, device=self._base.device)

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
    """Single tokens first, by slot (so that they stand in lanes as they are), the base's last of them; then chunks."""
    decodes = [item for item in items if _is_decode(item)]
    chunks = [item for item in items if not _is_decode(item)]
    return sorted(decodes, key=lambda item: (not item.sequence.slot, item.sequence.slot)) + chunks


def _layout(
    adapters: Listing[int], num_mixed: int, runs: tuple[Run, ...], lanes: Lanes | None, device: torch.device
) -> TokenLayout:
    is_all_in_lanes = lanes is not None and not any(adapters[lanes.num_tokens :])
    numbers = torch.tensor(adapters, device=device, dtype=torch.long)
    return TokenLayout(numbers, num_mixed, runs, lanes, is_all_in_lanes)


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
    is_single = all(item.start < size for item in items)
    # In the order of their blocks they read the cache in few runs.
    order = sorted(range(len(items)), key=lambda number: items[number].sequence.blocks[0])
    for number in order:
        item = items[number]
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
        is_single=is_single,
        inverse=_inverse(order, device) if is_single else None,
        num_read=min(size, max(item.start + 1 for item in items)),
    )


def _inverse(order: Listing[int], device: torch.device) -> torch.Tensor | None:
    """The place of each number in `order`, which has them all; None where that is the number itself."""
    places = sorted(range(len(order)), key=order.__getitem__)
    return None if places == list(range(len(order))) else torch.tensor(places, device=device)


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
