"""What kernels know of a step: its tokens in runs of those with the same rank rows, and the blocks that decodes read.

Owns the order of the tokens and the cut, made on the CPU in vectorised code. Knows nothing about why two slots have the
same rows: it is given a class for each slot. All numbers are int64.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from server.ops.sending import send

# Tokens of a run. At decode a run is one sequence's token, or a few of one adapter's: 16 is the smallest tile of a
# tensor core. A prefill chunk reads its rows once per run, so there longer runs pay; beyond 64 the accumulators of an
# expand no longer fit beside its operands in the registers of four warps.
SHORT_RUN = 16
LONG_RUN = 64


@dataclass(frozen=True, slots=True)
class Runs:
    """Run i is the tokens order[starts[i]:starts[i + 1]], at most `max_length`, all with the same rows, or empty.

    Tokens of the bare base are in no run.
    """

    max_length: int
    order: torch.Tensor  # (tokens,)
    starts: torch.Tensor  # (num + 1,) ascending
    # What `long_stretches` has found, by `longest`: every site of a step asks for the same.
    stretches: dict[int, tuple["Stretch", ...]] = field(init=False, default_factory=dict, compare=False)

    @property
    def num(self) -> int:
        return self.starts.shape[0] - 1


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens order[first:last] in runs that follow one another, all with the rows of one slot."""

    first: int
    last: int
    slot: int
    tokens: torch.Tensor | slice  # their numbers; a slice where they follow one another


@dataclass(frozen=True, slots=True)
class TokenRuns:
    """A step's tokens for the kernels: the slot of each, and the runs of equal `down` rows and of equal `up` rows.

    Adapters that share a projection (VeRA both, LoRA-FA `down`) are one run there: one product for all their tokens.
    """

    slots: torch.Tensor  # (tokens,)
    by_down: Runs
    by_up: Runs

    @classmethod
    def of(
        cls,
        slots: torch.Tensor,
        down_classes: torch.Tensor,
        up_classes: torch.Tensor,
        device: torch.device,
        *,
        is_static: bool = False,
    ) -> "TokenRuns":
        """Orders and cuts tokens with these slots, (tokens,) int64; both classes (max_slots,) int64, 0 for no edits.

        All three on the CPU. With `is_static` every shape depends on the number of tokens alone.
        """
        if is_static:
            numbers = cls.static_numbers(slots, down_classes, up_classes)
            return cls.of_static(send(numbers, device), slots.shape[0])
        downs, ups = down_classes.index_select(0, slots), up_classes.index_select(0, slots)
        cuts = [_cut(downs, is_static=False)]
        # They are equal where nobody shares one projection without the other.
        if not torch.equal(downs, ups):
            cuts.append(_cut(ups, is_static=False))
        parts = [slots, *(part for _, *of_cut in cuts for part in of_cut)]
        on_device, *pieces = torch.split(send(torch.cat(parts), device), [len(part) for part in parts])
        orders = zip(cuts, pieces[::2], pieces[1::2], strict=True)
        runs = [Runs(length, order, starts) for (length, *_), order, starts in orders]
        return cls(on_device, runs[0], runs[-1])

    @classmethod
    def static_numbers(cls, slots: torch.Tensor, down_classes: torch.Tensor, up_classes: torch.Tensor) -> torch.Tensor:
        """As many numbers for any `n` tokens, 5 n + 2, as a CUDA graph needs: runs are short, the last ones empty."""
        parts = [slots]
        for classes in (down_classes, up_classes):
            _, order, starts = _cut(classes.index_select(0, slots), is_static=True)
            parts += [order, starts]
        return torch.cat(parts)

    @classmethod
    def of_static(cls, numbers: torch.Tensor, num_tokens: int) -> "TokenRuns":
        """The runs in what `static_numbers` gave, wherever it lies now."""
        n = num_tokens
        slots, *cuts = torch.split(numbers, [n, n, n + 1, n, n + 1])
        return cls(slots, Runs(SHORT_RUN, *cuts[:2]), Runs(SHORT_RUN, *cuts[2:]))


def long_stretches(slots: torch.Tensor, runs: Runs, longest: int) -> tuple[Stretch, ...]:
    """The runs of more than `longest` tokens; those that follow one another with the same slot first are one, for they
    are of one class."""
    if runs.max_length == SHORT_RUN:
        return ()
    if longest not in runs.stretches:
        runs.stretches[longest] = tuple(_stretches(slots, runs, longest))
    return runs.stretches[longest]


def _stretches(slots: torch.Tensor, runs: Runs, longest: int) -> Iterator[Stretch]:
    starts = runs.starts.tolist()
    slot_of = slots[runs.order[runs.starts[:-1]]].tolist()
    long_runs = [run for run in zip(starts, starts[1:], slot_of, strict=False) if run[1] - run[0] > longest]
    first = 0
    for number, (_, last, slot) in enumerate(long_runs, start=1):
        if number < len(long_runs) and (long_runs[number][0], long_runs[number][2]) == (last, slot):
            continue
        begin = long_runs[first][0]
        yield Stretch(begin, last, slot, _numbers(runs.order[begin:last]))
        first = number


def _numbers(order: torch.Tensor) -> torch.Tensor | slice:
    is_dense = bool((order.diff() == 1).all())
    return slice(int(order[0]), int(order[-1]) + 1) if is_dense else order


def _cut(classes: torch.Tensor, *, is_static: bool) -> tuple[int, torch.Tensor, torch.Tensor]:
    """The longest run allowed, the order of tokens by class, and where runs of one class start in it."""
    num_tokens = classes.shape[0]
    ordered, order = torch.sort(classes, stable=True)
    place = torch.arange(num_tokens)
    is_first = torch.ones(num_tokens, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    in_class = place - torch.where(is_first, place, 0).cummax(0).values if num_tokens else place
    has_edits = ordered != 0
    is_long = not is_static and bool((has_edits & (in_class >= SHORT_RUN)).any())
    length = LONG_RUN if is_long else SHORT_RUN
    starts = place[has_edits & (in_class % length == 0)]
    num_padding = num_tokens - starts.shape[0] if is_static else 0
    return length, order, torch.cat([starts, starts.new_full((num_padding + 1,), num_tokens)])


@dataclass(frozen=True, slots=True)
class DecodeLists:
    """The decoding sequences of a step, one query each, and the blocks of each in the order of their tokens."""

    lengths: torch.Tensor  # (sequences,) cached tokens of each sequence, the new one included
    firsts: torch.Tensor  # (sequences,) where each sequence's blocks begin in `blocks`
    blocks: torch.Tensor  # (blocks,)
