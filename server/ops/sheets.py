"""What kernels know of the resident adapters: tables that lie on the device and change when a slot does, not per step.

Owns the layout of a slot's sheet, and the values that name where everything lies. Knows nothing about who fills them,
nor about adapters, methods or the language that kernels are written in.

A *sheet* is one int32 tensor for each slot. It begins with NUM_FIELDS numbers for every site of the base, by index:

    RANK                              rank rows at this site, 0 for none
    DOWN, UP                          where in the sheet the row numbers of `down` and `up` begin, RANK of them each
    MID_SCALE, MID_SHIFT              where in the sheet RANK float32 values begin (their bits); ABSENT for identity
    IN_SCALE ... OUT_SHIFT            the row of the buffer that holds the vector, as float32; ABSENT for identity

Row n of a matrix begins at element n * (its stride) of the buffer. The lists follow the fields, equal ones once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from server.ops.runs import TokenRuns

RANK, DOWN, UP, MID_SCALE, MID_SHIFT, IN_SCALE, UP_SCALE, OUT_SCALE, OUT_SHIFT = range(9)
NUM_FIELDS = 9
ABSENT = -1

# Columns of `GroupTable.members`.
SITE, WIDTH, COLUMN, ROW_STRIDE, VECTOR_STRIDE = range(5)
NUM_COLUMNS = 5


@dataclass(frozen=True, slots=True)
class SiteRows:
    """A slot's edit at one site, as its sheet says it; `down` and `up` are equally long."""

    down: tuple[int, ...] = ()  # row numbers
    up: tuple[int, ...] = ()
    mid_scale: torch.Tensor | None = None  # (rank,) float32
    mid_shift: torch.Tensor | None = None  # (rank,) float32
    vectors: Mapping[int, int] = field(default_factory=dict)  # IN_SCALE ... OUT_SHIFT -> row number


def make_sheet(num_sites: int, edits: Mapping[int, SiteRows]) -> torch.Tensor:
    """The sheet of a slot with these edits by site index: int32, on the CPU; without any, the base's blank sheet."""
    fields = torch.full((num_sites, NUM_FIELDS), ABSENT, dtype=torch.int32)
    fields[:, RANK] = 0
    parts, length = [fields.view(-1)], fields.numel()
    known: dict[tuple[int, ...], int] = {}

    def append(part: torch.Tensor) -> int:
        nonlocal length
        parts.append(part)
        length += len(part)
        return length - len(part)

    for site, edit in edits.items():
        own = dict(edit.vectors)
        for name, numbers in ((DOWN, edit.down), (UP, edit.up)):
            if numbers not in known:
                known[numbers] = append(torch.tensor(numbers, dtype=torch.int32))
            own[name] = known[numbers]
        for name, values in ((MID_SCALE, edit.mid_scale), (MID_SHIFT, edit.mid_shift)):
            if values is not None:
                own[name] = append(values.to("cpu", torch.float32).contiguous().view(torch.int32))
        own[RANK] = len(edit.down)
        fields[site, list(own)] = torch.tensor(list(own.values()), dtype=torch.int32)
    return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class Sheets:
    """The rank rows of all resident adapters, and where each slot's lie."""

    buffer: torch.Tensor  # (elements,) the device's flat buffer, in the dtype of rank rows
    addresses: torch.Tensor  # (max_slots,) int64, of each slot's sheet; slots without edits, 0 the first, have a blank
    max_rank: int  # no site of any sheet has more rows
    has_middle: bool  # whether any sheet has mid_scale or mid_shift
    has_vectors: bool  # whether any sheet has up_scale, out_scale or out_shift


@dataclass(frozen=True, slots=True)
class GroupTable:
    """A site group: sites that read the same input (tokens, d_in)."""

    sites: int  # bit set of their indices
    is_embedding: bool
    d_in: int
    widths: tuple[int, ...]  # d_out of each member
    down_stride: int  # elements from one `down` row to the next
    in_stride: int  # float32 values from one vector of d_in to the next
    # Of each member: its site's index, d_out, the column of its first output where all members' lie side by side,
    # elements from one `up` row to the next, and float32 values from one vector of d_out to the next.
    members: torch.Tensor  # (members, NUM_COLUMNS) int32 on the device


class Joint(Protocol):
    """A group's edits in one call, for all steps of the same slots."""

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """In place: y (tokens, all outputs), x (tokens, d_in)."""


@dataclass(frozen=True, slots=True)
class StepTables:
    """One step: its tokens, and which sites their adapters edit, as bit sets over the indices of sites."""

    sheets: Sheets
    group: Callable[[int], GroupTable]  # by number
    tokens: TokenRuns
    kept: TokenRuns | None  # the rows that the head computes; None where nobody edits it
    edited: int
    scaled: int  # where a slot of the step has an in_scale
    with_rows: int
    # What kernels have made of these for a group, by its number; kept for steps of the same slots.
    joints: dict[int, Joint | None] = field(default_factory=dict, compare=False)
