"""What a weight of the base can do that is laid out for products of ours.

Owns the interfaces alone. Knows nothing about layouts, nor about what reads the products.
"""

from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch


class Packed(Protocol):
    """W (d_out, d_in), and its products."""

    @property
    def num_bytes(self) -> int:
        """That it takes."""

    def rows(self, first: int, last: int) -> Self:
        """Those of the outputs [first, last), multiples of 16: a view."""

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x (..., d_in) -> x W^T + bias (..., d_out) in the dtype of x, rounded once; bias (d_out,) float32."""

    def whole(self) -> torch.Tensor:
        """(d_out, d_in), a copy."""


class FourBitProducts(Protocol):
    """Makes packed weights of 4-bit ones: levels[code] * scale, one scale for each block of a row."""

    def can_pack(self, d_out: int, d_in: int, block: int) -> bool:
        """Whether there are products of such a weight, with a scale for `block` inputs."""

    def packed(
        self,
        codes: torch.Tensor,
        levels: torch.Tensor,
        scale_codes: torch.Tensor,
        scale_levels: torch.Tensor | None,
        seconds: torch.Tensor | None,
    ) -> Any:
        """A `Packed` from rows: codes (d_out, d_in / 2) uint8, of two the higher bits first; levels (16,) float32.

        scale_codes (d_out, d_in / block): float32, the scales; or uint8, and a scale is
        scale_levels[code] * second[0] + second[1], with scale_levels (256,) and, for each 256 scales counted along the
        rows, a pair of `seconds`, all float32.
        """

    def joined(self, weights: Sequence[Any]) -> Packed:
        """What `packed` gave, one above the other; they must be alike in all but d_out."""
