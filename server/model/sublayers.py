"""Sites that are no products: norms, the residual stream after a decoder layer, and a layer's keys and values.

Owns what the base does at each of them, seen as a site. Knows nothing about adapters or about how a site is found.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from server.model.compact import compact_norm
from server.model.context import Scope
from server.model.site import SiteKind
from server.model.sites import BaseSite


class NormSite(BaseSite):
    """A norm: y = weight * normalized(x) + bias, however its model writes that (Gemma: 1 + weight)."""

    def _kind(self) -> SiteKind:
        return SiteKind.NORM

    def _widths(self) -> tuple[int, int]:
        width = int(self.module.get_parameter("weight").shape[0])
        return width, width

    @cached_property
    def weight_offset(self) -> float:
        """1 where the model adds it: then a weight of zeros leaves something over."""
        return float(bool(self._with_weight(0.0)(self._probe).any()))

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        """What the norm multiplies by its weight, (tokens, width) -> the same, without edits."""
        out: torch.Tensor = self._bare(x)
        return out

    @cached_property
    def _bare(self) -> nn.Module:
        return self._with_weight(1.0 - self.weight_offset)

    def compact(self, *, is_native: bool) -> bool:
        """Computes the norm with fewer operators from now on; False where that would not give the same."""
        forward = compact_norm(self.module, self._base, is_native=is_native)
        self._base = forward or self._base
        return forward is not None

    @property
    def _probe(self) -> torch.Tensor:
        weight = self.module.get_parameter("weight")
        return torch.arange(1.0, self.d_in + 1, dtype=weight.dtype, device=weight.device)[None]

    def _with_weight(self, value: float) -> nn.Module:
        """A copy of the norm with this weight everywhere, and a bias of zeros where it has one."""
        bare = copy.copy(self.module)
        vars(bare).pop("forward", None)  # this site's own
        values = {"weight": value, "bias": 0.0}
        own = {
            name: nn.Parameter(torch.full_like(p, values[name]), requires_grad=False)
            for name, p in self.module.named_parameters()
        }
        vars(bare)["_parameters"] = dict.fromkeys(self.module._parameters) | own
        return bare


class BlockSite(BaseSite):
    """The residual stream as a decoder layer gives it: the base's part is the identity, and edits come after it."""

    def __init__(self, index: int, path: str, module: nn.Module, scope: Scope, width: int) -> None:
        self._width = width
        super().__init__(index, path, module, scope)
        self._layer: Callable[..., Any] = self._base
        self._base = _identity
        module.forward = self.run_layer

    def _kind(self) -> SiteKind:
        return SiteKind.BLOCK

    def _widths(self) -> tuple[int, int]:
        return self._width, self._width

    def run_layer(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward; of a tuple, the first is the residual stream."""
        out: Any = self._layer(*args, **kwargs)
        if isinstance(out, tuple):
            return self.forward(out[0]), *out[1:]
        return self.forward(out)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


@dataclass(slots=True)
class AttentionSite:
    """The keys and values of a layer as they are cached, side by side (satisfies the `Site` protocol).

    Attention itself asks for what is edited here. The width is 2 * kv_heads * head_dim; 0 until it has been seen.
    """

    index: int
    path: str
    d_in: int = 0
    kind: SiteKind = SiteKind.ATTENTION
    table_of: str | None = None
    bias: torch.Tensor | None = None
    gain: float = 1.0
    weight_offset: float = 0.0

    @property
    def d_out(self) -> int:
        return self.d_in

    @property
    def row_norms_squared(self) -> torch.Tensor:
        raise TypeError(f"{self.path} has no weight")

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        raise TypeError(f"{self.path} has no weight")

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        raise TypeError(f"{self.path} is no norm")
