"""What storing a weight makes of it, and how much of a change of weights comes through that.

Owns the figures and the rounding to NF4. Knows nothing about adapters or models.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

_BLOCK = 64  # numbers that share a scale, as transformers asks for


@dataclass(frozen=True, slots=True)
class Passage:
    """A change D of weights W before storing, Q(W + D) - Q(W) after it: the sums behind the two figures."""

    squared_change: float = 0.0  # ||D||^2
    product: float = 0.0  # <Q(W + D) - Q(W), D>
    squared_difference: float = 0.0  # ||Q(W + D) - Q(W) - D||^2

    @property
    def kept(self) -> float:
        """The share of the change that comes through: the coefficient of D in what is stored. 1 if nothing changes."""
        return self.product / self.squared_change if self.squared_change else 1.0

    @property
    def noise(self) -> float:
        """The size of what is stored beside the change, in sizes of the change."""
        return (self.squared_difference / self.squared_change) ** 0.5 if self.squared_change else 0.0


def passage(change: torch.Tensor, stored_change: torch.Tensor) -> Passage:
    """Of D and Q(W + D) - Q(W), of one shape."""
    return Passage(
        squared_change=float(change.square().sum(dtype=torch.float64)),
        product=float((stored_change * change).sum(dtype=torch.float64)),
        squared_difference=float((stored_change - change).square().sum(dtype=torch.float64)),
    )


def total(passages: Iterable[Passage]) -> Passage:
    """Of several weights as if they were one."""
    found = list(passages)
    return Passage(
        squared_change=sum(item.squared_change for item in found),
        product=sum(item.product for item in found),
        squared_difference=sum(item.squared_difference for item in found),
    )


def nf4_rounded(weight: torch.Tensor) -> torch.Tensor:
    """What NF4 with double quantization holds of a weight (rows, d_in) float32."""
    packed, state = quantize_4bit(weight.contiguous(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")
    return cast(torch.Tensor, cast(Any, dequantize_4bit)(packed, state)).float()
