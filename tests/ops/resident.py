"""Adapters in the normal form on a device of their own, for tests of the kernels: a buffer, sheets, classes.

What each edit means is kept beside it in float64, and `Resident.expected` computes with that, token by token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from server.adapters.device.rows import RowAllocator, stride
from server.ops.runs import TokenRuns
from server.ops.sheets import (
    IN_SCALE,
    OUT_SCALE,
    OUT_SHIFT,
    UP_SCALE,
    GroupTable,
    Sheets,
    SiteRows,
    make_sheet,
)

VECTORS = {"in_scale": IN_SCALE, "up_scale": UP_SCALE, "out_scale": OUT_SCALE, "out_shift": OUT_SHIFT}


@dataclass(frozen=True, slots=True)
class Edit:
    """One slot's edit at one site: matrices (rank, width) in the dtype of rows, vectors float32."""

    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    vectors: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Resident:
    """A buffer that holds what a former user left wherever nothing is stored, and slots with edits in it."""

    def __init__(self, d_in: int, widths: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.d_in, self.widths, self.dtype, self.device = d_in, tuple(widths), dtype, device
        num_elements = 1 << 19
        self.buffer = torch.full((num_elements,), torch.nan, dtype=dtype, device=device)
        self._allocator = RowAllocator(num_elements, 1 << 10)
        self._stored: dict[tuple[int, int], tuple[torch.Tensor, tuple[int, ...]]] = {}
        self.slots: list[dict[int, Edit]] = [{}]
        self._rows: list[dict[int, SiteRows]] = [{}]
        self._sheets = [make_sheet(len(widths), {}).to(device)]

    def admit(self, edits: Mapping[int, Edit]) -> int:
        """A slot with these edits by member. A tensor that was admitted before is stored once."""
        rows = {member: self._site_rows(edit) for member, edit in edits.items()}
        self.slots.append(dict(edits))
        self._rows.append(rows)
        self._sheets.append(make_sheet(len(self.widths), rows).to(self.device))
        return len(self.slots) - 1

    def _site_rows(self, edit: Edit) -> SiteRows:
        vectors = {VECTORS[name]: self._store(v)[0] for name, v in edit.vectors.items() if name in VECTORS}
        down, up = (() if matrix is None else self._store(matrix) for matrix in (edit.down, edit.up))
        return SiteRows(down, up, edit.vectors.get("mid_scale"), edit.vectors.get("mid_shift"), vectors)

    def _store(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Rows in an order that is not that of the memory; a vector is one row, whatever the dtype."""
        key = (tensor.data_ptr(), tensor.numel())
        if key not in self._stored:
            matrix = tensor.view(self.dtype)[None] if tensor.dim() == 1 else tensor
            numbers = self._allocator.allocate(matrix.shape[1], matrix.shape[0])[::-1]
            step = stride(matrix.shape[1])
            for number, row in zip(numbers, matrix, strict=True):
                self.buffer[number * step : number * step + len(row)] = row.to(self.device)
            self._stored[key] = tensor, tuple(numbers)
        return self._stored[key][1]

    @property
    def sheets(self) -> Sheets:
        addresses = torch.tensor([sheet.data_ptr() for sheet in self._sheets], device=self.device)
        rows = [site for slot in self._rows for site in slot.values()]
        return Sheets(
            self.buffer,
            addresses,
            max_rank=max((len(r.down) for r in rows), default=0) or 1,
            has_middle=any(r.mid_scale is not None or r.mid_shift is not None for r in rows),
            has_vectors=any(r.vectors.keys() - {IN_SCALE} for r in rows),
        )

    @property
    def group(self) -> GroupTable:
        ends = torch.tensor(self.widths).cumsum(0).tolist()
        members = [
            [member, width, end - width, stride(width), self._vector_stride(width)]
            for member, (width, end) in enumerate(zip(self.widths, ends, strict=True))
        ]
        table = torch.tensor(members, dtype=torch.int32, device=self.device)
        sites = (1 << len(self.widths)) - 1
        in_stride = self._vector_stride(self.d_in)
        return GroupTable(sites, False, self.d_in, self.widths, stride(self.d_in), in_stride, table)

    def _vector_stride(self, width: int) -> int:
        return stride(width * 4 // self.dtype.itemsize) * self.dtype.itemsize // 4

    def runs(self, slots: Sequence[int], *, is_static: bool = False) -> TokenRuns:
        classes = [self._classes("down"), self._classes("up")]
        numbers = torch.tensor(slots, dtype=torch.long)
        return TokenRuns.of(numbers, *classes, self.device, is_static=is_static)

    def _classes(self, name: str) -> torch.Tensor:
        known: dict[object, int] = {None: 0}
        keys = [
            None if not rows else tuple((member, getattr(r, name)) for member, r in sorted(rows.items()))
            for rows in self._rows
        ]
        return torch.tensor([known.setdefault(key, len(known)) for key in keys])

    def expected(
        self, x: torch.Tensor, y: torch.Tensor, slots: Sequence[int], member: int, gain: float = 1.0
    ) -> torch.Tensor:
        """The member's outputs in float64, y (tokens, d_out) being the base's."""
        edits = [self.slots[slot].get(member) for slot in slots]
        rows = [self._expected_row(*row, gain) for row in zip(x, y, edits, strict=True)]
        return torch.stack(rows) if rows else y.double()

    def _expected_row(self, x: torch.Tensor, y: torch.Tensor, edit: Edit | None, gain: float) -> torch.Tensor:
        x, y = x.double().cpu(), y.double().cpu()
        if edit is None:
            return y
        vectors = {name: v.double() for name, v in edit.vectors.items()}
        if edit.down is not None and edit.up is not None:
            g = vectors.get("mid_scale", 1.0) * (edit.down.double() @ x) + vectors.get("mid_shift", 0.0)
            y = y + gain * vectors.get("up_scale", 1.0) * (g @ edit.up.double())
        return vectors.get("out_scale", 1.0) * y + vectors.get("out_shift", 0.0)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, slots=True)
class Shape:
    """An edit to be drawn: its rank, 0 for vectors alone, and which of the vectors it has."""

    rank: int
    fields: tuple[str, ...] = ()


FIELDS = ("mid_scale", "mid_shift", "in_scale", "up_scale", "out_scale", "out_shift")
EVERY_FIELD = Shape(5, FIELDS)


def drawn(resident: Resident, member: int, shape: Shape, seed: int, like: Edit | None = None, share: str = "") -> Edit:
    """An edit as strong as its base; with `share` ("down", "up", "down up") those matrices are the ones of `like`."""
    d_in, d_out, rank = resident.d_in, resident.widths[member], shape.rank
    widths = {"mid_scale": rank, "mid_shift": rank, "in_scale": d_in}
    vectors = {
        name: (0 if name.endswith("shift") else 1) + 0.5 * normal(widths.get(name, d_out), seed=seed + 10 + number)
        for number, name in enumerate(FIELDS)
        if name in shape.fields and (rank or not name.startswith("mid"))
    }
    if not rank:
        return Edit(vectors=vectors)
    down = normal(rank, d_in, seed=seed).div(d_in**0.5).to(resident.dtype)
    up = normal(rank, d_out, seed=seed + 1).div(rank**0.5).to(resident.dtype)
    if like is not None:
        down = like.down if "down" in share else down
        up = like.up if "up" in share else up
    return Edit(down, up, vectors)
