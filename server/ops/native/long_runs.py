"""Runs of many tokens: their products are a library's, which knows the processor's matrix units.

Owns which runs are long, and the same arithmetic around a product of PyTorch: the rows of a run are copied into one
matrix, and what may differ from token to token is done before and after. Knows nothing of short runs.
"""

import torch

from server.ops.native.build import library
from server.ops.native.dtypes import DTYPES
from server.ops.runs import Runs, long_stretches
from server.ops.sheets import COLUMN, DOWN, ROW_STRIDE, UP, WIDTH, GroupTable, Sheets

LONGEST = 40  # tokens of a run that the kernels' own loops are as good for, whatever its rank


def shrink_long(
    x: torch.Tensor, h: torch.Tensor, group: GroupTable, table: Sheets, slots: torch.Tensor, runs: Runs
) -> None:
    """What `shrink` leaves out: x (tokens, d_in), into h (tokens, members, max_rank) float32."""
    for stretch in long_stretches(slots, runs, LONGEST):
        tokens = stretch.tokens
        for member in range(len(group.widths)):
            down = _rows(group, table, member, stretch.slot, DOWN)
            if down is not None:
                h[tokens, member, : len(down)] = (x[tokens].to(down.dtype) @ down.t()).float()


def expand_long(
    y: torch.Tensor,
    h: torch.Tensor | None,
    group: GroupTable,
    table: Sheets,
    slots: torch.Tensor,
    runs: Runs,
    members: range,
    gain: float,
    *,
    is_joint: bool,
) -> None:
    """What `expand` leaves out: y (tokens, outputs), rows dense, in place."""
    for stretch in long_stretches(slots, runs, LONGEST):
        order, num, tokens = runs.order[stretch.first :], stretch.last - stretch.first, stretch.tokens
        for member in members:
            up = None if h is None else _rows(group, table, member, stretch.slot, UP)
            if up is None and not table.has_vectors:
                continue
            g = None if up is None or h is None else _middle(h, len(up), group, table, slots, order, num, member)
            column = int(group.members[member, COLUMN]) if is_joint else 0
            if isinstance(tokens, slice) and not table.has_vectors and up is not None and g is not None:
                y[tokens, column : column + up.shape[1]].addmm_(g.to(y.dtype), up.to(y.dtype), alpha=gain)
                continue
            low = None if up is None or g is None else g @ up
            library().graft_finish(
                y.data_ptr(), y.stride(0), DTYPES[y.dtype], column,
                None if low is None else low.data_ptr(), table.buffer.data_ptr(), DTYPES[table.buffer.dtype],
                table.addresses.data_ptr(), group.members.data_ptr(), member, slots.data_ptr(), order.data_ptr(), num,
                gain, torch.get_num_threads(),
            )  # fmt: skip


def _middle(
    h: torch.Tensor,
    rank: int,
    group: GroupTable,
    table: Sheets,
    slots: torch.Tensor,
    order: torch.Tensor,
    num: int,
    member: int,
) -> torch.Tensor:
    """mid_scale * h + mid_shift of the tokens order[:num]: (num, rank) in the dtype of rows."""
    g = torch.empty(num, rank, dtype=table.buffer.dtype)
    library().graft_middle(
        h.data_ptr(), *h.shape[1:], table.addresses.data_ptr(), group.members.data_ptr(), member,
        slots.data_ptr(), order.data_ptr(), num, g.data_ptr(), DTYPES[g.dtype], rank,
    )  # fmt: skip
    return g


def _rows(group: GroupTable, table: Sheets, member: int, slot: int, which: int) -> torch.Tensor | None:
    """The `down` or `up` rows of a slot at a member, (rank, width), a copy; None where it has none."""
    width = group.d_in if which == DOWN else int(group.members[member, WIDTH])
    stride = group.down_stride if which == DOWN else int(group.members[member, ROW_STRIDE])
    place = (
        table.buffer.data_ptr(), DTYPES[table.buffer.dtype], stride, table.addresses.data_ptr(),
        group.members.data_ptr(), member, slot, which,
    )  # fmt: skip
    rank = library().graft_rows(*place, None, width)
    if not rank:
        return None
    rows = torch.empty(rank, width, dtype=table.buffer.dtype)
    library().graft_rows(*place, rows.data_ptr(), width)
    return rows
