"""A batch as flat tensors: the order in which its tokens lie, and all numbers that a forward pass needs of them.

Owns the packing; whatever it makes goes to the device in one copy. Knows nothing about adapters beyond a number for
each token, nor how a forward pass reads what it packs.
"""

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from itertools import accumulate

import torch

from server.engine.chosen import Chosen
from server.engine.sequence import UNKNOWN_TOKEN, ScheduledSequence
from server.model.context import AttentionBatch
from server.model.rope import RopeRule
from server.ops import DecodeBatch, Lanes, PrefillSpan, TokenLayout, runs_of
from server.ops.prefill import Chunks, PrefillLibrary, PrefillPlan
from server.ops.runs import DecodeLists
from server.ops.sending import Packing


@dataclass(frozen=True, slots=True)
class StepOrder:
    """The items of a step in the order of their tokens: single tokens first, then chunks."""

    items: tuple[ScheduledSequence, ...]
    num_decodes: int
    starts: tuple[int, ...]  # of each item's tokens, and the end of the last

    @classmethod
    def of(cls, sequences: Listing[ScheduledSequence], adapter_of: Mapping[str, int]) -> "StepOrder":
        """`adapter_of` a sequence's first token, by its id; 0 for the base.

        Single tokens lie in the order of the lanes (so that they stand there as they are), the base's last of them;
        chunks so that those of one adapter are beside one another.
        """

        def place(item: ScheduledSequence) -> tuple[bool, bool, int]:
            adapter = adapter_of[item.sequence.sequence_id]
            return not is_decode(item), not adapter, adapter

        items = tuple(sorted(sequences, key=place))
        starts = tuple(accumulate((item.num_tokens for item in items), initial=0))
        return cls(items, sum(map(is_decode, items)), starts)

    @property
    def decodes(self) -> tuple[ScheduledSequence, ...]:
        return self.items[: self.num_decodes]

    @property
    def chunks(self) -> tuple[ScheduledSequence, ...]:
        return self.items[self.num_decodes :]

    @property
    def keep(self) -> list[int]:
        """The rows whose logits are needed."""
        return [row for item, start in zip(self.items, self.starts, strict=False) for row in kept_rows(item, start)]


def is_decode(item: ScheduledSequence) -> bool:
    return item.num_tokens == 1


def kept_rows(item: ScheduledSequence, start: int) -> range:
    """The rows of a packed step whose logits an item needs, if its tokens begin at `start`."""
    end = start + item.num_tokens
    if item.wants_prompt_logits:
        return range(start, end)
    return range(end - 1, end) if item.samples else range(0)


class PackedStep:
    """The numbers of one step on the device, int64."""

    def __init__(
        self,
        order: StepOrder,
        adapters: Listing[int],
        block_size: int,
        device: torch.device,
        *,
        rope: RopeRule | None = None,
        before: Chosen | None = None,
        for_kernels: bool = False,
        library: PrefillLibrary | None = None,
    ) -> None:
        """`adapters`: the number of each token's. `before`: the tokens that the step before this one has chosen.
        `library`: what computes the attention of chunks, if one does."""
        self._order, self._adapters, self._size, self._device = order, adapters, block_size, device
        self._for_kernels, self._library = for_kernels, library
        self._keep = order.keep
        packing = Packing()
        ids = [token for item in order.items for token in item.token_ids]
        unknown = [row for row, token in enumerate(ids) if token == UNKNOWN_TOKEN]
        packing.add("ids", ids)
        packing.add("unknown", unknown)
        packing.add("chosen", self._chosen_rows(unknown, before))
        packing.add("positions", [position for item in order.items for position in range(item.start, item.end)])
        packing.add("keep", self._keep)
        packing.add("adapters", adapters)
        packing.add("kept adapters", [adapters[row] for row in self._keep])
        if rope is not None:
            packing.add("rope lengths", [length for item in order.items for length in _rope_lengths(rope, item)])
        self._add_cache(packing)
        self._parts = packing.send(device)
        self.ids = self._known_ids(before)

    @property
    def positions(self) -> torch.Tensor:
        """(tokens,)"""
        return self._parts["positions"]

    @property
    def keep(self) -> torch.Tensor:
        """(rows,) those whose logits are needed."""
        return self._parts["keep"]

    @property
    def rope_lengths(self) -> torch.Tensor | None:
        """(tokens,), see `RopeRule`; None where the base does not ask."""
        return self._parts.get("rope lengths")

    def layout(self, num_lanes: int | None) -> TokenLayout:
        """Which adapter each token has; `num_lanes`: adapters that lanes may be made for, None for no lanes."""
        return self._layout("adapters", self._adapters, self._order.num_decodes, num_lanes)

    def logits_layout(self, num_lanes: int | None) -> TokenLayout:
        """The same for the rows that the head computes."""
        kept = [self._adapters[row] for row in self._keep]
        return self._layout("kept adapters", kept, len(kept), num_lanes)

    def _layout(self, part: str, adapters: Listing[int], num_mixed: int, num_lanes: int | None) -> TokenLayout:
        """Of the tokens the first `num_mixed` may change adapter from one on."""
        lanes = None
        if num_lanes is not None:
            tried = (adapters, adapters[:num_mixed])
            lanes = next(filter(None, (Lanes.of(some, num_lanes, self._device) for some in tried)), None)
        return TokenLayout(
            adapters=self._parts[part],
            num_mixed=num_mixed,
            runs=runs_of(adapters, num_mixed),
            lanes=lanes,
            runs_after_lanes=runs_of(adapters, lanes.num_tokens if lanes else 0),
        )

    def attention(self) -> AttentionBatch:
        """Where the tokens are cached, and what they attend to."""
        order, parts = self._order, self._parts
        has_decodes = order.num_decodes > 0
        return AttentionBatch(
            blocks=parts["blocks"],
            offsets=parts["offsets"],
            decode=self._decode_batch() if has_decodes and not self._for_kernels else None,
            num_decodes=order.num_decodes,
            prefills=self._spans() if self._library is None else (),
            lists=self._decode_lists() if has_decodes and self._for_kernels else None,
            plan=self._plan(self._library) if order.chunks and self._library is not None else None,
        )

    def _spans(self) -> tuple[PrefillSpan, ...]:
        starts = self._order.starts
        return tuple(
            PrefillSpan(starts[number], starts[number + 1], item.start, self._parts[f"blocks of {number}"])
            for number, item in enumerate(self._order.chunks, self._order.num_decodes)
        )

    def _plan(self, library: PrefillLibrary) -> PrefillPlan:
        chunks, starts = self._order.chunks, self._order.starts[self._order.num_decodes :]
        told = Chunks(
            starts=tuple(start - starts[0] for start in starts),
            lengths=tuple(item.end for item in chunks),
            blocks=tuple(tuple(read_blocks(item, self._size)) for item in chunks),
        )
        return library.plan(told, self._size, self._device)

    def _chosen_rows(self, unknown: Listing[int], before: Chosen | None) -> list[int]:
        """Where the step before has each token that is unknown here. Only a sequence's single newest token can be."""
        if not unknown:
            return []
        assert before is not None, "nobody has chosen these tokens"
        return [before.row_of[self._order.items[row].sequence.sequence_id] for row in unknown]

    def _known_ids(self, before: Chosen | None) -> torch.Tensor:
        """(tokens,) what the tokens are, those included that the CPU does not know yet."""
        ids, unknown = self._parts["ids"], self._parts["unknown"]
        if before is None or not len(unknown):
            return ids
        # A row without a choice has failed: whatever its sequence computes here, nobody reads.
        return ids.index_copy(0, unknown, before.tokens.index_select(0, self._parts["chosen"]).clamp_min(0))

    def _add_cache(self, packing: Packing) -> None:
        order, size = self._order, self._size
        blocks, offsets = [], []
        for item in order.items:
            for position in range(item.start, item.end):
                blocks.append(item.sequence.blocks[position // size])
                offsets.append(position % size)
        packing.add("blocks", blocks)
        packing.add("offsets", offsets)
        if self._library is None:
            for number, item in enumerate(order.chunks, order.num_decodes):
                packing.add(f"blocks of {number}", read_blocks(item, size))
        if self._for_kernels:
            add_decode_lists(packing, order.decodes, size)
        else:
            self._add_pairs(packing)

    def _decode_lists(self) -> DecodeLists:
        return DecodeLists(self._parts["lengths"], self._parts["firsts"], self._parts["read blocks"])

    def _add_pairs(self, packing: Packing) -> None:
        """The pairs of a `DecodeBatch`, in the order of their blocks: so they read the cache in few runs."""
        decodes, size = self._order.decodes, self._size
        self._by_block = sorted(range(len(decodes)), key=lambda number: decodes[number].sequence.blocks[0])
        pair_sequence: list[int] = []
        self._pair_block: list[int] = []
        pair_start: list[int] = []
        for number in self._by_block:
            blocks = read_blocks(decodes[number], size)
            pair_sequence += [number] * len(blocks)
            self._pair_block += blocks
            pair_start += range(0, len(blocks) * size, size)
        packing.add("lengths", [item.end for item in decodes])
        packing.add("pair sequence", pair_sequence)
        packing.add("pair block", self._pair_block)
        packing.add("pair start", pair_start)
        packing.add("inverse", sorted(range(len(decodes)), key=self._by_block.__getitem__))

    def _decode_batch(self) -> DecodeBatch:
        decodes, size, parts = self._order.decodes, self._size, self._parts
        is_single = all(item.start < size for item in decodes)
        is_in_order = self._by_block == list(range(len(decodes)))
        return DecodeBatch(
            lengths=parts["lengths"],
            pair_sequence=parts["pair sequence"],
            pair_block=parts["pair block"],
            pair_start=parts["pair start"],
            runs=tuple(_consecutive(self._pair_block)),
            is_single=is_single,
            inverse=parts["inverse"] if is_single and not is_in_order else None,
            num_read=min(size, max(item.end for item in decodes)),
        )


def add_decode_lists(packing: Packing, decodes: Listing[ScheduledSequence], size: int) -> None:
    """The numbers of `DecodeLists`, for blocks of `size` tokens."""
    blocks = [read_blocks(item, size) for item in decodes]
    packing.add("lengths", [item.end for item in decodes])
    packing.add("firsts", [*accumulate(map(len, blocks[:-1]), initial=0)] if blocks else [])
    packing.add("read blocks", [block for own in blocks for block in own])


def read_blocks(item: ScheduledSequence, size: int) -> list[int]:
    """The blocks that hold an item's tokens and all before them."""
    return item.sequence.blocks[: -(-item.end // size)]


def _rope_lengths(rule: RopeRule, item: ScheduledSequence) -> Listing[int]:
    return rule.lengths(item.sequence.num_first_tokens, item.sequence.num_tokens, item.start, item.end)


def _consecutive(blocks: Listing[int]) -> Iterator[tuple[int, int, int]]:
    """Stretches of blocks that follow one another: (first index, last index + 1, first block)."""
    start = 0
    for index, block in enumerate(blocks):
        if index + 1 == len(blocks) or blocks[index + 1] != block + 1:
            yield start, index + 1, blocks[start]
            start = index + 1
