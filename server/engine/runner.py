"""One step on the device: a batch becomes flat tensors, the base runs once, and logits come back.

All device work of a step starts here. Owns the KV cache and the packing of a batch. Knows nothing about the queue, text
or how tokens are chosen.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType

import torch

from server.adapters.device.device import DeviceTier
from server.adapters.device.step_edits import StepEdits
from server.engine.sequence import Batch, ScheduledSequence
from server.model.attention import KVCache
from server.model.base import Base
from server.model.context import AttentionBatch, SiteKernels, StepContext
from server.ops import DecodeBatch, Lanes, PrefillSpan, TokenLayout, runs_of
from server.ops.runs import DecodeLists

_RECOMPUTED_AT_ONCE = 512  # tokens: bounds what a long sequence takes for itself, once in its life


@dataclass(frozen=True, slots=True)
class StepLogits:
    """What a step computed. `sampled` (k, vocabulary): one row per item of `samplers`, in order. `scored`: the logits
    of all rows of an item that wants its prompt scored, (tokens of the item, vocabulary), by sequence id."""

    samplers: tuple[ScheduledSequence, ...]
    sampled: torch.Tensor
    scored: dict[str, torch.Tensor]


class Runner:
    """Runs batches of one base with the adapters of one device tier, on a KV cache of `num_blocks` blocks.

    `kernels` is what `server.ops.load_kernels` gave; with them the tier has tables.
    """

    def __init__(
        self, base: Base, adapters: DeviceTier, num_blocks: int, block_size: int, kernels: ModuleType | None = None
    ) -> None:
        self._base = base
        self._kernels = kernels
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
        for item in batch.sequences:  # all of them first: what is copied may be written to in this very step
            self._copy_start(item)
        for item in batch.sequences:
            self._recompute_if_stale(item)
        return self._forward(batch.sequences)

    def _copy_start(self, item: ScheduledSequence) -> None:
        """Copies an adapter's virtual tokens that fill a block in part from one that begins with them."""
        if item.copied_block is not None:
            place, num_tokens = divmod(item.sequence.num_virtual_tokens, self._block_size)
            self.cache.copy(item.copied_block, item.sequence.blocks[place], num_tokens)

    def _recompute_if_stale(self, item: ScheduledSequence) -> None:
        """Computes a sequence's cached tokens again where the token after them changes all their positions' angles."""
        rule, sequence = self._base.rope, item.sequence
        if rule is None or not rule.is_stale(sequence.num_first_tokens, item.start):
            return
        for start in range(0, item.start, _RECOMPUTED_AT_ONCE):
            num_tokens = min(_RECOMPUTED_AT_ONCE, item.start - start)
            self._forward([ScheduledSequence(sequence, start, num_tokens, False, False)])

    def _forward(self, sequences: Listing[ScheduledSequence]) -> StepLogits:
        slots_of = {item.sequence.sequence_id: item.slots for item in sequences}
        slots = {slot for own in slots_of.values() for slot in own} - {0}
        edits = self._adapters.batch(slots) if slots and self._kernels is None else None
        adapter_of = {slot: slot if edits is None else edits.local(slot) for slot in {*slots, 0}}
        items = _pack_order(sequences, {name: adapter_of[own[0]] for name, own in slots_of.items()})
        num_decodes = sum(_is_decode(item) for item in items)
        starts = _starts([item.num_tokens for item in items])
        ids = [token for item in items for token in item.token_ids]
        positions = [p for item in items for p in range(item.start, item.start + item.num_tokens)]
        keep = [row for item, start in zip(items, starts, strict=False) for row in _kept_rows(item, start)]
        own_slots = [slot for item in items for slot in slots_of[item.sequence.sequence_id]]
        adapters = [adapter_of[slot] for slot in own_slots]
        device = self._base.device
        input_ids, kept = torch.tensor(ids, device=device), torch.tensor(keep, device=device, dtype=torch.long)
        context = StepContext(
            attention=self._attention(items, starts, num_decodes),
            layout=_layout(adapters, num_decodes, edits, device),
            logits_layout=_layout([adapters[row] for row in keep], len(keep), edits, device),
            edits=edits,
            kernels=self._site_kernels(adapters, keep),
            ops=self._adapters.ops(own_slots, [own_slots[row] for row in keep], num_decodes, input_ids, kept),
            rope_lengths=self._rope_lengths(items),
        )
        self._base.attention.cache = self.cache
        self._base.attention.kernels = self._kernels
        if context.ops is not None:
            input_ids = input_ids.clamp_min(0)  # the ops know which tokens are virtual
        logits = self._base.forward(input_ids, torch.tensor(positions, device=device), kept, context)
        return _split(items, logits)

    def _site_kernels(self, slots: Listing[int], keep: Listing[int]) -> SiteKernels | None:
        if self._kernels is None:
            return None
        step = self._adapters.tables(slots, [slots[row] for row in keep])
        kernels: SiteKernels | None = None if step is None else self._kernels.StepKernels(step)
        return kernels

    def _rope_lengths(self, items: Listing[ScheduledSequence]) -> torch.Tensor | None:
        rule = self._base.rope
        if rule is None:
            return None
        lengths: list[int] = []
        for item in items:
            sequence, end = item.sequence, item.start + item.num_tokens
            lengths += rule.lengths(sequence.num_first_tokens, sequence.num_tokens, item.start, end)
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
        decodes = items[:num_decodes]
        return AttentionBatch(
            blocks=torch.tensor(blocks, device=device),
            offsets=torch.tensor(offsets, device=device),
            decode=_decode_batch(decodes, size, device) if decodes and self._kernels is None else None,
            num_decodes=num_decodes,
            prefills=prefills,
            lists=_decode_lists(decodes, size, device) if decodes and self._kernels is not None else None,
        )

    def _covering(self, item: ScheduledSequence) -> torch.Tensor:
        num_blocks = -(-(item.start + item.num_tokens) // self._block_size)
        return torch.tensor(item.sequence.blocks[:num_blocks], device=self._base.device)


def _is_decode(item: ScheduledSequence) -> bool:
    return item.num_tokens == 1


def _pack_order(sequences: Listing[ScheduledSequence], adapter_of: Mapping[str, int]) -> list[ScheduledSequence]:
    """Single tokens first, in the order of the lanes (so that they stand there as they are), the base's last of them;
    then chunks, those of one adapter beside one another. `adapter_of` a sequence's first token, by its id."""

    def place(item: ScheduledSequence) -> tuple[bool, bool, int]:
        adapter = adapter_of[item.sequence.sequence_id]
        return not _is_decode(item), not adapter, adapter

    return sorted(sequences, key=place)


def _layout(adapters: Listing[int], num_mixed: int, edits: StepEdits | None, device: torch.device) -> TokenLayout:
    """The layout of tokens with these batch-local adapters, of which the first `num_mixed` may change from one on."""
    lanes = None
    if edits is not None:
        num = edits.num_lanes
        lanes = Lanes.of(adapters, num, device) or Lanes.of(adapters[:num_mixed], num, device)
    return TokenLayout(
        adapters=torch.tensor(adapters, device=device, dtype=torch.long),
        num_mixed=num_mixed,
        runs=runs_of(adapters, num_mixed),
        lanes=lanes,
        runs_after_lanes=runs_of(adapters, lanes.num_tokens if lanes else 0),
    )


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


def _decode_lists(items: Listing[ScheduledSequence], size: int, device: torch.device) -> DecodeLists:
    blocks = [item.sequence.blocks[: -(-(item.start + 1) // size)] for item in items]
    ends = list(accumulate(map(len, blocks)))
    numbers = [item.start + 1 for item in items] + [0, *ends[:-1]] + [block for own in blocks for block in own]
    packed = torch.tensor(numbers, dtype=torch.int32).to(device)
    lengths, firsts, all_blocks = torch.split(packed, [len(items), len(items), ends[-1]])
    return DecodeLists(lengths, firsts, all_blocks)


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
