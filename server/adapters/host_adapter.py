"""An adapter as it lies in RAM: what the host tier keeps and the device tier copies.

Owns the values below and nothing else, so that neither tier needs to know the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch

from server.adapters.positions import Positions

_ROWS = ("down", "up")


@dataclass(frozen=True, slots=True)
class HostTensor:
    """A tensor with its content hash: equal hashes mean equal dtype, shape and bytes."""

    content_hash: bytes  # (32,)
    tensor: torch.Tensor  # contiguous, on the CPU; rank rows in the serving dtype, all else float32; never written to


@dataclass(frozen=True, slots=True)
class HostEdit:
    """An `Edit` in RAM: the same fields, the same shapes, None for identity.

    Rows are those of several tensors under one another: of one, but in a mix of one for each part that has rows here.
    """

    down: tuple[HostTensor, ...] = ()  # each (its rank, d_in)
    up: tuple[HostTensor, ...] = ()  # each (its rank, d_out)
    mid_scale: HostTensor | None = None  # (r,)
    mid_shift: HostTensor | None = None  # (r,)
    in_scale: HostTensor | None = None  # (d_in,)
    up_scale: HostTensor | None = None  # (d_out,)
    out_scale: HostTensor | None = None  # (d_out,)
    out_shift: HostTensor | None = None  # (d_out,)
    ops: Mapping[str, Mapping[str, HostTensor]] = field(default_factory=dict)  # float32, whatever is served in

    @classmethod
    def of(
        cls, tensors: Mapping[str, Sequence[HostTensor]], ops: Mapping[str, Mapping[str, HostTensor]] | None = None
    ) -> Self:
        """What `tensors` tells, and `ops`."""
        values: dict[str, Any] = {name: tuple(t) if name in _ROWS else t[0] for name, t in tensors.items()}
        return cls(**values, ops=ops or {})

    @property
    def rank(self) -> int:
        return sum(rows.tensor.shape[0] for rows in self.down)

    def tensors(self) -> dict[str, tuple[HostTensor, ...]]:
        """The fields of the normal form that are present, by name; only rows are ever more than one."""
        present = {}
        for name in _FIELDS:
            value = getattr(self, name)
            if value:
                present[name] = value if name in _ROWS else (value,)
        return present


_FIELDS = tuple(field.name for field in fields(HostEdit) if field.name != "ops")


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """One adapter in RAM. It stays whole for whoever holds it, evicted or not."""

    method: str
    rank: int
    num_parameters: int
    edits: Mapping[str, HostEdit]  # site path -> edit
    tensor_bytes: int  # of its distinct tensors
    warnings: tuple[str, ...] = ()
    positions: Positions | None = None  # as in `Lowered`, like what follows
    last_edits: Mapping[str, HostEdit] = field(default_factory=dict)
    num_virtual_tokens: int = 0

    @property
    def parts(self) -> tuple[Mapping[str, HostEdit], ...]:
        """The edits of each part."""
        return (self.edits, self.last_edits) if self.last_edits else (self.edits,)

    def all_edits(self) -> Iterator[HostEdit]:
        """Those of all parts."""
        for edits in self.parts:
            yield from edits.values()

    def tensors(self) -> Iterator[HostTensor]:
        """Every tensor of every edit; one that several edits use comes several times."""
        for edit in self.all_edits():
            for tensors in edit.tensors().values():
                yield from tensors
            for own in edit.ops.values():
                yield from own.values()
