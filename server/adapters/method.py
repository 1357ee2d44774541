"""The contract between adapter methods and the server: Checkpoint in, Edits out.

Owns the normal form in which every method is expressed and the `Method` protocol. Knows nothing about devices, slots,
batches or HTTP; a method never learns of them either.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.positions import Positions
from server.model.site import Site
from server.ops.site_ops import Tensors


@dataclass(frozen=True, slots=True)
class Edit:
    """What an adapter does at one site. All tensors float32 on the CPU; None means identity.

        h = mid_scale * (down @ x) + mid_shift                                            (r,)
        y = out_scale * (base(in_scale * x) + up_scale * (up^T @ h)) + out_shift          (d_out,)

    `base` includes the base's own bias, so `out_scale` multiplies that bias too. `down` reads the unscaled x.
    Rows of `down` and `up` are paired: row i of one belongs to row i of the other. What the normal form has no place
    for is in `ops`, by the names of `server.ops.site_ops`: they come before and after all this.
    """

    down: torch.Tensor | None = None  # (r, d_in)
    up: torch.Tensor | None = None  # (r, d_out): transposed, one row per rank
    mid_scale: torch.Tensor | None = None  # (r,)
    mid_shift: torch.Tensor | None = None  # (r,)
    in_scale: torch.Tensor | None = None  # (d_in,)
    up_scale: torch.Tensor | None = None  # (d_out,)
    out_scale: torch.Tensor | None = None  # (d_out,)
    out_shift: torch.Tensor | None = None  # (d_out,)
    ops: Mapping[str, Tensors] = field(default_factory=dict)  # op -> its tensors by name

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.shape[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields of the normal form that are present, by name."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "ops")
        return {name: tensor for name, tensor in named if tensor is not None}

    def stored(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """The same as a mix tells them, whose rows are those of several tensors: see `mixing.py`."""
        return {name: (tensor,) for name, tensor in self.tensors().items()}


def add_ops(edits: dict[str, Edit], ops: Mapping[str, Mapping[str, Tensors]]) -> None:
    """Adds ops, by site path, to the edits of their sites."""
    for path, own in ops.items():
        edit = edits.get(path, Edit())
        edits[path] = replace(edit, ops={**edit.ops, **own})


@dataclass(frozen=True, slots=True)
class Lowered:
    """An adapter in the normal form: the edits by site path, and what users are told about it."""

    method: str  # "lora", "rslora", "dora", "vera", "ia3", ...
    rank: int  # the largest rank at any site; 0 for methods without one
    num_parameters: int  # numbers in the checkpoint that belong to the adapter
    edits: Mapping[str, Edit]  # site path -> edit
    warnings: tuple[str, ...] = field(default=())
    weight: float = 1.0  # that the edits, which are those for the weight 1, are still to be given
    positions: Positions | None = None  # where in a sequence it is applied; None: everywhere
    last_edits: Mapping[str, Edit] = field(default_factory=dict)  # of a second part, where `positions` has one
    num_virtual_tokens: int = 0  # that stand before the prompt, with the ids -1, -2, ...

    @property
    def parts(self) -> tuple[Mapping[str, Edit], ...]:
        """The edits of each part."""
        return (self.edits, self.last_edits) if self.last_edits else (self.edits,)


class Method(Protocol):
    """A family of adapters: one module in `methods/` with a module-level `METHOD` that satisfies this."""

    name: str

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether an adapter_config.json is of this method; exactly one method claims a config."""

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        """The checkpoint as edits.

        Takes every tensor of the checkpoint that it understands (`checkpoint.take`); what is left is refused by the
        caller. Raises AdapterRejected, naming the key, the shape or the config field, for anything it cannot apply
        exactly. Pure: no state is kept, and it may run in any thread.
        """


@runtime_checkable
class WeighedMethod(Method, Protocol):
    """A method in which a request's weight is more than so much of what the adapter changes in the output."""

    def lower_weighed(self, checkpoint: Checkpoint, sites: Mapping[str, Site], weight: float) -> Lowered:
        """As `lower`, with the weight (finite, not zero) in the edits."""
