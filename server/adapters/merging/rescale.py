"""Changes that scale a weight's rows, summed without loss: the sum is a DoRA.

Owns that algebra, for merges and for mixes. Knows nothing about files, recipes or requests.

A weighted sum of changes (o_i - 1) W + up_i^T down_i scales W by o = 1 + sum_i w_i (o_i - 1), row by row, and adds low
rank. As o (W + (1 / o) sum_i w_i up_i^T down_i) it is what DoRA computes, with the magnitudes o ||W + ...||. Scales of
columns (IA3 before a feedforward layer) have no such form.
"""

from collections.abc import Sequence

import torch

_SMALLEST = 1e-3  # a row scaled by less is divided by nearly nothing


def merged_scale(scales: Sequence[torch.Tensor | None], weights: Sequence[float]) -> torch.Tensor | None:
    """o (n,) float32 of the sum, from each change's own o; None where nothing is scaled."""
    scaled = [(scale, weight) for scale, weight in zip(scales, weights, strict=True) if scale is not None]
    if not scaled:
        return None
    if len(scaled) == 1 and scaled[0][1] == 1:
        return scaled[0][0]
    total = torch.ones_like(scaled[0][0], dtype=torch.float64)
    for scale, weight in scaled:
        total += weight * (scale.double() - 1)
    return total.float()


def can_divide(scale: torch.Tensor) -> bool:
    """Whether every row is scaled by enough to divide by."""
    return bool((scale.abs() >= _SMALLEST).all())


def magnitudes(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """o ||W + up^T down|| of each row, float32 (d_out,), from W (d_out, d_in) and the divided `up` (r, d_out)."""
    norms = torch.addmm(weight, up.T, down).double().square().sum(1).sqrt()
    return (norms if scale is None else norms * scale.double()).float()
