"""Several adapters as one: the weighted sum of what each changes in the base's outputs, again in the normal form.

Owns that algebra, and the refusal of what has no exact place in it. Knows nothing about methods, files, tiers or who
asks.

A part with the weight w changes the output of a site by

    w ((o - 1) base(x) + W ((i - 1) x) + o u (up^T h) + shift)

with its out_scale o, in_scale i and up_scale u. With O = 1 + sum w (o - 1), and I likewise of the i, the sum over all
parts is

    y = O (base(I x) + sum f (up^T (w h))) + sum w shift,      f = o u / O,

as long as not both O and I are there. The weights go into mid_scale and mid_shift, so the rows of all parts lie under
one another as they are, and whoever has them already shares them. Where the f of all parts are equal they are the sum's
up_scale; else each other than 1 is multiplied into rows of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from server.adapters.merging.change import what_is_no_change
from server.adapters.merging.rescale import can_divide, merged_scale
from server.adapters.method import Edit, Lowered
from server.ground.errors import BadRequest
from server.ops.site_ops import Tensors


@dataclass(frozen=True, slots=True)
class Part:
    """An adapter of a mix, as it was lowered for its weight there."""

    name: str
    lowered: Lowered


@dataclass(frozen=True, slots=True)
class MixedEdit:
    """An `Edit` whose rows are those of several tensors under one another, kept apart so that equal ones are shared."""

    rows: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # (down, up) of each part that has some
    vectors: Mapping[str, torch.Tensor]  # by the names of the `Edit`'s fields; those of the rank are of all rows
    ops: Mapping[str, Tensors] = field(default_factory=dict)  # as in `Edit`: what has them is not mixed

    def stored(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """The fields that are present, by name."""
        downs, ups = tuple(down for down, _ in self.rows), tuple(up for _, up in self.rows)
        named = {"down": downs, "up": ups} if self.rows else {}
        return named | {name: (vector,) for name, vector in self.vectors.items()}


@dataclass(frozen=True, slots=True)
class Mixed:
    """A mix in the normal form: as `Lowered`, with the rows of its parts kept apart."""

    rank: int
    num_parameters: int
    edits: Mapping[str, MixedEdit]
    method: str = "mix"
    warnings: tuple[str, ...] = field(default=())
    positions: None = None  # these three as in `Lowered`: what has them is not mixed
    last_edits: Mapping[str, MixedEdit] = field(default_factory=dict)
    num_virtual_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Share:
    """What one part brings to one site."""

    name: str
    edit: Edit
    weight: float


def mix(parts: Sequence[Part]) -> Mixed:
    """The sum of the parts. Pure, and may run in any thread.

    Raises BadRequest, naming the adapters and the site, for a sum that cannot be applied exactly.
    """
    for part in parts:
        _check_is_sum(part)
    paths = dict.fromkeys(path for part in parts for path in part.lowered.edits)
    edits = {path: _mixed(path, _shares(parts, path)) for path in paths}
    ranks = [sum(down.shape[0] for down, _ in edit.rows) for edit in edits.values()]
    return Mixed(max(ranks, default=0), sum(part.lowered.num_parameters for part in parts), edits)


def _check_is_sum(part: Part) -> None:
    reason = what_is_no_change(part.lowered)
    if reason is not None:
        raise BadRequest(
            f"{part.name} cannot be mixed with others: {reason}. Ask for it alone, without a weight.", param="adapter"
        )


def _shares(parts: Sequence[Part], path: str) -> list[_Share]:
    edits = [(part, part.lowered.edits.get(path)) for part in parts]
    return [_Share(part.name, edit, part.lowered.weight) for part, edit in edits if edit is not None]


def _mixed(path: str, shares: Sequence[_Share]) -> MixedEdit:
    _check_scales(path, shares)
    weights = [share.weight for share in shares]
    in_scale = merged_scale([share.edit.in_scale for share in shares], weights)
    out_scale = merged_scale([share.edit.out_scale for share in shares], weights)
    with_rows = [share for share in shares if share.edit.rank]
    factors = _factors(path, with_rows, out_scale)
    is_common = all(factor is factors[0] for factor in factors)
    vectors = {
        "mid_scale": _mid(with_rows, "mid_scale", 1.0),
        "mid_shift": _mid(with_rows, "mid_shift", 0.0),
        "in_scale": in_scale,
        "up_scale": factors[0] if factors and is_common else None,
        "out_scale": out_scale,
        "out_shift": _shift(shares),
    }
    rows = tuple(
        _rows(share.edit, None if is_common else factor) for share, factor in zip(with_rows, factors, strict=True)
    )
    return MixedEdit(rows, {name: vector for name, vector in vectors.items() if vector is not None})


def _check_scales(path: str, shares: Sequence[_Share]) -> None:
    """Scales of columns and of rows of W have a sum that is neither."""
    of_input = [share.name for share in shares if share.edit.in_scale is not None]
    of_output = [share.name for share in shares if share.edit.out_scale is not None]
    if of_input and of_output:
        raise BadRequest(
            f"{of_input[0]} scales the input of {path} and {of_output[0]} its output: their sum is no change that can "
            "be applied exactly. Leave one of them out, or merge them into one adapter with a rank (graft merge "
            "--rank N).",
            param="adapter",
        )


def _factors(path: str, with_rows: Sequence[_Share], out_scale: torch.Tensor | None) -> list[torch.Tensor | None]:
    """f (d_out,) of each part that has rows; None for 1. Equal ones of parts without scales are the same object."""
    plain = None if out_scale is None else 1 / out_scale
    factors = [_factor(share.edit, out_scale, plain) for share in with_rows]
    if out_scale is not None and any(factor is not None for factor in factors) and not can_divide(out_scale):
        names = " and ".join(share.name for share in with_rows)
        raise BadRequest(
            f"Together the adapters scale an output of {path} to nothing, to which nothing of {names} can be added "
            "exactly. Use other weights.",
            param="adapter",
        )
    return factors


def _factor(edit: Edit, out_scale: torch.Tensor | None, plain: torch.Tensor | None) -> torch.Tensor | None:
    if edit.out_scale is None and edit.up_scale is None:
        return plain
    if edit.up_scale is None and edit.out_scale is out_scale:
        return None  # the only part that scales: what divides its rows multiplies them
    factor = torch.ones(())
    for scale in (edit.out_scale, edit.up_scale, plain):
        factor = factor if scale is None else factor * scale
    return factor


def _rows(edit: Edit, factor: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    assert edit.down is not None
    assert edit.up is not None
    return edit.down, edit.up if factor is None else edit.up * factor


def _mid(with_rows: Sequence[_Share], name: str, identity: float) -> torch.Tensor | None:
    """w times the vectors of this name, one after another (all rows,); None where all are the identity."""
    own = [getattr(share.edit, name) for share in with_rows]
    values = [
        share.weight * (torch.full((share.edit.rank,), identity) if vector is None else vector)
        for share, vector in zip(with_rows, own, strict=True)
    ]
    is_identity = all(bool((value == identity).all()) for value in values)
    return None if is_identity else torch.cat(values)


def _shift(shares: Sequence[_Share]) -> torch.Tensor | None:
    shifts = [share.weight * share.edit.out_shift for share in shares if share.edit.out_shift is not None]
    return torch.stack(shifts).sum(0) if shifts else None
