"""What an edit changes in a site's weight and bias, for those who fold edits into weights instead of applying them.

Owns the way from the normal form to a change of weights. Knows nothing about methods, files or where a weight is kept.
"""

from collections.abc import Set
from dataclasses import dataclass

import torch

from server.adapters.method import Edit, Lowered

_NOISE = 1e-6  # of the largest bias: below it, a change of biases is float32's rounding


@dataclass(frozen=True, slots=True)
class Change:
    """W' - W = (out_scale in_scale^T - 1) * W + up^T down, and b' - b = (out_scale - 1) * b + shift.

    All float32 on the CPU; None means nothing is changed there. Without the scales the change is of rank r and knows
    nothing of W.
    """

    down: torch.Tensor | None = None  # (r, d_in)
    up: torch.Tensor | None = None  # (r, d_out), every factor but `down` folded in
    out_scale: torch.Tensor | None = None  # (d_out,)
    in_scale: torch.Tensor | None = None  # (d_in,)
    shift: torch.Tensor | None = None  # (d_out,)

    @property
    def is_low_rank(self) -> bool:
        """Whether the change of the weight is up^T down alone, whatever W is."""
        return self.out_scale is None and self.in_scale is None

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.shape[0]

    def of_weight(self, weight: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        """W' - W (d_out, d_in) float32 on `device`; None where the weight stays. `weight` is W, None if not needed."""
        delta = None
        if self.down is not None and self.up is not None:
            delta = self.up.to(device).T @ self.down.to(device)
        factor = self._factor(device)
        if factor is None:
            return delta
        if weight is None:
            raise ValueError("this change scales the weight, so it needs the weight")
        scaled = factor * weight.to(device, torch.float32)
        return scaled if delta is None else scaled.add_(delta)

    def of_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """b' - b (d_out,) float32; None where the bias stays. `bias` is the base's own, or None."""
        change = None if self.shift is None else self.shift.double()
        if self.out_scale is not None and bias is not None:
            scaled = (self.out_scale.double() - 1) * bias.double()
            change = scaled if change is None else scaled + change
            # DoRA gives back with `shift` what it takes with `out_scale`, up to rounding.
            if bool(change.abs().max() <= _NOISE * bias.abs().max()):
                return None
        return change.float() if change is not None and bool(change.any()) else None

    def _factor(self, device: torch.device) -> torch.Tensor | None:
        """out_scale in_scale^T - 1, as (d_out, 1), (1, d_in) or (d_out, d_in)."""
        if self.is_low_rank:
            return None
        rows = None if self.out_scale is None else self.out_scale.to(device)[:, None]
        columns = None if self.in_scale is None else self.in_scale.to(device)[None, :]
        if rows is None or columns is None:
            only = columns if rows is None else rows
            assert only is not None
            return only - 1
        return rows * columns - 1


def what_is_no_change(lowered: Lowered, folded: Set[str] = frozenset()) -> str | None:
    """Why an adapter is no change of weights and biases, to stand behind a colon; None where it is one.

    `folded` are the ops that the caller folds into weights itself (`folding.py`).
    """
    if lowered.num_virtual_tokens:
        return f"its {lowered.method} puts virtual tokens before the prompt"
    if lowered.positions is not None:
        return f"its {lowered.method} edits some positions of a sequence, and not others"
    names = sorted({name for edit in lowered.edits.values() for name in edit.ops if name not in folded})
    return f"its {lowered.method} has {' and '.join(names)} beside the normal form" if names else None


def change_of(edit: Edit) -> Change:
    """An edit as a change of weight and bias. The edit's `down` is kept as it is, so that equal ones stay equal."""
    up, shift = edit.up, edit.out_shift
    if edit.down is not None and up is not None:
        scale = _product(edit.up_scale, edit.out_scale)
        up = up if scale is None else up * scale
        if edit.mid_shift is not None:
            moved = up.T @ edit.mid_shift
            shift = moved if shift is None else shift + moved
        up = up if edit.mid_scale is None else up * edit.mid_scale[:, None]
    return Change(edit.down, up, edit.out_scale, edit.in_scale, shift)


def _product(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one * other
