"""An adapter as it lies in RAM: what the host tier keeps and the device tier copies.

Owns the values below and nothing else, so that neither tier needs to know the other.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True, slots=True)
class HostTensor:
    """A tensor with its content hash: equal hashes mean equal dtype, shape and bytes."""

    content_hash: bytes  # (32,)
    tensor: torch.Tensor  # contiguous, on the CPU; rank rows in the serving dtype, vectors float32; never written to


@dataclass(frozen=True, slots=True)
class HostEdit:
    """An `Edit` in RAM: the same fields, the same shapes, None for identity."""

    down: HostTensor | None = None  # (r, d_in)
    up: HostTensor | None = None  # (r, d_out)
    mid_scale: HostTensor | None = None  # (r,)
    mid_shift: HostTensor | None = None  # (r,)
    in_scale: HostTensor | None = None  # (d_in,)
    up_scale: HostTensor | None = None  # (d_out,)
    out_scale: HostTensor | None = None  # (d_out,)
    out_shift: HostTensor | None = None  # (d_out,)

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.tensor.shape[0]

    def tensors(self) -> dict[str, HostTensor]:
        """The fields that are present, by name."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: tensor for name, tensor in named if tensor is not None}


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """One adapter in RAM. It stays whole for whoever holds it, evicted or not."""

    method: str
    rank: int
    num_parameters: int
    edits: Mapping[str, HostEdit]  # site path -> edit
    tensor_bytes: int  # of its distinct tensors
    warnings: tuple[str, ...] = ()

    def tensors(self) -> Iterator[HostTensor]:
        """Every tensor of every edit; one that several edits use comes several times."""
        for edit in self.edits.values():
            yield from edit.tensors().values()
