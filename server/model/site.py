"""A site: one place in the base that an adapter may edit, seen from the outside.

Owns the description that methods lower against (path, widths, bias) and the two questions about the frozen weight that
some methods need. Knows nothing about adapters, slots or how edits are applied (that is `sites.py`).
"""

from enum import StrEnum
from typing import Protocol

import torch


class SiteKind(StrEnum):
    LINEAR = "linear"
    EMBEDDING = "embedding"
    NORM = "norm"
    BLOCK = "block"  # the residual stream as a decoder layer gives it
    ATTENTION = "attention"  # the keys and values of a layer, side by side


PRODUCTS = (SiteKind.LINEAR, SiteKind.EMBEDDING)


class Site(Protocol):
    """What a method may know of a place in the base.

    `path` is the module path inside the base model ("model.layers.0.self_attn.q_proj"). For an embedding `d_in` is the
    size of the vocabulary (its input is a one-hot row) and `d_out` the hidden width. A site that is no product has one
    width for both, and what the base does there is the identity; at a norm it is the whole norm.
    """

    @property
    def index(self) -> int: ...
    @property
    def path(self) -> str: ...
    @property
    def kind(self) -> SiteKind: ...
    @property
    def d_in(self) -> int: ...
    @property
    def d_out(self) -> int: ...

    @property
    def table_of(self) -> str | None:
        """The path of the embedding whose weight this site shares (tied heads), or None."""

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's own bias, float32 on the CPU, (d_out,), or None."""

    @property
    def row_norms_squared(self) -> torch.Tensor:
        """||W_j||^2 of each output row of the dequantized weight, float32 on the CPU, (d_out,); taken at load."""

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ W^T without the bias: (r, d_in) -> (r, d_out), float32 on the CPU; safe from any thread."""
