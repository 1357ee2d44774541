"""Which tokens the grammars of a batch allow next: found while the device computes, applied to all rows in one pass.

Owns the bit masks of a step. Knows nothing about what a grammar says or how tokens are chosen.
"""

from collections.abc import Sequence as Listing
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from llguidance import LLExecutor

from server.engine.constraint import Constraint
from server.engine.runner import StepLogits
from server.engine.sequence import Batch, SequenceStatus
from server.ops.sending import send

_BITS = 32


class Masks:
    """Fills masks in threads of its own. One step at a time."""

    def __init__(self) -> None:
        self._executor: LLExecutor | None = None  # made with the first mask: it starts threads
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def begin(self, batch: Batch) -> "StepMasks | None":
        """Begins to fill the masks of the batch's sequences that sample under a constraint; None if none does."""
        bound = {
            item.sequence.sequence_id: item.sequence.constraint
            for item in batch.sequences
            if item.samples
            and item.sequence.constraint is not None
            and item.sequence.status is not SequenceStatus.FINISHED
        }
        if not bound:
            return None
        filled = self._thread.submit(self._fill, list(bound.values()))
        return StepMasks(list(bound), filled)

    def _fill(self, constraints: Listing[Constraint]) -> torch.Tensor:
        """(constraints, words) int32: bit b of word w says whether token 32 w + b may come next."""
        num_words = -(-constraints[0].vocab_size // _BITS)
        words = torch.zeros((len(constraints), num_words), dtype=torch.int32)
        if self._executor is None:
            self._executor = LLExecutor()
        matchers = [(constraint.matcher, row) for row, constraint in enumerate(constraints)]
        row_bytes = num_words * words.itemsize
        self._executor.unsafe_compute_mask_ptr(matchers, words.data_ptr(), row_bytes, len(matchers))
        return words

    def close(self) -> None:
        self._thread.shutdown()


class StepMasks:
    """The masks of one step, perhaps not filled yet."""

    def __init__(self, sequence_ids: Listing[str], filled: "Future[torch.Tensor]") -> None:
        self._number = {name: number for number, name in enumerate(sequence_ids)}
        self._filled = filled

    def applied(self, logits: StepLogits) -> torch.Tensor:
        """`logits.sampled` with -inf for what the masks leave out; a copy, as log-probabilities are of what was there.

        Waits until the masks are filled.
        """
        ids = [item.sequence.sequence_id for item in logits.samplers]
        rows = [row for row, name in enumerate(ids) if name in self._number]
        words = self._filled.result()[[self._number[ids[row]] for row in rows]]
        masked, device = logits.sampled.clone(), logits.sampled.device
        is_allowed = _bits(send(words, device))[:, : masked.shape[-1]]
        at = send(torch.tensor(rows), device)
        masked[at] = masked[at].masked_fill(~is_allowed, -torch.inf)
        return masked


def _bits(words: torch.Tensor) -> torch.Tensor:
    """(rows, words) int32 -> (rows, 32 words) bool, the lowest bit of a word first."""
    shifts = torch.arange(_BITS, device=words.device, dtype=torch.int32)
    return ((words[:, :, None] >> shifts) & 1).bool().flatten(1)
