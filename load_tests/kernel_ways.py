"""Ways to compute a case of the kernels' benchmark: ours, a gathered batched product, and a loop over adapters.

Owns what a way is, and these three. Knows nothing about other servers' kernels (`peer_kernels`), nor about time.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from load_tests.kernel_cases import Batch, Case, Group

Run = Callable[[torch.Tensor, torch.Tensor], None]  # (x, y): applies the edits of the case to y, in place


@dataclass(frozen=True, slots=True)
class TwoLaunches:
    """A run whose halves can be timed apart: `shrink(x)` gives what `expand(h, y)` takes."""

    shrink: Callable[[torch.Tensor], Any]
    expand: Callable[[Any, torch.Tensor], None]

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.expand(self.shrink(x), y)


def _nothing(group: Group, batch: Batch) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Way:
    """`make(case)` prepares all that a server has prepared before a layer runs, and returns the run."""

    name: str
    make: Callable[[Case], Run]
    refusal: Callable[[Group, Batch], str | None] = _nothing  # why it does not serve them
    is_peer: bool = False  # another server's kernels, which ours are held to
    is_half_only: bool = False  # takes no float32


def _by_kernels(case: Case) -> Run:
    kernels = importlib.import_module("server.ops.kernels")  # not on every machine, and only once it is wanted

    def shrink(x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = kernels.shrink(x, case.group_table, case.table, case.tokens)
        return h

    def expand(h: torch.Tensor, y: torch.Tensor) -> None:
        kernels.expand(y, h, case.group_table, case.table, case.tokens)

    return TwoLaunches(shrink, expand)


def _by_gathered_bmm(case: Case) -> Run:
    """Each token's own matrices gathered, padded to the largest rank, and two batched products for each linear."""
    rank = case.batch.max_rank
    index = (case.slots - 1).to(case.device)

    def stacked(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        pad = torch.nn.functional.pad
        return torch.stack([pad(m, (0, 0, 0, rank - m.shape[0])) for m in matrices])

    members = [(stacked([own[m].down for own in case.weights]), stacked([own[m].up for own in case.weights]))
               for m in range(len(case.group.widths))]  # fmt: skip

    def run(x: torch.Tensor, y: torch.Tensor) -> None:
        start = 0
        for down, up in members:
            h = torch.bmm(down.index_select(0, index), x[:, :, None])
            y[:, start : start + up.shape[2]] += torch.bmm(h.transpose(1, 2), up.index_select(0, index))[:, 0]
            start += up.shape[2]

    return run


_MAX_GATHERED_BYTES = 8 << 30


def _not_gathered(group: Group, batch: Batch) -> str | None:
    if not batch.is_plain:
        return "two products are LoRA's alone"
    gathered = len(batch.slots) * batch.max_rank * (group.d_in + sum(group.widths)) * 2
    return "the gathered matrices take too much memory" if gathered > _MAX_GATHERED_BYTES else None


def _by_loop(case: Case) -> Run:
    """As PEFT computes a mixed batch: for each adapter and linear, its tokens' rows out, two products, and back.

    For DoRA it is given the quotient of norms that PEFT computes again in every forward pass.
    """
    own = [torch.nonzero(case.slots == slot)[:, 0].to(case.device) for slot in range(1, len(case.batch.adapters) + 1)]

    def run(x: torch.Tensor, y: torch.Tensor) -> None:
        for tokens, weights in zip(own, case.weights, strict=True):
            rows = x.index_select(0, tokens)
            for member, columns in zip(weights, torch.split(y, list(case.group.widths), dim=1), strict=True):
                columns.index_copy_(0, tokens, member.applied(rows, columns.index_select(0, tokens)))

    return run


OURS = "kernels"
WAYS = (
    Way(OURS, _by_kernels),
    Way("gathered bmm", _by_gathered_bmm, _not_gathered),
    Way("loop", _by_loop),
)
