"""The forward passes: prompts packed, long ones in chunks, and one side of the comparison that runs them.

Owns the packing and the hold on an adapter while it is measured. Knows nothing about divergence or reports.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from server.adapters.positions import Reach
from server.adapters.registry import AdapterInfo
from server.assemble import Server
from server.drift.divergence import NO_TARGET
from server.drift.figures import NUM_QUARTERS
from server.engine import sequence as engine_sequence
from server.engine.sequence import Batch, SamplingParams, ScheduledSequence
from server.ground.errors import GenerationFailed, StartupRefused

_SCORED = SamplingParams(max_tokens=0, prompt_logprobs=0)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens start .. start + num_tokens - 1 of one prompt."""

    token_ids: tuple[int, ...]  # of the whole prompt
    start: int
    num_tokens: int

    def targets(self) -> list[int]:
        """The token that follows each position; NO_TARGET after the prompt's last."""
        return [*self.token_ids, NO_TARGET][self.start + 1 : self.start + 1 + self.num_tokens]

    def quarters(self) -> list[int]:
        """The quarter of the prompt that each position lies in, from 0."""
        positions = range(self.start, self.start + self.num_tokens)
        return [position * NUM_QUARTERS // len(self.token_ids) for position in positions]


Pass = tuple[Chunk, ...]


def plan(prompts: Sequence[tuple[int, ...]], max_rows: int, max_sequences: int) -> list[Pass]:
    """Every token of every prompt once, in order: several prompts to a pass, or a long one in several passes.

    A pass has at most `max_rows` tokens of at most `max_sequences` prompts. A prompt that is cut has its passes to
    itself, so that a pass either begins with whole prompts or goes on with the only one.
    """
    passes: list[Pass] = []
    packed: list[Chunk] = []
    for ids in prompts:
        num_rows = sum(chunk.num_tokens for chunk in packed)
        if packed and (num_rows + len(ids) > max_rows or len(packed) == max_sequences):
            passes.append(tuple(packed))
            packed = []
        if len(ids) <= max_rows:
            packed.append(Chunk(ids, 0, len(ids)))
        else:
            starts = range(0, len(ids), max_rows)
            passes += [(Chunk(ids, start, min(max_rows, len(ids) - start)),) for start in starts]
    return [*passes, tuple(packed)] if packed else passes


class Side:
    """One of the two bases that are compared, with its own lowered adapters. Its engine stands still meanwhile."""

    def __init__(self, server: Server, max_sequences: int, longest: int) -> None:
        """`longest`: tokens of the longest prompt. Raises StartupRefused where the KV cache came out too small."""
        self.server = server
        self._is_soiled = False
        self._longest = longest
        num_blocks, num_needed = server.runner.cache.num_blocks, -(-longest // server.runner.cache.block_size)
        if num_blocks < max_sequences * num_needed:
            raise StartupRefused(
                f"the KV cache has {num_blocks} blocks and {max_sequences * num_needed} are needed for prompts "
                f"of {longest} tokens; lower --max-tokens-per-prompt, or free memory on {server.base.device}"
            )

    @contextmanager
    def placed(self, spec: str | None) -> Iterator[tuple[int, AdapterInfo | None]]:
        """The slot of an adapter, held there for the block of code, and what it is; slot 0 for None, the bare base."""
        if spec is None:
            yield 0, None
            return
        registry = self.server.registry
        with registry.lease(spec) as lease:
            info = registry.verify(f"{lease.version.name}@{lease.version.digest}")
            slot = registry.admit(lease.version)
            if slot is None:  # nothing else is resident or loading here
                raise GenerationFailed(f"{lease.version} could not be placed on {self.server.base.device}")
            try:
                yield slot, info
            finally:
                registry.retire(lease.version)

    def logits(self, chunks: Pass, slot: int) -> torch.Tensor:
        """Runs one pass: (tokens of the pass, vocabulary), in the order of the chunks."""
        if chunks[0].start == 0 and self._is_soiled:
            self._clear_cache()
        reach = self.server.registry.reach(slot) if slot else None
        at_once = self._num_sequences(0 if reach is None else reach.num_virtual_tokens)
        parts = [self._logits(chunks[at : at + at_once], slot, reach) for at in range(0, len(chunks), at_once)]
        logits = torch.cat(parts)
        self._is_soiled = self._is_soiled or bool(logits.isnan().any())
        return logits

    def _num_sequences(self, num_virtual_tokens: int) -> int:
        """Prompts that the cache holds at once, each behind an adapter's virtual tokens."""
        cache, max_context = self.server.runner.cache, self.server.base.max_context
        if self._longest + num_virtual_tokens > max_context:
            raise GenerationFailed(
                f"the adapter's {num_virtual_tokens} virtual tokens and a prompt of {self._longest} tokens exceed the "
                f"base's context of {max_context}; lower --max-tokens-per-prompt"
            )
        num_sequences = cache.num_blocks // -(-(self._longest + num_virtual_tokens) // cache.block_size)
        if not num_sequences:
            raise GenerationFailed(
                f"the adapter's {num_virtual_tokens} virtual tokens leave no room for the prompts; lower "
                "--max-tokens-per-prompt"
            )
        return num_sequences

    def _logits(self, chunks: Pass, slot: int, reach: Reach | None) -> torch.Tensor:
        items = [self._scheduled(number, chunk, slot, reach) for number, chunk in enumerate(chunks)]
        scored = self.server.runner.run(Batch(tuple(items))).scored
        rows = [
            scored[item.sequence.sequence_id][-chunk.num_tokens :] for item, chunk in zip(items, chunks, strict=True)
        ]
        return torch.cat(rows)

    def _scheduled(self, number: int, chunk: Chunk, slot: int, reach: Reach | None) -> ScheduledSequence:
        """The virtual tokens of an adapter are computed with a prompt's first chunk."""
        sequence = engine_sequence.Sequence(f"prompt-{number}", list(chunk.token_ids), _SCORED)
        sequence.take(slot, reach)
        num_virtual, size = sequence.num_virtual_tokens, self.server.runner.cache.block_size
        num_blocks = -(-(self._longest + num_virtual) // size)
        sequence.blocks = list(range(number * num_blocks, (number + 1) * num_blocks))
        start = chunk.start + num_virtual if chunk.start else 0
        end = chunk.start + num_virtual + chunk.num_tokens
        sequence.num_computed_tokens = start
        return ScheduledSequence(sequence, start, end - start, samples=False, wants_prompt_logits=True)

    def _clear_cache(self) -> None:
        """What a prompt with NaN left behind must not reach the next: attention may read past a sequence's end with
        weight 0, and 0 times NaN is NaN."""
        cache = self.server.runner.cache
        for tensor in (*cache.keys, *cache.values):
            tensor.zero_()
        self._is_soiled = False
