"""A group's edits in one call, whose arguments are made once for all steps of the same slots.

Owns that call's struct. A decode step makes dozens of these calls, each after megabytes of weights were read, so what
Python does for it is done in a cold cache and costs more than it seems. Knows nothing of long runs.
"""

import ctypes

import torch

from server.ops.native.build import library
from server.ops.native.dtypes import DTYPES
from server.ops.native.layout import dense_rows
from server.ops.native.long_runs import LONGEST
from server.ops.runs import TokenRuns, long_stretches
from server.ops.sheets import GroupTable, Sheets

_POINTERS = ("buffer", "addresses", "members", "slots", "down_order", "down_starts", "up_order", "up_starts", "h")


class _Joint(ctypes.Structure):
    """`struct joint` of kernels.c."""

    _fields_ = [
        (name, ctypes.c_void_p if name in _POINTERS else ctypes.c_int64)
        for name in (
            "buffer", "dtype", "addresses", "members", "num_members", "slots", "down_order", "down_starts", "num_down",
            "up_order", "up_starts", "num_up", "h", "max_rank", "d_in", "down_stride", "in_stride", "max_width",
            "has_rows", "has_vectors", "scales", "num_threads",
        )
    ]  # fmt: skip


class Joint:
    """What adds the edits of all members of a group to y, called with y (tokens, all outputs), rows dense, and
    x (tokens, d_in) of the same dtype."""

    def __init__(self, group: GroupTable, table: Sheets, tokens: TokenRuns, *, has_rows: bool, scales: bool) -> None:
        num_tokens, num_members = tokens.slots.shape[0], len(group.widths)
        h = torch.empty(num_tokens if has_rows else 0, num_members, table.max_rank)
        down, up = tokens.by_down, tokens.by_up
        self._struct = _Joint(
            table.buffer.data_ptr(), DTYPES[table.buffer.dtype], table.addresses.data_ptr(), group.members.data_ptr(),
            num_members, tokens.slots.data_ptr(), down.order.data_ptr(), down.starts.data_ptr(), down.num,
            up.order.data_ptr(), up.starts.data_ptr(), up.num, h.data_ptr(), table.max_rank, group.d_in,
            group.down_stride, group.in_stride, max(group.widths), has_rows, table.has_vectors, scales,
            torch.get_num_threads(),
        )  # fmt: skip
        self.place = ctypes.addressof(self._struct)
        self._call = library().graft_joint
        self._kept = h, group, table, tokens  # whose addresses the struct has

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> None:
        x = dense_rows(x)
        self._call(self.place, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), DTYPES[x.dtype])


def joint(group: GroupTable, table: Sheets, tokens: TokenRuns, *, has_rows: bool, scales: bool = False) -> Joint | None:
    """None for an embedding and for long runs, whose products are not made here.

    `scales`: whether any adapter of the step has an in_scale here, which a call by itself leaves to `scale`, and a
    decode layer applies where the group has one member.
    """
    runs = (tokens.by_down, tokens.by_up)
    if group.is_embedding or any(long_stretches(tokens.slots, run, LONGEST) for run in runs):
        return None
    return Joint(group, table, tokens, has_rows=has_rows, scales=scales)
