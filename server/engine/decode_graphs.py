"""Decode steps as recordings: one for each number of sequences that is rounded up to, with and without adapters, and
the draws of their tokens.

Owns the tensors that the recordings read, and when one is of use no more. A replay costs the CPU one copy of numbers
and one call; launching a step kernel by kernel takes longer than a GPU computes it. Knows nothing about how a recording
is made (`recording.py`), nor about methods: the sheets of the resident adapters lie on the device, and kernels look
there.
"""

import logging
import time
from collections.abc import Callable, Hashable, Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from server.adapters.device.device import DeviceTier
from server.engine.chosen import Chosen, marked
from server.engine.packed_step import read_blocks
from server.engine.recording import Recorder, Recording
from server.engine.sampler import Asked, SamplingRow, is_cut, packed, sample, sample_all
from server.engine.sequence import UNKNOWN_TOKEN, ScheduledSequence
from server.model.attention import KVCache
from server.model.base import Base
from server.model.context import AttentionBatch, StepContext
from server.ops import Kernels, StepKernels, TokenLayout
from server.ops.runs import DecodeLists, TokenRuns
from server.ops.sending import Packing, send
from server.ops.sheets import StepTables

log = logging.getLogger(__name__)

_STEPS = (1, 2, 4, 8, 16)  # numbers of sequences; from the last on all multiples of it
_NOBODY = SamplingRow(temperature=0, top_p=1, top_k=0, uniform=0)  # at a place that no sequence has


def graph_sizes(max_sequences: int) -> list[int]:
    """The numbers of sequences that recordings are made for, the largest last."""
    large = range(2 * _STEPS[-1], max_sequences + _STEPS[-1], _STEPS[-1])
    return [size for size in (*_STEPS, *large) if size < max_sequences] + [max_sequences]


@dataclass(frozen=True, slots=True)
class _Draws:
    """The recorded draws of one recorded step, and the tensor that they read what is asked from."""

    asked: torch.Tensor  # as `packed` has it
    recording: Recording


@dataclass(frozen=True, slots=True)
class _Graph:
    """One recording, and the tensor that it reads its numbers from."""

    numbers: torch.Tensor
    recording: Recording
    depends_on: Hashable  # of the tables: when that changes, the recording is of use no more
    tables: StepTables | None  # kept, as the recording has their tensors' addresses
    draws: dict[bool, _Draws] = field(default_factory=dict)  # by whether any row is cut; they read this one's logits


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay gives; the next one overwrites it.

    logits (items, vocabulary); greedy (items,) the most likely tokens, NOT_FINITE for rows that are no numbers. `draw`
    is `sample` of these logits, marked likewise: a tensor of its own.
    """

    logits: torch.Tensor
    greedy: torch.Tensor
    draw: Callable[[Listing[SamplingRow]], torch.Tensor]


class DecodeGraphs:
    """The recordings of one runner. They need kernels, which find a slot's rows on the device.

    `cache` has one block more than the scheduler gives away, the last: the places of a size that no sequence has read
    and write there.
    """

    def __init__(
        self,
        base: Base,
        adapters: DeviceTier,
        cache: KVCache,
        kernels: Kernels,
        recorder: Recorder,
        sizes: Listing[int],
        max_context: int,
    ) -> None:
        self._base, self._adapters, self._cache, self._kernels = base, adapters, cache, kernels
        self._recorder = recorder
        self._sizes = tuple(sizes)
        self._max_blocks = -(-max_context // cache.block_size)  # of one sequence
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        self._fault: str | None = None
        self._draw_fault: str | None = None
        # What the step before has chosen; recordings read it, so it stays where it is.
        self._latest = torch.zeros(self._sizes[-1], dtype=torch.int64, device=base.device)

    def record_all(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Makes those of the bare base, the largest first: the others then find its memory. Those with adapters are
        made when they are first wanted, as they depend on what adapters edit."""
        started, reserved_bytes = time.perf_counter(), self._reserved_bytes()
        for done, size in enumerate(reversed(self._sizes)):
            progress(done, len(self._sizes))
            if self._fault is None:
                self._find(size, has_adapters=False)
        progress(len(self._sizes), len(self._sizes))
        if self._fault is None:
            took_s, took_mib = time.perf_counter() - started, (self._reserved_bytes() - reserved_bytes) / (1 << 20)
            log.info("decode steps of %s sequences are graphs: %.1f s, %.0f MiB", self._sizes, took_s, took_mib)

    def _reserved_bytes(self) -> int:
        return torch.cuda.memory_reserved(self._base.device) if self._base.device.type == "cuda" else 0

    def can_run(self, items: Listing[ScheduledSequence]) -> bool:
        """Whether a step is of single tokens that all choose a next one, and of nothing that only a prefill knows."""
        return (
            self._fault is None
            and len(items) <= self._sizes[-1]
            and self._base.rope is None
            and all(item.num_tokens == 1 and item.samples and not item.wants_prompt_logits for item in items)
            and not self._adapters.has_ops({slot for item in items for slot in item.slots})
        )

    def run(self, items: Listing[ScheduledSequence], before: Chosen | None) -> Replay | None:
        """One more token of each. None where this device cannot record; it is not tried again."""
        slots = [slot for item in items for slot in item.slots]
        size = next(size for size in self._sizes if size >= len(items))
        graph = self._find(size, has_adapters=any(slots))
        if graph is None:
            return None
        if before is not None and len(before.tokens):
            self._latest[: len(before.tokens)].copy_(before.tokens)
        host = self._packed(items, before, size, has_adapters=any(slots)).host()
        graph.numbers[: len(host)].copy_(send(host, self._base.device))
        graph.recording.replay()
        logits, tokens = (output[: len(items)] for output in graph.recording.outputs)
        return Replay(logits, tokens, lambda rows: self._drawn(graph, rows))

    def _drawn(self, graph: _Graph, rows: Listing[SamplingRow]) -> torch.Tensor:
        """The tokens of the first rows of the graph's logits."""
        has_cuts = any(map(is_cut, rows))
        draws = None if self._draw_fault else graph.draws.get(has_cuts) or self._record_draws(graph, has_cuts)
        if draws is None:
            logits = graph.recording.outputs[0][: len(rows)]
            return marked(logits, sample(logits, rows))
        draws.asked.copy_(send(packed([*rows, *[_NOBODY] * (draws.asked.shape[1] - len(rows))]), self._base.device))
        draws.recording.replay()
        (tokens,) = draws.recording.outputs
        return tokens[: len(rows)].clone()

    def _record_draws(self, graph: _Graph, has_cuts: bool) -> _Draws | None:
        """Made when they are first wanted: a sort of vocabularies takes memory that greedy answers do not need."""
        logits, _ = graph.recording.outputs
        asked = packed([_NOBODY] * len(logits)).to(self._base.device)

        def work() -> tuple[torch.Tensor, ...]:
            return (marked(logits, sample_all(logits, Asked.of(asked), has_cuts=has_cuts)),)

        try:
            draws = _Draws(asked, self._recorder.record(work))
        except torch.OutOfMemoryError:
            raise  # as for steps
        except RuntimeError as error:
            self._draw_fault = str(error).partition("\n")[0]
            log.warning("draws are launched one kernel at a time: they cannot be recorded (%s)", self._draw_fault)
            return None
        graph.draws[has_cuts] = draws
        return draws

    def _find(self, size: int, *, has_adapters: bool) -> _Graph | None:
        depends_on = self._adapters.static_shape() if has_adapters else None
        known = self._graphs.get((size, has_adapters))
        if known is not None and known.depends_on == depends_on:
            return known
        self._graphs.pop((size, has_adapters), None)
        try:
            graph = self._record(size, has_adapters, depends_on)
        except torch.OutOfMemoryError:
            raise  # it passes: the step is tried again, smaller
        except RuntimeError as error:  # whatever of the base's code cannot be recorded
            self._fault = str(error).partition("\n")[0]
            log.warning("decode steps are launched one kernel at a time: they cannot be recorded (%s)", self._fault)
            self._graphs.clear()
            return None
        self._graphs[size, has_adapters] = graph
        return graph

    def _record(self, size: int, has_adapters: bool, depends_on: Hashable) -> _Graph:
        """Of a step that nobody asked for: all its places are empty."""
        packing = self._packed([], None, size, has_adapters=has_adapters)
        blank = packing.host()
        room = size * self._max_blocks  # for the blocks that are read, which come last
        numbers = torch.zeros(len(blank) + room, dtype=torch.int64, device=self._base.device)
        numbers[: len(blank)].copy_(blank)
        parts = packing.parts(numbers)
        parts["read blocks"] = numbers[len(blank) - size :]
        tables = self._adapters.static_tables(TokenRuns.of_static(parts["runs"], size)) if has_adapters else None
        return _Graph(numbers, self._recorder.record(lambda: self._work(parts, size, tables)), depends_on, tables)

    def _packed(
        self, items: Listing[ScheduledSequence], before: Chosen | None, size: int, *, has_adapters: bool
    ) -> Packing:
        """The numbers of a step; their places depend on `size` alone, but for the length of the last list."""
        block_size, num_empty = self._cache.block_size, size - len(items)
        spare = self._cache.num_blocks - 1
        ids = [item.token_ids[0] for item in items]
        blocks = [read_blocks(item, block_size) for item in items] + [[spare]] * num_empty
        packing = Packing()
        packing.add("ids", [*ids, *[0] * num_empty])
        packing.add("latest", [*_latest_rows(items, ids, before), *[-1] * num_empty])
        packing.add("positions", [*(item.start for item in items), *[0] * num_empty])
        packing.add("blocks", [own[-1] for own in blocks])
        packing.add("offsets", [*(item.start % block_size for item in items), *[0] * num_empty])
        packing.add("lengths", [*(item.end for item in items), *[1] * num_empty])
        packing.add("firsts", [*accumulate(map(len, blocks[:-1]), initial=0)])
        packing.add("keep", range(size))
        if has_adapters:
            slots = [slot for item in items for slot in item.slots]
            packing.add("runs", self._adapters.static_runs([*slots, *[0] * num_empty]))
        packing.add("read blocks", [block for own in blocks for block in own])
        return packing

    def _work(
        self, parts: Mapping[str, torch.Tensor], size: int, tables: StepTables | None
    ) -> tuple[torch.Tensor, ...]:
        """The forward pass and the choice of the most likely tokens, of whatever the numbers are by then."""
        latest, nothing = parts["latest"], torch.zeros_like(parts["ids"])
        chosen = self._latest.index_select(0, latest.clamp_min(0))
        # A row without a choice has failed: whatever its sequence computes here, nobody reads.
        ids = torch.where(latest >= 0, chosen, parts["ids"]).clamp_min(0)
        lists = DecodeLists(parts["lengths"], parts["firsts"], parts["read blocks"])
        layout = TokenLayout(nothing, size, ())
        kernels = None if tables is None else StepKernels(tables, self._kernels)
        attention = AttentionBatch(parts["blocks"], parts["offsets"], None, size, (), lists)
        context = StepContext(attention, layout, layout, None, kernels)
        self._base.attention.cache = self._cache
        self._base.attention.kernels = self._kernels
        logits = self._base.forward(ids, parts["positions"], parts["keep"], context)
        return logits, marked(logits, logits.argmax(dim=-1))


def _latest_rows(items: Listing[ScheduledSequence], ids: Listing[int], before: Chosen | None) -> list[int]:
    """Where the step before has each token, -1 for those that are known."""
    rows = []
    for item, token in zip(items, ids, strict=True):
        if token == UNKNOWN_TOKEN:
            assert before is not None, "nobody has chosen these tokens"
            rows.append(before.row_of[item.sequence.sequence_id])
        else:
            rows.append(-1)
    return rows
