"""One step on the device: a batch becomes flat tensors, the base runs once, and logits come back.

All device work of a step starts here. Owns the KV cache. Knows nothing about the queue, text or how tokens are chosen.
"""

from collections.abc import Callable
from collections.abc import Sequence as Listing
from dataclasses import dataclass

import torch

from server.adapters.device.device import DeviceTier
from server.engine.chosen import Chosen
from server.engine.decode_graphs import DecodeGraphs, graph_sizes
from server.engine.packed_step import PackedStep, StepOrder, kept_rows
from server.engine.recording import Recorder
from server.engine.sampler import ArgMax, SamplingRow, most_likely
from server.engine.sequence import Batch, ScheduledSequence
from server.model.attention import KVCache
from server.model.base import Base
from server.model.context import SiteKernels, StepContext
from server.ops import Kernels, StepKernels, native
from server.ops.prefill import PrefillLibrary
from server.ops.sending import send

_RECOMPUTED_AT_ONCE = 512  # tokens: bounds what a long sequence takes for itself, once in its life


@dataclass(frozen=True, slots=True)
class StepLogits:
    """What a step computed. `sampled` (k, vocabulary): one row per item of `samplers`, in order. `scored`: the logits
    of all rows of an item that wants its prompt scored (`scorers`), (tokens of the item, vocabulary), by sequence id.
    `greedy` (k,): their most likely tokens, NOT_FINITE for rows that are no numbers, where the step has them found, and
    `draw`: tokens (k,) that are drawn of these very logits, marked likewise, where the step can."""

    samplers: tuple[ScheduledSequence, ...]
    sampled: torch.Tensor
    scorers: tuple[ScheduledSequence, ...]
    scored: dict[str, torch.Tensor]
    greedy: torch.Tensor | None = None
    draw: Callable[[Listing[SamplingRow]], torch.Tensor] | None = None
    argmax: ArgMax = most_likely  # of rows of logits, as the step's kernels find it


class Runner:
    """Runs batches of one base with the adapters of one device tier, on a KV cache of `num_blocks` blocks.

    `kernels` is what `server.ops.load_kernels` gave; with them the tier has tables. `library` is what `choose_prefill`
    gave. With a `recorder`, which needs kernels, decode steps of up to `max_recorded` sequences of at most
    `max_context` tokens are recorded and replayed.
    """

    def __init__(
        self,
        base: Base,
        adapters: DeviceTier,
        num_blocks: int,
        block_size: int,
        kernels: Kernels | None = None,
        *,
        library: PrefillLibrary | None = None,
        recorder: Recorder | None = None,
        max_recorded: int = 0,
        max_context: int = 0,
    ) -> None:
        self._base = base
        self._kernels, self._library = kernels, library
        self._adapters = adapters
        self._block_size = block_size
        num_spare = 1 if recorder is not None else 0
        self.cache = KVCache(base.kv_shapes, num_blocks + num_spare, block_size, base.kv_dtype, base.device)
        self.graphs: DecodeGraphs | None = None
        if recorder is not None:
            assert kernels is not None, "recordings need kernels"
            sizes = graph_sizes(max_recorded)
            self.graphs = DecodeGraphs(base, adapters, self.cache, kernels, recorder, sizes, max_context)

    def is_device_alive(self) -> bool:
        """Whether the device still computes; a GPU that has met an illegal access never does again."""
        try:
            return torch.ones(2, device=self._base.device).sum().item() == 2
        except torch.OutOfMemoryError:
            return True  # it has answered
        except RuntimeError:
            return False

    def rest(self) -> None:
        """Lets go of what is kept from step to step and soon made anew: no step is to come for a while."""
        self._adapters.rest()

    def run(self, batch: Batch, before: Chosen | None = None) -> StepLogits:
        """One forward pass over the batch (not empty). `before`: what the step before it has chosen, if a sequence's
        newest token is not known here yet. A GPU only gets the work here, and does it when its line has come to it."""
        self._adapters.before_step()
        for item in batch.sequences:  # all of them first: what is copied may be written to in this very step
            self._copy_start(item)
        for item in batch.sequences:
            self._recompute_if_stale(item)
        return self._replay(batch.sequences, before) or self._forward(batch.sequences, before)

    def _replay(self, items: tuple[ScheduledSequence, ...], before: Chosen | None) -> StepLogits | None:
        """The step as a recording; None if it is not one of those, or this device has none."""
        if self.graphs is None or not self.graphs.can_run(items):
            return None
        found = self.graphs.run(items, before)
        if found is None:
            return None
        # The logits are read no more once the step has chosen; what it chose is, when the next step is under way.
        return StepLogits(items, found.logits, (), {}, found.greedy.clone(), found.draw)

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

    def _forward(self, sequences: Listing[ScheduledSequence], before: Chosen | None = None) -> StepLogits:
        slots_of = {item.sequence.sequence_id: item.slots for item in sequences}
        slots = {slot for own in slots_of.values() for slot in own} - {0}
        edits = self._adapters.batch(slots) if slots and self._kernels is None else None
        adapter_of = {slot: slot if edits is None else edits.local(slot) for slot in {*slots, 0}}
        order = StepOrder.of(sequences, {name: adapter_of[own[0]] for name, own in slots_of.items()})
        own_slots = [slot for item in order.items for slot in slots_of[item.sequence.sequence_id]]
        step = PackedStep(
            order,
            [adapter_of[slot] for slot in own_slots],
            self._block_size,
            self._base.device,
            rope=self._base.rope,
            before=before,
            for_kernels=self._kernels is not None,
            library=self._library,
        )
        num_lanes = None if edits is None else edits.num_lanes
        kept_slots = [own_slots[row] for row in order.keep]
        context = StepContext(
            attention=step.attention(),
            layout=step.layout(num_lanes),
            logits_layout=step.logits_layout(num_lanes),
            edits=edits,
            kernels=self._site_kernels(own_slots, kept_slots),
            ops=self._adapters.ops(own_slots, kept_slots, order.num_decodes, step.ids, step.keep),
            rope_lengths=step.rope_lengths,
        )
        self._base.attention.cache = self.cache
        self._base.attention.kernels = self._kernels
        # The ops know which tokens are virtual; the base has no rows for them.
        ids = step.ids if context.ops is None else step.ids.clamp_min(0)
        logits = self._base.forward(ids, step.positions, step.keep, context)
        return _split(order.items, logits, native.argmax if self._kernels is native else most_likely)

    def _site_kernels(self, slots: Listing[int], kept_slots: Listing[int]) -> SiteKernels | None:
        if self._kernels is None:
            return None
        step = self._adapters.tables(slots, kept_slots)
        return None if step is None else StepKernels(step, self._kernels)


def _split(items: Listing[ScheduledSequence], logits: torch.Tensor, argmax: ArgMax) -> StepLogits:
    samplers, rows, scorers, scored, row = [], [], [], {}, 0
    for item in items:
        num_rows = len(kept_rows(item, 0))
        if item.wants_prompt_logits:
            scorers.append(item)
            scored[item.sequence.sequence_id] = logits[row : row + num_rows]
        row += num_rows
        if item.samples:
            samplers.append(item)
            rows.append(row - 1)
    is_all = rows == list(range(logits.shape[0]))
    sampled = logits if is_all else logits.index_select(0, send(torch.tensor(rows, dtype=torch.int64), logits.device))
    return StepLogits(tuple(samplers), sampled, tuple(scorers), scored, argmax=argmax)
