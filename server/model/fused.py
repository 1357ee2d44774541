"""One product for all plain linears of a site group, with its weight laid out as the processor wants it.

Owns the weights of the linears that it takes over, and their layout. Knows nothing about adapters or sites.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

_PACKED_FOR_TOKENS = 16  # the batch that oneDNN is told to expect; any other works


@cache
def can_pack() -> bool:
    """Whether this processor and this PyTorch can keep 16-bit weights in oneDNN's own layout.

    Every product of a plain weight lays it out anew, which takes as long as the product itself for a few tokens.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    weight = torch.arange(64 * 32, dtype=torch.float32).view(64, 32).remainder(7).to(torch.bfloat16)
    x = torch.ones(3, 32, dtype=torch.bfloat16)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_TOKENS)
        is_right = torch.equal(_packed_product(x, packed, None), F.linear(x, weight))
        return is_right and torch.equal(packed.to_dense(), weight)
    except (AttributeError, RuntimeError):  # the operators are PyTorch's own business and may change
        return False


def _packed_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class FusedLinear:
    """One product for linears that share their input; it takes their weights over.

    Unpacked, the linears' own weights become views of the fused one. Packed (bfloat16 on a CPU that can), they become a
    NaN that takes no memory: nobody reads it unnoticed, and `weight_of` unpacks.
    """

    def __init__(self, modules: Sequence[nn.Linear], *, is_packed: bool = False) -> None:
        biases = [m.bias.data for m in modules if m.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.widths = [m.out_features for m in modules]
        self.offsets = [sum(self.widths[:i]) for i in range(len(modules))]
        weight = torch.cat([m.weight.data for m in modules])
        self._packed: torch.Tensor | None = None
        self._weight: torch.Tensor | None = None
        if is_packed:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_TOKENS)
        else:
            self._weight = weight
        self.packed_bytes = weight.numel() * weight.element_size() if is_packed else 0
        for module, start, width in zip(modules, self.offsets, self.widths, strict=True):
            if is_packed:
                module.weight.data = weight.new_full((1, 1), torch.nan).expand(width, module.in_features)
            else:
                module.weight.data = weight[start : start + width]
            if self.bias is not None:
                module.bias.data = self.bias[start : start + width]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_in) -> (..., sum of all d_out), the members' outputs beside one another."""
        if self._packed is not None:
            return _packed_product(x, self._packed, self.bias)
        assert self._weight is not None
        return F.linear(x, self._weight, self.bias)

    def product_of(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """What a call gives for one member, (..., d_out): only its rows are computed, unless they are packed, for a
        packed weight cannot be cut."""
        if self._weight is None:
            return self.output_of(member, self(x))
        rows = slice(self.offsets[member], self.offsets[member] + self.widths[member])
        return F.linear(x, self._weight[rows], None if self.bias is None else self.bias[rows])

    def output_of(self, member: int, outputs: torch.Tensor) -> torch.Tensor:
        """The part (..., d_out) of one member, a view of what a call returned."""
        return outputs.narrow(-1, self.offsets[member], self.widths[member])

    def weight_of(self, member: int) -> torch.Tensor:
        """(d_out, d_in) of one member: a view, or a copy where the weight is packed."""
        weight = self._weight if self._packed is None else self._packed.to_dense()
        assert weight is not None
        return weight[self.offsets[member] : self.offsets[member] + self.widths[member]]
